"""Needles' words are the entries of the sorted list of all pairs, without the list."""

import pytest
from wonderwords import RandomWord

from memdlm.evaluation.tasks.ruler.words import HyphenatedPairs, list_words


def test_adjectives_that_continue_each_other_are_sorted_among_each_other() -> None:
    pairs = HyphenatedPairs(["red", "blue-eyed", "blue", "ad hoc", "blue"], ["fox", "ant", "zoo"])
    assert list(pairs) == [
        *("ad hoc-ant", "ad hoc-fox", "ad hoc-zoo"),
        *("blue-ant", "blue-eyed-ant", "blue-eyed-fox", "blue-eyed-zoo", "blue-fox", "blue-zoo"),
        *("red-ant", "red-fox", "red-zoo"),
    ]
    assert pairs[-1] == "red-zoo"
    assert pairs[2:5] == ["ad hoc-zoo", "blue-ant", "blue-eyed-ant"]
    with pytest.raises(IndexError):
        pairs[len(pairs)]


def test_the_pairs_are_those_of_the_sorted_list() -> None:
    words = RandomWord(enhanced_prefixes=False).parts_of_speech
    nouns = words["nouns"][::80]
    expected = sorted({f"{a}-{noun}" for a in words["adjectives"] for noun in nouns})
    assert list(HyphenatedPairs(words["adjectives"], nouns)) == expected


def test_a_word_of_several_kinds_is_listed_once() -> None:
    words = list_words()
    assert list(words) == sorted(set(words))
    assert len(words) > 8000
