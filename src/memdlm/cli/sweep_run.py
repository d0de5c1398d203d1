"""The work of `memdlm sweep`: trainings, then evaluations, then the report, each once.

<output>/evaluation.json, results/ ...   as `memdlm eval` (or exposure-bias) writes them
<output>/sweep/<key>.json                what a training's arms are asked; beside it lock and log,
                                         and `.done`, the same again once it is answered
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

from memdlm.cli.evaluation_request import describe_evaluation, titled
from memdlm.cli.run_folder import RECIPE
from memdlm.cli.settings import to_plain, to_yaml
from memdlm.cli.sweep_jobs import Job, JobsOutcome, run_jobs
from memdlm.cli.sweep_plan import PlannedEvaluation, SweepPlan, Training
from memdlm.cli.sweep_worker import is_answered
from memdlm.errors import MemDLMError, StoppedError
from memdlm.evaluation.config import Arm
from memdlm.evaluation.exposure_bias.comparison import RESULT as BIAS_RESULT
from memdlm.evaluation.presets import EXPOSURE_BIAS
from memdlm.evaluation.records import CellKey, EvaluationFolder
from memdlm.evaluation.tasks.table import expand
from memdlm.files import write_text
from memdlm.reporting.evaluation_folder import holds_results
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
    """Do all that is not done, then write the report.

    Raises:
        UsageError: A result folder holds another evaluation.
        StoppedError: SIGTERM or Ctrl-C came.
        SweepError: Some job failed; the others were done all the same.
    """
    for evaluation in plan.evaluations:
        if evaluation.preset.kind != EXPOSURE_BIAS:
            _begin(evaluation, options.command)
    jobs = sweep_jobs(plan, options.command)
    num_done = sum(job.is_done() for job in jobs)
    _say(
        f"{len(plan.trainings)} trainings, {len(jobs) - len(plan.trainings)} evaluations; "
        f"{num_done} of them done before"
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
    _report(plan)
    _check(outcome)


def _begin(evaluation: PlannedEvaluation, command: str) -> None:
    """Write down what is evaluated, or check that the folder holds the same."""
    description = describe_evaluation(
        evaluation.preset,
        titled(evaluation.preset, evaluation.is_tiny),
        evaluation.config,
        [planned.arm for planned in evaluation.arms],
        is_tiny=evaluation.is_tiny,
        command=command,
        backbone=evaluation.recipe.model,
        training_seed=evaluation.training_seed,
    )
    versions = {**collect_versions(), **collect_devices(), **collect_commit(Path())}
    EvaluationFolder(evaluation.folder).begin(description, versions)


def sweep_jobs(plan: SweepPlan, command: str) -> list[Job]:
    """Return all jobs, each evaluation as soon as what it needs: results come early."""
    trainings = {training.key: training for training in plan.trainings}
    jobs: dict[str, Job] = {}
    names: dict[str, str] = {}
    for evaluation in plan.evaluations:
        is_bias = evaluation.preset.kind == EXPOSURE_BIAS
        found = []
        for key in evaluation.trainings:
            training = _training_job(trainings[key])
            names[key] = training.name
            found.append(training)
            if not is_bias:
                found.append(_scores_job(evaluation, key, training.name, command))
        if is_bias:
            found.append(_exposure_bias_job(evaluation, names, command))
        for job in found:
            jobs.setdefault(job.name, job)
    return list(jobs.values())


def _training_job(training: Training) -> Job:
    def command() -> Sequence[str]:
        write_text(training.recipe_file, to_yaml(training.recipe))
        resume = ["--resume"] if (training.place / RECIPE).is_file() else []
        train = ["train", str(training.recipe_file), "--quiet", *resume]
        return [sys.executable, "-m", "memdlm.cli", *train]

    return Job(
        name=f"training {training.key} ({training.label})",
        kind="training",
        command=command,
        place=training.place,
        is_done=lambda: training.is_finished,
    )


def _scores_job(evaluation: PlannedEvaluation, key: str, training: str, command: str) -> Job:
    """Return the job that asks the arms of one training."""
    folder, config = EvaluationFolder(evaluation.folder), evaluation.config
    arms = [p.arm for p in evaluation.arms if p.is_wanted and p.training == key]
    cells = [
        folder.cell_path(CellKey(arm.name, task, seed))
        for arm in arms
        for task in expand(config.tasks)[0]
        for seed in config.seeds
    ]
    name = f"{evaluation.name}, {', '.join(arm.name for arm in arms)}"
    return _job(name, evaluation, arms, key, cells, (training,), command)


def _exposure_bias_job(evaluation: PlannedEvaluation, names: dict[str, str], command: str) -> Job:
    """Return the job that measures all arms: they have to see the same samples."""
    results = [evaluation.folder / BIAS_RESULT]
    after = tuple(names[key] for key in evaluation.trainings)
    return _job(
        evaluation.name, evaluation, evaluation.wanted, "exposure_bias", results, after, command
    )


def _job(
    name: str,
    evaluation: PlannedEvaluation,
    arms: Sequence[Arm],
    key: str,
    results: Sequence[Path],
    after: tuple[str, ...],
    command: str,
) -> Job:
    """Return a job of `sweep_worker`, done when it has answered just this and left `results`."""
    spec = {
        "preset": evaluation.preset.name,
        "is_tiny": evaluation.is_tiny,
        "folder": str(evaluation.folder),
        "config": to_plain(evaluation.config),
        "arms": [to_plain(arm) for arm in arms],
        "data": to_plain(evaluation.recipe.data),
    }
    place = evaluation.folder / SWEEP / key

    def start() -> Sequence[str]:
        path = place.with_name(f"{key}.json")
        write_text(path, json.dumps({**spec, "command": command}, indent=1) + "\n")
        return [sys.executable, "-m", "memdlm.cli.sweep_worker", str(path)]

    def is_done() -> bool:
        return all(path.is_file() for path in results) and is_answered(place, spec)

    return Job(name, f"evaluation of {evaluation.preset.name}", start, place, is_done, after)


def _environment(options: SweepOptions) -> dict[str, str]:
    """Return the number of threads: more than cores in all would slow every process down."""
    if "OMP_NUM_THREADS" in os.environ and options.threads is None:
        return {}
    threads = options.threads or max(1, (os.cpu_count() or 1) // options.jobs)
    return {"OMP_NUM_THREADS": str(threads)}


def _report(plan: SweepPlan) -> None:
    """Draw one page of all results that are there, and print their tables."""
    from memdlm.cli.report import report

    folders = [e.folder for e in plan.evaluations if holds_results(e.folder)]
    if folders:
        report(folders, plan.output / REPORT, overwrite=True)


def _check(outcome: JobsOutcome) -> None:
    """Say what failed.

    Raises:
        SweepError: Something did.
    """
    for name, reason in outcome.failed.items():
        _say(f"FAILED {name}: {reason}")
    for name in outcome.blocked:
        _say(f"NOT RUN {name}: what it needs has failed")
    if outcome.failed:
        num_jobs = len(outcome.failed) + len(outcome.done) + len(outcome.blocked)
        raise SweepError(
            f"{len(outcome.failed)} of {num_jobs} jobs failed and {len(outcome.blocked)} were not "
            "run: their logs say why; mend that and start the same command again"
        )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
