"""Training rows that are read, encoded and ordered as training goes on: for more than memory holds.

The stream has no end: a pass over the source follows the other. Rows are held a buffer at a time,
shuffled, and grouped by length within it. The order is a function of source, settings and seed
alone, so a resumed run skips to its place, and processes take slices of one order.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch.utils.data import IterableDataset, get_worker_info

from memdlm.data.bucketing import bucketed_order
from memdlm.data.config import DataConfig
from memdlm.data.encoding import Example, as_item, encode_dialogues, fit
from memdlm.data.formatting import to_dialogues
from memdlm.data.readers import stream_records
from memdlm.errors import ConfigError, DataError
from memdlm.seeding import generator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Rows per call of the tokenizer.
_CHUNK = 64


class StreamedDataset(IterableDataset[dict[str, list[int]]]):
    """Endless {input_ids, labels}, lists of int; labels are -100 on the prompt.

    `MemDLMTrainer` sets the order (`arrange`); without it rows come one by one, shuffled with seed
    0. It cannot be split among workers of a data loader: use none, or one.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: "PreTrainedTokenizerBase",
        echo: Callable[[str], None] = print,
    ) -> None:
        """Stream `config.train`; `echo` receives a line when the source has been read once.

        Raises:
            DataError: The source holds no row that can be read; only the first one is tried.
        """
        if config.train is None:
            raise ConfigError("data.train is not set: name a .jsonl or .parquet file or hub id")
        self.config, self.tokenizer, self.echo = config, tokenizer, echo
        self.source = config.train
        self.step_size, self.seed, self.order = 1, 0, "group_by_length"
        next(to_dialogues(stream_records(self.source, 1), config))

    def arrange(self, step_size: int, seed: int, order: str) -> None:
        """Say how rows follow each other, before the first is taken.

        Args:
            step_size: Rows of an optimizer step over all processes.
            seed: Names the random order.
            order: `train_sampling_strategy`: `"sequential"` keeps the source's order, `"random"`
                shuffles within the buffer, all else groups by length too.
        """
        self.step_size, self.seed, self.order = step_size, seed, order

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        """Yield rows for ever.

        Raises:
            ConfigError: Several workers would each yield every row.
            DataError: A row cannot be used, or a pass over the source leaves none.
        """
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ConfigError(
                "training.dataloader_num_workers: several workers would each stream every row; use "
                "0 or 1"
            )
        number = 0
        examples = self._passes()
        while True:
            size = -(-self.config.shuffle_buffer // self.step_size) * self.step_size
            buffer = list(islice(examples, size))
            draws = generator(self.seed, "stream_order", number)
            for index in self._arranged([len(example.input_ids) for example in buffer], draws):
                yield as_item(buffer[index])
            number += 1

    def _arranged(self, lengths: list[int], draws: torch.Generator) -> list[int]:
        if self.order == "sequential":
            return list(range(len(lengths)))
        if self.order == "random":
            order: list[int] = torch.randperm(len(lengths), generator=draws).tolist()
            return order
        return bucketed_order(lengths, self.step_size, draws)

    def _passes(self) -> Iterator[Example]:
        is_first = True
        while True:
            read = kept = cut = 0
            for rows, examples in self._chunks():
                read += rows
                for example in examples:
                    fitted = fit(example, self.config)
                    if fitted is not None:
                        kept += 1
                        cut += fitted is not example
                        yield fitted
            if not kept:
                raise DataError(
                    f"no train row is left of {read:,} from {self.source}: raise data.max_length, "
                    "set data.overlong to truncate, or give rows with a response"
                )
            if is_first:
                self.echo(
                    f"train data {self.source}: one pass streamed, {read:,} rows read, {kept:,} "
                    f"kept, {cut:,} of them cut to {self.config.max_length:,} tokens"
                )
            is_first = False

    def _chunks(self) -> Iterator[tuple[int, list[Example]]]:
        dialogues = to_dialogues(stream_records(self.source, self.config.num_rows), self.config)
        while chunk := list(islice(dialogues, _CHUNK)):
            full = [dialogue for dialogue in chunk if dialogue.response.strip()]
            template = self.config.chat_template
            examples = (
                encode_dialogues(full, self.tokenizer, chat_template=template) if full else []
            )
            yield len(chunk), examples
