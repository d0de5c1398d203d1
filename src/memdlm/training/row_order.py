"""The order of training rows, named by (seed, epoch) like every other random draw.

transformers draws it from the global random state, which a resumed run meets in another state than
the uninterrupted one: it would then skip batches of one order and go on in another. It also groups
by the rows of one process; here the rows of a step over all processes count, so that any number of
processes with equal steps sees the same rows in each.
"""

from collections.abc import Callable, Iterator
from typing import Any, cast

from torch.utils.data import IterableDataset, RandomSampler, Sampler
from transformers.trainer_pt_utils import AcceleratorConfig, LengthGroupedSampler

from memdlm.data.bucketing import LengthBuckets
from memdlm.data.streaming import StreamedDataset
from memdlm.seeding import generator
from memdlm.training.config import MemDLMConfig


class SeededOrder(Sampler[int]):
    """Hands a sampler the same random numbers whenever it draws the same epoch."""

    def __init__(
        self,
        sampler: LengthGroupedSampler | LengthBuckets | RandomSampler,
        seed: int,
        epoch: Callable[[], int],
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


def step_size(args: MemDLMConfig) -> int:
    """Return the rows of one optimizer step over all processes and micro-batches."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def ordered(sampler: Any, args: MemDLMConfig, epoch: Callable[[], int]) -> Any:
    """Return the Trainer's sampler with our random numbers and step size; others as they are."""
    if isinstance(sampler, LengthGroupedSampler):
        if args.length_grouping == "buckets":
            sampler = LengthBuckets(sampler.lengths, step_size(args))
        else:
            sampler.batch_size = step_size(args)
    if isinstance(sampler, LengthGroupedSampler | LengthBuckets | RandomSampler):
        return SeededOrder(sampler, _seed(args), epoch)
    return sampler


def prepare_stream(dataset: object, args: MemDLMConfig) -> None:
    """Arrange a data set without length, if it is one, before the Trainer is built around it."""
    if not isinstance(dataset, IterableDataset):
        return
    # accelerate would have the first process read and broadcast, which our batches, with their part
    # that stays on the host, do not survive: every process reads all and takes its slice.
    settings = cast(AcceleratorConfig, args.accelerator_config)  # made by TrainingArguments
    if settings.dispatch_batches is None:
        settings.dispatch_batches = False
    if isinstance(dataset, StreamedDataset):
        dataset.arrange(step_size(args), _seed(args), str(args.train_sampling_strategy))


def _seed(args: MemDLMConfig) -> int:
    return args.seed if args.data_seed is None else args.data_seed
