"""From a recipe's data section to data sets: split, window, counts, and every refusal."""

import json
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from transformers import PreTrainedTokenizerFast

from memdlm.data.config import DataConfig
from memdlm.data.dataset import DataSplits, EncodedDataset, encode_rows, load_dataset, split_rows
from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.errors import ConfigError, DataError

Tokenizer = PreTrainedTokenizerFast
Write = Callable[..., str]


def rows(*lengths: int) -> list[dict[str, str]]:
    """Rows of that many tokens: a prompt of two, the rest response with its end-of-text token."""
    return [{"prompt": "Where is", "completion": "one " * (n - 3)} for n in lengths]


def load(config: DataConfig, tokenizer: Tokenizer, **options: Any) -> tuple[DataSplits, list[str]]:
    lines: list[str] = []
    return load_dataset(config, tokenizer, echo=lines.append, **options), lines


def fails(config: DataConfig, tokenizer: Tokenizer) -> str:
    with pytest.raises(DataError) as caught:
        load_dataset(config, tokenizer, echo=lambda line: None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_items_label_the_response_and_never_the_prompt(jsonl: Write, words: Tokenizer) -> None:
    path = jsonl([{"prompt": "Where is John ?", "completion": "the garden ."}])
    data, lines = load(DataConfig(train=path, test_fraction=0), words)
    assert data.eval is None
    assert len(lines) == 1
    [item] = list(data.train)  # type: ignore[call-overload]
    assert item["labels"] == [-100] * 4 + item["input_ids"][4:]
    assert words.decode(item["input_ids"][4:]) == "the garden. <|endoftext|>"
    assert type(item["input_ids"][0]) is int
    assert data.train.lengths == [8]
    assert data.train.prompt_lengths == [4]


def test_all_forms_and_files_give_the_same_examples(tmp_path: Path, words: Tokenizer) -> None:
    user, answer = {"role": "user", "content": "Where ?"}, {"role": "assistant", "content": "one"}
    forms: dict[str, list[dict[str, Any]]] = {
        "a": [{"prompt": "Where ?", "completion": "one"}],
        "b": [{"messages": [user, answer]}],
        "c": [{"prompt": [user], "completion": [answer]}],
        "d": [{"instruction": "Where ?", "input": "", "output": "one"}],
    }
    expected = None
    for name, form in forms.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(form[0]))
        (tmp_path / f"{name}.json").write_text(json.dumps(form))
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(form), tmp_path / f"{name}.parquet")
        for suffix in ("jsonl", "json", "parquet"):
            path = str(tmp_path / f"{name}.{suffix}")
            data, _ = load(DataConfig(train=path, test_fraction=0), words)
            expected = expected or data.train[0]
            assert data.train[0] == expected


def test_overlong_rows_are_dropped_and_counted(jsonl: Write, words: Tokenizer) -> None:
    path = jsonl(rows(8, 9, 10, 11, 12))
    data, [line] = load(DataConfig(train=path, test_fraction=0, max_length=10), words)
    report = data.train.report
    assert data.train.lengths == [8, 9, 10]
    assert (report.read, report.kept, report.cut, report.overlong, report.empty) == (5, 3, 0, 2, 0)
    assert (report.num_tokens, report.num_response_tokens) == (27, 21)
    assert (report.shortest, report.longest) == (8, 12)
    assert line == (
        f"train data {path}: 5 rows read, 3 kept, 0 of them cut to 10 tokens; dropped 2 over-long "
        "and 0 empty; 27 tokens, 21 of them in responses, longest row 12"
    )


def test_overlong_rows_are_cut_and_counted(jsonl: Write, words: Tokenizer) -> None:
    long_prompt = {"prompt": "one two three four five six", "completion": "seven eight"}
    path = jsonl([*rows(4, 12), long_prompt])
    config = DataConfig(train=path, test_fraction=0, max_length=5, overlong="truncate")
    data, _ = load(config, words)
    report = data.train.report
    assert (report.read, report.kept, report.cut, report.overlong) == (3, 3, 2, 0)
    assert data.train.lengths == [4, 5, 5]
    item = data.train[2]
    assert words.decode(item["input_ids"]) == "three four five six seven"
    assert [label != -100 for label in item["labels"]] == [False] * 4 + [True]
    for item in (data.train[i] for i in range(3)):
        assert any(label != -100 for label in item["labels"])


