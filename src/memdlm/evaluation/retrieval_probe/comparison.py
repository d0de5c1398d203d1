"""The retrieval probe of several arms on the same questions, arm by arm, restartable.

<output>/probe/<arm>.json   a cell: what decides its numbers, and every answer
<output>/probe.json         means, differences and intervals, made of the cells

Knows no figure and no command line.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from memdlm.data.config import CHAT_TEMPLATE
from memdlm.data.encoding import check_prompt_fits
from memdlm.errors import ConfigError, DataError
from memdlm.evaluation.config import Arm
from memdlm.evaluation.loaded import (
    LoadedModel,
    arm_tokenizer,
    by_model,
    check_arms,
    load_arm,
    memory_settings,
)
from memdlm.evaluation.measured_cells import FORMAT, read_cell, write_cell
from memdlm.evaluation.retrieval_probe.asking import CONDITIONS, ProbeItem, make_items, probe_batch
from memdlm.evaluation.retrieval_probe.results import WITH, WITHOUT, figures
from memdlm.evaluation.samples import Sample, encode_samples
from memdlm.memory.config import MemoryConfig
from memdlm.plain import as_json_gives_it
from memdlm.uncertainty import NUM_RESAMPLES

CELLS = "probe"
RESULT = "probe.json"

Say = Callable[[str], None]


@dataclass(frozen=True)
class ProbeSettings:
    """How the probe asks, for all arms alike.

    Raises:
        ConfigError: A value is out of range.
    """

    conditions: tuple[str, ...] = field(
        default=tuple(CONDITIONS), metadata={"help": "What is asked, in this order."}
    )
    max_new_tokens: int | None = field(
        default=None,
        metadata={"help": "Length of answers. Default: that of the longest right one."},
    )
    seed: int = field(
        default=0, metadata={"help": "Seed of memories, orders, resamples and generated rows."}
    )
    batch_size: int = field(
        default=8, metadata={"help": "Questions asked together; changes no answer."}
    )
    chat_template: str = field(default="auto", metadata={"help": "auto, or never for raw prompts."})
    num_resamples: int = field(
        default=NUM_RESAMPLES, metadata={"help": "Resamples of the samples for intervals."}
    )

    def __post_init__(self) -> None:
        """Check ranges and names."""
        for name in ("batch_size", "num_resamples", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: {value} is out of range; use 1 or more")
        if self.seed < 0:
            raise ConfigError(f"seed: {self.seed} is out of range; use 0 or more")
        if self.chat_template not in CHAT_TEMPLATE:
            raise ConfigError(f"chat_template: {self.chat_template!r}: write auto or never")
        if not self.conditions or len(set(self.conditions)) < len(self.conditions):
            raise ConfigError(f"conditions: {list(self.conditions)}: name each once, at least one")
        for name in self.conditions:
            if name not in CONDITIONS:
                raise ConfigError(f"conditions: {name!r} is not one of {', '.join(CONDITIONS)}")


def compare_retrieval(
    arms: Sequence[Arm],
    samples: Sequence[Sample],
    settings: ProbeSettings,
    output: Path,
    *,
    overwrite: bool = False,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Ask every arm the same questions in every condition, without and with a memory.

    Args:
        arms: What is compared; the memory of each is what it writes, whether enabled or not.
        samples: Questions with their evidence; at least one.
        settings: How to ask.
        output: Folder of the cells; made if missing.
        overwrite: Replace cells of other settings.
        say: Receives a line per arm.

    Returns:
        `{"format", "conditions", "num_samples", "seed", ..., "arms"}`; each of `arms` with its
        name, model and settings, and what `figures` gives.

    Raises:
        UsageError: No arm or two of one name, or a cell of other settings.
        DataError: A sample cannot be used (see `make_items`), or exceeds a context.
        CheckpointError: A model or a cell cannot be read.
    """
    check_arms(arms)
    arms = [replace(arm, memory=replace(arm.memory, enabled=True)) for arm in arms]
    # Bad rows show before the first model is loaded, whichever arm they would stop.
    items = {arm.name: _items(arm, samples, settings) for arm in arms}
    described = []
    for group in by_model(arms):
        loaded = load_arm(group[0])
        for arm in group:
            asked, data_hash = items[arm.name]
            rooms = _rooms(asked, settings.max_new_tokens)
            _check_context(asked, loaded.context_length, rooms)
            facts = {
                **loaded.identity,
                "data_hash": data_hash,
                "num_samples": len(samples),
                "conditions": list(settings.conditions),
                "seed": settings.seed,
                "sampling": {**asdict(arm.sampling), "max_new_tokens": rooms},
                **memory_settings(arm),
            }
            path = output / CELLS / f"{arm.name}.json"
            cell = read_cell(path, facts, overwrite)
            if cell is None:
                cell = {"samples": _measure(loaded, arm, asked, rooms, settings, say)}
                write_cell(path, facts, cell)
            else:
                say(f"{arm.name}: measured before")
            described.append(_describe(arm, facts, cell["samples"], settings))
        del loaded
    order = [arm.name for arm in arms]
    return {
        "format": FORMAT,
        "conditions": list(settings.conditions),
        "num_samples": len(samples),
        "seed": settings.seed,
        "chat_template": settings.chat_template,
        "num_resamples": settings.num_resamples,
        "arms": sorted(described, key=lambda arm: order.index(arm["name"])),
    }


