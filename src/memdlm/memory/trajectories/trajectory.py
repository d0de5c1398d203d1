"""What a trajectory is: ordered transitions between states, made without any model (Eq. 5-7).

Shapes: B batch, L length, K inner steps.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from memdlm.diffusion.states import CleanBatch, State
from memdlm.memory.config import MemoryConfig


@dataclass(frozen=True)
class Transition:
    """One inner step: what the student sees, and the less noisy state it should foresee.

    Attributes:
        source: The student's input.
        target: The next state; the teacher's input where a loss has one.
        t: Time that weighs the loss of each row [B] float32.
    """

    source: State
    target: State
    t: torch.Tensor

    def supervised(self, supervision: str) -> torch.Tensor:
        """Return the scored positions [B, L] bool.

        `masked` scores every masked token of the source; `newly_revealed` those that the target
        shows (Eq. 7), which is all of them when the target is clean.
        """
        if supervision == "newly_revealed":
            return self.source.masked & ~self.target.masked
        return self.source.masked


@dataclass(frozen=True)
class Trajectory:
    """The inner loop's curriculum for one batch.

    Attributes:
        transitions: The K inner steps in order.
        anchor: The outer loop's state x_t. A transition whose source *is* this object shares its
            early layers with the outer pass.
    """

    transitions: tuple[Transition, ...]
    anchor: State


@dataclass(frozen=True)
class TrajectoryRequest:
    """All that a builder may look at.

    Attributes:
        batch: Ground truth and maskable positions.
        anchor: The outer state x_t.
        t: The time at which it was drawn [B] float32.
        config: Settings of the memory.
        mask_token_id: Id of the mask token.
        generator: CPU generator of the trajectory stream.
    """

    batch: CleanBatch
    anchor: State
    t: torch.Tensor
    config: MemoryConfig
    mask_token_id: int
    generator: torch.Generator


TrajectoryBuilder = Callable[[TrajectoryRequest], Trajectory]


def chain(states: list[State], times: list[torch.Tensor], final: State) -> tuple[Transition, ...]:
    """Return the transitions from each of `states` to the next one, the last one to `final`."""
    targets = [*states[1:], final]
    return tuple(
        Transition(source, target, t)
        for source, target, t in zip(states, targets, times, strict=True)
    )


def realised_ratio(masked: torch.Tensor, maskable: torch.Tensor) -> torch.Tensor:
    """Return masked / maskable tokens of every row [B] float32 (0 where nothing is maskable)."""
    return masked.sum(dim=1).float() / maskable.sum(dim=1).clamp(min=1).float()
