r"""Make rows to train for BABILong: its prompts, other stories and pages than it asks about.

    python examples/babilong.py --babi BABI --book FILE --output DIR
    memdlm train recipes/tiny/babilong.yaml --set data.train=DIR/train.jsonl ...
    memdlm eval babilong@512 --model RUN --set sources.babi=BABI \
        --set sources.background=DIR/book_test.txt
    memdlm probe --arm memdlm=RUN --data DIR/eval.jsonl

Rows hide bAbI's training stories in the first four fifths of the book (`book_train.txt`); an
evaluation hides the test stories in the rest (`book_test.txt`). The rows of `eval.jsonl`, training
stories that `train.jsonl` leaves out, name the facts that their answers follow from, for the probe.
Needs the extra `eval`.
"""

import argparse
import json
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memdlm.data.babi import Question, find_babi_file, read_babi
from memdlm.errors import DataError, MemDLMError, UsageError
from memdlm.evaluation.prepared import quiet_lm_eval
from memdlm.evaluation.tasks.babilong.background import read_book
from memdlm.evaluation.tasks.babilong.local import make_documents
from memdlm.evaluation.tasks.babilong.scoring import LABELS
from memdlm.evaluation.tasks.babilong.task import MAX_NEW_TOKENS, prompt_writer
from memdlm.evaluation.tasks.task import TaskRequest, TaskSources, with_harness
from memdlm.seeding import derive_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PromptWriter = Callable[[dict[str, Any]], str]

ANSWERS = {
    "qa1": (r"Where is (.*)\?", "The most recent location of {0} is {target}."),
    "qa2": (r"Where is the (.*)\?", "The {0} is in the {target}."),
    "qa3": (r"Where was the (.*) before the (.*)\?", "Before the {1} the {0} was in the {target}."),
    "qa4": (r".*", "{target}"),
    "qa5": (r".*", "{target}"),
}
"""A task's questions, and the answer in the form that its prompts' examples have."""

EXTRA_TOKENS = {"qa3": 96}
"""Three facts take longer stories, few of which fit where those of other tasks do."""

HELD_OUT = 20
"""One in so many of a file's questions, the last ones in one piece, are for eval.jsonl."""


def build(arguments: argparse.Namespace) -> None:
    """Write words.jsonl, the two parts of the book, train.jsonl and eval.jsonl."""
    output = Path(arguments.output)
    if (output / "train.jsonl").exists() and not arguments.overwrite:
        raise UsageError(f"{output} already holds a set; choose another --output or --overwrite")
    pages = split_book(Path(arguments.book))
    questions = {
        task: {split: read_questions(arguments.babi, task, split) for split in ("train", "test")}
        for task in LABELS
    }
    writers = {task: prompt_writer(task) for task in LABELS}
    words = list_words(pages.values(), questions, writers)
    tokenizer = find_tokenizer(arguments.tokenizer, words)
    output.mkdir(parents=True, exist_ok=True)
    for split, text in pages.items():
        path = output / f"book_{split}.txt"
        path.write_text(text, encoding="utf-8")
        print(f"{path}: {len(text.split()):,} words")
    write_rows(output / "words.jsonl", [{"words": " ".join(words)}])
    parts: dict[str, list[dict[str, Any]]] = {"train": [], "eval": []}
    for task in arguments.tasks:
        count = len(questions[task]["train"])
        # One piece: a story's questions share its facts and follow one another.
        first_held_out = count - count // HELD_OUT
        for request in list_requests(arguments, task, tokenizer, output / "book_train.txt"):
            for document in make_documents(
                request, task, MAX_NEW_TOKENS, writers[task], split="train"
            ):
                row = make_row(document, task, writers[task])
                if document["id"] < first_held_out:
                    parts["train"].append(row)
                else:
                    question = questions[task]["train"][document["id"]]
                    parts["eval"].append(row | name_evidence(document, question, writers[task]))
    for part, rows in parts.items():
        random.Random(derive_seed(arguments.seed, f"babilong/{part}")).shuffle(rows)
        write_rows(output / f"{part}.jsonl", rows)


