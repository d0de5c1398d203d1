"""The blocks of block decoding and where every row stands among them. Knows no model.

Shapes: `B` rows, `N` blocks of the row with most, `P` length of a block.
"""

from collections.abc import Sequence

import torch

from memdlm.sampling.block_plan import BlockPlan, Progress
from memdlm.sampling.canvas import Canvas
from memdlm.sampling.config import SamplingConfig
from memdlm.sampling.unmasking import transfer_schedule


def plan_blocks(
    canvas: Canvas, prompt_lengths: Sequence[int], block_length: int, config: SamplingConfig
) -> BlockPlan:
    """Divide every row of a `block_canvas` into blocks, from the one with its first slot on.

    The positions of a block are all its columns, those of the prompt too. Every block has the same
    schedule, that of a block without prompt: a shared one is done earlier.
    """
    counts = block_schedule(block_length, config)
    first = [length // block_length for length in prompt_lengths]
    last = [length // block_length for length in canvas.lengths]
    num_blocks = [end - start for start, end in zip(first, last, strict=True)]
    starts = torch.tensor(first)[:, None] + torch.arange(max(num_blocks))
    # Blocks behind a row's last one are never its current block.
    positions = starts[:, :, None] * block_length + torch.arange(block_length)
    positions = positions.clamp(max=canvas.tokens.shape[1] - 1)
    is_slot = positions >= torch.tensor(prompt_lengths)[:, None, None]
    device = canvas.tokens.device
    return BlockPlan(
        positions=positions.to(device),
        is_slot=is_slot.to(device),
        counts=[[counts] * number for number in num_blocks],
        order=None,
        widths=[[block_length] * number for number in num_blocks],
    )


def block_schedule(block_length: int, config: SamplingConfig) -> list[int]:
    """Return how many slots each step of a block commits at least; no zeros."""
    if config.min_tokens_per_step is not None:
        return [config.min_tokens_per_step] * -(-block_length // config.min_tokens_per_step)
    steps = block_length
    if config.num_unmasking_steps is not None:
        num_blocks = -(-config.max_new_tokens // block_length)
        steps = -(-config.num_unmasking_steps // num_blocks)
    counts = transfer_schedule(block_length, steps, config.step_schedule, config.schedule_epsilon)
    return [count for count in counts if count]


class BlockProgress(Progress):
    """Where every row stands: its block, its steps there, and what of it a cache knows for good.

    Attributes:
        num_steps_taken: Steps of each row, those in which it waits left out.
        settled: Columns of each row whose keys and values in the cache are those of final tokens.
        is_waiting: Rows for which the coming step only settles the block they have finished.
    """

    def __init__(
        self,
        plan: BlockPlan,
        prompt_lengths: Sequence[int],
        block_length: int,
        max_editing_steps: int | None,
        has_cache: bool,
    ) -> None:
        """Put every row at the first step of its first block.

        Args:
            plan: From `plan_blocks`.
            prompt_lengths: Tokens of each prompt.
            block_length: P.
            max_editing_steps: Steps of a block after its last mask is gone; None = no editing.
            has_cache: Whether rows have to settle finished blocks.
        """
        super().__init__(plan)
        self.block_length = block_length
        self.num_steps_taken = [0] * len(prompt_lengths)
        self.settled = [0] * len(prompt_lengths)
        self.is_waiting = [False] * len(prompt_lengths)
        self._max_editing_steps, self._has_cache = max_editing_steps, has_cache
        self._prompt_lengths = prompt_lengths
        self._num_editing_steps = [0] * len(prompt_lengths)

    def starts(self) -> list[int]:
        """Return the first column of each row's current block."""
        return [
            (prompt // self.block_length + block) * self.block_length
            for prompt, block in zip(self._prompt_lengths, self.block, strict=True)
        ]

    def slots_before(self) -> list[int]:
        """Return how many slots precede each row's block; below 0 where it begins in the prompt."""
        return [
            start - prompt
            for start, prompt in zip(self.starts(), self._prompt_lengths, strict=True)
        ]

    def counts(self) -> list[int]:
        """Return how many slots each row commits in the coming step, at least; 0 = none now."""
        return [
            0
            if self.is_done[row] or self.is_waiting[row]
            else planned[block][min(self._step[row], len(planned[block]) - 1)]
            for row, (planned, block) in enumerate(zip(self._plan.counts, self.block, strict=True))
        ]

    def begin_step(self) -> None:
        """Decide which rows wait in the coming step."""
        active = [row for row, is_done in enumerate(self.is_done) if not is_done]
        starts = self.starts()
        behind = [row for row in active if self._has_cache and self.settled[row] < starts[row]]
        # The first step reads the prompts, all rows at once, whatever their lengths.
        is_first = not any(self.num_steps_taken)
        waits = len(behind) < len(active) and not is_first
        self.is_waiting = [waits and row in behind for row in range(len(self.block))]

    def parts(self) -> list[tuple[int, int]]:
        """Return the columns (start, end) that the coming step has to run for each row."""
        return [
            (min(settled, start), start if is_waiting else start + self.block_length)
            for settled, start, is_waiting in zip(
                self.settled, self.starts(), self.is_waiting, strict=True
            )
        ]

    def portions(self, size: int) -> list[tuple[int, int]]:
        """Return columns (start, end) to run ahead of the step, and note them as settled.

        Args:
            size: Columns of a portion, a multiple of the block length.

        Returns:
            One part per row, or nothing if no row has more than `size` columns to settle. Rows that
            have nothing left run their current block, to no effect.
        """
        starts = self.starts()
        missing = [
            start - min(settled, start) for settled, start in zip(self.settled, starts, strict=True)
        ]
        if max(missing) <= size:
            return []
        parts = [
            (start - left, start - left + min(left or self.block_length, size))
            for start, left in zip(starts, missing, strict=True)
        ]
        self.settled = [min(end, start) for (_, end), start in zip(parts, starts, strict=True)]
        return parts

    def settle(self) -> None:
        """Note that the columns before every row's current block have been run as they stay."""
        self.settled = self.starts()

    def advance_row(
        self,
        row: int,
        *,
        had_masks: bool,
        has_masks: bool,
        filled: bool,
        edited: bool,
        abandoned: bool,
    ) -> bool:
        """Go on to the row's next step, and to its next block where one is final.

        Args:
            row: Which.
            had_masks: Whether the block had a masked slot before the step.
            has_masks: Whether it still has one.
            filled: Whether the step filled a slot of it.
            edited: Whether the step replaced a token of it.
            abandoned: Whether it is left as it is.

        Returns:
            Whether the row has left its block.
        """
        if self.is_done[row] or self.is_waiting[row]:
            return False
        self._step[row] += 1
        self.num_steps_taken[row] += 1
        if not abandoned and has_masks:
            return False
        if not abandoned and self._max_editing_steps is not None and (had_masks or edited):
            self._num_editing_steps[row] += 1
            if self._num_editing_steps[row] <= self._max_editing_steps:
                return False
        if not (filled or edited):
            # The step saw the block as it stays, so what it left in the cache is final.
            self.settled[row] = self.starts()[row] + self.block_length
        if self.block[row] + 1 == len(self._plan.counts[row]):
            self.is_done[row] = True
        else:
            self.block[row] += 1
            self._step[row] = self._num_editing_steps[row] = 0
        return True
