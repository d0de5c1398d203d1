"""Which token a slot would take, and where random numbers come from. Knows no canvas, no model.

Shapes: `B` rows, `P` slots of the block, `V` vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from memdlm.seeding import generator

Draw = Callable[[int, str, int, tuple[int, ...]], Tensor]
"""`draw(row, stream, step, shape)` gives uniform numbers in [0, 1) of `shape`, float64.

`row` is the prompt's place in the batch and `step` counts the row's own steps. Streams are
`"token_choice"` (shape (P, V)), `"unmasking"` (shape (P,)) and `"transfer"` (shape (P,)); a draw
depends on its arguments only, so what one stream or row consumes never moves another.
"""


def row_draws(seeds: Sequence[int], device: torch.device | str = "cpu") -> Draw:
    """Return a draw in which row i's numbers depend on `seeds[i]` and on no other row."""

    def draw(row: int, stream: str, step: int, shape: tuple[int, ...]) -> Tensor:
        source = generator(seeds[row], f"sampling_{stream}", step, device=device)
        return torch.rand(shape, dtype=torch.float64, device=device, generator=source)

    return draw


def suppress(logits: Tensor, token_ids: Sequence[int]) -> Tensor:
    """Return logits [B, P, V] with probability zero for `token_ids`."""
    if not token_ids:
        return logits
    index = torch.tensor(token_ids, dtype=torch.int64, device=logits.device)
    return logits.index_fill(-1, index, float("-inf"))


def keep_likely(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> Tensor:
    """Return logits [B, P, V] with probability zero for all but the likely tokens.

    Args:
        logits: [B, P, V] float32.
        temperature: Divides the logits before `top_p` looks at them; 0 counts as 1.
        top_k: Keep the k best tokens, and those that tie with the last of them.
        top_p: Keep the fewest best tokens, of those that `top_k` left, whose probabilities add up
            to at least this; always the best one.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        last = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < last, float("-inf"))
    if top_p is not None and top_p < 1:
        ordered, index = (logits / (temperature or 1.0)).sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(dim=-1, dtype=torch.float64)
        mass_before = probabilities.cumsum(dim=-1) - probabilities
        dropped = torch.zeros_like(logits, dtype=torch.bool)
        dropped.scatter_(-1, index, mass_before >= top_p)
        # Rounding must not drop the best token, before which there is no mass.
        dropped.scatter_(-1, index[..., :1], False)
        logits = logits.masked_fill(dropped, float("-inf"))
    return logits


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
        scores = logits.to(torch.float64) + temperature * gumbel(uniform())
    else:
        scores = logits.clone()
    scores[..., mask_token_id] = float("-inf")
    return scores.argmax(dim=-1)


def gumbel(uniform: Tensor) -> Tensor:
    """Return standard Gumbel noise from uniform draws in [0, 1), of the same shape and dtype."""
    return -torch.log(-torch.log(uniform))
