"""Where a text ends, and that no row ends on what its whole answer does not say."""

import random
from itertools import product
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from memdlm.answer_text import AnswerText, StopStrings
from memdlm.errors import UsageError
from memdlm.sampling.config import SamplingConfig
from tests.byte_tokenizer import Bytes


def test_a_text_is_cut_before_the_first_stop_string() -> None:
    stops = StopStrings(("\n", "the"))
    assert stops.cut("red key\nin the box") == "red key"
    assert stops.cut("in the box\n") == "in "
    assert stops.cut("red key") == "red key"
    assert StopStrings().cut("red\nkey") == "red\nkey"


@pytest.mark.parametrize("strings", [("b",), ("ab", "b"), ("b", "aba", "cab"), ("aab", "ab", "ca")])
def test_a_settled_text_is_cut_alike_however_it_goes_on(strings: tuple[str, ...]) -> None:
    stops, settled = StopStrings(strings), 0
    for letters in product("abc", repeat=6):
        whole = "".join(letters)
        for length in range(7):
            text = whole[:length]
            if stops.is_settled(text):
                settled += 1
                assert stops.cut(text) == stops.cut(whole) == stops.sure(text)
            assert stops.cut(whole).startswith(stops.sure(text))
    assert settled


def test_an_earlier_stop_string_may_still_be_on_its_way() -> None:
    stops = StopStrings(("b", "abc"))
    assert not stops.is_settled("ab")
    assert stops.is_settled("abd")
    assert stops.is_settled("b")
    assert not stops.is_settled("a")


def words(*vocabulary: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer that takes out spaces before punctuation, as older ones do."""
    model = Tokenizer(WordLevel({word: index for index, word in enumerate(vocabulary)}, "?"))
    model.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=model, clean_up_tokenization_spaces=True)


def ends_rightly(tokenizer: Any, stop: str, answers: list[list[int]]) -> int:
    """Check every beginning of the answers on which a row would end; return how many there are."""
    reading = AnswerText.of(tokenizer, [stop], SamplingConfig())
    assert reading.is_complete is not None
    number = 0
    for answer in answers:
        for length in range(len(answer) + 1):
            assert reading.read(answer).startswith(reading.read_begun(answer[:length]))
            if reading.is_complete(0, answer[:length]):
                number += 1
                assert reading.read(answer[:length]) == reading.read(answer)
    return number


def test_a_row_does_not_end_on_half_a_character() -> None:
    text = "die Brücke über den Fluss — 橋\n und weiter"
    for stop in ("\n", "橋", "ü", "\ufffd"):
        ended = ends_rightly(Bytes(), stop, [list(text.encode())])
        assert (ended > 0) == (stop != "\ufffd")


def test_a_row_does_not_end_on_a_space_that_is_taken_out_again() -> None:
    tokenizer = words("red", " ", "key", ".", "'ve", "?")
    assert tokenizer.decode([0, 1, 3, 1, 4]) == "red.'ve"
    draws = random.Random(0)
    answers = [[draws.randrange(6) for _ in range(8)] for _ in range(300)]
    assert ends_rightly(tokenizer, " ", answers) > 100


def test_bad_stop_strings_are_refused() -> None:
    for strings in ("\n", ["red", ""]):
        with pytest.raises(UsageError, match="give a list, and no empty string"):
            AnswerText.of(Bytes(), strings, SamplingConfig())  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="infill fills gaps: choose one"):
        AnswerText.of(Bytes(), ["red"], SamplingConfig(infill=True))  # type: ignore[arg-type]
    reading = AnswerText.of(Bytes(), [], SamplingConfig(infill=True))  # type: ignore[arg-type]
    assert reading.is_complete is None
