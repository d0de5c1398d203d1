"""Prefix and dual cache of Fast-dLLM (arXiv 2505.22618) for bidirectional models. APPROXIMATE.

Under full attention every token's keys and values change whenever any token changes, so nothing can
be kept exactly. These caches keep it all the same for the time of one block. The first step of a
block runs the whole canvas; until the block is full,

    prefix   what precedes the block stays as it was then; the block and what follows are run
    dual     all other positions stay as they were then; the block alone is run

A row's answer differs from an uncached one, but still depends on nothing else in its batch: every
row renews its cache at its own block starts and at no others'.
"""

import torch
from torch import Tensor, nn

from memdlm.backbones.wrapping import backbone_of
from memdlm.sampling.block_plan import BlockPlan, Progress
from memdlm.sampling.cached_forward import CachedForward
from memdlm.sampling.canvas import Canvas
from memdlm.sampling.remaining_rows import RemainingRows


class ApproximateCache:
    """Logits of masked decoding from partial forwards; see `LogitsSource`."""

    def __init__(self, model: nn.Module, canvas: Canvas, kind: str, plan: BlockPlan) -> None:
        """Prepare caches of `kind` `prefix` or `dual` for the blocks of `plan`."""
        backbone = backbone_of(model)
        # A block's first slot is predicted from the token before it in families that shift.
        self._lead = int(backbone is not None and backbone.right_shift_logits)
        self._model, self._canvas, self._kind = model, canvas, kind
        self._mask = canvas.attention_mask
        self._bounds = _block_bounds(plan)
        self.num_forwards = 0
        self._streams: dict[str, tuple[CachedForward, RemainingRows, list[int]]] = {}

    def __call__(
        self, tokens: Tensor, positions: Tensor, progress: Progress, stream: str
    ) -> Tensor:
        """Return float32 logits [B, P, V] at `positions` of `tokens` [B, T]."""
        num_rows, num_columns = tokens.shape
        if stream not in self._streams:
            forward = CachedForward(self._model, num_columns)
            self._streams[stream] = (forward, RemainingRows(), [-1] * num_rows)
        forward, rows, cached_block = self._streams[stream]
        parts = []
        for row, length in enumerate(self._canvas.lengths):
            block = progress.block[row]
            start, end = self._bounds[row][block]
            if cached_block[row] != block:
                parts.append((0, length))
                cached_block[row] = block
            else:
                start = max(start - self._lead, 0)
                parts.append((start, length if self._kind == "prefix" else end))
        places = rows.leave(progress.is_done, tokens.device)
        if places is not None:
            forward.keep(places)
        mask = None if self._mask is None else rows.take(self._mask)
        self.num_forwards += 1
        with rows.in_forward():
            logits = forward(
                rows.take(tokens),
                rows.choose(parts),
                rows.take(positions),
                num_columns,
                lambda columns, visible: mask,
            )
        return rows.spread(logits, num_rows)


def _block_bounds(plan: BlockPlan) -> list[list[tuple[int, int]]]:
    """Return first column and end of every row's blocks."""
    bounds = []
    for positions, widths in zip(plan.positions.cpu(), plan.widths, strict=True):
        blocks = []
        for block, width in zip(positions, widths, strict=False):
            real: Tensor = block[torch.arange(len(block)) < width]
            blocks.append((int(real[0]), int(real[-1]) + 1))
        bounds.append(blocks)
    return bounds
