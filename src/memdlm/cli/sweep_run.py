"""The work of `memdlm sweep`: trainings, then evaluations, then the report, each once.

<output>/evaluation.json, results/ ...   as `memdlm eval` writes them
<output>/sweep/<key>.json                what a training's arms are asked; beside it lock and log
<output>/trainings/                      unless --trainings names a folder to share
<output>/report/                         the page

Every step leaves its result whole or not at all, so a sweep that was killed goes on where it was,
and two sweeps on one folder share the work (`memdlm.cli.sweep_jobs`).
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memdlm.cli.evaluation_arms import describe_arm
from memdlm.cli.settings import to_plain, to_yaml
from memdlm.cli.sweep_jobs import Job, JobsOutcome, run_jobs
from memdlm.cli.sweep_plan import PlannedEvaluation, SweepPlan, Training
from memdlm.errors import MemDLMError, StoppedError
from memdlm.evaluation.records import FORMAT, CellKey, EvaluationFolder
from memdlm.evaluation.tasks.table import expand, find_task
from memdlm.files import write_text
from memdlm.versions import collect_commit, collect_devices, collect_versions

SWEEP = "sweep"
REPORT = "report"


class SweepError(MemDLMError):
    """Part of a sweep failed."""


@dataclass(frozen=True)
class SweepOptions:
    """How a sweep runs; changes no result.

    Attributes:
        jobs: Processes at a time.
        gpus: GPUs that they are given in turn; empty leaves it to them.
        threads: CPU threads of each; None for an equal share of the cores.
        command: What was typed.
    """

    jobs: int = 1
    gpus: tuple[str, ...] = ()
    threads: int | None = None
    command: str = ""


def run_sweep(plan: SweepPlan, options: SweepOptions) -> None:
    """Do all that is not done, then write the reports.

    Raises:
        UsageError: A result folder holds another evaluation.
        StoppedError: SIGTERM or Ctrl-C came.
        SweepError: Some job failed; the others were done all the same.
    """
    for evaluation in plan.evaluations:
        _begin(evaluation, options.command)
    jobs = [_training_job(training) for training in plan.trainings]
    names = {training.key: job.name for training, job in zip(plan.trainings, jobs, strict=True)}
    for evaluation in plan.evaluations:
        jobs += [_evaluation_job(evaluation, key, names[key]) for key in evaluation.trainings]
    num_done = sum(job.is_done() for job in jobs)
    _say(
        f"{len(plan.trainings)} trainings, {len(jobs) - len(plan.trainings)} evaluations; "
        f"{num_done} done before"
    )
    try:
        outcome = run_jobs(
            jobs,
            num_parallel=options.jobs,
            gpus=options.gpus,
            environment=_environment(options),
            say=_say,
        )
    except StoppedError as stopped:
        stopped.args = (f"{stopped}: continue with {options.command}",)
        raise
    _check(outcome)


def _begin(evaluation: PlannedEvaluation, command: str) -> None:
    """Write down what is evaluated, or check that the folder holds the same."""
    config, preset = evaluation.config, evaluation.preset
    tasks, groups = expand(config.tasks)
    description: dict[str, Any] = {
        "format": FORMAT,
        "preset": preset.name,
        "title": preset.title,
        "kind": preset.kind,
        "command": command,
        "arms": [describe_arm(planned.arm) for planned in evaluation.arms],
        "tasks": tasks,
        "groups": groups,
        "seeds": list(config.seeds),
        "num_samples": {
            name: config.num_samples or find_task(name)[0].num_samples for name in tasks
        },
    }
    versions = {**collect_versions(), **collect_devices(), **collect_commit(Path())}
    EvaluationFolder(evaluation.folder).begin(description, versions)


def _training_job(training: Training) -> Job:
    def command() -> Sequence[str]:
        write_text(training.recipe_file, to_yaml(training.recipe))
        resume = ["--resume"] if (training.place / "recipe.yaml").is_file() else []
        return _memdlm("train", str(training.recipe_file), "--quiet", *resume)

    return Job(
        name=f"training {training.key} ({training.label})",
        kind="training",
        command=command,
        place=training.place,
        is_done=lambda: training.is_finished,
    )


def _evaluation_job(evaluation: PlannedEvaluation, key: str, training: str) -> Job:
    """Return the job that asks the arms of one training."""
    folder, config = EvaluationFolder(evaluation.folder), evaluation.config
    arms = [p.arm for p in evaluation.arms if p.is_wanted and p.training == key]
    place = folder.path / SWEEP / key

    def command() -> Sequence[str]:
        spec = {"config": to_plain(config), "arms": [to_plain(arm) for arm in arms]}
        path = place.with_name(f"{key}.json")
        write_text(path, json.dumps(spec, indent=1) + "\n")
        return [sys.executable, "-m", "memdlm.cli.sweep_worker", str(folder.path), str(path)]

    cells = [
        folder.cell_path(CellKey(arm.name, task, seed))
        for arm in arms
        for task in expand(config.tasks)[0]
        for seed in config.seeds
    ]
    return Job(
        name=f"{evaluation.preset.name}, {', '.join(arm.name for arm in arms)}",
        kind=f"evaluation of {evaluation.preset.name}",
        command=command,
        place=place,
        is_done=lambda: all(cell.is_file() for cell in cells),
        after=(training,),
    )


def _memdlm(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "memdlm.cli", *arguments]


def _environment(options: SweepOptions) -> dict[str, str]:
    """Return the number of threads: more than cores in all would slow every process down."""
    if "OMP_NUM_THREADS" in os.environ and options.threads is None:
        return {}
    threads = options.threads or max(1, (os.cpu_count() or 1) // options.jobs)
    return {"OMP_NUM_THREADS": str(threads)}


def _check(outcome: JobsOutcome) -> None:
    """Say what failed.

    Raises:
        SweepError: Something did.
    """
    for name, reason in outcome.failed.items():
        _say(f"FAILED {name}: {reason}")
    for name in outcome.blocked:
        _say(f"NOT RUN {name}: its training failed")
    if outcome.failed:
        raise SweepError(
            f"{len(outcome.failed)} of {len(outcome.failed) + len(outcome.done)} jobs failed, "
            f"{len(outcome.blocked)} were not run: see their logs, and start the same command again"
        )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
