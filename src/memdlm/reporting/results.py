"""What an evaluation has left behind: arms, tasks, and a result for each arm, task and seed.

Results that are not there yet are simply missing. A result that says it is another one's, or one
that the evaluation knows nothing of, is never taken for what is asked for.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memdlm.reporting.records import Record, read_record

EVALUATION = "evaluation.json"
_RESULTS = "results"
_FIX_RESULT = "delete it and evaluate again, which makes only what is missing"
_FIX_EVALUATION = "evaluate anew into another folder, or leave this one out"

# A file's own mean and that of its samples agree but for rounding.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class ComparedArm:
    """One side of a comparison, as the evaluation names it.

    Attributes:
        name: What files call it.
        label: What a reader sees.
        model: Folder or hub name; None for an arm without a model, which is not run.
        adapter: Adapter on top; None for none.
        has_memory: Whether a memory is written from each prompt.
        settings: What it sets differently from the others.
    """

    name: str
    label: str
    model: str | None
    adapter: str | None
    has_memory: bool
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class ScoredSample:
    """One document of a task.

    Attributes:
        number: Its place among the task's documents.
        prompt: SHA-256 of its prompt: arms that agree here were asked the same.
        scores: Metric -> score; a fraction in the main metric.
    """

    number: int
    prompt: str
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Result:
    """One result file: an arm on a task with a seed.

    Attributes:
        path: The file, below the evaluation's folder.
        settings: Everything that decides its numbers.
        command: What was typed.
        commit: Git commit it was made at, "dirty" beside it where files differed.
        versions: Packages that decide numbers.
        model: Model and adapter, in words.
        metrics: Names of its metrics; the first is the main one.
        samples: Its documents.
        num_dropped: Samples whose memory was dropped.
        num_cut: Samples whose prompt was cut to fit the model's context.
        digest: SHA-256 of the file.
        has_own_mean: Whether the mean that the file gives is that of its samples.
    """

    path: str
    settings: Mapping[str, Any]
    command: str
    commit: str
    versions: Mapping[str, Any]
    model: str
    metrics: tuple[str, ...]
    samples: Sequence[ScoredSample]
    num_dropped: int
    num_cut: int
    digest: str
    has_own_mean: bool

    @property
    def metric(self) -> str:
        """The main metric."""
        return self.metrics[0]

    def scores(self, metric: str | None = None) -> list[float]:
        """Return the samples' scores in a metric, the main one by default."""
        return [sample.scores[metric or self.metric] for sample in self.samples]


@dataclass(frozen=True)
class Evaluation:
    """One evaluation as a report sees it.

    Attributes:
        name: What the report calls it.
        preset: Its preset; None if it has none.
        title: Its heading.
        command: What was typed.
        arms: What is compared.
        tasks: Names with lengths.
        groups: Group -> its tasks.
        seeds: Seeds asked for.
        num_samples: Task -> documents asked for.
        paper: Arm -> column -> the paper's figure in percent, where the evaluation names it.
        results: (arm, task, seed) -> result; what was not run is missing.
        strangers: Result files that are none of this evaluation's.
        training_seed: Seed that its models were trained with, where a sweep trains with several.
    """

    name: str
    preset: str | None
    title: str
    command: str
    arms: Sequence[ComparedArm]
    tasks: Sequence[str]
    groups: Mapping[str, Sequence[str]]
    seeds: Sequence[int]
    num_samples: Mapping[str, int]
    paper: Mapping[str, Mapping[str, float]]
    results: Mapping[tuple[str, str, int], Result]
    strangers: Sequence[str]
    training_seed: int | None = None

    @property
    def heading(self) -> str:
        """Its title, with the seed that its models were trained with where there are several."""
        seed = self.training_seed
        return self.title if seed is None else f"{self.title}, training seed {seed}"

    def arm(self, name: str) -> ComparedArm:
        """Return an arm by its name."""
        return next(arm for arm in self.arms if arm.name == name)

    def expected_samples(self, task: str) -> int | None:
        """Return how many documents a task should have; None where nothing says so."""
        if task in self.num_samples:
            return self.num_samples[task]
        said = [r.settings.get("num_samples") for (_, t, _), r in self.results.items() if t == task]
        return max((n for n in said if isinstance(n, int)), default=None)


