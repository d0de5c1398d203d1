"""Sizes are those of a scan that counts every document, though few are counted."""

import random
from dataclasses import dataclass

import pytest

from memdlm.errors import DataError
from memdlm.evaluation.tasks.ruler.fitting import (
    TooShortError,
    find_size,
    fit,
    shrinking,
)


@dataclass(frozen=True)
class Words:
    """A document of a number of words; its answer is one more."""

    number: int

    def text(self) -> str:
        return " ".join(["word"] * self.number)

    def solved(self) -> str:
        return self.text() + " answer"


class Counter:
    """Counts words, and how often it is asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, text: str) -> int:
        self.calls += 1
        return len(text.split())


@pytest.mark.parametrize("seed", range(20))
def test_the_size_is_that_of_a_scan_that_counts_every_document(seed: int) -> None:
    rng = random.Random(seed)
    # A fixed part, some 4 tokens a unit, and chance of the order of its square root.
    numbers = [200 + round(4 * size + rng.gauss(0, 2) * size**0.5) for size in range(6000)]
    room, step = 500 + 700 * seed, (5, 10, 25)[seed % 3]
    scanned = step
    while numbers[scanned] + 1 <= room:
        scanned += step
    count = Counter()
    drawn: list[int] = []

    def draw(size: int) -> Words:
        drawn.append(size)
        return Words(numbers[size])

    assert find_size(draw, count, room, step=step) == scanned - step
    assert drawn == list(range(step, scanned + 1, step)), "every size draws, for the generators"
    assert count.calls <= 10 + len(drawn) // 5


@pytest.mark.parametrize(
    ("room", "size"),
    [(40, 30), (41, 50), (45, 40), (10, 0), (11, 20), (5, 0)],
)
def test_an_exact_fit_is_a_step_more_as_lm_eval_has_it(room: int, size: int) -> None:
    assert find_size(Words, Counter(), room, step=10) == size


def test_a_size_never_exceeds_the_most() -> None:
    assert find_size(Words, Counter(), 1000, step=10, most=55) == 55
    assert find_size(Words, Counter(), 51, step=10, most=55) == 55


@pytest.mark.parametrize("tokens", [0, 3])
def test_documents_that_never_grow_end_the_search(tokens: int) -> None:
    with pytest.raises(DataError, match=f"counts {tokens} tokens in a document of more than 200"):
        find_size(Words, lambda text: tokens, 100, step=10)


def test_sizes_shrink_in_steps_and_then_one_by_one() -> None:
    assert shrinking(23, 10) == [23, 13, 3, 2, 1]
    assert shrinking(30, 10, least=8) == [30, 20, 10, 9, 8]
    assert shrinking(1, 500) == [1]


def test_the_first_document_that_fits_is_taken() -> None:
    draft, tokens = fit(Words, Counter(), 12, shrinking(23, 10))
    assert (draft, tokens) == (Words(3), 3)


def test_a_length_that_holds_no_document_says_by_how_much() -> None:
    with pytest.raises(TooShortError) as caught:
        fit(lambda size: Words(100 + size), Counter(), 60, shrinking(23, 10))
    assert caught.value.excess == 41
