"""From a DataConfig and a tokenizer to training and evaluation sets, with an account of every row.

Rows are split before they are encoded, so the held-out rows depend neither on the tokenizer nor on
the window. Nothing is shuffled here: the order of training is the trainer's.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from torch.utils.data import Dataset

from memdlm.data.cache import CachedSplit, cache_file, read_cache, write_cache
from memdlm.data.config import DataConfig
from memdlm.data.encoding import (
    Example,
    as_item,
    check_tokenizer,
    encode_dialogues,
    fit,
)
from memdlm.data.formatting import Dialogue, to_dialogues
from memdlm.data.readers import Record, read_records
from memdlm.data.streaming import StreamedDataset
from memdlm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = TypeVar("Row")

# Rows per call of the tokenizer: enough to use its threads; few, because it keeps about 150 bytes a
# token until the call returns, and rows may be books.
_CHUNK = 64


@dataclass(frozen=True)
class DataReport:
    """What became of the rows of one split; `kept` includes `cut`. Lengths in tokens.

    Attributes:
        split: `"train"` or `"eval"`.
        source: The file or hub id.
        read: Rows before any was dropped.
        kept: Rows in the data set.
        cut: Rows shortened to `max_length`.
        overlong: Rows dropped because they, or with `truncate_right` their prompts, fill the
            window.
        empty: Rows dropped because their response is empty.
        max_length: The window.
        num_tokens: Tokens of all kept rows.
        num_response_tokens: Those of them that are labelled.
        num_unknown_tokens: Those of all that the tokenizer does not know.
        shortest: Length of the shortest row that was encoded, before cutting.
        longest: Length of the longest one.
    """

    split: str
    source: str
    read: int
    kept: int
    cut: int
    overlong: int
    empty: int
    max_length: int
    num_tokens: int
    num_response_tokens: int
    num_unknown_tokens: int
    shortest: int
    longest: int

    def line(self) -> str:
        """Return the report as one line."""
        unknown = (
            f"; {self.num_unknown_tokens:,} tokens unknown to the tokenizer"
            if self.num_unknown_tokens
            else ""
        )
        return (
            f"{self.split} data {self.source}: {self.read:,} rows read, {self.kept:,} kept, "
            f"{self.cut:,} of them cut to {self.max_length:,} tokens; dropped {self.overlong:,} "
            f"over-long and {self.empty:,} empty; {self.num_tokens:,} tokens, "
            f"{self.num_response_tokens:,} of them in responses, longest row {self.longest:,}"
            + unknown
        )


class EncodedDataset(Dataset[dict[str, list[int]]]):
    """Map-style data set of {input_ids, labels}, lists of int; labels are -100 on the prompt.

    Attributes:
        examples: The encoded rows, in the order of the source.
        report: What became of the rows.
    """

    def __init__(self, examples: Sequence[Example], report: DataReport) -> None:
        """Hold the encoded rows and their report."""
        self.examples = examples
        self.report = report

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        """Return one row."""
        return as_item(self.examples[index])

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, for grouping by length."""
        return [len(example.input_ids) for example in self.examples]

    @property
    def prompt_lengths(self) -> list[int]:
        """Prompt tokens of each row."""
        return [example.prompt_length for example in self.examples]


@dataclass(frozen=True)
class DataSplits:
    """The training rows and, unless `test_fraction` is 0 and no source is named, the held-out."""

    train: EncodedDataset | StreamedDataset
    eval: EncodedDataset | None


def load_dataset(
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    context_length: int | None = None,
    echo: Callable[[str], None] = print,
) -> DataSplits:
    """Read, split, encode and fit the rows a configuration names, or take them from the cache.

    With `config.streaming` training rows are a `StreamedDataset`, and nothing is cached.

    Args:
        config: The data section of a recipe; `train` must be set.
        tokenizer: Must have a mask, an end-of-text and a padding token.
        context_length: Longest input of the model in tokens (`max_position_embeddings`).
        echo: Receives one line per split, and one on the cache if it is used or cannot be.

    Raises:
        ConfigError: No training source, or a window beyond the model's context.
        DataError: Anything wrong with a source, a row or the tokenizer, or nothing left of a split.
    """
    if config.train is None:
        raise ConfigError("data.train is not set: name a .jsonl, .json or .parquet file or hub id")
    check_context(config, context_length)
    check_tokenizer(tokenizer)
    if config.streaming:
        streamed = StreamedDataset(config, tokenizer, echo)
        echo(
            f"train data {config.train}: streamed, {config.shuffle_buffer:,} rows at a time "
            "(counts follow after the first pass)"
        )
        if config.eval is None:
            return DataSplits(streamed, None)
        rows = read_dialogues(config.eval, config, config.num_eval_rows)
        held_out = _encode(rows, config, tokenizer, source=config.eval, split="eval")
        echo(held_out.report.line())
        return DataSplits(streamed, held_out)
    place = cache_file(config, tokenizer) if config.cache else None
    cached = None if place is None else _from_cache(place, config, echo)
    train_set, eval_set = cached or _read_and_encode(config, tokenizer)
    echo(train_set.report.line())
    if eval_set is not None:
        echo(eval_set.report.line())
    if place is not None:
        if cached:
            echo(f"encoded rows come from the cache, {place}")
        else:
            _to_cache(place, train_set, eval_set, echo)
    return DataSplits(train_set, eval_set)


