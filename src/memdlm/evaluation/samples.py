"""Prompts with their clean responses, for measurements that score text instead of decoding it.

They come from rows in a file, in any form that training reads, or from generated tasks. For the
retrieval probe a row says besides what its answer follows from: `evidence`, a text of the prompt or
a list of them, `question`, the prompt without its document, and `answers`, the texts to look for
(the whole completion if there are none).
"""

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from memdlm.data.config import DataConfig
from memdlm.data.encoding import Example as EncodedExample
from memdlm.data.encoding import check_prompt_fits, encode_dialogues
from memdlm.data.formatting import Dialogue, to_dialogues
from memdlm.data.readers import Record, read_records
from memdlm.data.tasks import TASKS, TaskConfig, generate_examples
from memdlm.data.tokenizer import check_encodable
from memdlm.errors import DataError, UsageError
from memdlm.evaluation.tasks.task import split_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATED = "generated"


@dataclass(frozen=True)
class Sample:
    """One prompt with its response.

    Attributes:
        dialogue: Both as text, and where they come from.
        source: The generated task, or the file.
        answers: What a right response contains.
        any_order: Whether a right response may name its answers in any order.
        evidence: Texts in the prompt that the answer follows from; empty where nobody said.
        question: The prompt without its document; None where nobody said.
    """

    dialogue: Dialogue
    source: str
    answers: tuple[str, ...]
    any_order: bool
    evidence: tuple[str, ...]
    question: str | None


def read_samples(
    data: str | None, tasks: Sequence[str], num_samples: int | None, seed: int
) -> list[Sample]:
    """Read rows of a file or hub data set, or generate rows of tasks.

    Args:
        data: File or hub name, as in training; excludes `tasks`.
        tasks: Generated tasks with their length in words, e.g. `generated_single_needle@96`, or
            `generated@96` for all of them; the values are those of the test split.
        num_samples: Rows of the file, or of each task, at most; None: all, or 100.
        seed: Of what is generated.

    Raises:
        UsageError: Neither or both are given, or a task is unknown.
        DataError: The file or a row cannot be used.
    """
    if num_samples is not None and num_samples < 1:
        raise UsageError(f"--num-samples {num_samples} is out of range; use 1 or more")
    if data is not None and tasks:
        raise UsageError("give --data or --tasks, not both")
    if data is not None:
        records = read_records(data, num_samples)
        return [
            _from_row(dialogue, record.values, data)
            for dialogue, record in zip(to_dialogues(records, DataConfig()), records, strict=True)
        ]
    if not tasks:
        raise UsageError(
            "there is nothing to measure on: give --data FILE, or --tasks generated@96"
        )
    return [
        sample
        for name in tasks
        for task, length in _generated(name)
        for sample in _generate(task, length, num_samples or 100, seed)
    ]


def encode_samples(
    samples: Sequence[Sample], tokenizer: "PreTrainedTokenizerBase", *, chat_template: str
) -> list[EncodedExample]:
    """Return the ids of every sample.

    Raises:
        DataError: A text cannot be encoded; names the row.
    """
    for sample in samples:
        dialogue = sample.dialogue
        try:
            check_encodable(tokenizer, f"{dialogue.prompt} {dialogue.response}")
        except DataError as error:
            raise DataError(f"{dialogue.where}: {error}") from error
    dialogues = [sample.dialogue for sample in samples]
    return encode_dialogues(dialogues, tokenizer, chat_template=chat_template)


def check_context(
    samples: Sequence[Sample],
    encoded: Sequence[EncodedExample],
    context_length: int,
    num_slots: int,
) -> None:
    """Refuse a sample whose prompt and `num_slots` slots exceed the context, all in tokens.

    Raises:
        DataError: Naming the row.
    """
    for sample, example in zip(samples, encoded, strict=True):
        try:
            check_prompt_fits(example.prompt_length, context_length, num_slots)
        except DataError as error:
            raise DataError(f"{sample.dialogue.where}: {error}") from error


def ids_hash(encoded: Sequence[EncodedExample]) -> str:
    """Return a BLAKE2b hash (128 bits, in hex) of encoded samples, their order included."""
    digest = hashlib.blake2b(digest_size=16)
    for example in encoded:
        ids = np.asarray(example.input_ids, dtype=np.int64)
        digest.update(np.array([len(ids), example.prompt_length], dtype=np.int64).tobytes())
        digest.update(ids.tobytes())
    return digest.hexdigest()


def _from_row(dialogue: Dialogue, values: Mapping[str, Any], source: str) -> Sample:
    question = values.get("question")
    if question is not None and (not isinstance(question, str) or not question.strip()):
        raise DataError(f"{dialogue.where}: `question` must be a text that is not empty")
    return Sample(
        dialogue=dialogue,
        source=source,
        answers=_texts(values, "answers", dialogue.where) or (dialogue.response.strip(),),
        any_order=False,
        evidence=_texts(values, "evidence", dialogue.where),
        question=question,
    )


def _texts(values: Mapping[str, Any], name: str, where: str) -> tuple[str, ...]:
    """Return a column that holds a text, a list of texts, or nothing."""
    value = values.get(name)
    texts = [value] if isinstance(value, str) else ([] if value is None else value)
    if not isinstance(texts, list) or not all(isinstance(t, str) and t.strip() for t in texts):
        raise DataError(f"{where}: `{name}` must be a text or a list of texts, none of them empty")
    return tuple(texts)


def _generated(name: str) -> list[tuple[str, int]]:
    """Return tasks and length that a name stands for."""
    base, length = split_name(name)
    known = [GENERATED, *(f"{GENERATED}_{task}" for task in TASKS)]
    if base not in known:
        close = difflib.get_close_matches(base, known, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
        raise UsageError(f"--tasks {name}: {base!r} is no generated task; {hint}")
    if length is None:
        raise UsageError(f"--tasks {name}: it needs a length in words, as in {base}@96")
    chosen = list(TASKS) if base == GENERATED else [base.removeprefix(f"{GENERATED}_")]
    return [(task, length) for task in chosen]


def _generate(task: str, length: int, num_samples: int, seed: int) -> list[Sample]:
    config = TaskConfig(
        tasks=(task,), length=length, num_examples=num_samples, seed=seed, split="test"
    )
    examples = generate_examples(config)
    name = f"{GENERATED}_{task}@{length}"
    records = [
        Record({"prompt": example["prompt"], "completion": example["completion"]}, f"{name} {i}")
        for i, example in enumerate(examples)
    ]
    dialogues = to_dialogues(records, DataConfig())
    return [
        Sample(
            dialogue=dialogue,
            source=name,
            answers=tuple(example["answers"]),
            any_order=TASKS[task].any_order,
            evidence=tuple(example["prompt"][start:end] for start, end in example["evidence"]),
            question=example["question"],
        )
        for dialogue, example in zip(dialogues, examples, strict=True)
    ]