def read_evaluation(folder: Path, name: str, remark: Callable[[str], None]) -> Evaluation:
    """Return the evaluation in a folder.

    Args:
        folder: Holds evaluation.json.
        name: What the report calls it.
        remark: Told about files that are left out.

    Raises:
        CheckpointError: A file is damaged, or says that it is another one's.
    """
    record, _ = read_record(folder / EVALUATION, _FIX_EVALUATION)
    arms = [_arm(part) for part in record.parts("arms")]
    tasks, seeds = record.get("tasks", list), record.get("seeds", list)
    groups = record.values.get("groups") or {}
    expected = {(arm.name, task, seed) for arm in arms for task in tasks for seed in seeds}
    results, strangers = {}, []
    for path in sorted((folder / _RESULTS).glob("*/*/seed*.json")):
        result, key = _result(path, folder)
        if key in expected:
            results[key] = result
        else:
            strangers.append(result.path)
            remark(f"{path} is no part of {folder / EVALUATION} and is left out")
    return Evaluation(
        name=name,
        preset=record.text("preset"),
        title=record.text("title") or name,
        command=record.text("command") or "",
        arms=arms,
        tasks=tasks,
        groups={group: list(members) for group, members in groups.items()},
        seeds=seeds,
        num_samples={task: int(n) for task, n in (record.values.get("num_samples") or {}).items()},
        paper=record.values.get("paper") or {},
        results=results,
        strangers=strangers,
        training_seed=record.get("training_seed", int)
        if "training_seed" in record.values
        else None,
    )


def model_text(model: str | None, adapter: str | None) -> str:
    """Return model and adapter in words; empty where there is none."""
    return " + ".join(part for part in (model, adapter) if part)


def _arm(record: Record) -> ComparedArm:
    name = record.get("name", str)
    return ComparedArm(
        name,
        record.text("label") or name,
        record.text("model"),
        record.text("adapter"),
        bool(record.values.get("memory")),
        record.values.get("settings") or {},
    )


def _result(path: Path, folder: Path) -> tuple[Result, tuple[str, str, int]]:
    """Return a result file and whose result it is, which its place has to confirm."""
    record, digest = read_record(path, _FIX_RESULT)
    key = (record.get("arm", str), record.get("task", str), record.get("seed", int))
    place = (path.parents[1].name, path.parent.name, path.stem.removeprefix("seed"))
    if (key[0], key[1], str(key[2])) != place:
        raise record.error(
            f"its place is that of {'/'.join(place)}, it says it is {key[0]}/{key[1]}/{key[2]}"
        )
    metrics = record.part("metrics")
    names = sorted(metrics.values, key=lambda name: name != "score")  # the main one first
    if not names:
        raise record.error("metrics is empty")
    samples = [_sample(part, names) for part in record.parts("samples")]
    if not samples:
        raise record.error("samples is empty")
    if len({sample.number for sample in samples}) < len(samples):
        raise record.error("samples has an id twice")
    mean = sum(sample.scores[names[0]] for sample in samples) / len(samples)
    origin = record.part("provenance")
    result = Result(
        path=path.relative_to(folder).as_posix(),
        settings=record.part("settings").values,
        command=origin.text("command") or "",
        commit=origin.text("commit") or "none",
        versions=origin.values.get("versions") or {},
        model=model_text(origin.text("model"), origin.text("adapter")),
        metrics=tuple(names),
        samples=samples,
        num_dropped=sum(s.get("memory") == "dropped" for s in record.values["samples"]),
        num_cut=sum(bool(s.get("num_dropped_tokens")) for s in record.values["samples"]),
        digest=digest,
        has_own_mean=abs(metrics.part(names[0]).number("value") - mean) <= _ROUNDING,
    )
    return result, key


def _sample(record: Record, metrics: Sequence[str]) -> ScoredSample:
    scores = record.part("metrics")
    return ScoredSample(
        record.get("id", int),
        record.get("prompt_sha256", str),
        {name: scores.number(name) for name in metrics},
    )