def _items(
    arm: Arm, samples: Sequence[Sample], settings: ProbeSettings
) -> tuple[list[ProbeItem], str]:
    """Return what an arm reads, and its hash."""
    tokenizer = arm_tokenizer(arm)
    encoded = encode_samples(samples, tokenizer, chat_template=settings.chat_template)
    items = make_items(
        samples,
        encoded,
        tokenizer,
        chat_template=settings.chat_template,
        needs_question="question_only" in settings.conditions,
        seed=settings.seed,
    )
    return items, _hash(items)


def _hash(items: Sequence[ProbeItem]) -> str:
    """Return a BLAKE2b hash (128 bits, in hex) of all that is asked, needles included."""
    digest = hashlib.blake2b(digest_size=16)
    for item in items:
        question = [] if item.question is None else item.question.tolist()
        parts = [item.prompt.tolist(), item.needle.tolist(), question, item.response.tolist()]
        digest.update(json.dumps([*parts, item.sample.answers, item.sample.any_order]).encode())
    return digest.hexdigest()


def _rooms(items: Sequence[ProbeItem], max_new_tokens: int | None) -> dict[str, int]:
    """Return the length of answers by source: that of its longest right one, unless it is given.

    As benchmarks do: a network may have learnt to end its answers by the room that they have.
    """
    rooms: dict[str, int] = {}
    for item in items:
        source, length = item.sample.source, len(item.response)
        rooms[source] = max_new_tokens or max(rooms.get(source, 0), length)
    return rooms


def _check_context(items: Sequence[ProbeItem], context: int, rooms: Mapping[str, int]) -> None:
    for item in items:
        slots = max(rooms[item.sample.source], len(item.response))
        try:
            check_prompt_fits(len(item.prompt), context, slots)
        except DataError as error:
            raise DataError(f"{item.sample.dialogue.where}: {error}") from error


def _measure(
    loaded: LoadedModel,
    arm: Arm,
    items: Sequence[ProbeItem],
    rooms: Mapping[str, int],
    settings: ProbeSettings,
    say: Say,
) -> list[dict[str, Any]]:
    """Return what every sample was answered, in their order."""
    say(f"{arm.name}: {len(items)} questions, {len(settings.conditions)} conditions")
    variants: dict[str, MemoryConfig | None] = {WITHOUT: None, WITH: arm.memory}
    records: list[dict[str, Any]] = []
    for batch in _batches(items, settings.batch_size):
        sampling = replace(arm.sampling, max_new_tokens=rooms[batch[0].sample.source])
        answered = {
            name: probe_batch(
                loaded.model,
                loaded.tokenizer,
                batch,
                settings.conditions,
                sampling,
                memory,
                arm.objective,
            )
            for name, memory in variants.items()
        }
        for row, item in enumerate(batch):
            answers = {
                condition: {name: answered[name][condition][row].as_plain() for name in variants}
                for condition in settings.conditions
            }
            dialogue = item.sample.dialogue
            where = {"where": dialogue.where, "source": item.sample.source}
            records.append({**where, "target": dialogue.response, "answers": answers})
    _tell_of_dropped(arm.name, records, say)
    return records


def _batches(items: Sequence[ProbeItem], batch_size: int) -> Iterator[Sequence[ProbeItem]]:
    """Yield batches of one source each; the rows of a source stand together."""
    for _, group in groupby(items, key=lambda item: item.sample.source):
        rows = list(group)
        for start in range(0, len(rows), batch_size):
            yield rows[start : start + batch_size]


def _tell_of_dropped(name: str, records: Sequence[Mapping[str, Any]], say: Say) -> None:
    num_dropped = sum(
        any(answer[WITH]["memory"] == "dropped" for answer in record["answers"].values())
        for record in records
    )
    if num_dropped:
        say(
            f"{name}: {num_dropped} memories met inf or nan and were left out; lower "
            "memory.learning_rate"
        )


def _describe(
    arm: Arm,
    facts: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    settings: ProbeSettings,
) -> dict[str, Any]:
    return {
        "name": arm.name,
        "label": arm.label,
        "model": arm.model,
        "adapter": arm.adapter,
        "settings": as_json_gives_it(facts),
        **figures(
            records,
            settings.conditions,
            num_resamples=settings.num_resamples,
            seed=settings.seed,
        ),
    }
