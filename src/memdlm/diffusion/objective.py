"""The weighted masked-token objective: weights and normalisers for both loops, in one place.

Every choice is expressed as one number per token, so that a loss is always
`sum(coefficient * token_loss)` (MemDLM Eq. 3, 8 and 10):

    coefficient[b, l] = supervised[b, l] * omega(t[b]) / normaliser[b]

Shapes: B batch, L length. All float32 on the CPU, computed before the step starts.
"""

from dataclasses import dataclass, field

import torch

from memdlm.diffusion.schedule import SCHEDULES, get_schedule
from memdlm.errors import ConfigError

WEIGHTINGS = ("schedule", "uniform")
NORMALISERS = ("token", "sequence", "batch", "reference_sequence")
PADDINGS = ("supervised", "excluded", "excluded_inner")


@dataclass(frozen=True)
class ObjectiveConfig:
    """How the outer loss is drawn and normalised; schedule and padding hold for both loops."""

    schedule: str = field(
        default="linear",
        metadata={"help": "Noise schedule alpha(t): linear (LLaDA, the paper) or cosine."},
    )
    weighting: str = field(
        default="schedule",
        metadata={"help": "Weight omega(t) of a row: schedule (1/t when linear) or uniform (1)."},
    )
    normaliser: str = field(
        default="token",
        metadata={
            "help": "Divide the outer loss by all maskable tokens of the batch (token, published "
            "code), by those of each row and then by rows (sequence), or by rows only (batch)."
        },
    )
    padding: str = field(
        default="supervised",
        metadata={
            "help": "Padding after the response: supervised as end-of-text (published code), "
            "excluded from attention and both losses, or excluded_inner (inner loop only)."
        },
    )
    logits_budget: int = field(
        default=256,
        metadata={
            "help": "MiB that logits may take at a time, in float32; both loops compute head and "
            "loss in chunks of as many tokens. What a loss holds beside them is about twice that."
        },
    )
    time_epsilon: float = field(
        default=1e-3,
        metadata={"help": "Smallest t drawn; the paper draws t from U(1e-3, 1)."},
    )

    def __post_init__(self) -> None:
        """Check every value against its table or range."""
        for name, allowed in (
            ("schedule", tuple(SCHEDULES)),
            ("weighting", WEIGHTINGS),
            ("normaliser", NORMALISERS),
            ("padding", PADDINGS),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"objective.{name}: {getattr(self, name)!r} is not one of {', '.join(allowed)}"
                )
        if not isinstance(self.logits_budget, int) or self.logits_budget < 1:
            raise ConfigError(
                f"objective.logits_budget: {self.logits_budget} is not a whole number of MiB, at "
                "least 1; use 256"
            )
        if not 0 < self.time_epsilon < 1:
            raise ConfigError(
                f"objective.time_epsilon: {self.time_epsilon} is not between 0 and 1; use 1e-3"
            )

    @property
    def logits_budget_bytes(self) -> int:
        """`logits_budget` in bytes."""
        return self.logits_budget * 2**20


def row_weights(t: torch.Tensor, weighting: str, schedule: str) -> torch.Tensor:
    """Return the weight of every row [B] float32 for its time `t` [B]."""
    if weighting == "uniform":
        return torch.ones_like(t)
    return get_schedule(schedule).weight(t)


def coefficients(
    supervised: torch.Tensor,
    counted: torch.Tensor,
    weights: torch.Tensor,
    normaliser: str,
    *,
    rows_are_independent: bool = False,
) -> torch.Tensor:
    """Return the factor of every token's loss [B, L] float32; zero where nothing is supervised.

    Args:
        supervised: Positions whose loss counts [B, L] bool.
        counted: Positions that the normaliser counts [B, L] bool: all maskable ones in the outer
            loop, the supervised ones in the inner loop (as published).
        weights: omega(t) per row [B] float32.
        normaliser: `token`: all counted tokens of the batch. `sequence`: those of the row, then the
            number of rows. `batch`: the number of rows. `reference_sequence`: those of the row,
            *times* the number of rows, a quirk of the published inner loop.
        rows_are_independent: Normalise each row as if it were alone in the batch, which is what one
            memory per sequence means.

    Raises:
        ConfigError: If `normaliser` is unknown.
    """
    rows = 1 if rows_are_independent else supervised.shape[0]
    per_row = counted.sum(dim=1).float()
    per_batch = per_row if rows_are_independent else per_row.sum().expand_as(per_row)
    if normaliser == "token":
        divisor = per_batch.clamp(min=1)
    elif normaliser == "sequence":
        divisor = per_row.clamp(min=1) * rows
    elif normaliser == "batch":
        divisor = torch.full_like(per_row, rows)
    elif normaliser == "reference_sequence":
        divisor = per_row.clamp(min=1) / rows
    else:
        raise ConfigError(f"normaliser: {normaliser!r} is not one of {', '.join(NORMALISERS)}")
    return supervised * (weights / divisor)[:, None]
