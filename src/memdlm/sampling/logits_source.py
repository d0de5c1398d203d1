"""How a decode gets its logits. Knows the model only through its call.

Shapes: `B` rows, `T` canvas, `P` slots of a block, `V` vocabulary.
"""

import inspect
from typing import Any, Protocol

from torch import Tensor, nn

from memdlm.backbones.first_attention import FirstAttention
from memdlm.backbones.wrapping import backbone_of
from memdlm.sampling.block_plan import Progress
from memdlm.sampling.canvas import Canvas
from memdlm.sampling.remaining_rows import RemainingRows


class LogitsSource(Protocol):
    """How a decode asks the model: with the whole canvas, or with a part of it and a cache."""

    num_forwards: int
    """Calls of the model so far."""

    def __call__(
        self, tokens: Tensor, positions: Tensor, progress: Progress, stream: str
    ) -> Tensor:
        """Return float32 logits [B, P, V] at `positions` of `tokens` [B, T].

        `progress` says where each row stands; `stream` tells canvases apart that differ in more
        than what the steps fill in. Logits of rows that are done mean nothing.
        """
        ...


class WholeForward:
    """Every step is a forward of the whole canvas, of the rows that are not done.

    Exact, also where the first layer keeps what the tokens outside of the slots give each other.
    """

    def __init__(self, model: nn.Module, canvas: Canvas) -> None:
        """Ask `model` about states of `canvas`."""
        self.model, self.canvas = model, canvas
        self.num_forwards = 0
        self._rows = RemainingRows()
        backbone = backbone_of(model)
        self._keeps_first = (
            backbone is not None
            and _takes(model, "first")
            and FirstAttention.pays(backbone, canvas.slots, canvas.attention_mask)
        )
        self._first: dict[str, FirstAttention] = {}

    def __call__(
        self, tokens: Tensor, positions: Tensor, progress: Progress, stream: str
    ) -> Tensor:
        """See `LogitsSource`."""
        self.num_forwards += 1
        rows = self._rows
        places = rows.leave(progress.is_done, tokens.device)
        if places is not None:
            for first in self._first.values():
                first.keep(places)
        more: dict[str, Any] = {}
        if self._keeps_first:
            if stream not in self._first:
                self._first[stream] = FirstAttention(rows.take(self.canvas.slots))
            more["first"] = self._first[stream]
        mask = self.canvas.attention_mask
        with rows.in_forward():
            logits: Tensor = self.model(
                rows.take(tokens),
                attention_mask=None if mask is None else rows.take(mask),
                positions=rows.take(positions),
                **more,
            ).logits
        return rows.spread(logits.float(), len(tokens))


def _takes(model: nn.Module, name: str) -> bool:
    """Return whether `model` takes an argument `name`: a wrapper of the user's need not."""
    parameters = inspect.signature(model.forward).parameters.values()
    return any(p.name == name or p.kind is p.VAR_KEYWORD for p in parameters)
