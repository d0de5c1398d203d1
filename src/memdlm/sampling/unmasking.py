"""Which masked slots to commit in a step, and how many. Knows no model and no canvas.

A policy is a plain function (probabilities, tokens, uniform) -> confidence: the slots with the
highest confidence are committed. A new policy is one function and one row of
`UNMASKING_POLICIES` (and its name in `sampling.config.POLICIES`).

The policy `independent` ranks nothing: every slot draws the step it is committed in by itself,
before the block is decoded (`transfer_steps`).

Shapes: `B` rows, `P` slots of the block, `V` vocabulary, `K` planned steps of a block.
"""

from collections.abc import Callable

import numpy
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


def most_confident(confidence: Tensor, masked: Tensor, count: int | Tensor) -> Tensor:
    """Return the `count` most confident masked slots of every row, [B, P] bool.

    Equal confidences are committed from left to right, so that a row's order does not depend on
    the batch it is in.

    Args:
        confidence: [B, P] float.
        masked: [B, P] bool; only these are eligible. A row with fewer gives all it has.
        count: Slots per row: one number, or [B] int64.
    """
    eligible = confidence.masked_fill(~masked, float("-inf"))
    order = eligible.argsort(dim=-1, descending=True, stable=True)
    rank = torch.arange(masked.shape[-1], device=masked.device).expand_as(order)
    limit = count.unsqueeze(-1) if isinstance(count, Tensor) else count
    chosen = torch.zeros_like(masked).scatter_(-1, order, rank < limit)
    return chosen & masked


def transfer_schedule(
    num_masked: int, num_steps: int, kind: str = "even", epsilon: float = 1e-3
) -> list[int]:
    """Return how many slots each step commits; the sum is `num_masked`, zeros included.

    Args:
        num_masked: Slots to commit.
        num_steps: Length of the returned list.
        kind: `"even"` spreads them evenly, the remainder first (LLaDA's `generate.py`).
            `"linear"` and `"cosine"` commit the rounded expected count of the noise schedule's
            reverse process, masked x (1 - (1 - alpha(s)) / (1 - alpha(t))) from time t to s.
            `"dream"` rounds it down and leaves the rest to the last step (Dream's
            `diffusion_generate`).
        epsilon: Last time of `"dream"`.
    """
    if kind == "even":
        share, remainder = divmod(num_masked, num_steps)
        return [share + (step < remainder) for step in range(num_steps)]
    counts = []
    if kind == "dream":
        # float32 throughout, as in the official code: the product decides what is cut off.
        for probability in _transfer_probabilities(num_steps, kind, epsilon).numpy():
            count = int(numpy.float32(num_masked) * probability)
            num_masked -= count
            counts.append(count)
        return counts
    for probability in _stays_masked(num_steps, kind).tolist():
        count = min(num_masked, round(num_masked * (1 - probability)))
        num_masked -= count
        counts.append(count)
    return counts


def transfer_steps(uniform: Tensor, kind: str, epsilon: float) -> Tensor:
    """Return the step in which each slot is committed under the policy `independent`.

    A slot still masked at time t is committed on the way to time s with probability
    1 - (1 - alpha(s)) / (1 - alpha(t)), independently of the others; in the last step surely.

    Args:
        uniform: [K, P] float64 draws in [0, 1), one row per planned step.
        kind: As in `transfer_schedule`; `"even"` has the probabilities of `"linear"`.
        epsilon: Last time of `"dream"`.

    Returns:
        [P] int64, from 0 to K - 1.
    """
    probabilities = _transfer_probabilities(len(uniform), kind, epsilon)
    leaves = uniform < probabilities.to(uniform.device, torch.float64).unsqueeze(-1)
    return leaves.to(torch.int64).argmax(dim=0)


def _transfer_probabilities(num_steps: int, kind: str, epsilon: float) -> Tensor:
    """Return the probability that a masked slot is committed, per step: [K] float32, last is 1."""
    if kind == "dream":
        times = torch.linspace(1, epsilon, num_steps + 1)
        probabilities = 1 - times[1:] / times[:-1]
    else:
        probabilities = 1 - _stays_masked(num_steps, "linear" if kind == "even" else kind)
    probabilities[-1] = 1
    return probabilities


def _stays_masked(num_steps: int, kind: str) -> Tensor:
    """Return the probability that a masked slot stays masked, per step: [K] float32."""
    # float32 as in the reference: halves such as 7 x 1/2 round differently in float64.
    times = torch.tensor(
        [(num_steps - step) / num_steps for step in range(num_steps + 1)], dtype=torch.float32
    )
    return get_schedule(kind).reverse_mask_probability(times[1:], times[:-1])
