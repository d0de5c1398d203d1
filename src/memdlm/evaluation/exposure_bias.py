"""Exposure bias: how much worse a model predicts in the context of its own output (paper, Fig. 3).

At a denoising step some response tokens are still masked. Their negative log-likelihood is taken
twice: with the visible ones as the model itself has filled them in (sequential), and with the clean
ones in the same places (static). Their ratio is 1 for a model whose output is as good a context as
the truth, and grows with every mistake it has to build on.

The order of unmasking is drawn per sample from a seed and does not depend on the model, so that all
models and memories are compared on the same samples and masks. Shapes: B rows, T canvas, R slots of
a row, S steps.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memdlm.errors import DataError
from memdlm.memory.config import MemoryConfig
from memdlm.memory.parametric_memory import ParametricMemory
from memdlm.sampling.canvas import prompt_canvas
from memdlm.sampling.config import SamplingConfig
from memdlm.sampling.masked_decoding import decode
from memdlm.sampling.token_choice import row_draws
from memdlm.seeding import derive_seed


@dataclass(frozen=True)
class ExposureBias:
    """Both likelihoods at every step, averaged over the masked tokens of all samples.

    Attributes:
        mask_ratio: Share of the slots still masked before the step [S]; falls from 1.
        static_nll: Mean negative log-likelihood in clean context [S], nats per token.
        sequential_nll: The same in the model's own context [S].
        num_tokens: Scored tokens [S].
    """

    mask_ratio: tuple[float, ...]
    static_nll: tuple[float, ...]
    sequential_nll: tuple[float, ...]
    num_tokens: tuple[int, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        """Sequential over static likelihood at every step; 1 at the first by definition."""
        pairs = zip(self.sequential_nll, self.static_nll, strict=True)
        return tuple(sequential / max(static, 1e-12) for sequential, static in pairs)

    @property
    def overall_ratio(self) -> float:
        """The same over all tokens of all steps but the first, where both are equal."""
        weights = self.num_tokens[1:]
        sequential = sum(w * x for w, x in zip(weights, self.sequential_nll[1:], strict=True))
        static = sum(w * x for w, x in zip(weights, self.static_nll[1:], strict=True))
        return sequential / max(static, 1e-12)


@torch.no_grad()
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
    """Decode every prompt greedily in a random order and score its clean response on the way.

    Args:
        model: A backbone, possibly wrapped; evaluated in eval mode, which is then restored.
        prompts: Token ids, one 1-D int64 tensor per sample.
        responses: Clean responses with their end-of-text token, likewise. Shorter ones are filled
            with end-of-text, as in training; the filling is decoded but not scored.
        memory: Write a memory from each prompt first; None, or `enabled` off, measures without.
        num_steps: Denoising steps S; None unmasks one token per step.
        seed: Decides the orders of unmasking and the memories.
        batch_size: Samples decoded together.

    Raises:
        DataError: If there is no sample, or a prompt has no response.
    """
    if not prompts or len(prompts) != len(responses):
        raise DataError(
            f"exposure bias needs one response per prompt, got {len(prompts)} and {len(responses)}"
        )
    length = max(len(response) for response in responses)
    config = SamplingConfig(
        max_new_tokens=length,
        num_unmasking_steps=num_steps,
        policy="random",
        # Both contexts are scored under one attention, that of the whole response.
        decoder="masked",
        stop_at_eos=False,
    )
    totals = None
    for start in range(0, len(prompts), batch_size):
        batch = slice(start, start + batch_size)
        seeds = [derive_seed(seed, "exposure_bias", i) for i in range(len(prompts))[batch]]
        sums = _measure_batch(model, prompts[batch], responses[batch], memory, config, seeds, seed)
        totals = sums if totals is None else totals + sums
    assert totals is not None
    static, sequential, count, masked, slots = totals.unbind(dim=1)
    return ExposureBias(
        mask_ratio=tuple((masked / slots).tolist()),
        static_nll=tuple((static / count.clamp(min=1)).tolist()),
        sequential_nll=tuple((sequential / count.clamp(min=1)).tolist()),
        num_tokens=tuple(int(n) for n in count.tolist()),
    )


def _measure_batch(
    model: nn.Module,
    prompts: Sequence[Tensor],
    responses: Sequence[Tensor],
    memory: MemoryConfig | None,
    config: SamplingConfig,
    seeds: list[int],
    memory_seed: int,
) -> Tensor:
    """Return sums over the batch [S, 5]: static, sequential, scored, masked, slots (float64)."""
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

    attached: AbstractContextManager[None] = nullcontext()
    if memory is not None and memory.enabled:
        writer = ParametricMemory(model, memory)
        without_slots = prompt_canvas(prompts, 0, mask_id, pad_id, device)
        writer.write(without_slots.tokens, without_slots.attention_mask, seed=memory_seed)
        attached = writer.attached()
    states = [canvas.tokens]
    with attached:
        decode(
            model,
            prompts,
            config,
            on_step=lambda step: states.append(step.canvas),
            draw=row_draws(seeds, device),
        )
        was_training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            sums = [
                _score(model, state, canvas.attention_mask, positions, clean, is_real, mask_id)
                for state in states[:-1]
            ]
        finally:
            for module in was_training:
                module.training = True
    return torch.stack(sums)


def _score(
    model: nn.Module,
    state: Tensor,
    attention_mask: Tensor | None,
    positions: Tensor,
    clean: Tensor,
    is_real: Tensor,
    mask_id: int,
) -> Tensor:
    """Return one state's sums [5]; both contexts hide exactly the same slots."""
    own = state.gather(1, positions)  # [B, R]
    masked = own == mask_id
    pristine = state.scatter(1, positions, torch.where(masked, mask_id, clean))
    scored = masked & is_real
    sums = []
    for ids in (pristine, state):
        logits = model(ids, attention_mask=attention_mask, positions=positions).logits.float()
        nll = F.cross_entropy(logits.flatten(0, 1), clean.flatten(), reduction="none")
        sums.append((nll.view_as(scored) * scored).sum(dtype=torch.float64))
    counts = [scored.sum(), masked.sum(), torch.tensor(masked.numel(), device=state.device)]
    return torch.stack([*sums, *(count.double() for count in counts)])