def _read_and_encode(
    config: DataConfig, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[EncodedDataset, EncodedDataset | None]:
    assert config.train is not None
    train = read_dialogues(config.train, config, config.num_rows)
    held_out: list[Dialogue] | None = None
    if config.eval is not None:
        held_out = read_dialogues(config.eval, config, config.num_eval_rows)
    elif config.test_fraction > 0:
        train, held_out = split_rows(train, config.test_fraction, config.split_seed)
        if not train:
            raise DataError(
                f"{config.train} has too few rows to hold out {config.test_fraction:g} of them: "
                "name data.eval, or set data.test_fraction to 0"
            )
    train_set = _encode(train, config, tokenizer, source=config.train, split="train")
    if held_out is None:
        return train_set, None
    source = config.eval or config.train
    return train_set, _encode(held_out, config, tokenizer, source=source, split="eval")


def _from_cache(
    place: Path, config: DataConfig, echo: Callable[[str], None]
) -> tuple[EncodedDataset, EncodedDataset | None] | None:
    """Return the splits kept at `place`; None if there are none, or damaged ones, which is said."""
    try:
        splits = read_cache(place)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        echo(f"the cached rows {place} cannot be used ({error}): encoding anew")
        return None
    sources = (config.train, config.eval or config.train)
    sets = [
        EncodedDataset(split.examples, replace(DataReport(**split.about), source=str(source)))
        for split, source in zip(splits, sources, strict=False)
    ]
    return sets[0], sets[1] if len(sets) > 1 else None


def _to_cache(
    place: Path,
    train: EncodedDataset,
    held_out: EncodedDataset | None,
    echo: Callable[[str], None],
) -> None:
    sets = [train] if held_out is None else [train, held_out]
    try:
        write_cache(place, [CachedSplit(list(s.examples), asdict(s.report)) for s in sets])
    except OSError as error:
        reason = error.strerror or str(error)
        echo(
            f"encoded rows are not cached ({place.parent}: {reason}): check the folder, choose "
            "another with MEMDLM_CACHE, or set data.cache to false"
        )


def encode_rows(
    rows: Iterable[Mapping[str, Any]],
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    source: str = "rows",
    split: str = "train",
) -> EncodedDataset:
    """Encode rows that are in memory, such as generated tasks, in their order.

    Raises:
        DataError: As `load_dataset`, with `source` in place of the file.
    """
    check_tokenizer(tokenizer)
    records = [Record(dict(row), f"{source} row {i}") for i, row in enumerate(rows, start=1)]
    if not records:
        raise DataError(f"{source} holds no rows: give at least one")
    dialogues = list(to_dialogues(records, config))
    return _encode(dialogues, config, tokenizer, source=source, split=split)


def read_dialogues(source: str, config: DataConfig, limit: int | None = None) -> list[Dialogue]:
    """Read the first `limit` rows of a source as dialogues, with those of an empty response.

    Raises:
        DataError: The source or a row cannot be used; unless `config.on_empty` is `"drop"`, that
            includes an empty response.
    """
    return list(to_dialogues(read_records(source, limit), config))


def check_context(config: DataConfig, context_length: int | None) -> None:
    """Raise a ConfigError if the window exceeds the model's context, in tokens (None: unknown)."""
    if context_length is not None and config.max_length > context_length:
        raise ConfigError(
            f"data.max_length {config.max_length:,} exceeds the model's context of "
            f"{context_length:,} tokens: set data.max_length to {context_length} or less"
        )


def split_rows(rows: Sequence[Row], test_fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Return (train, test), the rows `datasets.Dataset.train_test_split` would draw, in its order.

    The paper splits LongAlpaca with that function (0.05, seed 42); the same permutation here gives
    the same test set, whatever reader the rows came through.
    """
    order = np.random.default_rng(seed).permutation(len(rows))
    num_test = ceil(test_fraction * len(rows))
    return [rows[i] for i in order[num_test:]], [rows[i] for i in order[:num_test]]


def _encode(
    rows: Sequence[Dialogue],
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    source: str,
    split: str,
) -> EncodedDataset:
    """Encode dialogues, drop the empty, fit the rest to the window, and account for each."""
    dialogues = [row for row in rows if row.response.strip()]
    examples: list[Example] = []
    cut = overlong = longest = 0
    shortest: int | None = None
    for start in range(0, len(dialogues), _CHUNK):
        chunk = dialogues[start : start + _CHUNK]
        for example in encode_dialogues(chunk, tokenizer, chat_template=config.chat_template):
            length = len(example.input_ids)
            longest = max(longest, length)
            shortest = length if shortest is None else min(shortest, length)
            fitted = fit(example, config)
            if fitted is None:
                overlong += 1
                continue
            cut += fitted is not example
            examples.append(fitted)
    # A tokenizer that knows every text has no unknown token; no id is -1.
    unknown_id = -1 if tokenizer.unk_token_id is None else tokenizer.unk_token_id
    num_tokens = sum(len(example.input_ids) for example in examples)
    report = DataReport(
        split=split,
        source=source,
        read=len(rows),
        kept=len(examples),
        cut=cut,
        overlong=overlong,
        empty=len(rows) - len(dialogues),
        max_length=config.max_length,
        num_tokens=num_tokens,
        num_response_tokens=num_tokens - sum(example.prompt_length for example in examples),
        num_unknown_tokens=sum(
            int((example.input_ids == unknown_id).sum()) for example in examples
        ),
        shortest=shortest or 0,
        longest=longest,
    )
    if not examples:
        raise DataError(_nothing_left(report))
    return EncodedDataset(examples, report)


def _nothing_left(report: DataReport) -> str:
    counts = f"{report.overlong:,} over-long, {report.empty:,} empty"
    if not report.overlong:
        return (
            f"no {report.split} row is left of {report.read:,} from {report.source} ({counts}): "
            "give rows with a response"
        )
    return (
        f"no {report.split} row is left of {report.read:,} from {report.source} ({counts}; the "
        f"shortest has {report.shortest:,} tokens, data.max_length is {report.max_length:,}): "
        "raise data.max_length, or set data.overlong to truncate"
    )
