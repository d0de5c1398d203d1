"""Rows that are read as training needs them: lazy, endless, one order for any number of ranks."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import datasets
import pytest
from accelerate.data_loader import IterableDatasetShard
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from memdlm.data import streaming
from memdlm.data.bucketing import padding_shares
from memdlm.data.config import DataConfig
from memdlm.data.dataset import EncodedDataset, load_dataset
from memdlm.data.readers import Record
from memdlm.data.streaming import StreamedDataset
from memdlm.errors import ConfigError, DataError

Tokenizer = PreTrainedTokenizerFast
NUM_ROWS = 40


def row(number: int) -> dict[str, str]:
    return {"prompt": "Where is", "completion": "one " * (5 + 7 * number % 50)}


@pytest.fixture
def config(jsonl: Callable[..., str]) -> DataConfig:
    path = jsonl([row(n) for n in range(NUM_ROWS)])
    return DataConfig(train=path, streaming=True, test_fraction=0, shuffle_buffer=16)


def stream(config: DataConfig, tokenizer: Tokenizer, **arrangement: Any) -> StreamedDataset:
    dataset = load_dataset(config, tokenizer, echo=lambda line: None).train
    assert isinstance(dataset, StreamedDataset)
    dataset.arrange(**{"step_size": 4, "seed": 3, "order": "group_by_length", **arrangement})
    return dataset


def take(dataset: StreamedDataset, number: int) -> list[dict[str, list[int]]]:
    return list(islice(dataset, number))


def test_a_stream_gives_the_rows_of_the_data_set_over_and_over(
    config: DataConfig, words: Tokenizer
) -> None:
    whole = load_dataset(replace(config, streaming=False), words, echo=lambda line: None).train
    assert isinstance(whole, EncodedDataset)
    expected = sorted((whole[i] for i in range(NUM_ROWS)), key=str)
    # 40 rows are five halves of a buffer: two passes end where a buffer ends.
    rows = take(stream(config, words), 2 * NUM_ROWS)
    assert sorted(rows, key=str) == sorted(expected * 2, key=str)
    in_order = take(stream(config, words, order="sequential"), NUM_ROWS)
    assert in_order == [whole[i] for i in range(NUM_ROWS)]


def test_the_order_is_named_by_the_seed_and_differs_between_buffers(
    config: DataConfig, words: Tokenizer
) -> None:
    rows = take(stream(config, words), 2 * NUM_ROWS)
    assert take(stream(config, words), 2 * NUM_ROWS) == rows
    assert take(stream(config, words, seed=4), 2 * NUM_ROWS) != rows
    whole = replace(config, shuffle_buffer=NUM_ROWS)
    two_passes = take(stream(whole, words), 2 * NUM_ROWS)
    assert two_passes[:NUM_ROWS] != two_passes[NUM_ROWS:]
    shuffled = take(stream(whole, words, order="random"), NUM_ROWS)
    assert shuffled != two_passes[:NUM_ROWS]
    assert sorted(shuffled, key=str) == sorted(two_passes[:NUM_ROWS], key=str)


def test_only_a_buffer_and_a_chunk_are_read_ahead(
    config: DataConfig, words: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = 0

    def endless(source: str, limit: int | None = None) -> Iterator[Record]:
        nonlocal read
        for number in count():
            read = number + 1
            yield Record(row(number), f"row {number}")

    monkeypatch.setattr(streaming, "stream_records", endless)
    dataset = stream(config, words)
    assert read == 1
    take(dataset, 20)
    assert read <= 32 + 64


def test_steps_have_little_padding(config: DataConfig, words: Tokenizer) -> None:
    def mean_padding(order: str) -> float:
        large = replace(config, shuffle_buffer=512)
        rows = take(stream(large, words, step_size=8, order=order), 512)
        lengths = [len(r["input_ids"]) for r in rows]
        shares = padding_shares(range(len(rows)), lengths, 8)
        return sum(shares) / len(shares)

    assert mean_padding("group_by_length") < 0.05
    assert mean_padding("random") > 0.3


def test_ranks_together_see_the_same_steps_whatever_their_number(
    config: DataConfig, words: Tokenizer
) -> None:
    step, num_steps, per_device = 8, 12, 2
    steps = {}
    for world_size in (1, 2, 4):
        rows = []
        for rank in range(world_size):
            shard = IterableDatasetShard(
                stream(config, words, step_size=step),
                batch_size=per_device,
                num_processes=world_size,
                process_index=rank,
            )
            rows.append(list(islice(shard, step * num_steps // world_size)))
        micros = [[r[i : i + per_device] for i in range(0, len(r), per_device)] for r in rows]
        flat = [item for together in zip(*micros, strict=True) for m in together for item in m]
        steps[world_size] = [flat[i : i + step] for i in range(0, len(flat), step)]
    assert len(steps[1]) == num_steps
    assert steps[1] == steps[2] == steps[4]


def test_rows_are_counted_once_the_source_is_read(config: DataConfig, words: Tokenizer) -> None:
    lines: list[str] = []
    short = replace(config, max_length=20, overlong="filter")
    dataset = load_dataset(short, words, echo=lines.append).train
    assert isinstance(dataset, StreamedDataset)
    assert "streamed, 16 rows at a time" in lines[0]
    take(dataset, 1)
    kept = sum(len(f"{row(n)['completion']}".split()) + 3 <= 20 for n in range(NUM_ROWS))
    take(dataset, 3 * NUM_ROWS)
    assert f"one pass streamed, {NUM_ROWS} rows read, {kept} kept, 0 of them cut" in lines[1]
    assert len([line for line in lines[1:] if "one pass" in line]) == 2, "one line per iteration"


def test_an_evaluation_source_is_read_whole(config: DataConfig, words: Tokenizer) -> None:
    splits = load_dataset(
        replace(config, eval=config.train, num_eval_rows=3), words, echo=lambda line: None
    )
    assert splits.eval is not None
    assert len(splits.eval) == 3


def test_hub_rows_are_streamed(
    config: DataConfig, words: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load(*args: object, **options: object) -> datasets.IterableDataset:
        asked.append(options)
        rows = datasets.Dataset.from_list([row(n) for n in range(NUM_ROWS)])
        return rows.to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = take(stream(replace(config, train="name/of-many"), words), NUM_ROWS)
    assert len(rows) == NUM_ROWS
    assert all(options["streaming"] is True for options in asked)


def test_what_cannot_be_streamed_is_refused(
    config: DataConfig, words: Tokenizer, tmp_path: Path
) -> None:
    listed = tmp_path / "rows.json"
    listed.write_text(json.dumps([row(1)]))
    with pytest.raises(DataError, match=r"one list and cannot be streamed: use \.jsonl"):
        stream(replace(config, train=str(listed)), words)
    with pytest.raises(DataError, match="does not exist"):
        stream(replace(config, train=str(tmp_path / "none.jsonl")), words)
    with pytest.raises(DataError, match=r"no train row is left of 40 .*data\.max_length"):
        take(stream(replace(config, max_length=3), words), 1)
    with pytest.raises(ConfigError, match=r"data\.test_fraction to 0"):
        DataConfig(train="rows.jsonl", streaming=True)
    with pytest.raises(ConfigError, match=r"data\.shuffle_buffer is 0"):
        replace(config, shuffle_buffer=0)
    loader = DataLoader(stream(config, words), batch_size=None, num_workers=2)
    with pytest.raises(ConfigError, match="dataloader_num_workers"):
        next(iter(loader))


def test_a_row_that_is_wrong_is_named_when_it_comes(config: DataConfig, words: Tokenizer) -> None:
    assert config.train is not None
    with Path(config.train).open("a") as file:
        file.write("{\n")
    dataset = stream(config, words)
    with pytest.raises(DataError, match=r"rows\.jsonl:41 is not valid JSON"):
        take(dataset, NUM_ROWS + 8)
