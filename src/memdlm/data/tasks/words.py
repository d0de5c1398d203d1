"""The closed vocabulary of the generated tasks: names, values and filler sentences.

A value is several syllables, one from each slot's own alphabet. Every syllable occurs in both
splits and only the combinations are disjoint, so a model meets each of its tokens in training and
still has to copy an answer it has never given. Several tokens per answer also let an early wrong
token mislead the later ones, which is the exposure bias the method is about.
"""

import random
from collections.abc import Iterator


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "amber birch cedar clover coral daisy ember fern flint garnet ginger hazel heather holly "
    "indigo iris ivory ivy jade jasper juniper laurel lemon lilac linden lotus maple marble mint "
    "moss myrtle nettle oak olive onyx opal orchid pearl pepper pine plum poppy quartz reed robin "
    "rose ruby rush saffron sage scarlet sienna silver sorrel spruce tansy teal thistle thyme "
    "topaz tulip umber velvet violet walnut wheat willow wren yarrow zinnia"
)

SYLLABLES = (
    _words("ba be bi bo bu da de di do du ka ke ki ko ku ta te ti to tu"),
    _words("la le li lo lu ma me mi mo mu na ne ni no nu ra re ri ro ru"),
    _words("fa fe fi fo fu sa se si so su va ve vi vo vu za ze zi zo zu"),
)
"""One alphabet per slot of a value."""

VALUE_LENGTH = len(SYLLABLES)

KEEP_VERBS = ("keeps", "guards", "hides")
FUNCTION_WORDS = _words(
    ". : ? and is what does keep which word most often note copies joined entered where question "
    "answer the follow adds"
)

PRETRAINING_VERBS = (*KEEP_VERBS, "adds", "entered", "is")
"""Words that stand between a name and a value in the quickstart's pretraining texts."""
PRETRAINING_LINKS = ("copies", "joined")
"""Words that stand between two names there."""

_ADJECTIVES = _words("quiet old bright narrow wooden early distant warm grey gentle")
_NOUNS = _words("river road window garden market bridge cloud lantern field harbour")
_ACTIONS = _words("waited shone drifted turned slept changed faded rested moved grew")
_MANNERS = _words("slowly again today nearby softly later alone twice")
_LINKS = ("beside", "behind", "under")

SHORTEST_FILLER = 4
"""Words of the shortest filler sentence, its full stop included."""

_TEST_SHARE = 4
"""One combination of syllables in this many belongs to the test split."""


def vocabulary() -> Iterator[str]:
    """Yield every word an example of any task, length and split may use, each once."""
    groups = (NAMES, *SYLLABLES, KEEP_VERBS, FUNCTION_WORDS)
    yield from dict.fromkeys(word for group in groups for word in group)
    yield from (w for g in (_ADJECTIVES, _NOUNS, _ACTIONS, _MANNERS, _LINKS) for w in g)


def in_test_split(indices: tuple[int, ...]) -> bool:
    """Tell whether the value made of these syllables belongs to the test split."""
    return sum(indices) % _TEST_SHARE == 0


def draw_values(rng: random.Random, split: str, count: int) -> list[str]:
    """Draw `count` different values of a split, syllables separated by spaces."""
    values: dict[str, None] = {}
    while len(values) < count:
        indices = tuple(rng.randrange(len(alphabet)) for alphabet in SYLLABLES)
        if in_test_split(indices) == (split == "test"):
            value = " ".join(a[i] for a, i in zip(SYLLABLES, indices, strict=True))
            values[value] = None
    return list(values)


def filler_sentence(rng: random.Random, most_words: int) -> list[str]:
    """Return a sentence of no task's words, between `SHORTEST_FILLER` and `most_words` words."""
    adjective, place = rng.choice(_ADJECTIVES), rng.choice(_NOUNS)
    noun, action = rng.choice(_NOUNS), rng.choice(_ACTIONS)
    manner, link = rng.choice(_MANNERS), rng.choice(_LINKS)
    forms = (
        ["the", noun, action, "."],
        ["the", adjective, noun, action, "."],
        ["the", adjective, noun, action, manner, "."],
        ["the", noun, action, link, "the", place, "."],
        ["the", adjective, noun, action, link, "the", place, "."],
    )
    return list(rng.choice([form for form in forms if len(form) <= most_words]))
