"""Hide bAbI facts in a book, and score a model on finding them: retrieval from real text.

    python examples/babi_in_a_book.py build --babi DIR --book FILE --output DIR
    memdlm train recipes/tiny/babi_in_a_book.yaml --set data.train=DIR/train.jsonl ...
    python examples/babi_in_a_book.py evaluate --model RUN --data DIR/test.jsonl --memory on

Facts keep their order; sentences of the book fall between them at random. Training rows use bAbI's
training stories and the first four fifths of the book, test rows bAbI's test stories and the rest,
so neither a story nor a page is seen in both. The format of bAbI's files: `memdlm.data.babi`.
"""

import argparse
import json
import random
import re
import sys
from dataclasses import replace
from pathlib import Path

from memdlm.data.babi import Question, find_babi_file, read_babi, read_text
from memdlm.errors import DataError, MemDLMError, UsageError
from memdlm.seeding import derive_seed


def words(text: str) -> str:
    """Return `text` in lower case, words and marks separated by single spaces."""
    return " ".join(re.findall(r"[a-z]+|[.?!,;:]", text.lower()))


def read_book(path: Path) -> list[str]:
    """Return the sentences of a plain-text book, 4 to 24 words each."""
    text = re.sub(r"\s+", " ", read_text(path))
    sentences = [words(part) for part in re.split(r"(?<=[.?!])\s", text)]
    return [sentence for sentence in sentences if 4 <= len(sentence.split()) <= 24]


def hide(
    question: Question, sentences: list[str], length: int, rng: random.Random
) -> dict[str, str]:
    """Return a row of about `length` words: facts in order, consecutive book sentences between."""
    facts = [words(fact) for fact in question.facts]
    answer = words(question.answer)
    tail = f"question : {words(question.text)} answer :"
    taken = sum(len(part.split()) for part in (*facts, tail, answer))
    place = rng.randrange(len(sentences))
    background: list[str] = []
    while taken + len(sentences[place % len(sentences)].split()) <= length:
        background.append(sentences[place % len(sentences)])
        taken += len(background[-1].split())
        place += 1
    slots = sorted(rng.sample(range(len(facts) + len(background)), len(facts)))
    fact_at = dict(zip(slots, facts, strict=True))
    rest = iter(background)
    text = [fact_at[i] if i in fact_at else next(rest) for i in range(len(facts) + len(background))]
    return {"prompt": " ".join([*text, tail]), "completion": answer}


def build(arguments: argparse.Namespace) -> None:
    """Write train.jsonl and test.jsonl."""
    output = Path(arguments.output)
    if (output / "train.jsonl").exists() and not arguments.overwrite:
        raise UsageError(f"{output} already holds a set; choose another --output or --overwrite")
    sentences = read_book(Path(arguments.book))
    cut = len(sentences) * 4 // 5
    if cut < 1 or cut == len(sentences):
        raise DataError(f"{arguments.book}: too few sentences to split; give a longer book")
    parts = {"train": sentences[:cut], "test": sentences[cut:]}
    output.mkdir(parents=True, exist_ok=True)
    for split, background in parts.items():
        path = find_babi_file(Path(arguments.babi), arguments.task, split)
        copies = arguments.copies if split == "train" else 1
        rows = []
        for index, question in enumerate(read_babi(path)):
            for copy in range(copies):
                rng = random.Random(derive_seed(arguments.seed, f"babi/{split}", index, copy))
                rows.append(hide(question, background, arguments.words, rng))
        path = output / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} rows of up to {arguments.words} words")


def evaluate(arguments: argparse.Namespace) -> None:
    """Print the share of exact answers as one JSON line."""
    from memdlm.backbones.loading import load_model
    from memdlm.backbones.tokenizers import load_tokenizer
    from memdlm.cli.run_folder import RunFolder
    from memdlm.cli.settings import build
    from memdlm.data.readers import read_records
    from memdlm.inference import generate
    from memdlm.memory.config import MemoryConfig
    from memdlm.sampling.config import SamplingConfig

    rows = [record.values for record in read_records(arguments.data, arguments.limit)]
    folder, memory = arguments.model, MemoryConfig()
    run = RunFolder(Path(arguments.model))
    if run.is_run:
        # A memory as the run was trained with, or would have been.
        folder = str(run.result())
        memory = build(MemoryConfig, run.recorded_recipe()["memory"], source=arguments.model)
    memory = replace(memory, enabled=arguments.memory == "on")
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    longest = max(len(row["completion"].split()) for row in rows)
    answers = generate(
        model,
        tokenizer,
        [row["prompt"] for row in rows],
        SamplingConfig(max_new_tokens=longest + 1),
        memory,
        batch_size=50,
    )
    hits = [
        words(answer.text) == row["completion"] for answer, row in zip(answers, rows, strict=True)
    ]
    figures = {"accuracy": sum(hits) / len(hits), "rows": len(hits), "memory": arguments.memory}
    print(json.dumps({"model": arguments.model, **figures}))


def main() -> int:
    """Run one of the two commands; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    make = commands.add_parser("build", help="write train.jsonl and test.jsonl")
    make.add_argument("--babi", required=True, help="folder with bAbI's English task files")
    make.add_argument("--book", required=True, help="a plain-text book, UTF-8")
    make.add_argument("--output", required=True, help="folder to write to")
    make.add_argument("--task", default="qa1", help="bAbI task (default: qa1)")
    make.add_argument("--words", type=int, default=96, help="words per row (default: 96)")
    make.add_argument("--copies", type=int, default=8, help="training rows per question")
    make.add_argument("--seed", type=int, default=0)
    make.add_argument("--overwrite", action="store_true")
    make.set_defaults(run=build)
    score = commands.add_parser("evaluate", help="score a model on a set")
    score.add_argument("--model", required=True, help="run folder or model folder")
    score.add_argument("--data", required=True, help="a test.jsonl")
    score.add_argument("--memory", choices=("on", "off"), default="off")
    score.add_argument("--limit", type=int, default=None, help="score only the first rows")
    score.set_defaults(run=evaluate)
    arguments = parser.parse_args()
    try:
        arguments.run(arguments)
    except MemDLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
