"""The blocks of every row and how many slots each step commits. Knows no model.

A row's plan depends on its own slots alone, and each row follows its plan at its own pace: one that
is done with a block goes on to the next while others are still busy, so that the step in which a
slot is filled is the one it has when the row is decoded alone.

Shapes: `B` rows, `N` blocks of the row with most, `P` slots of the widest block.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from memdlm.sampling.canvas import Canvas
from memdlm.sampling.config import SamplingConfig
from memdlm.sampling.token_choice import Draw
from memdlm.sampling.unmasking import transfer_schedule, transfer_steps


@dataclass(frozen=True)
class BlockPlan:
    """What every row decodes, block by block.

    Attributes:
        positions: [B, N, P] int64, columns of the slots; 0 where a block has fewer.
        is_slot: [B, N, P] bool, False where `positions` is filler.
        counts: Per row and block the slots to commit in each step; no zeros.
        order: [B, N, P] float64 confidences fixed in advance, for the policy `independent`, else
            None.
        widths: Per row and block its number of slots.
    """

    positions: Tensor
    is_slot: Tensor
    counts: list[list[list[int]]]
    order: Tensor | None
    widths: list[list[int]]

    @classmethod
    def build(cls, canvas: Canvas, config: SamplingConfig, draw: Draw) -> Self:
        """Divide the slots of every row into blocks and plan their steps."""
        rows = [
            _blocks(slots, length, config)
            for slots, length in zip(canvas.slots.cpu(), canvas.lengths, strict=True)
        ]
        num_blocks = max(len(blocks) for blocks in rows)
        width = max(len(block) for blocks in rows for block in blocks)
        positions = torch.zeros((len(rows), num_blocks, width), dtype=torch.int64)
        is_slot = torch.zeros_like(positions, dtype=torch.bool)
        order = torch.zeros_like(positions, dtype=torch.float64)
        counts: list[list[list[int]]] = []
        for row, blocks in enumerate(rows):
            counts.append([])
            steps = _steps_per_block(canvas.lengths[row], blocks, config)
            for number, block in enumerate(blocks):
                positions[row, number, : len(block)] = block
                is_slot[row, number, : len(block)] = True
                if config.policy == "independent":
                    chosen = _independent_steps(
                        row, number * steps, len(block), steps, config, draw
                    )
                    order[row, number, : len(block)] = -chosen.double()
                    planned = torch.bincount(chosen, minlength=steps).tolist()
                else:
                    planned = transfer_schedule(
                        len(block), steps, config.step_schedule, config.schedule_epsilon
                    )
                counts[-1].append([count for count in planned if count])
        device = canvas.tokens.device
        return cls(
            positions.to(device),
            is_slot.to(device),
            counts,
            order.to(device) if config.policy == "independent" else None,
            [[len(block) for block in blocks] for blocks in rows],
        )

    @property
    def num_steps(self) -> list[int]:
        """Steps that each row takes at most."""
        return [sum(len(block) for block in blocks) for blocks in self.counts]


def _blocks(slots: Tensor, length: int, config: SamplingConfig) -> list[Tensor]:
    """Return the columns of a row's slots [T], block by block; empty blocks are left out."""
    columns = slots.nonzero()[:, 0]
    if not config.infill:
        return list(columns.split(config.tokens_per_block))
    window = length if config.block_length is None else config.block_length
    numbers = columns // window
    return [columns[numbers == number] for number in numbers.unique().tolist()]


def _steps_per_block(length: int, blocks: list[Tensor], config: SamplingConfig) -> int:
    if not config.infill:
        return config.steps_per_block
    if config.num_unmasking_steps is None:
        return max(len(block) for block in blocks)
    # Windows without a mask token count: the reference spreads the steps over all of them.
    window = length if config.block_length is None else config.block_length
    return -(-config.num_unmasking_steps // -(-length // window))


def _independent_steps(
    row: int, start: int, width: int, steps: int, config: SamplingConfig, draw: Draw
) -> Tensor:
    """Return the planned step of every slot of a block that starts at planned step `start`: [P]."""
    uniform = torch.stack([draw(row, "unmasking", start + step, (width,)) for step in range(steps)])
    return transfer_steps(uniform, config.step_schedule, config.schedule_epsilon).cpu()


class Progress:
    """Where every row stands in its plan: the only state of a decode that lives on the host."""

    def __init__(self, plan: BlockPlan) -> None:
        """Put every row at the first step of its first block."""
        self._plan = plan
        self.block = [0] * len(plan.counts)
        self._step = [0] * len(plan.counts)
        self.is_done = [False] * len(plan.counts)

    def counts(self) -> list[int]:
        """Return how many slots each row commits in the coming step, at least; 0 = done."""
        return [
            0 if done else self._plan.counts[row][self.block[row]][self._step[row]]
            for row, done in enumerate(self.is_done)
        ]

    def widths(self) -> list[int]:
        """Return the number of slots of each row's current block."""
        return [widths[block] for widths, block in zip(self._plan.widths, self.block, strict=True)]

    def slots_before(self) -> list[int]:
        """Return how many slots each row has before its current block."""
        return [
            sum(widths[:block]) for widths, block in zip(self._plan.widths, self.block, strict=True)
        ]

    def advance(self, masked_left: list[int] | None) -> None:
        """Go on to the next step, and to the next block where one is filled.

        Args:
            masked_left: Slots of the current block that are still masked, per row; None when every
                step commits exactly what was planned.
        """
        for row, counts in enumerate(self._plan.counts):
            if self.is_done[row]:
                continue
            self._step[row] += 1
            planned = len(counts[self.block[row]])
            is_filled = self._step[row] == planned if masked_left is None else masked_left[row] == 0
            if is_filled and self.block[row] + 1 == len(counts):
                self.is_done[row] = True
            elif is_filled:
                self.block[row] += 1
                self._step[row] = 0
