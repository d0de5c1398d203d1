"""How a decode gets its logits. Knows the model only through its call.

Shapes: `B` rows, `T` canvas, `P` slots of a block, `V` vocabulary.
"""

from typing import Protocol

from torch import Tensor, nn

from memdlm.sampling.block_plan import Progress
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
    """Every step is a forward of the whole canvas, of the rows that are not done."""

    def __init__(self, model: nn.Module, attention_mask: Tensor | None) -> None:
        """Ask `model`, hiding what `attention_mask` [B, T] hides."""
        self.model, self.attention_mask = model, attention_mask
        self.num_forwards = 0
        self._rows = RemainingRows()

    def __call__(
        self, tokens: Tensor, positions: Tensor, progress: Progress, stream: str
    ) -> Tensor:
        """See `LogitsSource`."""
        self.num_forwards += 1
        rows = self._rows
        rows.leave(progress.is_done, tokens.device)
        mask = None if self.attention_mask is None else rows.take(self.attention_mask)
        with rows.in_forward():
            logits: Tensor = self.model(
                rows.take(tokens), attention_mask=mask, positions=rows.take(positions)
            ).logits
        return rows.spread(logits.float(), len(tokens))
