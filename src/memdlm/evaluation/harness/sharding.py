"""Several processes share requests without talking to each other: all of them make the same plan.

Every process knows all requests and plans the same batches; batch by batch, each goes to the
process with the least work so far. Answers meet in the files of the response cache. Nothing here
knows a model.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from memdlm.errors import UsageError


@dataclass(frozen=True)
class Shard:
    """This process's place among those that share the requests.

    Attributes:
        index: 0 for the first, which gathers the answers.
        count: How many there are.

    Raises:
        UsageError: `index` is not below `count`.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        """Check that the two fit."""
        if not 0 <= self.index < self.count:
            raise UsageError(
                f"shard {self.index} of {self.count}: shards count from 0 to one below their number"
            )

    @classmethod
    def from_environment(cls) -> "Shard":
        """Return the place that torchrun gives a process in RANK and WORLD_SIZE; 0 of 1 without.

        Raises:
            UsageError: The two are no numbers or do not fit.
        """
        given = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        try:
            index, count = map(int, given)
        except ValueError:
            raise UsageError(
                f"the environment has RANK={given[0]} and WORLD_SIZE={given[1]}: both must be "
                "numbers; start the processes with torchrun"
            ) from None
        return cls(index, count)

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Return the place written as `1/4`: the second of four; `environment` asks torchrun's.

        Raises:
            UsageError: The text is neither.
        """
        if text == "environment":
            return cls.from_environment()
        index, slash, count = text.partition("/")
        if not (slash and index.isdigit() and count.isdigit()):
            raise UsageError(f"shard {text!r}: write 0/4 for the first of four processes")
        return cls(int(index), int(count))

    @property
    def name(self) -> str:
        """What files of this process are called, `0-of-4`."""
        return f"{self.index}-of-{self.count}"

    def owns(self, work: Sequence[float]) -> list[bool]:
        """Return which of the batches, given by the work of each, fall to this process.

        Each goes to the process that has the least work by then, the first of those that tie. With
        batches of falling work, shares differ by less than one batch.
        """
        loads = [0.0] * self.count
        owned = []
        for amount in work:
            taker = loads.index(min(loads))
            loads[taker] += amount
            owned.append(taker == self.index)
        return owned


class ShareDone(Exception):
    """This process has answered its share, and another one gathers the answers."""
