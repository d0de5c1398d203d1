"""Whether the results of one table may stand side by side, and what tells them apart.

Arms are there to differ in model, adapter and memory. In anything else they must not: another
number of samples, other documents, other sampling or another commit is said first, above the table.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from memdlm.reporting.results import Evaluation, Result, model_text
from memdlm.reporting.settings import NOTHING, as_text, flatten

Key = tuple[str, str, int]

# What has to be equal in all arms of a column; a name stands for everything below it.
_SAME_IN_ALL_ARMS = (
    "num_samples",
    "data",
    "data_hash",
    "sampling",
    "dtype",
    "quantization",
    "tokenizer_hash",
    "chat_template",
    "truncation",
    "context_length",
    "likelihood",
)
# What has to be equal in all columns of an arm.
_SAME_IN_ALL_TASKS = (
    "model_fingerprint",
    "adapter_fingerprint",
    "tokenizer_hash",
    "dtype",
    "quantization",
    "memory",
    "objective",
    "chat_template",
)
# What says how a memory is written, and nothing where there is none.
_OF_MEMORY = ("memory", "objective")
_SHOWN = 4
_HASH_LENGTH = 12


def warnings(evaluation: Evaluation) -> list[str]:
    """Return what a reader has to know before the numbers; nothing where all is well."""
    results = evaluation.results
    flat = {key: flatten(result.settings) for key, result in results.items()}
    lines = [
        f"{setting} differs between arms on {_few(places)}, so their scores do not compare "
        f"({values})"
        for setting, places, values in _unequal(flat, _SAME_IN_ALL_ARMS, _column)
    ]
    lines += [
        f"{setting} differs between the results of {_few(places)}, which are not of one arm "
        f"({values})"
        for setting, places, values in _unequal(flat, _SAME_IN_ALL_TASKS, lambda key: (key[0],))
    ]
    lines += _other_arm(evaluation, flat)
    lines += _other_code(results)
    lines += _other_samples(evaluation)
    cut = {key: result for key, result in results.items() if result.num_cut}
    if cut:
        count = sum(result.num_cut for result in cut.values())
        lines.append(
            f"{count:,} prompts were longer than the model's context and were cut in the middle "
            f"({_few(_name(key) for key in cut)})"
        )
    dropped = {key: result for key, result in results.items() if result.num_dropped}
    if dropped:
        count = sum(result.num_dropped for result in dropped.values())
        lines.append(
            f"the memory met inf or nan and was dropped for {count:,} samples "
            f"({_few(_name(key) for key in dropped)}): they were answered without it"
        )
    lines += [
        f"the score that {result.path} gives is not the mean of its samples; the mean is shown"
        for result in results.values()
        if not result.has_own_mean
    ]
    if evaluation.strangers:
        lines.append(
            f"left out, for evaluation.json knows nothing of them: {_few(evaluation.strangers)}"
        )
    return lines


def arm_differences(evaluation: Evaluation) -> dict[str, list[str]]:
    """Return setting -> value in each arm, for settings in which arms differ on the same task.

    That a memory's settings are missing where there is no memory is no difference of its own.
    """
    flat = _with_memory_everywhere(evaluation)
    settings = {name for name, _, _ in _unequal(flat, None, _column)}
    return {
        name: [
            _joined(values.get(name, _MISSING) for (arm, _, _), values in flat.items() if arm == a)
            for a in (arm.name for arm in evaluation.arms)
        ]
        for name in _all_settings(flat)
        if name in settings
    }


def task_differences(evaluation: Evaluation) -> dict[str, list[tuple[str, str]]]:
    """Return setting -> (value, tasks) pairs, where results of one arm differ in the setting."""
    flat = {key: flatten(result.settings) for key, result in evaluation.results.items()}
    settings = {name for name, _, _ in _unequal(flat, None, lambda key: (key[0],))}
    found: dict[str, list[tuple[str, str]]] = {}
    for name in _all_settings(flat):
        if name not in settings:
            continue
        by_value: dict[str, list[str]] = {}
        for (_, task, seed), values in flat.items():
            where = f"{task}, seed {seed}" if len(evaluation.seeds) > 1 else task
            by_value.setdefault(_text(values.get(name, _MISSING)), []).append(where)
        found[name] = [(v, ", ".join(dict.fromkeys(where))) for v, where in by_value.items()]
    return found


def common_settings(evaluation: Evaluation) -> dict[str, str]:
    """Return the settings that are equal in all results, a memory's in all that have one."""
    flat = list(_with_memory_everywhere(evaluation).values())
    names = dict.fromkeys(name for values in flat for name in values)
    return {
        name: as_text(flat[0][name])
        for name in names
        if all(name in values and values[name] == flat[0][name] for values in flat)
    }


def _with_memory_everywhere(evaluation: Evaluation) -> dict[Key, dict[str, Any]]:
    """Return flat settings; where the memory is off, it has the settings that all others share."""
    flat = {key: flatten(result.settings) for key, result in evaluation.results.items()}
    on = [values for values in flat.values() if values.get("memory.enabled") is True]
    shared = {
        name: value
        for name, value in (on[0] if on else {}).items()
        if name.partition(".")[0] in _OF_MEMORY and all(values.get(name) == value for values in on)
    }
    shared["memory.enabled"] = False
    return {
        key: values
        if values.get("memory.enabled") is True
        # A section that is off is null, or says so.
        else {**{n: v for n, v in values.items() if n not in _OF_MEMORY}, **shared}
        for key, values in flat.items()
    }


