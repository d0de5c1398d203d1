"""Logits under block-causal attention, with the whole canvas or beside an exact cache.

The masks are prepared here and passed along: the model's own `config.attention` is neither read
for them nor changed, so that decodes in several threads do not disturb each other.

Shapes: `B` rows, `T` canvas, `P` length of a block, `V` vocabulary, `Q` and `K` as in
`cached_forward`.
"""

import torch
from torch import Tensor, nn

from memdlm.sampling.block_plan import Progress
from memdlm.sampling.block_progress import BlockProgress
from memdlm.sampling.cached_forward import CachedForward
from memdlm.sampling.remaining_rows import RemainingRows

# Columns of a long prompt that one forward reads: its mask takes at most 64 MiB a row for a context
# of 32768, and the products are as large as a device wants them.
PORTION = 2048


def block_causal_mask(columns: Tensor, num_visible: int, block_length: int) -> Tensor:
    """Return what queries at `columns` [B, Q] see of columns 0 to K: [B, 1, Q, K] bool."""
    keys = torch.arange(num_visible, device=columns.device) // block_length
    return (keys <= columns[:, :, None] // block_length)[:, None]


class BlockCausalForward:
    """Every step is a forward of all columns up to the current block; see `LogitsSource`."""

    def __init__(self, model: nn.Module, block_length: int) -> None:
        """Ask `model` with blocks of `block_length`."""
        self.model, self.block_length = model, block_length
        self.num_forwards = 0
        self._rows = RemainingRows()

    def __call__(
        self, tokens: Tensor, positions: Tensor, progress: Progress, stream: str
    ) -> Tensor:
        """Return float32 logits [B, P, V] at `positions` of `tokens` [B, T]."""
        assert isinstance(progress, BlockProgress)
        self.num_forwards += 1
        rows = self._rows
        rows.leave(progress.is_done, tokens.device)
        width = max(rows.choose(progress.starts())) + self.block_length
        # Padding, and blocks a row has not reached, lie behind what its positions see.
        columns = torch.arange(width, device=tokens.device)[None]
        mask = block_causal_mask(columns, width, self.block_length)
        with rows.in_forward():
            logits: Tensor = self.model(
                rows.take(tokens)[:, :width], attention_mask=mask, positions=rows.take(positions)
            ).logits
        return rows.spread(logits.float(), len(tokens))


class ExactCache:
    """A step runs the current blocks only; keys and values of settled columns are kept.

    What a row settles is what no later step changes, so logits are those of `BlockCausalForward` up
    to rounding. The tokens of a block just finished are run once more, since its last step still
    saw a mask: together with the first step of the next block where all rows do so, and else in a
    step in which their rows wait, so that no row is made to run more than a block.

    A prompt is read in portions, since the mask of a forward grows with its tokens times all those
    before; what remains of it is run together with the first step.
    """

    def __init__(self, model: nn.Module, block_length: int, num_columns: int) -> None:
        """Ask `model`, keeping keys and values of `num_columns` columns."""
        self.block_length = block_length
        self.num_forwards = 0
        self._portion = max(PORTION // block_length, 1) * block_length
        self._forward = CachedForward(model, num_columns)
        self._rows = RemainingRows()
        # A model that is block-causal by its own config would misread a missing mask.
        self._may_omit_mask = getattr(model.config, "attention", "full") == "full"

    def __call__(
        self, tokens: Tensor, positions: Tensor, progress: Progress, stream: str
    ) -> Tensor:
        """Return float32 logits [B, P, V] at `positions` of `tokens` [B, T]; see `LogitsSource`."""
        assert isinstance(progress, BlockProgress)
        rows, num_rows = self._rows, len(tokens)
        places = rows.leave(progress.is_done, tokens.device)
        if places is not None:
            self._forward.keep(places)
        tokens, positions = rows.take(tokens), rows.take(positions)
        with rows.in_forward():
            while parts := progress.portions(self._portion):
                self._run(tokens, rows.choose(parts), positions)
            logits = self._run(tokens, rows.choose(progress.parts()), positions)
        progress.settle()
        return rows.spread(logits, num_rows)

    def _run(self, tokens: Tensor, parts: list[tuple[int, int]], positions: Tensor) -> Tensor:
        num_visible = max(end for _, end in parts)
        is_one_block = all(
            start == num_visible - self.block_length and end == num_visible for start, end in parts
        )

        def mask(columns: Tensor, num_visible: int) -> Tensor | None:
            if is_one_block and self._may_omit_mask:
                return None
            return block_causal_mask(columns, num_visible, self.block_length)

        self.num_forwards += 1
        return self._forward(tokens, parts, positions, num_visible, mask)
