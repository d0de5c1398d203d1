"""The texts of the quickstart's pretraining: pairs, sentences and notes that repeat.

Knows words and their ids; knows nothing of models or masks. A text is token ids and, beside each,
whether it is part of a value: those are the tokens worth hiding, because another copy tells them.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from memdlm.data.tasks.words import (
    NAMES,
    PRETRAINING_LINKS,
    PRETRAINING_VERBS,
    SYLLABLES,
    filler_sentence,
    vocabulary,
)
from memdlm.errors import DataError

SHORTEST_TEXT = 24
"""Tokens of a text of adjacent pairs, the first stage."""

GAP_TEXT = 36
"""Tokens of a text of pairs with words between; holds two whole sets of pairs of any gap."""

COPIES = 3
"""Times each pair stands in a text of pairs."""

Text = tuple[list[int], list[bool]]
"""Token ids, and which of them are values that may be masked."""


@dataclass(frozen=True)
class Words:
    """Token ids of the words that texts are made of, by role."""

    any_word: list[int]
    extra: list[int]
    names: list[int]
    slots: list[list[int]]
    verbs: list[int]
    links: list[int]
    stop: int
    encode: Callable[[str], int]

    @property
    def values(self) -> list[int]:
        """Every token that can be a value."""
        return [*self.names, *(token for slot in self.slots for token in slot), *self.extra]


def collect_words(tokenizer: Any) -> Words:
    """Look up the ids of the words that texts are made of.

    Raises:
        DataError: The tokenizer lacks a word.
    """
    known = tokenizer.get_vocab()
    missing = [word for word in vocabulary() if word not in known]
    if missing:
        raise DataError(
            f"the tokenizer lacks {len(missing)} words of the tasks, e.g. {missing[0]!r}; "
            "build it with memdlm.data.tasks.vocabulary()"
        )

    def ids(group: tuple[str, ...]) -> list[int]:
        return [known[word] for word in group]

    # Words of other texts take part in the pairs: each has to be learned as key and as value.
    others = set(known) - set(vocabulary()) - set(tokenizer.all_special_tokens)
    extra = ids(tuple(sorted(others)))
    return Words(
        any_word=[*ids(tuple(vocabulary())), *extra],
        extra=extra,
        names=ids(NAMES),
        slots=[ids(slot) for slot in SYLLABLES],
        verbs=ids(PRETRAINING_VERBS),
        links=ids(PRETRAINING_LINKS),
        stop=known["."],
        encode=known.__getitem__,
    )


def pairs(rng: random.Random, words: Words, length: int, gap: int) -> Text:
    """Return shuffled copies of a few (key, value) pairs, `gap` verbs between key and value."""
    count = length // (COPIES * (2 + gap))
    keys = rng.sample(words.any_word, count)
    items = [(key, rng.choice(words.values)) for key in keys] * COPIES
    rng.shuffle(items)
    ids: list[int] = []
    is_value: list[bool] = []
    for key, value in items:
        ids += [key, *rng.choices(words.verbs, k=gap), value]
        is_value += [False] * (1 + gap) + [True]
    return ids, is_value


def sentences(rng: random.Random, words: Words, length: int) -> Text:
    """Return `length` tokens of sentences that stand two or three times, filler between them."""
    parts: list[Text] = []
    total = 0
    names = rng.sample(words.names, len(words.names))
    while total < length and names:
        key, is_link = names.pop(), rng.random() < 0.3
        value = [rng.choice(words.names)] if is_link else [rng.choice(slot) for slot in words.slots]
        flags = [False, False, *[True] * len(value), False]
        for _ in range(rng.choice((2, 3))):
            verb = rng.choice(words.links if is_link else words.verbs)
            parts.append(([key, verb, *value, words.stop], flags))
            total += len(flags)
        if rng.random() < 0.5:
            total += _add_filler(rng, words, parts)
    while total < length:
        total += _add_filler(rng, words, parts)
    return _shuffle_and_cut(rng, parts, length)


def notes(rng: random.Random, words: Words, length: int) -> Text:
    """Return `length` tokens of noted values, one of them noted far more often than the others."""
    start = [words.encode("note"), words.encode(":")]
    common = [rng.choice(slot) for slot in words.slots]
    share = rng.uniform(0.25, 0.5)
    parts: list[Text] = []
    total = 0
    while total < length:
        is_common = rng.random() < share
        value = common if is_common else [rng.choice(slot) for slot in words.slots]
        flags = [False, False, *[True] * len(value), False]
        parts.append(([*start, *value, words.stop], flags))
        total += len(flags)
        if rng.random() < 0.5:
            total += _add_filler(rng, words, parts)
    return _shuffle_and_cut(rng, parts, length)


def _shuffle_and_cut(rng: random.Random, parts: list[Text], length: int) -> Text:
    rng.shuffle(parts)
    ids = [token for tokens, _ in parts for token in tokens]
    is_value = [flag for _, flags in parts for flag in flags]
    return ids[:length], is_value[:length]


def _add_filler(rng: random.Random, words: Words, parts: list[Text]) -> int:
    filler = [words.encode(word) for word in filler_sentence(rng, most_words=8)]
    parts.append((filler, [False] * len(filler)))
    return len(filler)
