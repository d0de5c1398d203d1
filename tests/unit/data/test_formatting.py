"""Rows of every form become dialogues; a row that does not fit is named with what it has."""

from typing import Any

import pytest

from memdlm.data.formatting import (
    REQUIRED_COLUMNS,
    Dialogue,
    detect_format,
    rename_columns,
    to_dialogue,
)
from memdlm.data.readers import Record
from memdlm.errors import DataError

USER = {"role": "user", "content": "q"}
ASSISTANT = {"role": "assistant", "content": "a"}


def dialogue(values: dict[str, Any], row_format: str | None = None) -> Dialogue:
    return to_dialogue(Record(values, "f:1"), row_format or detect_format(values, "f:1"))


def fails(values: dict[str, Any], row_format: str | None = None) -> str:
    with pytest.raises(DataError) as caught:
        dialogue(values, row_format)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("f:1")
    return str(caught.value)


def test_prompt_and_completion_strings_stay_as_they_are() -> None:
    made = dialogue({"prompt": " q ", "completion": " a\n"})
    assert made == Dialogue(({"role": "user", "content": " q "},), " q ", " a\n", "f:1")


def test_messages_split_before_the_last_assistant_turn() -> None:
    system = {"role": "system", "content": "s"}
    last = {"role": "assistant", "content": "b"}
    made = dialogue({"messages": [system, USER, ASSISTANT, USER, last]})
    assert made.messages == (system, USER, ASSISTANT, USER)
    assert made.response == "b"
    assert made.prompt == "s\n\nq\n\na\n\nq\n\n"


@pytest.mark.parametrize("row_format", [None, "conversational", "prompt_completion"])
def test_prompt_and_completion_as_message_lists(row_format: str | None) -> None:
    made = dialogue({"prompt": [USER], "completion": [ASSISTANT]}, row_format)
    assert made == dialogue({"messages": [USER, ASSISTANT]})


@pytest.mark.parametrize(
    ("extra", "user"),
    [
        ({"input": " text\n"}, "do it\n\n text"),
        ({"input": ""}, "do it"),
        ({"input": "  "}, "do it"),
        ({"input": None}, "do it"),
        ({}, "do it"),
    ],
)
def test_alpaca_joins_and_strips(extra: dict[str, Any], user: str) -> None:
    made = dialogue({"instruction": "\ndo it", "output": " done \n", **extra})
    assert made.messages == ({"role": "user", "content": user},)
    assert made.prompt == user + "\n\n"
    assert made.response == "done"


def test_none_keys_of_a_message_are_absent_and_others_are_kept() -> None:
    made = dialogue({"messages": [{**USER, "name": None, "tag": "t"}, ASSISTANT]})
    assert made.messages == ({**USER, "tag": "t"},)


def test_unknown_columns_are_listed_with_the_known_formats() -> None:
    message = fails({"question": "q", "answer": "a"})
    assert "'question', 'answer'" in message and "data.columns" in message
    assert all(name in message for name in REQUIRED_COLUMNS)


def test_columns_that_fit_two_formats_ask_for_a_choice() -> None:
    row = {"messages": [USER, ASSISTANT], "instruction": "i", "output": "o"}
    assert "fits several formats (conversational, alpaca)" in fails(row)
    assert dialogue(row, "alpaca").response == "o"


def test_renamed_columns() -> None:
    columns = {"prompt": "question", "completion": "answer"}
    record = rename_columns(Record({"question": "q", "answer": "a", "id": 3}, "f:1"), columns)
    assert record.values == {"prompt": "q", "completion": "a", "id": 3}
    with pytest.raises(DataError, match=r"f:1 has no column 'question' \(data.columns.prompt\)"):
        rename_columns(Record({"q": "q"}, "f:1"), columns)


@pytest.mark.parametrize(
    ("values", "row_format", "expected"),
    [
        ({"prompt": "q"}, "prompt_completion", "no column 'completion'"),
        ({"prompt": "q"}, "conversational", "no column 'completion'"),
        ({"instruction": "q"}, "alpaca", "no column 'output'"),
        ({"prompt": "q", "completion": None}, None, "nothing (null) as 'completion'"),
        ({"prompt": 3, "completion": "a"}, None, "a int as 'prompt'"),
        ({"prompt": "q", "completion": [ASSISTANT]}, None, "both must be strings, or both lists"),
        ({"prompt": [USER], "completion": [ASSISTANT, USER]}, None, "has 2 messages"),
        ({"messages": "q"}, None, "must be a list of messages"),
        ({"messages": []}, None, "has 0 message(s)"),
        ({"messages": [ASSISTANT]}, None, "has 1 message(s)"),
        ({"messages": [USER, ASSISTANT, USER]}, None, "ends with a message of role 'user'"),
        ({"messages": [USER, {"role": "assistant"}]}, None, "message 2 of 'messages' has no text"),
        ({"messages": [USER, "a"]}, None, "message 2 of 'messages' has no text"),
        ({"messages": [{**USER, "content": [1]}, ASSISTANT]}, None, "message 1 of 'messages'"),
        ({"instruction": 1, "output": "o"}, None, "a int as 'instruction'"),
        ({"instruction": "i", "output": None}, None, "nothing (null) as 'output'"),
    ],
)
def test_unusable_rows_are_named(
    values: dict[str, Any], row_format: str | None, expected: str
) -> None:
    assert expected in fails(values, row_format)