def short_commit(commit: str) -> str:
    """Return a commit as git shortens it, with what stands beside it."""
    name, *rest = commit.split(" ")
    return " ".join([name[:_HASH_LENGTH], *rest])


class _Missing:
    """Stands for a setting that a result does not have."""


_MISSING = _Missing()


def _text(value: Any) -> str:
    return NOTHING if isinstance(value, _Missing) else as_text(value)


def _joined(values: Iterable[Any]) -> str:
    return " | ".join(dict.fromkeys(map(_text, values))) or NOTHING


def _all_settings(flat: Mapping[Key, Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for values in flat.values() for name in values))


def _column(key: Key) -> tuple[str, int]:
    return key[1], key[2]


def _unequal(
    flat: Mapping[Key, Mapping[str, Any]], roots: Sequence[str] | None, place_of: Any
) -> list[tuple[str, list[str], str]]:
    """Return settings that are not equal among results of one place.

    Args:
        flat: (arm, task, seed) -> flat settings.
        roots: Settings to look at, with everything below them; None for all.
        place_of: (arm, task, seed) -> the place within which they should be equal.

    Returns:
        Setting, the places where it differs, and the values of the first of them.
    """
    places: dict[Any, list[Key]] = {}
    for key in flat:
        places.setdefault(place_of(key), []).append(key)
    found = []
    for name in _all_settings(flat):
        if roots is not None and name.partition(".")[0] not in roots:
            continue
        bad = [
            (place, keys)
            for place, keys in places.items()
            if len({repr(flat[key].get(name, _MISSING)) for key in keys}) > 1
        ]
        if bad:
            where: dict[str, list[str]] = {}
            place, keys = bad[0]
            for key in keys:
                rest = [str(part) for part in key if part not in place]
                where.setdefault(_short(flat[key].get(name, _MISSING)), []).append(rest[0])
            values = "; ".join(f"{value}: {_few(names)}" for value, names in where.items())
            found.append((name, list(dict.fromkeys(str(p[0]) for p, _ in bad)), values))
    return found


def _short(value: Any) -> str:
    """Return a value, a hash cut to what tells it apart."""
    text = _text(value)
    is_hash = len(text) >= 32 and all(letter in "0123456789abcdef" for letter in text)
    return f"{text[:_HASH_LENGTH]}…" if is_hash else text


def _other_arm(evaluation: Evaluation, flat: Mapping[Key, Mapping[str, Any]]) -> list[str]:
    """Return a line for each arm whose results say that they are of another model or memory."""
    lines = []
    for arm in evaluation.arms:
        named = model_text(arm.model, arm.adapter)
        found = {
            key: (result.model, flat[key].get("memory.enabled") is True)
            for key, result in evaluation.results.items()
            if key[0] == arm.name
        }
        models = dict.fromkeys(model for model, _ in found.values() if model != named)
        if models:
            lines.append(
                f"results of {arm.name} were made with {_few(models)}, and evaluation.json names "
                f"{named or 'no model'}"
            )
        memories = [key[1] for key, (_, has) in found.items() if has != arm.has_memory]
        if memories:
            was = "without a memory" if arm.has_memory else "with a memory"
            lines.append(
                f"results of {arm.name} on {_few(memories)} were made {was}, against what "
                "evaluation.json says"
            )
    return lines


def _other_code(results: Mapping[Key, Result]) -> list[str]:
    """Return lines about commits and versions that are not one."""
    lines = []
    commits: dict[str, list[str]] = {}
    for key, result in results.items():
        commits.setdefault(result.commit, []).append(_name(key))
    if len(commits) > 1:
        each = "; ".join(f"{short_commit(c)}: {_few(names)}" for c, names in commits.items())
        lines.append(f"the results were made by different commits ({each})")
    dirty = [name for commit, names in commits.items() if "dirty" in commit for name in names]
    if dirty:
        lines.append(
            f"{len(dirty):,} of {len(results):,} results were made with changes that were not "
            "committed (dirty): their commit alone does not make them again"
        )
    versions = [result.versions for result in results.values()]
    for package in dict.fromkeys(name for each in versions for name in each):
        found = dict.fromkeys(str(each.get(package, NOTHING)) for each in versions)
        if len(found) > 1:
            lines.append(f"the results were made with several versions of {package}: "
                         f"{', '.join(found)}")  # fmt: skip
    return lines


def _other_samples(evaluation: Evaluation) -> list[str]:
    """Return a line where results hold other numbers of samples than were asked for."""
    bad = [
        f"{_name(key)}: {len(result.samples):,} of {evaluation.num_samples[key[1]]:,}"
        for key, result in evaluation.results.items()
        if key[1] in evaluation.num_samples
        and len(result.samples) != evaluation.num_samples[key[1]]
    ]
    return [f"results with another number of samples than asked for ({_few(bad)})"] if bad else []


def _name(key: Key) -> str:
    return f"{key[0]} on {key[1]}, seed {key[2]}"


def _few(names: Iterable[str]) -> str:
    """Return names, as many as one can read."""
    listed = list(dict.fromkeys(names))
    more = len(listed) - _SHOWN
    return ", ".join(listed[:_SHOWN]) + (f" and {more:,} more" if more > 0 else "")
