"""BABILong documents made here: a bAbI question whose facts are hidden in a text of the user's.

In the manner of the official generator (github.com/booydar/babilong, `babilong_utils.py`): facts
keep their order and each falls at a random place among consecutive sentences of the background,
which begin at a random one. Different on purpose:

- A length counts the whole prompt (lm-eval's description and examples, text, question, the token
  that opens a text) and the room for the answer. There it counts facts and background only.
- Questions are drawn at random from the split's file, not in its order, and one whose prompt is too
  long even without background is passed over.
- White space in the background, line breaks included, becomes single blanks.
"""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from memdlm.data.babi import Question, find_babi_file, read_babi
from memdlm.data.encoding import encode_prompt
from memdlm.errors import DataError
from memdlm.evaluation.tasks.babilong.background import Background, read_background
from memdlm.evaluation.tasks.task import TaskRequest
from memdlm.seeding import derive_seed


def make_documents(
    request: TaskRequest,
    task: str,
    max_new_tokens: int,
    write_prompt: Callable[[dict[str, Any]], str],
    split: str = "test",
) -> list[dict[str, Any]]:
    """Hide questions of one of bAbI's files; return lm-eval's documents, at most `num_samples`.

    The questions depend on the seed, not on the length, as far as they fit into it.

    Args:
        request: Its sources name the folder of bAbI and the background text; length 0 is without
            background and without a limit.
        task: bAbI's, `qa1` to `qa5`.
        max_new_tokens: Room for the answer.
        write_prompt: Gives the whole prompt of a document (`task.prompt_writer`).
        split: `test`, or `train` for rows to train on; evaluations ask about `test` only.

    Returns:
        Documents of `id` (place of the question in its file), `input`, `question` and `target`.

    Raises:
        DataError: A source is missing or unreadable, the background is too short, or no question
            fits into the length.
    """
    sources, length = request.sources, request.length or 0
    assert sources.babi is not None
    questions = list(read_babi(find_babi_file(Path(sources.babi), task, split)))
    order = list(range(len(questions)))
    random.Random(derive_seed(request.seed, f"babilong/{task}/questions")).shuffle(order)

    def count(texts: Sequence[str]) -> list[int]:
        encoded: Any = request.tokenizer(list(texts), add_special_tokens=False, verbose=False)
        return [len(ids) for ids in encoded["input_ids"]]

    def room(document: dict[str, Any]) -> int:
        prompt = encode_prompt(request.tokenizer, write_prompt(document), chat_template="never")
        return length - max_new_tokens - len(prompt)

    background = read_background(_background_path(request), count) if length else None
    documents: list[dict[str, Any]] = []
    for index in order:
        if len(documents) == request.num_samples:
            break
        question = questions[index]
        document = _document(index, question, list(question.facts))
        if background is not None:
            free = room(document)
            if free < 0:
                continue
            seed = derive_seed(request.seed, f"babilong/{task}/places", index)
            document = _fill(index, question, background, free, seed, room)
        documents.append(document)
    if not documents:
        raise DataError(
            f"{request.name}: no question's facts fit into {length} tokens beside lm-eval's "
            "description and examples; use a longer length"
        )
    return documents


def hide(facts: Sequence[str], background: Sequence[str], rng: random.Random) -> list[str]:
    """Return facts and background, each in its order, facts at places that are drawn alike."""
    places = sorted(rng.randrange(len(background) + 1) for _ in facts)
    text: list[str] = []
    rest = list(zip(places, facts, strict=True))
    for place in range(len(background) + 1):
        while rest and rest[0][0] == place:
            text.append(rest.pop(0)[1])
        text += background[place : place + 1]
    return text


def _fill(
    index: int,
    question: Question,
    background: Background,
    free: int,
    seed: int,
    room: Callable[[dict[str, Any]], int],
) -> dict[str, Any]:
    """Return the document with as much background as its prompt has room for."""
    start = random.Random(seed).randrange(len(background.sentences))
    sentences = background.take(start, free)
    while True:
        rng = random.Random(derive_seed(seed, "facts"))
        document = _document(index, question, hide(question.facts, sentences, rng))
        excess = -room(document)
        if not sentences or excess <= 0:
            return document
        # Tokens of sentences apart need not add up to those of the text. Fewer words than tokens
        # too many, so that the length is not undershot by much; more at once where it is far off.
        sentences = _without_last_words(sentences, max(1, excess // 4))


def _without_last_words(sentences: Sequence[str], count: int) -> list[str]:
    kept = list(sentences)
    while count > 0 and kept:
        words = kept.pop().split(" ")
        if len(words) > count:
            kept.append(" ".join(words[:-count]))
        count -= len(words)
    return kept


def _document(index: int, question: Question, text: Sequence[str]) -> dict[str, Any]:
    return {
        "id": index,
        "input": " ".join(text),
        "question": question.text,
        "target": question.answer,
    }


def _background_path(request: TaskRequest) -> Path:
    path = request.sources.background
    if path is None:
        raise DataError(
            f"{request.name}: bAbI files need a text to hide them in; give sources.background"
        )
    return Path(path)
