"""Block decoding of LLaDA2.x: block-causal attention, a confidence threshold, token editing.

The canvas of a row is a whole number of blocks, counted from the start of its prompt; the prompt's
last, partial block is shared with the first slots. A token attends to its own block and to earlier
ones. Blocks are filled from left to right; a step commits every slot of the current block whose
confidence exceeds `threshold`, and at least what the schedule asks for (LLaDA2.0's sampler). With
`editing_threshold`, a step also replaces committed tokens that the model has come to doubt, and a
full block is looked at again until nothing changes (LLaDA2.1, arXiv 2602.08676).

Nothing before the current block changes any more, and nothing behind it is seen: keys and values of
finished blocks are computed once. That cache is exact. Rows go through their blocks at their own
pace; a step of a batch gives each row what it gets alone.

Shapes: `B` rows, `T` canvas, `P` length of a block, `S` new tokens, `V` vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from memdlm.sampling.block_causal import BlockCausalForward, ExactCache
from memdlm.sampling.block_plan import BlockPlan
from memdlm.sampling.block_progress import BlockProgress, plan_blocks
from memdlm.sampling.canvas import Canvas, block_canvas
from memdlm.sampling.config import SamplingConfig
from memdlm.sampling.end_of_text import IsComplete
from memdlm.sampling.logits_source import LogitsSource
from memdlm.sampling.masked_decoding import DecodeOutput, MaskedDecode
from memdlm.sampling.token_choice import Draw
from memdlm.sampling.unmasking import most_confident

# Of the published samplers, and of the paper's evaluation.
DEFAULT_THRESHOLD = 0.95


class BlockDecode(MaskedDecode):
    """One block decode in progress."""

    progress: BlockProgress

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[Tensor],
        config: SamplingConfig,
        draw: Draw | None,
        is_complete: IsComplete | None = None,
    ) -> None:
        """Lay out the canvas and plan the steps; arguments and errors as `decode`."""
        own: Any = model.config
        self.block_length: int = config.block_length or own.block_length
        self.prompt_lengths = [len(prompt) for prompt in prompts]
        self.threshold = _threshold(config)
        super().__init__(model, prompts, config, draw, is_complete)

    def _lay_out(self, prompts: Sequence[Tensor], device: torch.device) -> Canvas:
        ids: Any = self.model.config
        return block_canvas(
            prompts,
            self.config.max_new_tokens,
            self.block_length,
            ids.mask_token_id,
            ids.pad_token_id,
            device,
        )

    @cached_property
    def _answer_slots(self) -> Tensor:
        # The rest of the last block is decoded with it, and is no part of the answer.
        starts = self._on_device(self.prompt_lengths)
        return starts[:, None] + torch.arange(self.config.max_new_tokens, device=starts.device)

    def _plan(self) -> BlockPlan:
        return plan_blocks(self.canvas, self.prompt_lengths, self.block_length, self.config)

    def _progress(self) -> BlockProgress:
        limit = self.config.max_editing_steps if self.config.editing_threshold is not None else None
        has_cache = self.config.cache != "none"
        return BlockProgress(self.plan, self.prompt_lengths, self.block_length, limit, has_cache)

    def _source(self) -> LogitsSource:
        if self.config.cache == "none":
            return BlockCausalForward(self.model, self.block_length)
        return ExactCache(self.model, self.block_length, self.tokens.shape[1])

    def _final(self) -> list[int] | None:
        if self.config.editing_threshold is None:
            return None
        return [
            self.canvas.lengths[row] if is_done else start
            for row, (is_done, start) in enumerate(
                zip(self.progress.is_done, self.progress.starts(), strict=True)
            )
        ]

    def _step(self, index: int) -> Tensor:
        """Predict each row's current block, commit, edit and move on; return what was filled."""
        progress = self.progress
        progress.begin_step()
        rows = torch.arange(len(progress.block), device=self.tokens.device)
        block = self._on_device(progress.block)
        positions, is_slot = self.plan.positions[rows, block], self.plan.is_slot[rows, block]
        filled_before = self.unmask_step.gather(1, positions)  # [B, P]
        masked = is_slot & (filled_before < 0)
        is_active = self._on_device([count > 0 for count in progress.counts()]).unsqueeze(1)

        logits = self._logits(positions)  # [B, P, V]
        chosen, confidence, order = self._predict(logits, index)
        committed = most_confident(order, masked, self._on_device(progress.counts()))
        if self.threshold is not None:
            committed |= masked & (confidence > self.threshold) & is_active
        current = self.tokens.gather(1, positions)
        edited = torch.zeros_like(committed)
        if self.config.editing_threshold is not None:
            edited = is_slot & ~masked & is_active & (chosen != current)
            edited &= confidence > self.config.editing_threshold

        current = torch.where(committed | edited, chosen, current)
        self.tokens = self.tokens.scatter(1, positions, current)
        own_step = self._on_device(progress.num_steps_taken).unsqueeze(1)
        filled = torch.where(committed, own_step, filled_before)
        self.unmask_step.scatter_(1, positions, filled)
        self._move_on(masked, committed, edited, self._is_abandoned(current))
        return torch.zeros_like(self.unmask_step, dtype=torch.bool).scatter(1, positions, committed)

    def _is_abandoned(self, block: Tensor) -> Tensor:
        """Return whether each row leaves its block [B, P] as it is: [B] bool."""
        if not self.config.abandon_block_at_eos:
            return torch.zeros(len(block), dtype=torch.bool, device=block.device)
        ids = torch.tensor(self.stop_ids, dtype=torch.int64, device=block.device)
        return torch.isin(block, ids).any(dim=1)

    def _move_on(
        self, masked: Tensor, committed: Tensor, edited: Tensor, is_abandoned: Tensor
    ) -> None:
        """Tell the progress what the step did; the one look at the device in a step."""
        facts = [masked.any(1), (masked & ~committed).any(1), committed.any(1), edited.any(1)]
        stops = self.config.stop_at_eos and self.config.stop_early
        has_ended = self._has_ended() if stops else torch.zeros_like(is_abandoned)
        seen = torch.stack([*facts, is_abandoned, has_ended]).tolist()
        for row, (had, has, filled, changed, abandoned, ended) in enumerate(
            zip(*seen, strict=True)
        ):
            has_left = self.progress.advance_row(
                row,
                had_masks=had,
                has_masks=has,
                filled=filled,
                edited=changed,
                abandoned=abandoned,
            )
            # Until its block is left, an edit may still take the end of the text away.
            if ended and (has_left or self.config.editing_threshold is None):
                self.progress.is_done[row] = True
        self._let_complete_rows_go()

    def _draws(self, stream: str, index: int, tail: tuple[int, ...]) -> Tensor:
        """Return uniform draws [B, P, *tail] float64; each row draws what it draws alone."""
        shape = (self.block_length, *tail)
        draws = torch.full(
            (len(self.prompt_lengths), *shape), 0.5, dtype=torch.float64, device=self.tokens.device
        )
        for row, count in enumerate(self.progress.counts()):
            if count:
                draws[row] = self.draw(row, stream, self.progress.num_steps_taken[row], shape)
        return draws

    def _output(self, num_steps: int) -> DecodeOutput:
        output = super()._output(num_steps)
        steps = zip(self.unmask_step.cpu(), self.progress.num_steps_taken, strict=True)
        # Steps that only edit fill nothing, and count all the same.
        filled = [torch.bincount(row[row >= 0], minlength=n).tolist() for row, n in steps]
        return replace(output, tokens_per_step=filled)


def _threshold(config: SamplingConfig) -> float | None:
    """Return the confidence above which slots are committed; None where it means nothing."""
    if config.threshold is not None or config.policy not in ("low_confidence", "margin"):
        return config.threshold
    return DEFAULT_THRESHOLD
