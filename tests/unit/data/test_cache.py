"""Encoded rows on disk: reused for the same content, never for other, rebuilt when damaged."""

import errno
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerFast

from memdlm.data import cache as cache_module
from memdlm.data import dataset as dataset_module
from memdlm.data.cache import cache_file
from memdlm.data.config import DataConfig
from memdlm.data.dataset import EncodedDataset, load_dataset
from memdlm.data.tokenizer import build_word_tokenizer

Tokenizer = PreTrainedTokenizerFast
ROWS = [{"instruction": f"Say {n}", "input": "", "output": "one two " * n} for n in range(1, 9)]


def load(config: DataConfig, tokenizer: Tokenizer) -> tuple[list[list[Any]], list[str]]:
    lines: list[str] = []
    splits = load_dataset(config, tokenizer, echo=lines.append)
    sets = [s for s in (splits.train, splits.eval) if isinstance(s, EncodedDataset)]
    return [[s[i] for i in range(len(s))] for s in sets], lines


@pytest.fixture
def rows_file(jsonl: Callable[..., str]) -> str:
    return jsonl(ROWS)


@pytest.fixture
def no_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make encoding impossible, so that rows can only come from the cache."""

    def encode(*args: object, **kwargs: object) -> None:
        raise AssertionError("rows are encoded")

    monkeypatch.setattr(dataset_module, "encode_dialogues", encode)


def test_the_same_rows_come_back_with_their_report(
    rows_file: str, words: Tokenizer, request: pytest.FixtureRequest
) -> None:
    config = DataConfig(train=rows_file, test_fraction=0.25, max_length=12)
    first, lines = load(config, words)
    assert (len(first[0]), len(first[1])) == (3, 1)
    assert not any("cache" in line for line in lines)
    request.getfixturevalue("no_encoding")
    again, more = load(config, words)
    assert again == first
    assert more[:2] == lines
    assert more[2].startswith("encoded rows come from the cache, ")


def test_a_copy_elsewhere_is_the_same_content(
    rows_file: str, words: Tokenizer, tmp_path: Path, no_encoding: None
) -> None:
    del no_encoding
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(Path(rows_file).read_bytes())
    config = DataConfig(train=rows_file)
    assert cache_file(config, words) == cache_file(replace(config, train=str(copy)), words)


def test_whatever_changes_the_rows_changes_the_place(
    rows_file: str, words: Tokenizer, chat: Tokenizer
) -> None:
    config = DataConfig(train=rows_file)
    changes: dict[str, Any] = {
        "max_length": 100,
        "overlong": "truncate",
        "on_empty": "drop",
        "test_fraction": 0.5,
        "split_seed": 1,
        "num_rows": 3,
        "num_eval_rows": 3,
        "chat_template": "never",
        "format": "alpaca",
        "columns": {"prompt": "instruction"},
        "eval": rows_file,
    }
    places = [cache_file(config, words)]
    places += [cache_file(replace(config, **{key: value}), words) for key, value in changes.items()]
    places += [cache_file(config, chat), cache_file(config, build_word_tokenizer(["one"]))]
    with Path(rows_file).open("a") as file:
        file.write(json.dumps(ROWS[0]) + "\n")
    places.append(cache_file(config, words))
    assert None not in places
    assert len(set(places)) == len(places)


def test_a_call_with_padding_does_not_change_the_place(rows_file: str, words: Tokenizer) -> None:
    config = DataConfig(train=rows_file)
    before = cache_file(config, words)
    words(["one", "one two"], padding=True, truncation=True, max_length=3)
    assert cache_file(config, words) == before


@pytest.mark.parametrize("where", [0.02, 0.4, 0.7, 0.99, None])
def test_a_damaged_file_is_told_and_replaced(
    rows_file: str, words: Tokenizer, where: float | None
) -> None:
    config = DataConfig(train=rows_file)
    first, _ = load(config, words)
    place = cache_file(config, words)
    assert place is not None
    whole = place.read_bytes()
    broken = bytearray(whole)
    if where is None:
        del broken[len(broken) // 2 :]
    else:
        broken[int(where * len(broken))] ^= 1
    place.write_bytes(broken)
    again, lines = load(config, words)
    assert again == first
    assert "cannot be used" in lines[0]
    assert "encoding anew" in lines[0]
    assert place.read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_told_and_training_goes_on(
    rows_file: str, words: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEMDLM_CACHE", str(tmp_path / "file"))
    sets, lines = load(DataConfig(train=rows_file), words)
    assert len(sets[0]) == 7
    assert "encoded rows are not cached" in lines[-1]
    assert "MEMDLM_CACHE" in lines[-1]


def test_off_writes_nothing_and_no_partial_file_stays(
    rows_file: str, words: Tokenizer, own_cache: Path
) -> None:
    load(DataConfig(train=rows_file, cache=False), words)
    assert not own_cache.exists()
    load(DataConfig(train=rows_file), words)
    assert [path.suffix for path in (own_cache / "encoded").iterdir()] == [".rows"]


def test_a_template_that_asks_for_the_time_is_not_cached(rows_file: str, chat: Tokenizer) -> None:
    config = DataConfig(train=rows_file)
    assert cache_file(config, chat) is not None
    old = chat.chat_template
    chat.chat_template = "{{ strftime_now('%d') }}" + str(old)
    try:
        assert cache_file(config, chat) is None
    finally:
        chat.chat_template = old


def test_hub_rows_are_cached_by_the_bytes_of_their_files(
    tmp_path: Path, words: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hub(rows: list[dict[str, str]], name: str) -> None:
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / name)
        on_disk = datasets.load_from_disk(tmp_path / name)
        monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: on_disk)

    config = DataConfig(train="Yukang/LongAlpaca-12k", test_fraction=0.25)
    hub(ROWS, "one")
    first, _ = load(config, words)
    again, lines = load(config, words)
    assert again == first
    assert "from the cache" in lines[-1]
    hub([*ROWS[:-1], {**ROWS[-1], "output": "three"}], "two")
    other, lines = load(config, words)
    assert other != first
    assert not any("cache" in line for line in lines)


def test_a_write_that_fails_leaves_nothing_behind(
    rows_file: str, words: Tokenizer, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        assert path.stat().st_size > 0
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_module, "sync", full)
    sets, lines = load(DataConfig(train=rows_file), words)
    assert len(sets[0]) == 7
    assert "No space left on device" in lines[-1]
    assert list((own_cache / "encoded").iterdir()) == []
