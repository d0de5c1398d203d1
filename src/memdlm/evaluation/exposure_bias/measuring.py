"""Exposure bias: how much worse a model predicts in the context of its own output (paper, Fig. 3).

At a denoising step some response tokens are still masked. Their negative log-likelihood is taken
twice: with the visible ones as the model itself has filled them in (sequential), and with the clean
ones in the same places (static). Their ratio is 1 for a model whose output is as good a context as
the truth, and grows with every mistake it has to build on.

The order of unmasking is drawn per sample from a seed and does not depend on the model, so that all
models and memories are compared on the same samples and masks. Shapes: B rows, T canvas, R slots of
a row, S steps, N samples.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memdlm.backbones.operation_order import official_order
from memdlm.diffusion.objective import ObjectiveConfig
from memdlm.errors import DataError, UsageError
from memdlm.evaluation.exposure_bias.results import BiasSums, ExposureBias
from memdlm.memory.config import MemoryConfig
from memdlm.memory.parametric_memory import ParametricMemory
from memdlm.sampling.canvas import prompt_canvas
from memdlm.sampling.config import SamplingConfig
from memdlm.sampling.decoding import decode
from memdlm.sampling.evaluation_mode import evaluation_mode
from memdlm.sampling.token_choice import row_draws
from memdlm.seeding import derive_seed


def measure_exposure_bias(
    model: nn.Module,
    prompts: Sequence[Tensor],
    responses: Sequence[Tensor],
    *,
    memory: MemoryConfig | None = None,
    num_steps: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
) -> ExposureBias:
    """Return the means of `measure_bias_sums` over all samples; arguments and errors as there."""
    return measure_bias_sums(
        model,
        prompts,
        responses,
        memory=memory,
        num_steps=num_steps,
        seed=seed,
        batch_size=batch_size,
    ).summary()


@torch.no_grad()
def measure_bias_sums(
    model: nn.Module,
    prompts: Sequence[Tensor],
    responses: Sequence[Tensor],
    *,
    memory: MemoryConfig | None = None,
    objective: ObjectiveConfig | None = None,
    num_steps: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    on_batch: Callable[[int], None] | None = None,
) -> BiasSums:
    """Decode every prompt greedily in a random order and score its clean response on the way.

    A sample's figures depend on its own texts, its place among the samples, the seed and the
    longest response, not on the batch it is measured in.

    Args:
        model: A backbone, possibly wrapped; evaluated in eval mode, which is then restored.
        prompts: Token ids, one 1-D int64 tensor per sample.
        responses: Clean responses with their end-of-text token, likewise. Shorter ones are filled
            with end-of-text, as in training; the filling is decoded but not scored.
        memory: Write a memory from each prompt first; None, or `enabled` off, measures without.
        objective: Noise schedule of the memory's anchor; the default one if None.
        num_steps: Denoising steps S; None, or more than there are slots, unmasks one per step.
        seed: Decides the orders of unmasking and the memories.
        batch_size: Samples decoded together.
        on_batch: Called with the number of samples that are done.

    Raises:
        DataError: If there is no sample, or a prompt has no response.
        UsageError: `batch_size` is below 1, or a sample exceeds the model's context.
    """
    if not prompts or len(prompts) != len(responses):
        raise DataError(
            f"exposure bias needs one response per prompt, got {len(prompts)} and {len(responses)}"
        )
    if batch_size < 1:
        raise UsageError(f"batch_size: {batch_size} is out of range; use 1 or more")
    config = SamplingConfig(
        max_new_tokens=max(len(response) for response in responses),
        num_unmasking_steps=num_steps,
        policy="random",
        # Both contexts are scored under one attention, that of the whole response.
        decoder="masked",
        stop_at_eos=False,
    )
    parts, num_dropped = [], 0
    for start in range(0, len(prompts), batch_size):
        batch = slice(start, start + batch_size)
        seeds = [derive_seed(seed, "exposure_bias", i) for i in range(len(prompts))[batch]]
        attached, dropped = _memory(model, prompts[batch], memory, objective, seeds)
        with attached:
            parts.append(_measure_batch(model, prompts[batch], responses[batch], config, seeds))
        num_dropped += dropped
        if on_batch is not None:
            on_batch(min(start + batch_size, len(prompts)))
    static, sequential, scored, masked = torch.cat(parts).cpu().unbind(dim=2)  # [N, S] each
    return BiasSums(
        # Every sample has as many slots, and a step fills as many in each.
        mask_ratio=tuple((masked[0] / config.max_new_tokens).tolist()),
        static_nll=static.numpy(),
        sequential_nll=sequential.numpy(),
        num_tokens=scored.long().numpy(),
        num_dropped=num_dropped,
    )


def _memory(
    model: nn.Module,
    prompts: Sequence[Tensor],
    memory: MemoryConfig | None,
    objective: ObjectiveConfig | None,
    seeds: list[int],
) -> tuple[AbstractContextManager[None], int]:
    """Write a memory per prompt; return what attaches them, and how many were dropped."""
    if memory is None or not memory.enabled:
        return nullcontext(), 0
    # As at inference: no sample may see another's memory.
    writer = ParametricMemory(model, replace(memory, sharing="sequence"), objective)
    ids: Any = model.config
    device = next(model.parameters()).device
    canvas = prompt_canvas(prompts, 0, ids.mask_token_id, ids.pad_token_id, device)
    stats = writer.write(canvas.tokens, canvas.attention_mask, seed=seeds)
    return writer.attached(), stats.alive.numel() - int(stats.alive.sum())


def _measure_batch(
    model: nn.Module,
    prompts: Sequence[Tensor],
    responses: Sequence[Tensor],
    config: SamplingConfig,
    seeds: list[int],
) -> Tensor:
    """Return every row's sums [B, S, 4]: static, sequential, scored, masked (float64)."""
    device = next(model.parameters()).device
    ids: Any = model.config
    mask_id, pad_id, eos_id = ids.mask_token_id, ids.pad_token_id, ids.eos_token_id
    canvas = prompt_canvas(prompts, config.max_new_tokens, mask_id, pad_id, device)
    positions = canvas.slot_positions()  # [B, R]
    fill = eos_id if isinstance(eos_id, int) else eos_id[0]
    clean = torch.full(positions.shape, fill, dtype=torch.int64)
    is_real = torch.zeros(positions.shape, dtype=torch.bool)
    for row, response in enumerate(responses):
        clean[row, : len(response)] = response
        is_real[row, : len(response)] = True
    clean, is_real = clean.to(device), is_real.to(device)

    states = [canvas.tokens]
    scorer = _Scorer(model, clean, is_real, mask_id)
    decode(
        scorer,
        prompts,
        config,
        on_step=lambda step: states.append(step.canvas),
        draw=row_draws(seeds, device),
    )
    sequential, scorer.sums = scorer.sums, []
    with evaluation_mode(model):
        for state in states[:-1]:
            masked = state.gather(1, positions) == mask_id
            pristine = state.scatter(1, positions, torch.where(masked, mask_id, clean))
            scorer(pristine, canvas.attention_mask, positions)
    # Both contexts hide exactly the same slots.
    own, static = torch.stack(sequential, dim=1), torch.stack(scorer.sums, dim=1)  # [B, S, 3]
    return torch.cat([static[..., :1], own], dim=-1)