def split_book(path: Path) -> dict[str, str]:
    """Return the first four fifths of a book, `train`, and the rest, `test`: whole paragraphs."""
    text = read_book(path).strip()
    cut = text.find("\n\n", len(text) * 4 // 5)
    if cut < 0:
        raise DataError(f"{path}: no blank line in its last fifth to split it at; add one there")
    return {"train": text[:cut].strip() + "\n", "test": text[cut:].strip() + "\n"}


def read_questions(folder: str, task: str, split: str) -> list[Question]:
    """Return all questions of one of bAbI's files."""
    return list(read_babi(find_babi_file(Path(folder), task, split)))


def list_words(
    pages: Iterable[str],
    questions: dict[str, dict[str, list[Question]]],
    writers: dict[str, PromptWriter],
) -> list[str]:
    """Return every word that a prompt or answer of any task can hold, marks attached."""
    words = {word for text in pages for word in text.split()}
    for task, splits in questions.items():
        blank = {"input": "", "question": "", "target": ""}
        words.update(writers[task](blank).split())
        for question in (question for split in splits.values() for question in split):
            answer = write_answer(task, question.text, question.answer)
            for text in (*question.facts, question.text, question.answer, answer):
                words.update(text.split())
    return sorted(words)


def find_tokenizer(name: str | None, words: list[str]) -> "PreTrainedTokenizerBase":
    """Return a model's tokenizer, or the one of words that `make_start --words-of` makes."""
    if name is None:
        from memdlm.data.tokenizer import build_word_tokenizer

        return build_word_tokenizer(words)
    from memdlm.backbones.tokenizers import load_tokenizer

    return load_tokenizer(name)


def list_requests(
    arguments: argparse.Namespace, task: str, tokenizer: "PreTrainedTokenizerBase", pages: Path
) -> Iterator[TaskRequest]:
    """Yield a request for rows of each length, each of other questions and pages."""
    for place, length in enumerate(arguments.lengths):
        longer = length + EXTRA_TOKENS.get(task, 0)
        yield TaskRequest(
            name=f"babilong_{task}@{longer}",
            tokenizer=tokenizer,
            length=longer,
            num_samples=arguments.rows,
            seed=derive_seed(arguments.seed, "babilong/rows", place),
            sources=TaskSources(babi=arguments.babi, background=str(pages)),
        )


def make_row(document: dict[str, Any], task: str, write_prompt: PromptWriter) -> dict[str, str]:
    """Return a document as a row to train on."""
    answer = write_answer(task, document["question"], document["target"])
    return {"prompt": write_prompt(document), "completion": answer}


def name_evidence(
    document: dict[str, Any], question: Question, write_prompt: PromptWriter
) -> dict[str, Any]:
    """Return what the retrieval probe has to know besides: see memdlm.evaluation.samples."""
    return {
        "evidence": list(question.support),
        "question": write_prompt({**document, "input": ""}),
        "answers": [document["target"]],
    }


def write_answer(task: str, question: str, target: str) -> str:
    """Return the answer in the form that the task's examples show.

    Raises:
        DataError: The question is not one of this task's.
    """
    pattern, form = ANSWERS[task]
    match = re.fullmatch(pattern, question)
    if match is None:
        raise DataError(f"{task}: {question!r} is no question of this task; check bAbI's files")
    return form.format(*match.groups(), target=target)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write JSON Lines and say so."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows):,} row(s)")


def positive(text: str) -> int:
    """Return a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def main() -> int:
    """Write the set; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--babi", required=True, help="folder with bAbI's English task files")
    parser.add_argument("--book", required=True, help="a plain-text book, UTF-8")
    parser.add_argument("--output", required=True, help="folder to write to")
    parser.add_argument(
        "--tokenizer",
        help="model to count tokens for (default: one token per word, as make_start has it)",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=list(LABELS),
        default=list(LABELS),
        metavar="TASK",
        help="bAbI tasks to make rows of (default: qa1 qa2 qa3 qa4 qa5)",
    )
    parser.add_argument(
        "--lengths",
        nargs="+",
        type=positive,
        default=[224, 240, 256, 272, 288],
        metavar="N",
        help="tokens of prompt and answer together (default: 224 to 288); qa3 has 96 more",
    )
    parser.add_argument(
        "--rows",
        type=positive,
        default=1000,
        metavar="N",
        help="rows per task and length, at most (default: 1000)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true")
    arguments = parser.parse_args()
    try:
        with_harness()
        with quiet_lm_eval():
            build(arguments)
    except MemDLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
