"""The words of RULER's documents: those of the package `wonderwords`, as the benchmark uses them.

Another release of that package may hold other words; lm-eval's prompts change with it too.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import accumulate
from typing import overload

from memdlm.errors import UsageError


@cache
def needle_words() -> "HyphenatedPairs":
    """Return the six million words that needles are named by, `adjective-noun`."""
    return HyphenatedPairs(_category("adjective"), _category("noun"))


@cache
def list_words() -> tuple[str, ...]:
    """Return every noun, adjective and verb once, sorted: the words of the numbered lists."""
    kinds = ("noun", "adjective", "verb")
    return tuple(sorted({word for kind in kinds for word in _category(kind)}))


class HyphenatedPairs(Sequence[str]):
    """All `adjective-noun` in code point order, each made when asked for.

    The list itself would take seconds and half a gigabyte; a document needs a few of its entries.
    """

    def __init__(self, adjectives: Iterable[str], nouns: Iterable[str]) -> None:
        """Sort the parts."""
        self._nouns = sorted(set(nouns))
        # A block is one adjective, unless others continue it with a hyphen (blue, blue-eyed): their
        # words come mixed, so that block is a list.
        self._blocks: list[str | list[str]] = []
        for group in _groups(adjectives):
            if len(group) == 1:
                self._blocks.append(group[0])
            else:
                self._blocks.append(sorted({f"{a}-{noun}" for a in group for noun in self._nouns}))
        sizes = (len(self._nouns) if isinstance(b, str) else len(b) for b in self._blocks)
        self._starts = list(accumulate(sizes, initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        number = bisect_right(self._starts, place) - 1
        block, rest = self._blocks[number], place - self._starts[number]
        return f"{block}-{self._nouns[rest]}" if isinstance(block, str) else block[rest]


def _groups(adjectives: Iterable[str]) -> list[list[str]]:
    groups: list[list[str]] = []
    # With the hyphen, since it is what decides between a word and a longer one that begins so.
    for adjective in sorted(set(adjectives), key=lambda word: word + "-"):
        if groups and adjective.startswith(groups[-1][0] + "-"):
            groups[-1].append(adjective)
        else:
            groups.append([adjective])
    return groups


def _category(kind: str) -> list[str]:
    try:
        from wonderwords import RandomWord
    except ImportError as error:
        raise UsageError("RULER needs the extra `eval`: pip install 'memdlm[eval]'") from error
    return list(RandomWord(enhanced_prefixes=False).parts_of_speech[kind])