def test_empty_responses(jsonl: Write, words: Tokenizer) -> None:
    path = jsonl([*rows(5), {"prompt": "Where", "completion": " \n"}, *rows(6)])
    message = fails(DataConfig(train=path, test_fraction=0), words)
    assert message == (
        f"{path}:2 has an empty response: fill it, remove the row, or set data.on_empty to drop"
    )
    data, _ = load(DataConfig(train=path, test_fraction=0, on_empty="drop"), words)
    assert data.train.lengths == [5, 6]
    assert (data.train.report.read, data.train.report.empty) == (3, 1)


def test_nothing_left(jsonl: Write, words: Tokenizer) -> None:
    path = jsonl(rows(9, 12))
    message = fails(DataConfig(train=path, test_fraction=0, max_length=8), words)
    assert message.startswith(f"no train row is left of 2 from {path} (2 over-long, 0 empty; the")
    assert "shortest has 9 tokens, data.max_length is 8" in message
    assert "set data.overlong to truncate" in message
    empty = jsonl([{"prompt": "a", "completion": ""}], "empty.jsonl")
    config = DataConfig(train=empty, test_fraction=0, on_empty="drop")
    assert "no train row is left of 1" in fails(config, words)
    assert "no eval row is left of 1" in fails(
        DataConfig(train=path, eval=empty, on_empty="drop"), words
    )


def test_held_out_rows_are_those_of_the_papers_split() -> None:
    import datasets

    for size, fraction in [(20, 0.05), (21, 0.05), (7, 0.3), (100, 0.05)]:
        train, test = split_rows(range(size), fraction, 42)
        whole = datasets.Dataset.from_dict({"i": list(range(size))})
        theirs = whole.train_test_split(test_size=fraction, seed=42)
        assert train == theirs["train"]["i"]
        assert test == theirs["test"]["i"]


def test_split_is_disjoint_whole_and_the_same_each_time(jsonl: Write, words: Tokenizer) -> None:
    path = jsonl(rows(*range(4, 44)))
    config = DataConfig(train=path)
    (data, lines), (again, _) = load(config, words), load(config, words)
    assert data.eval is not None and again.eval is not None
    assert len(data.eval) == 2 and len(lines) == 2
    assert sorted(data.train.lengths + data.eval.lengths) == list(range(4, 44))
    assert data.train.lengths == again.train.lengths
    assert data.eval.lengths == again.eval.lengths
    other, _ = load(DataConfig(train=path, split_seed=1), words)
    assert other.train.lengths != data.train.lengths
    # The held-out rows do not depend on the window.
    short, _ = load(DataConfig(train=path, max_length=42), words)
    assert short.eval is not None
    assert short.eval.lengths == [n for n in data.eval.lengths if n <= 42]


def test_named_evaluation_rows_and_limits(jsonl: Write, words: Tokenizer) -> None:
    train, evaluation = jsonl(rows(4, 5, 6, 7)), jsonl(rows(8, 9, 10), "eval.jsonl")
    config = DataConfig(train=train, eval=evaluation, num_rows=3, num_eval_rows=2)
    data, lines = load(config, words)
    assert data.eval is not None
    assert data.train.lengths == [4, 5, 6]
    assert data.eval.lengths == [8, 9]
    assert lines[1].startswith(f"eval data {evaluation}: 2 rows read")


def test_one_row_cannot_be_split(jsonl: Write, words: Tokenizer) -> None:
    message = fails(DataConfig(train=jsonl(rows(5))), words)
    assert "too few rows to hold out 0.05" in message and "data.test_fraction to 0" in message


