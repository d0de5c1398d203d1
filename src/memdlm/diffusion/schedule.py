"""Noise schedules: how much of the response is masked at time t (MemDLM Eq. 1-2, arXiv 2603.22241).

Time runs from 0 (clean) to 1 (fully masked). `alpha(t)` is the probability that a maskable token is
still visible, so the expected mask ratio is `1 - alpha(t)`. Knows nothing of tokens or models.
"""

import math
from abc import ABC, abstractmethod

import torch

from memdlm.errors import ConfigError

# The published code divides by 1 - alpha(t) + 1e-6; the golden losses depend on it at small t.
WEIGHT_EPSILON = 1e-6


class Schedule(ABC):
    """A noise schedule; every method maps a float tensor of any shape to one of the same shape."""

    @abstractmethod
    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        """Return the probability that a maskable token is visible at time `t`."""

    @abstractmethod
    def alpha_derivative(self, t: torch.Tensor) -> torch.Tensor:
        """Return d alpha / dt, which is never positive."""

    def weight(self, t: torch.Tensor) -> torch.Tensor:
        """Return the loss weight omega(t) = -alpha'(t) / (1 - alpha(t) + 1e-6); 1/t when linear."""
        return -self.alpha_derivative(t) / (1 - self.alpha(t) + WEIGHT_EPSILON)

    def reverse_mask_probability(self, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Return the probability that a token masked at `t` is still masked at the earlier `s`."""
        return (1 - self.alpha(s)) / (1 - self.alpha(t))


class LinearSchedule(Schedule):
    """alpha(t) = 1 - t, the schedule of LLaDA and of the paper."""

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        """Return 1 - t."""
        return 1 - t

    def alpha_derivative(self, t: torch.Tensor) -> torch.Tensor:
        """Return -1."""
        return -torch.ones_like(t)


class CosineSchedule(Schedule):
    """alpha(t) = 1 - cos(pi/2 (1 - t)): few masks early, many late."""

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        """Return 1 - cos(pi/2 (1 - t))."""
        return 1 - torch.cos(math.pi / 2 * (1 - t))

    def alpha_derivative(self, t: torch.Tensor) -> torch.Tensor:
        """Return -pi/2 sin(pi/2 (1 - t))."""
        return -(math.pi / 2) * torch.sin(math.pi / 2 * (1 - t))


SCHEDULES: dict[str, type[Schedule]] = {"linear": LinearSchedule, "cosine": CosineSchedule}


def get_schedule(name: str) -> Schedule:
    """Return the schedule called `name`.

    Raises:
        ConfigError: If there is no such schedule.
    """
    if name not in SCHEDULES:
        raise ConfigError(
            f"objective.schedule: unknown schedule {name!r}; choose one of {', '.join(SCHEDULES)}"
        )
    return SCHEDULES[name]()
