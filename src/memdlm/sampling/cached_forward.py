"""A forward over a part of every row, beside cached keys and values of the rest.

Rows stand at different places and need parts of different lengths, yet a forward is rectangular,
and with one memory per row every row must take part in it. Shorter parts are filled up with
repetitions of their last token, whose keys go to a spare slot that nobody looks at.

Knows neither blocks nor schedules. Shapes: B rows, T canvas, Q tokens of the longest part, P
positions asked for, K visible slots, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from memdlm.backbones.kv_cache import KVCache

MaskMaker = Callable[[Tensor, int], Tensor | None]
"""`mask(columns, num_visible)` gives what the queries at `columns` [B, Q] may attend to: a mask
[B, K], [B, 1, Q, K], or None for all `num_visible` slots."""


class CachedForward:
    """Forwards of one decode on one cache; a slot per column of the canvas."""

    def __init__(self, model: nn.Module, num_columns: int) -> None:
        """Prepare for rows of `num_columns` columns."""
        self.model = model
        self.num_columns = num_columns
        self.cache = KVCache(num_columns + 1)

    def keep(self, rows: Tensor) -> None:
        """Let all rows leave but `rows` [b] int64, which the coming forwards have."""
        self.cache.keep(rows)

    def __call__(
        self,
        tokens: Tensor,
        parts: Sequence[tuple[int, int]],
        positions: Tensor,
        num_visible: int,
        mask: MaskMaker,
    ) -> Tensor:
        """Run the columns `parts[row]` = (start, end) of every row and keep their keys and values.

        Args:
            tokens: The canvas [B, T] int64.
            parts: At least one column per row.
            positions: Columns whose logits are wanted [B, P]; of a column outside its row's part
                the logits mean nothing.
            num_visible: K, the end of what any query may attend to.
            mask: What the queries may attend to among it.

        Returns:
            Float32 logits [B, P, V].
        """
        device = tokens.device
        bounds = torch.tensor(parts, device=device)
        starts, ends = bounds[:, :1], bounds[:, 1:]
        width = max(end - start for start, end in parts)
        columns = starts + torch.arange(width, device=device)
        slots = torch.where(columns < ends, columns, self.num_columns)
        columns = torch.minimum(columns, ends - 1)
        self.cache.open(slots, num_visible)
        logits: Tensor = self.model(
            tokens.gather(1, columns),
            attention_mask=mask(columns, num_visible),
            position_ids=columns,
            positions=(positions - starts).clamp(0, width - 1),
            cache=self.cache,
        ).logits
        return logits.float()
