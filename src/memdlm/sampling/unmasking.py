"""Which masked slots to commit in a step, and how many. Knows no model and no canvas.

A policy is a plain function (probabilities, tokens, uniform) -> confidence: the slots with the
highest confidence are committed. A new policy is one function and one row of
`UNMASKING_POLICIES` (and its name in `sampling.config.POLICIES`).

Shapes: `B` rows, `P` slots of the block, `V` vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from memdlm.diffusion.schedule import get_schedule

UnmaskingPolicy = Callable[[Tensor, Tensor, Callable[[], Tensor]], Tensor]


def low_confidence(probabilities: Tensor, tokens: Tensor, uniform: Callable[[], Tensor]) -> Tensor:
    """Rank by the probability of the chosen token (LLaDA's low-confidence remasking)."""
    return probabilities.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def random(probabilities: Tensor, tokens: Tensor, uniform: Callable[[], Tensor]) -> Tensor:
    """Rank by uniform draws; `uniform()` gives them, [B, P]."""
    return uniform()


def margin(probabilities: Tensor, tokens: Tensor, uniform: Callable[[], Tensor]) -> Tensor:
    """Rank by the gap between the two most probable tokens."""
    best = probabilities.topk(2, dim=-1).values
    return best[..., 0] - best[..., 1]


def entropy(probabilities: Tensor, tokens: Tensor, uniform: Callable[[], Tensor]) -> Tensor:
    """Rank by negative entropy, in nats: the most peaked distribution first."""
    return -torch.special.entr(probabilities).sum(dim=-1)


UNMASKING_POLICIES: dict[str, UnmaskingPolicy] = {
    "low_confidence": low_confidence,
    "random": random,
    "margin": margin,
    "entropy": entropy,
}


def most_confident(confidence: Tensor, masked: Tensor, count: int) -> Tensor:
    """Return the `count` most confident masked slots of every row, [B, P] bool.

    Equal confidences are committed from left to right, so that a row's order does not depend on
    the batch it is in.

    Args:
        confidence: [B, P] float.
        masked: [B, P] bool; only these are eligible. A row with fewer gives all it has.
        count: Slots per row.
    """
    eligible = confidence.masked_fill(~masked, float("-inf"))
    order = eligible.argsort(dim=-1, descending=True, stable=True)
    chosen = torch.zeros_like(masked).scatter_(-1, order[:, :count], True)
    return chosen & masked


def transfer_schedule(num_masked: int, num_steps: int, kind: str = "even") -> list[int]:
    """Return how many slots each step commits; the sum is `num_masked`, zeros included.

    Args:
        num_masked: Slots to commit.
        num_steps: Length of the returned list.
        kind: `"even"` spreads them evenly, the remainder first (LLaDA's `generate.py`).
            `"linear"` and `"cosine"` commit the rounded expected count of the noise schedule's
            reverse process, masked x (1 - (1 - alpha(s)) / (1 - alpha(t))) from time t to s.
    """
    if kind == "even":
        share, remainder = divmod(num_masked, num_steps)
        return [share + (step < remainder) for step in range(num_steps)]
    schedule = get_schedule(kind)
    # float32 as in the reference: halves such as 7 x 1/2 round differently in float64.
    times = torch.tensor(
        [(num_steps - step) / num_steps for step in range(num_steps + 1)], dtype=torch.float32
    )
    stays_masked = schedule.reverse_mask_probability(times[1:], times[:-1])
    counts = []
    for probability in stays_masked.tolist():
        count = min(num_masked, round(num_masked * (1 - probability)))
        num_masked -= count
        counts.append(count)
    return counts
