"""Early layers on some positions of every row, beside keys and values that another forward had.

They attend to their own keys and to those that a `KeyRecorder` kept of an ordinary forward. Knows
neither prompts nor memories. Shapes: B batch, L length, Q columns of the row with most, G key-value
heads, D head width, H hidden width.
"""

from dataclasses import dataclass, replace

import torch

from memdlm.backbones.base import DiffusionModel
from memdlm.backbones.kv_cache import Recorded
from memdlm.backbones.layer_inputs import LayerInputs, narrow_inputs
from memdlm.backbones.row_columns import RowColumns


@dataclass(frozen=True)
class _BesideRecorded:
    """A cache to the layers: fresh keys and values in the place of the recorded ones."""

    recorded: Recorded
    columns: RowColumns

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.recorded[layer_idx]
        return self.columns.put(key, keys), self.columns.put(value, values)


def partial_prefix(
    model: DiffusionModel,
    input_ids: torch.Tensor,
    inputs: LayerInputs,
    stop: int,
    columns: RowColumns,
    recorded: Recorded,
    hidden: torch.Tensor,
) -> torch.Tensor:
    """Return hidden states [B, L, H] before layer `stop`, computed at `columns` only.

    What `model.prefix` returns, if the states elsewhere do not depend on the tokens at `columns`
    and are those of the recorded forward; an approximation of it otherwise.

    Args:
        model: The layers.
        input_ids: Token ids [B, L] int64; those elsewhere are not looked at.
        inputs: As for all L columns.
        stop: The first layer not to run.
        columns: Where to run.
        recorded: Of a forward through these layers.
        hidden: Hidden states [B, L, H] that it had before layer `stop`.
    """
    narrowed = narrow_inputs(inputs, columns.positions)
    inputs = replace(narrowed, cache=_BesideRecorded(recorded, columns))
    own = model.embed_tokens(input_ids.gather(1, columns.positions))
    return columns.put(model.run_layers(own, inputs, 0, stop), hidden)
