"""Turn a row of any supported form into one dialogue: the turns before the response, the response.

Forms (the columns tell which, or `DataConfig.format` names it):

- prompt_completion: `prompt` and `completion`, both strings;
- conversational: `messages`, a list of {role, content} that ends with the assistant's turn, or
  `prompt` and `completion` as such lists;
- alpaca: `instruction`, `input` (may be missing or empty) and `output`; user = instruction, blank
  line, input; assistant = output; both stripped (the paper's LongAlpaca set-up).

Only the last assistant turn is the response. This file knows no tokenizer.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memdlm.data.config import DataConfig
from memdlm.data.readers import Record
from memdlm.errors import DataError

Message = dict[str, Any]

# The columns that make a form, besides optional ones. Both prompt forms share theirs: the type of
# the first row's prompt tells a string from a list of messages.
REQUIRED_COLUMNS = {
    "prompt_completion": ("prompt", "completion"),
    "conversational": ("messages",),
    "alpaca": ("instruction", "output"),
}


@dataclass(frozen=True, slots=True)
class Dialogue:
    """One training example as text.

    Attributes:
        messages: The turns before the response, for a chat template.
        prompt: The same as bare text, for a tokenizer without one.
        response: What the model learns to write; may be empty, the caller decides.
        where: Place of the row, for messages.
    """

    messages: tuple[Message, ...]
    prompt: str
    response: str
    where: str


def to_dialogues(records: Iterable[Record], config: DataConfig) -> Iterator[Dialogue]:
    """Convert rows in their order, so that the first bad one is the one named.

    Those of an empty response come too, unless `config.on_empty` makes them errors.

    Raises:
        DataError: A row cannot be used.
    """
    row_format = config.format
    for record in records:
        row = rename_columns(record, config.columns)
        if row_format == "auto":
            row_format = detect_format(row.values, row.where)
        dialogue = to_dialogue(row, row_format)
        if config.on_empty == "error" and not dialogue.response.strip():
            raise DataError(
                f"{record.where} has an empty response: fill it, remove the row, or set "
                "data.on_empty to drop"
            )
        yield dialogue


def rename_columns(record: Record, columns: Mapping[str, str]) -> Record:
    """Return the row under the standard names; `columns` maps a standard name to the row's own."""
    if not columns:
        return record
    values = dict(record.values)
    for standard, own in columns.items():
        if own not in values:
            raise DataError(
                f"{record.where} has no column {own!r} (data.columns.{standard}): it has "
                f"{_names(record.values)}"
            )
        values[standard] = values.pop(own)
    return Record(values, record.where)


def detect_format(columns: Iterable[str], where: str) -> str:
    """Return the one form that the columns fit.

    Raises:
        DataError: They fit none, or more than one.
    """
    found = list(columns)
    fits = [name for name, needed in REQUIRED_COLUMNS.items() if set(needed) <= set(found)]
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise DataError(
            f"{where} fits several formats ({', '.join(fits)}): set data.format to one of them"
        )
    known = "; ".join(f"{name}: {', '.join(cols)}" for name, cols in REQUIRED_COLUMNS.items())
    raise DataError(
        f"{where} has the columns {_names(found)}, which fit no format ({known}): rename them with "
        "data.columns"
    )


def to_dialogue(record: Record, row_format: str) -> Dialogue:
    """Return a row, in standard column names, as a dialogue.

    Raises:
        DataError: A column is missing or of the wrong type; names the row.
    """
    values, where = record.values, record.where
    if row_format == "conversational" and "messages" not in values:
        needed: Sequence[str] = REQUIRED_COLUMNS["prompt_completion"]
    else:
        needed = REQUIRED_COLUMNS[row_format]
    for name in needed:
        if name not in values:
            raise DataError(
                f"{where} has no column {name!r}, which {row_format} rows need: it has "
                f"{_names(values)}"
            )
    if row_format == "alpaca":
        return _from_alpaca(values, where)
    if "messages" in needed:
        return _from_messages(_messages(values, "messages", where), where)
    prompt, completion = values["prompt"], values["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return Dialogue(user_turn(prompt), prompt, completion, where)
    if isinstance(prompt, list) and isinstance(completion, list):
        if len(completion) != 1:
            raise DataError(
                f"{where} has {len(completion)} messages in 'completion': it must be the one "
                "assistant turn to learn; move earlier turns to 'prompt'"
            )
        turns = _messages(values, "prompt", where) + _messages(values, "completion", where)
        return _from_messages(turns, where)
    raise DataError(
        f"{where} has {_type(prompt)} as 'prompt' and {_type(completion)} as 'completion': both "
        "must be strings, or both lists of messages"
    )


def user_turn(text: str) -> tuple[Message, ...]:
    """Return the conversation that consists of one user turn."""
    return ({"role": "user", "content": text},)


def plain_text(messages: Sequence[Message]) -> str:
    """Return a conversation as bare text: each turn's content, then a blank line; no roles."""
    return "".join(f"{message['content']}\n\n" for message in messages)


def _from_alpaca(values: Mapping[str, Any], where: str) -> Dialogue:
    instruction = _string(values, "instruction", where)
    extra = "" if values.get("input") is None else _string(values, "input", where)
    user = f"{instruction}\n\n{extra}".strip() if extra.strip() else instruction.strip()
    messages = user_turn(user)
    response = _string(values, "output", where).strip()
    return Dialogue(messages, plain_text(messages), response, where)


def _from_messages(messages: list[Message], where: str) -> Dialogue:
    if len(messages) < 2:
        raise DataError(
            f"{where} has {len(messages)} message(s): a conversation needs a turn before the "
            "assistant's"
        )
    *before, last = messages
    if last["role"] != "assistant":
        raise DataError(
            f"{where} ends with a message of role {last['role']!r}: the last turn must be the "
            "assistant's, it is the one to learn"
        )
    return Dialogue(tuple(before), plain_text(before), last["content"], where)


def _messages(values: Mapping[str, Any], name: str, where: str) -> list[Message]:
    messages = values[name]
    if not isinstance(messages, list):
        raise DataError(f"{where} has {_type(messages)} as {name!r}: it must be a list of messages")
    checked = []
    for number, message in enumerate(messages, start=1):
        for key in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(key), str):
                raise DataError(
                    f"{where}, message {number} of {name!r} has no text under {key!r}: each "
                    "message is {role: ..., content: ...} with strings"
                )
        # Parquet gives every message every key of the column; None means absent.
        checked.append({key: value for key, value in message.items() if value is not None})
    return checked


def _string(values: Mapping[str, Any], name: str, where: str) -> str:
    value = values[name]
    if not isinstance(value, str):
        raise DataError(f"{where} has {_type(value)} as {name!r}: it must be a string")
    return value


def _names(columns: Iterable[str]) -> str:
    return ", ".join(map(repr, columns)) or "none"


def _type(value: object) -> str:
    return "nothing (null)" if value is None else f"a {type(value).__name__}"
