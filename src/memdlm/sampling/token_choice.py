"""Which token a slot would take, and where random numbers come from. Knows no canvas, no model.

Shapes: `B` rows, `P` slots of the block, `V` vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from memdlm.seeding import generator

Draw = Callable[[str, int, tuple[int, ...]], Tensor]
"""`draw(stream, step, shape)` gives uniform numbers in [0, 1), [B, *shape] float64.

Streams are `"token_choice"` (shape (P, V)) and `"unmasking"` (shape (P,)); a draw depends on its
arguments only, so what one stream consumes never moves the other.
"""


def row_draws(seeds: Sequence[int], device: torch.device | str = "cpu") -> Draw:
    """Return a draw in which row i's numbers depend on `seeds[i]` and on no other row."""

    def draw(stream: str, step: int, shape: tuple[int, ...]) -> Tensor:
        rows = [
            torch.rand(
                shape,
                dtype=torch.float64,
                device=device,
                generator=generator(seed, f"sampling_{stream}", step, device=device),
            )
            for seed in seeds
        ]
        return torch.stack(rows)

    return draw


def suppress(logits: Tensor, token_ids: Sequence[int]) -> Tensor:
    """Return logits [B, P, V] with probability zero for `token_ids`."""
    if not token_ids:
        return logits
    index = torch.tensor(token_ids, dtype=torch.int64, device=logits.device)
    return logits.index_fill(-1, index, float("-inf"))


def choose_tokens(
    logits: Tensor, temperature: float, mask_token_id: int, uniform: Callable[[], Tensor]
) -> Tensor:
    """Return the token of every slot, [B, P] int64: the best one, or a sample by Gumbel-max.

    The mask token is never chosen: a committed slot would still read as masked. It keeps its
    share of the probabilities, so that confidences are those of the official sampler.

    Args:
        logits: [B, P, V] float32.
        temperature: 0 is greedy. Noise is float64 because float32 Gumbel noise distorts the
            distribution (arXiv 2409.02908).
        mask_token_id: Token that may not be chosen.
        uniform: Gives [B, P, V] float64 uniform draws; called only when temperature > 0.
    """
    if temperature > 0:
        # argmax of exp(logits) / (-log u)^temperature, in logs so that exp cannot overflow.
        scores = logits.to(torch.float64) - temperature * torch.log(-torch.log(uniform()))
    else:
        scores = logits.clone()
    scores[..., mask_token_id] = float("-inf")
    return scores.argmax(dim=-1)
