"""Forward corruption: from clean tokens to noisier states, and partly back (MemDLM Eq. 1, 5).

All functions work on the CPU with an explicit generator, change nothing in place, and touch only
maskable positions. Shapes: B batch, L length.
"""

import torch

from memdlm.diffusion.schedule import Schedule
from memdlm.diffusion.states import CleanBatch, State


def draw_time(batch_size: int, epsilon: float, generator: torch.Generator) -> torch.Tensor:
    """Draw t ~ U(epsilon, 1), one per row [B] float32; epsilon keeps the weight 1/t finite."""
    return epsilon + (1 - epsilon) * torch.rand(batch_size, generator=generator)


def corrupt(
    batch: CleanBatch,
    t: torch.Tensor,
    schedule: Schedule,
    mask_token_id: int,
    generator: torch.Generator,
) -> State:
    """Mask every maskable token on its own with probability 1 - alpha(t), t [B] in [0, 1]."""
    draws = torch.rand(batch.clean.shape, generator=generator)
    masked = batch.maskable & (draws < (1 - schedule.alpha(t))[:, None])
    return batch.state(masked, mask_token_id)


def mask_more(
    masked: torch.Tensor, maskable: torch.Tensor, count: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Return a superset of `masked` [B, L] with `count` [B] hidden positions per row.

    The extra positions are a uniformly random subset of the maskable visible ones.
    """
    extra = count - masked.sum(dim=1)
    return masked | _random_subset(maskable & ~masked, extra, generator)


def reveal(masked: torch.Tensor, count: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return a uniformly random subset of `masked` [B, L] with `count` [B] positions per row."""
    return _random_subset(masked, count, generator)


def _random_subset(
    candidates: torch.Tensor, count: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Choose `count` [B] of the true positions of `candidates` [B, L] in every row."""
    # Rank random keys; candidates get keys below 1 and all others come after them.
    keys = torch.rand(candidates.shape, generator=generator).masked_fill(~candidates, 2.0)
    ranks = keys.argsort(dim=1).argsort(dim=1)
    return candidates & (ranks < count[:, None])
