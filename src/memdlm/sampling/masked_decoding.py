"""Masked decoding: LLaDA's sampler (arXiv 2502.09992, algorithms 4 and 5) over any masked model.

Every step predicts all slots of a row's current block, commits the most confident ones and leaves
the rest masked. Blocks are filled from left to right; one block is the whole response by default.
Dream's `diffusion_generate` is the same loop under other settings. Knows the model only through its
call (logits at given positions) and its special token ids.

Shapes: `B` rows, `T` canvas, `S` slots of a row, `P` slots of a block, `V` vocabulary.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from memdlm.errors import ConfigError, NonFiniteError, UsageError
from memdlm.sampling.block_plan import BlockPlan, Progress
from memdlm.sampling.canvas import Canvas, infill_canvas, prompt_canvas
from memdlm.sampling.config import SamplingConfig
from memdlm.sampling.end_of_text import (
    CompleteAnswers,
    IsComplete,
    before_first,
    before_first_gap,
    check_vocabulary,
    forbid_early_end,
    has_ended,
    stop_ids,
)
from memdlm.sampling.logits_source import LogitsSource, WholeForward
from memdlm.sampling.token_choice import (
    Draw,
    choose_tokens,
    gumbel,
    keep_likely,
    row_draws,
    suppress,
)
from memdlm.sampling.unmasking import UNMASKING_POLICIES, most_confident


@dataclass(frozen=True)
class DecodeStep:
    """One unmasking step, as `on_step` sees it.

    Attributes:
        index: 0 for the first step.
        num_steps: Steps of the whole decode, if no row is done before its plan ends.
        canvas: [B, T] int64 after the step; not overwritten by later steps.
        committed: [B, T] bool, the slots filled in this step.
        final: Per row the columns from the left that no later step changes, masks apart; None when
            what is committed stays. Only a decode that edits tokens has others.
    """

    index: int
    num_steps: int
    canvas: Tensor
    committed: Tensor
    final: list[int] | None = None


@dataclass(frozen=True)
class DecodeOutput:
    """What a decode gives.

    Attributes:
        tokens: Per row the generated tokens, 1-D int64 on the CPU; cut before the first
            end-of-text token when `stop_at_eos` is set, and where `is_complete` ended the row. With
            `infill` the whole filled prompt.
        canvas: [B, T] int64, prompts and slots, padding on the right. Slots behind the end of a
            row that stopped early still hold the mask token.
        unmask_step: [B, T] int64, the step that filled a position; -1 = no slot, or not filled.
            It is the step that fills it when the row is decoded alone.
        num_forwards: Calls of the model: one per step, two under guidance, and those in which a
            cache reads a long prompt beforehand.
        tokens_per_step: Per row how many slots each of its steps filled. Its length is the number
            of steps the row took.
        ended: Per row whether an end-of-text token or `is_complete` ended it, rather than the
            number of slots.
    """

    tokens: list[Tensor]
    canvas: Tensor
    unmask_step: Tensor
    num_forwards: int
    tokens_per_step: list[list[int]]
    ended: list[bool]


class MaskedDecode:
    """One decode in progress: the loop, and what other ways of decoding put in its places."""

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[Tensor],
        config: SamplingConfig,
        draw: Draw | None,
        is_complete: IsComplete | None = None,
    ) -> None:
        """Lay out the canvas and plan the steps; arguments and errors as `decode`."""
        device = next(model.parameters()).device
        self.model, self.config = model, config
        self.draw = draw or row_draws([config.seed] * len(prompts), device)
        check_prompts(model, prompts, config)
        self.canvas = canvas = self._lay_out(prompts, device)
        self.mask_token_id: int = _model_config(model).mask_token_id
        self.stop_ids = stop_ids(_model_config(model), config)
        self.tokens = canvas.tokens
        self.unmask_step = torch.full_like(canvas.tokens, -1)
        self.is_nan = torch.zeros((), dtype=torch.bool, device=canvas.tokens.device)
        if config.infill and is_complete is not None:
            raise UsageError("infill fills the slots it is given: leave out is_complete")
        self.complete = None if is_complete is None else CompleteAnswers(is_complete, len(prompts))
        self.plan = self._plan()
        self.progress = self._progress()
        self.logits_source = self._source()

    def _lay_out(self, prompts: Sequence[Tensor], device: torch.device) -> Canvas:
        ids = _model_config(self.model)
        if self.config.infill:
            return infill_canvas(prompts, ids.mask_token_id, ids.pad_token_id, device)
        new = self.config.max_new_tokens
        return prompt_canvas(prompts, new, ids.mask_token_id, ids.pad_token_id, device)

    @cached_property
    def _answer_slots(self) -> Tensor:
        """The columns that hold each row's response: [B, S] int64; not for infilling."""
        return self.canvas.slot_positions()

    def _plan(self) -> BlockPlan:
        return BlockPlan.build(self.canvas, self.config, self.draw)

    def _progress(self) -> Progress:
        return Progress(self.plan)

    def _source(self) -> LogitsSource:
        if self.config.cache in ("prefix", "dual"):
            from memdlm.sampling.approximate_cache import ApproximateCache

            return ApproximateCache(self.model, self.canvas, self.config.cache, self.plan)
        return WholeForward(self.model, self.canvas)

    def run(self) -> Generator[DecodeStep, None, DecodeOutput]:
        """Fill all slots."""
        num_steps = max(self.plan.num_steps)
        index = 0
        while not all(self.progress.is_done):
            committed = self._step(index)
            yield DecodeStep(index, num_steps, self.tokens, committed, self._final())
            index += 1
        # One look at the end: asking the device at every step would make each step wait for it.
        if self.is_nan:
            raise NonFiniteError(
                "the model's logits are nan or inf while decoding; check the checkpoint, or load "
                "it in float32"
            )
        return self._output(index)

    def _final(self) -> list[int] | None:
        """Return how many columns of each row will stay as they are; None for all committed."""
        return None

    def _step(self, index: int) -> Tensor:
        """Predict each row's current block, commit and move on; return what was filled [B, T]."""
        progress = self.progress
        block = self._on_device(progress.block)
        rows = torch.arange(len(block), device=block.device)
        positions, is_slot = self.plan.positions[rows, block], self.plan.is_slot[rows, block]
        masked = is_slot & (self.unmask_step.gather(1, positions) < 0)  # [B, P]
        counts = progress.counts()
        logits = self._logits(positions)  # [B, P, V]
        chosen, confidence, order = self._predict(logits, index)
        committed = most_confident(order, masked, self._on_device(counts))
        if self.config.threshold is not None:
            committed |= masked & (confidence >= self.config.threshold)
        committed &= self._on_device([count > 0 for count in counts]).unsqueeze(1)
        # Added, not written: filler points at column 0, which may itself be a slot.
        change = torch.where(committed, chosen - self.tokens.gather(1, positions), 0)
        self.tokens = self.tokens.scatter_add(1, positions, change)
        self.unmask_step.scatter_add_(1, positions, committed * (index + 1))
        self._advance(masked & ~committed)
        return self.unmask_step == index

    def _advance(self, masked: Tensor) -> None:
        """Move on given what is still masked of each row's block [B, P]."""
        is_open = self.config.threshold is not None
        self.progress.advance(masked.sum(dim=1).tolist() if is_open else None)
        if self.config.stop_at_eos and self.config.stop_early and not self.config.infill:
            for row, ended in enumerate(self._has_ended().tolist()):
                self.progress.is_done[row] |= ended
        self._let_complete_rows_go()

    def _let_complete_rows_go(self) -> None:
        """End the rows whose answers the caller finds complete with what is final of them."""
        if self.complete is None or not self.config.stop_early:
            return
        slots = self._answer_slots
        is_final = self.unmask_step.gather(1, slots) >= 0
        limits = self._final()
        if limits is not None:
            is_final &= slots < self._on_device(limits).unsqueeze(1)
        final = before_first_gap(self.tokens.gather(1, slots), is_final)
        self.complete.look(final, self.progress.is_done)

    def _predict(self, logits: Tensor, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return every slot's token, its confidence, and what its turn is decided by: each [B, P].

        Args:
            logits: [B, P, V] float32, without suppressed tokens.
            index: The step.
        """
        config = self.config
        vocabulary = logits.shape[-1]
        best = logits.amax(dim=-1)  # nan where any logit is
        self.is_nan |= (best.isnan() | best.isposinf()).any()
        likely = logits
        if config.temperature or config.confidence_source == "sampling":
            if config.top_k is not None or config.top_p is not None:
                # Before the cut, so that a likely mask token does not take a better one's place.
                likely = suppress(logits, (self.mask_token_id,))
            likely = keep_likely(likely, config.temperature, config.top_k, config.top_p)
        chosen = choose_tokens(
            likely,
            config.temperature,
            self.mask_token_id,
            lambda: self._draws("token_choice", index, (vocabulary,)),
        )
        if self.plan.order is not None:
            rows = torch.arange(len(chosen), device=chosen.device)
            order = self.plan.order[rows, self._on_device(self.progress.block)]
            return chosen, order, order
        if config.confidence_source == "sampling":
            logits = likely / (config.temperature or 1.0)
        deferred = self._deferred(vocabulary)
        confidence = UNMASKING_POLICIES[config.policy](
            suppress(logits, deferred).softmax(dim=-1),
            chosen,
            lambda: self._draws("unmasking", index, ()),
        )
        order = confidence
        if config.confidence_temperature:
            # The best of confidence / temperature + Gumbel noise are a draw without replacement.
            noise = gumbel(self._draws("transfer", index, ()))
            order = confidence.double() / config.confidence_temperature + noise
        if deferred:
            is_deferred = torch.isin(chosen, self._on_device(deferred))
            confidence = confidence.masked_fill(is_deferred, -1.0)
            order = order.masked_fill(is_deferred, torch.finfo(order.dtype).min)
        return chosen, confidence, order

    def _logits(self, positions: Tensor) -> Tensor:
        """Return float32 logits [B, P, V] at `positions`, guided and without suppressed tokens."""
        config = self.config
        logits = self.logits_source(self.tokens, positions, self.progress, "conditional")
        if config.guidance_scale:
            # Two calls of B rows, not one of 2B: what is bound to the batch's rows stays bound.
            without_prompt = self.tokens.where(self.canvas.slots, self.mask_token_id)
            unconditional = self.logits_source(
                without_prompt, positions, self.progress, "unconditional"
            )
            logits = unconditional + (config.guidance_scale + 1) * (logits - unconditional)
        vocabulary = logits.shape[-1]
        check_vocabulary(config, vocabulary)
        ending = self._ending(vocabulary)
        never = config.suppress_tokens + (ending if config.end_tokens == "suppress" else ())
        logits = suppress(logits, never)
        if config.min_new_tokens and ending:
            before = self._on_device(self.progress.slots_before())
            logits = forbid_early_end(logits, before, config.min_new_tokens, ending)
        return logits

    def _ending(self, vocabulary: int) -> tuple[int, ...]:
        """Return the stop ids that the model can say: a config may name one that it cannot."""
        return tuple(token for token in self.stop_ids if token < vocabulary)

    def _deferred(self, vocabulary: int) -> tuple[int, ...]:
        ending = self._ending(vocabulary) if self.config.end_tokens == "defer" else ()
        return self.config.defer_tokens + ending

    def _draws(self, stream: str, index: int, tail: tuple[int, ...]) -> Tensor:
        """Return uniform draws [B, P, *tail] float64; each row draws what it draws alone."""
        widths = self.progress.widths()
        shape = (len(widths), self.plan.positions.shape[2], *tail)
        draws = torch.full(shape, 0.5, dtype=torch.float64, device=self.tokens.device)
        for row, width in enumerate(widths):
            if not self.progress.is_done[row]:
                # All rows start together and none waits, so the row's own step is this one.
                draws[row, :width] = self.draw(row, stream, index, (width, *tail))
        return draws

    def _has_ended(self) -> Tensor:
        """Return whether each row's response has ended, [B] bool; not for infilling."""
        slots = self._answer_slots
        return has_ended(
            self.tokens.gather(1, slots),
            self.unmask_step.gather(1, slots) >= 0,
            self.stop_ids,
        )

    def _output(self, num_steps: int) -> DecodeOutput:
        config = self.config
        tokens = self.tokens.cpu()
        if config.infill:
            lengths = self.canvas.lengths
            rows = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
            ended = [False] * len(rows)
        else:
            rows = list(tokens.gather(1, self._answer_slots.cpu()))
            ended = self._has_ended().tolist()
            complete = {} if self.complete is None else self.complete.answers
            for row, answer in complete.items():
                rows[row], ended[row] = torch.tensor(answer), True
            if config.stop_at_eos:
                rows = [before_first(row, self.stop_ids) for row in rows]
        return DecodeOutput(
            tokens=rows,
            canvas=self.tokens,
            unmask_step=self.unmask_step,
            num_forwards=self.logits_source.num_forwards,
            tokens_per_step=[
                torch.bincount(row[row >= 0]).tolist() for row in self.unmask_step.cpu()
            ],
            ended=ended,
        )

    def _on_device(self, values: Sequence[int] | Sequence[bool]) -> Tensor:
        return torch.tensor(values, device=self.tokens.device)


def check_prompts(model: nn.Module, prompts: Sequence[Tensor], config: SamplingConfig) -> None:
    """Refuse prompts that do not fit the model, and a model that lacks a token id.

    Raises:
        ConfigError: The model lacks a token id that the decode needs.
        UsageError: A prompt exceeds the context, its new tokens included.
    """
    model_config = _model_config(model)
    for name in ("mask_token_id", "pad_token_id"):
        if getattr(model_config, name) is None:
            raise ConfigError(f"the model's config has no {name}; set it before decoding")
    if config.stop_at_eos and not config.infill and not stop_ids(model_config, config):
        raise ConfigError(
            "the model's config has no eos_token_id; set it before decoding, or set "
            "sampling.stop_tokens"
        )
    num_new = 0 if config.infill else config.max_new_tokens
    context = model_config.max_position_embeddings
    for row, prompt in enumerate(prompts):
        if len(prompt) + num_new > context:
            room = context - num_new
            shorter = f"cut the prompt to {room} tokens" if room > 0 else ""
            lower = "lower max_new_tokens" if num_new else ""
            new = f", which with {num_new} new ones exceeds" if num_new else ", which exceeds"
            raise UsageError(
                f"prompt {row} has {len(prompt)} tokens{new} the model's context of {context}; "
                f"{' or '.join(filter(None, (shorter, lower)))}"
            )


def _model_config(model: nn.Module) -> Any:
    return model.config
