"""Order rows so that a step's rows have about one length, whatever number of processes share it.

A step is the rows of one optimizer step over all processes and micro-batches. An order is a
function of lengths, step size and random numbers alone: processes take slices of it, so any number
of them that makes up the same step sees the same rows in it.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

# Lengths are compared after a random factor of up to this share, so that neighbours change from
# pass to pass. Rows of a step then differ by about 2 * 0.04, which costs some 4 % of padding.
_JITTER = 0.04


def bucketed_order(
    lengths: Sequence[int] | np.ndarray, step_size: int, draws: torch.Generator
) -> list[int]:
    """Return all row indices, in steps of `step_size` rows of similar length.

    Rows are sorted by length times a random factor within 4 % of 1 and cut into steps; steps follow
    in random order. The step with the longest row comes first, so that a GPU that is too small says
    so at once; one that is not full comes last. Within a step rows go from long to short, so that
    its micro-batches, which are slices of it, have even less padding.

    Args:
        lengths: Tokens of each row, one or more rows.
        step_size: Rows of one optimizer step, 1 or more.
        draws: Random numbers on the CPU; the same state gives the same order.
    """
    lengths = np.asarray(lengths)
    noise = torch.rand(len(lengths), generator=draws, dtype=torch.float64).numpy()
    keys = lengths * (1 + _JITTER * (2 * noise - 1))
    order = np.argsort(-keys, kind="stable")
    num_full, rest = divmod(len(order), step_size)
    # Which step is short is drawn, or it would be the same shortest rows in every pass.
    short = int(torch.randint(num_full + 1, (1,), generator=draws)) * step_size
    last = order[short : short + rest]
    full = np.concatenate([order[:short], order[short + rest :]]).reshape(num_full, step_size)
    full = full[torch.randperm(num_full, generator=draws).numpy()]
    if num_full:
        longest = int(np.argmax(lengths[full].max(axis=1)))
        full[[0, longest]] = full[[longest, 0]]
    steps = [*full, last]
    return [int(i) for step in steps for i in step[np.argsort(-lengths[step], kind="stable")]]


class LengthBuckets(Sampler[int]):
    """Yields `bucketed_order`; `generator` is set before each pass (`SeededOrder` does)."""

    def __init__(self, lengths: Sequence[int], step_size: int) -> None:
        """Order rows of these lengths [tokens] in steps of `step_size` rows."""
        self.lengths = np.asarray(lengths)
        self.step_size = step_size
        self.generator = torch.Generator()

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        """Yield row indices."""
        yield from bucketed_order(self.lengths, self.step_size, self.generator)


def padding_shares(
    order: Sequence[int], lengths: Sequence[int], step_size: int, batch_size: int | None = None
) -> list[float]:
    """Return the share of padding among the tokens of each step: 0 (none) to below 1.

    Args:
        order: Row indices.
        lengths: Tokens of each row.
        step_size: Rows of one optimizer step.
        batch_size: Rows padded together (per device and micro-batch); None: the whole step.
    """
    shares = []
    for start in range(0, len(order), step_size):
        tokens = [lengths[i] for i in order[start : start + step_size]]
        size = batch_size or step_size
        batches = [tokens[i : i + size] for i in range(0, len(tokens), size)]
        shares.append(1 - sum(tokens) / sum(max(batch) * len(batch) for batch in batches))
    return shares
