"""The trace of a decode: which step filled which slot, as one HTML page that plays it.

`TraceRecorder` watches `memdlm.inference.generate`; `write_page` needs what it saw and the answers.
The page (`trace_page.html`) is self-contained: no network, no library.
"""

import html
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memdlm.cli.text_stream import piece
from memdlm.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from memdlm.inference import Generation, GenerationUpdate


@dataclass
class _Row:
    """What one prompt's canvas went through: per column its (step, token id), step 0 = given."""

    start: int
    events: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    last: list[int] = field(default_factory=list)
    num_steps: int = 0


class TraceRecorder:
    """Remembers what every step changed; pass `record` as `on_update`."""

    def __init__(self, mask_token_id: int) -> None:
        """Record decodes of a model with this mask token."""
        self.mask_token_id = mask_token_id
        self.rows: dict[int, _Row] = {}

    def record(self, update: "GenerationUpdate") -> None:
        """Note the tokens that a step put in place, edits included."""
        canvas, committed = update.step.canvas.tolist(), update.step.committed.tolist()
        step = update.step.index + 1
        for place, row_number in enumerate(update.rows):
            row = self.rows.setdefault(row_number, _Row(update.answer_starts[place]))
            tokens = canvas[place]
            for column in range(row.start, len(tokens)):
                token = tokens[column]
                if token == self.mask_token_id:
                    continue
                if not row.last and not committed[place][column]:
                    row.events[column] = [(0, token)]  # stood there before the first step
                elif committed[place][column] or row.last[column] != token:
                    row.events.setdefault(column, []).append((step, token))
                    row.num_steps = step
            row.last = tokens

    def slots(
        self, row_number: int, num_slots: int, tokenizer: "PreTrainedTokenizerBase"
    ) -> list[list[list[Any]]]:
        """Return per slot of an answer its events [step, text, is special, probability]."""
        row = self.rows[row_number]
        special = set(tokenizer.all_special_ids)
        slots = []
        for column in range(row.start, row.start + num_slots):
            left = row.last[column - 1] if column else None
            if left in special:
                left = None
            slots.append(
                [
                    # The probability is open: a decode does not tell it.
                    [step, piece(tokenizer, left, [token]), token in special, None]
                    for step, token in row.events.get(column, [])
                ]
            )
        return slots


def check_free(place: Path, overwrite: bool) -> None:
    """Refuse a place where no page can go, before time is spent on what it would show.

    Raises:
        UsageError: It is a folder, or a file that may not be replaced.
        CheckpointError: Its folder does not exist.
    """
    if place.is_dir():
        raise UsageError(f"--trace {place} is a folder: name a file, e.g. {place}/trace.html")
    if place.exists() and not overwrite:
        raise UsageError(f"--trace {place} exists: choose another name, or add --overwrite")
    if not place.absolute().parent.is_dir():
        raise CheckpointError(
            f"cannot write {place}: there is no folder {place.absolute().parent}; create it first"
        )


def write_page(
    place: Path,
    recorder: TraceRecorder,
    prompts: Sequence[str],
    answers: "Sequence[Generation]",
    tokenizer: "PreTrainedTokenizerBase",
    max_new_tokens: int | None,
    about: str,
) -> None:
    """Write the page; `place` appears whole or stays as it was.

    Args:
        place: The file.
        recorder: What was recorded while `answers` were decoded.
        prompts: What to show as each answer's prompt.
        answers: In the order of the prompts.
        tokenizer: The model's.
        max_new_tokens: Slots of an answer; None where prompts were filled in.
        about: One line on what was run.

    Raises:
        CheckpointError: It cannot be written.
    """
    records = []
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        num_slots = answer.num_prompt_tokens if max_new_tokens is None else max_new_tokens
        records.append(
            {
                "prompt": prompt,
                "memory": answer.memory,
                "length": len(answer.token_ids),
                "num_steps": recorder.rows[number].num_steps,
                "slots": recorder.slots(number, num_slots, tokenizer),
            }
        )
    page = render_page({"about": about, "prompts": records}, [answer.text for answer in answers])
    partial = place.with_name(f".{place.name}.partial-{os.getpid()}")
    try:
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, place)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(
            f"cannot write {place} ({error.strerror}): free some space, or choose another place"
        ) from error


def render_page(trace: dict[str, Any], answers: Sequence[str]) -> str:
    """Return the page of a trace; no text in it can be read as markup."""
    # ensure_ascii also hides lone surrogates, which UTF-8 could not hold.
    data = json.dumps(trace, ensure_ascii=True).replace("<", "\\u003c")
    listed = "".join(f"<pre>{html.escape(answer)}</pre>" for answer in answers)
    template = files("memdlm.cli").joinpath("trace_page.html").read_text(encoding="utf-8")
    before, between, after = _split(template, "__ANSWERS__", "__TRACE__")
    return "".join((before, listed, between, data, after))


def _split(text: str, first: str, second: str) -> tuple[str, str, str]:
    before, _, rest = text.partition(first)
    between, _, after = rest.partition(second)
    return before, between, after