class _Scorer(nn.Module):
    """A model that scores what every forward says of the masked slots; the decode runs on it.

    A decode's own forwards are those of the sequential context, so none is run twice.
    """

    def __init__(self, model: nn.Module, clean: Tensor, is_real: Tensor, mask_id: int) -> None:
        """Score against `clean` [B, R] where `is_real` [B, R]."""
        super().__init__()
        self.model = model
        self._clean, self._is_real, self._mask_id = clean, is_real, mask_id
        self.sums: list[Tensor] = []
        """Per forward and row: negative log-likelihood, scored, masked [B, 3] float64."""

    @property
    def config(self) -> Any:
        """The model's config."""
        return self.model.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None, positions: Tensor) -> Any:
        """Call the model at all slots, `positions` [B, R], and keep the sums of what it says."""
        # In a decode too, so that a state has one loss in both contexts.
        with official_order():
            output = self.model(input_ids, attention_mask=attention_mask, positions=positions)
        masked = input_ids.gather(1, positions) == self._mask_id
        scored = masked & self._is_real
        logits = output.logits.float().flatten(0, 1)
        nll = F.cross_entropy(logits, self._clean.flatten(), reduction="none").view_as(scored)
        total = (nll * scored).sum(dim=1, dtype=torch.float64)
        self.sums.append(torch.stack([total, scored.sum(dim=1), masked.sum(dim=1)], dim=1))
        return output