def test_unknown_words_are_counted(jsonl: Write, words: Tokenizer, chat: Tokenizer) -> None:
    path = jsonl([*rows(5), {"prompt": "stranger", "completion": "one stranger"}])
    data, [line] = load(DataConfig(train=path, test_fraction=0), words)
    assert data.train.report.num_unknown_tokens == 2
    assert line.endswith("; 2 tokens unknown to the tokenizer")
    data, [line] = load(DataConfig(train=path, test_fraction=0), chat)
    assert data.train.report.num_unknown_tokens == 0
    assert line.endswith("longest row 36")


def test_columns_of_ones_own(jsonl: Write, words: Tokenizer) -> None:
    path = jsonl([{"question": "Where", "answer": "one"}])
    assert "'question', 'answer'" in fails(DataConfig(train=path, test_fraction=0), words)
    columns = {"prompt": "question", "completion": "answer"}
    data, _ = load(DataConfig(train=path, test_fraction=0, columns=columns), words)
    assert data.train.lengths == [3]


def test_first_bad_row_of_the_file_is_named(jsonl: Write, words: Tokenizer) -> None:
    """Although the split shuffles: what is told does not depend on its seed."""
    bad = {"prompt": "Where"}
    path = jsonl([*rows(5, 5), bad, *rows(5), bad, bad, bad])
    assert fails(DataConfig(train=path), words).startswith(f"{path}:3 has no column 'completion'")


def test_more_rows_than_one_chunk_keep_their_order(jsonl: Write, words: Tokenizer) -> None:
    lengths = [4 + i % 7 for i in range(150)]
    data, _ = load(DataConfig(train=jsonl(rows(*lengths)), test_fraction=0), words)
    assert data.train.lengths == lengths


def test_window_beyond_the_models_context(jsonl: Write, words: Tokenizer) -> None:
    config = DataConfig(train=jsonl(rows(5, 5)), max_length=513)
    with pytest.raises(ConfigError, match=r"513 exceeds the model's context of 512 tokens: set"):
        load(config, words, context_length=512)
    load(config, words, context_length=513)


def test_tokenizer_without_mask_token(jsonl: Write) -> None:
    tokenizer = build_word_tokenizer(["Where is one"])
    tokenizer.mask_token = None
    message = fails(DataConfig(train=jsonl(rows(5))), tokenizer)
    assert "no mask token" in message and "set tokenizer.mask_token" in message


def test_training_source_must_be_named(words: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"data.train is not set"):
        load(DataConfig(), words)


def test_rows_in_memory(words: Tokenizer) -> None:
    data = encode_rows(rows(5, 6), DataConfig(), words, source="tasks")
    assert isinstance(data, EncodedDataset)
    assert data.lengths == [5, 6]
    with pytest.raises(DataError, match="tasks row 2 has an empty response"):
        encode_rows(rows(5, 3), DataConfig(), words, source="tasks")
    with pytest.raises(DataError, match="tasks holds no rows"):
        encode_rows([], DataConfig(), words, source="tasks")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"format": "csv"}, "data.format is 'csv': choose one of auto, prompt_completion"),
        ({"overlong": "keep"}, "data.overlong is 'keep': choose one of filter, truncate"),
        ({"on_empty": "keep"}, "data.on_empty is 'keep': choose one of error, drop"),
        ({"chat_template": "yes"}, "data.chat_template is 'yes': choose one of auto, never"),
        ({"max_length": 1}, "data.max_length is 1"),
        ({"test_fraction": 1.0}, "data.test_fraction is 1.0"),
        ({"test_fraction": -0.1}, "data.test_fraction is -0.1"),
        ({"num_rows": 0}, "data.num_rows is 0"),
        ({"num_eval_rows": -1}, "data.num_eval_rows is -1"),
        ({"columns": {"answer": "a"}}, "data.columns names 'answer': the standard columns are"),
    ],
)
def test_bad_settings(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        DataConfig(**values)
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)


def test_config_is_frozen_and_explains_every_field() -> None:
    with pytest.raises(FrozenInstanceError):
        DataConfig().max_length = 3  # type: ignore[misc]
    assert all(f.metadata["help"].strip() for f in fields(DataConfig))
