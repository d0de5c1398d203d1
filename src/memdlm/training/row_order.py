"""The order of training rows, named by (seed, epoch) like every other random draw.

transformers draws it from the global random state, which a resumed run meets in another state than
the uninterrupted one: it would then skip batches of one order and go on in another.
"""

from collections.abc import Callable, Iterator

from torch.utils.data import RandomSampler, Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from memdlm.seeding import generator


class SeededOrder(Sampler[int]):
    """Hands a sampler the same random numbers whenever it draws the same epoch."""

    def __init__(
        self, sampler: LengthGroupedSampler | RandomSampler, seed: int, epoch: Callable[[], int]
    ) -> None:
        """Wrap `sampler`; `epoch` is asked at the start of every pass."""
        self.sampler, self.seed, self.epoch = sampler, seed, epoch

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        """Yield this epoch's row indices."""
        self.sampler.generator = generator(self.seed, "row_order", self.epoch())
        yield from self.sampler
