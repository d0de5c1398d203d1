"""bAbI's own files, in both of the separators they come with."""

from pathlib import Path

import pytest

from memdlm.data.babi import Question, find_babi_file, read_babi
from memdlm.errors import DataError

STORY = (
    "1 Mary moved to the bathroom.\n"
    "2 John went to the hallway.\n"
    "3 Where is Mary? \tbathroom\t1\n"
    "4 Mary travelled to the office.\n"
    "5 Where is Mary? |office|4\n"
    "1 Sandra went to the garden.\n"
    "2 Where is Sandra?\tgarden\t1 2\n"
)


def test_every_question_comes_with_the_facts_before_it_whatever_the_separator(
    tmp_path: Path,
) -> None:
    path = tmp_path / "qa1_single-supporting-fact_test.txt"
    path.write_text(STORY)
    mary = ("Mary moved to the bathroom.", "John went to the hallway.")
    travelled, sandra = "Mary travelled to the office.", ("Sandra went to the garden.",)
    assert list(read_babi(path)) == [
        Question(mary, "Where is Mary?", "bathroom", mary[:1]),
        Question((*mary, travelled), "Where is Mary?", "office", (travelled,)),
        Question(sandra, "Where is Sandra?", "garden", sandra),
    ]


def test_a_malformed_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "qa1_test.txt"
    path.write_text(STORY + "Mary has no number.\n")
    with pytest.raises(DataError, match=r"qa1_test\.txt line 8: not in bAbI's format"):
        list(read_babi(path))


def test_a_missing_file_is_named_with_its_pattern(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no qa2_\*_test\.txt; give the folder"):
        find_babi_file(tmp_path, "qa2", "test")
