"""The work of `memdlm eval`: check, begin the folder, evaluate, print the table."""

import shlex
import shutil
from pathlib import Path

from rich.console import Console

from memdlm.cli.evaluation_place import check_place, evaluation_folder
from memdlm.cli.evaluation_progress import EvaluationProgress
from memdlm.cli.evaluation_request import (
    EvaluationRequest,
    preset_of,
    resolve,
    titled,
)
from memdlm.cli.invocation import command_line
from memdlm.cli.report import print_results
from memdlm.errors import UsageError
from memdlm.evaluation.harness.sharding import Shard
from memdlm.evaluation.presets import EXPOSURE_BIAS, GROUPS, PRESETS, Preset
from memdlm.evaluation.runner import Provenance, Session, prepare_all, run_evaluation
from memdlm.evaluation.tasks.table import GROUPS as TASK_GROUPS
from memdlm.evaluation.tasks.table import TASKS
from memdlm.reporting.evaluation_folder import read_results
from memdlm.versions import collect_commit, collect_devices, collect_versions


def run_request(request: EvaluationRequest) -> None:
    """Evaluate what a request asks for, and show the table.

    Raises:
        MemDLMError: Whatever is wrong with arguments, data, models or the folder.
    """
    preset = preset_of(request)
    if preset is not None and preset.kind == EXPOSURE_BIAS:
        _measure_exposure_bias(request, preset)
        return
    evaluation = resolve(request)
    shard = _shard(request)
    is_quiet = request.quiet or shard.index > 0
    progress = EvaluationProgress(Console(stderr=True), is_quiet)
    folder = evaluation_folder(request.output, request.preset, request.tasks)
    if not request.dry_run:
        check_place(folder, request.overwrite, shard)
    # Whatever is wrong with the input is found before the folder is there.
    plan = prepare_all(evaluation.config, evaluation.arms, progress.say)
    if request.dry_run:
        return
    if request.overwrite and folder.path.exists():
        shutil.rmtree(folder.path)
    versions = collect_versions()
    commit = collect_commit(Path())["git_commit"]
    folder.begin(evaluation.description, {**versions, **collect_devices(), "git_commit": commit})
    try:
        run_evaluation(
            evaluation.config,
            evaluation.arms,
            folder,
            Provenance(command_line(), commit, versions),
            Session(shard, progress.say, progress.report),
            plan,
        )
    finally:
        progress.stop()
    if shard.index == 0:
        print_results(read_results(folder.path, folder.path.name, progress.say))
        place = shlex.quote(str(folder.path))
        print(f"results in {place}; a page of them: memdlm report {place}")


def _shard(request: EvaluationRequest) -> Shard:
    """Return this process's share.

    Raises:
        UsageError: It is told in two ways, or cannot be read.
    """
    if request.shard is None:
        return Shard.from_environment()
    if request.processes > 1:
        raise UsageError("--shard and --processes both divide the requests: leave one of them out")
    return Shard.parse(request.shard)


def _measure_exposure_bias(request: EvaluationRequest, preset: Preset) -> None:
    """Measure a preset of exposure bias on rows of a file, or on its tiny tasks.

    Raises:
        UsageError: There are no rows, or an argument does not apply.
    """
    from memdlm.cli.exposure_bias_run import run_exposure_bias
    from memdlm.evaluation.exposure_bias.comparison import BiasSettings
    from memdlm.evaluation.samples import read_samples

    if request.tasks or request.shard or request.processes > 1 or request.dry_run:
        raise UsageError(
            f"{preset.name} has no tasks, --shard, --processes and --dry-run: leave them out"
        )
    if (request.data is None) != request.tiny:
        raise UsageError(
            f"{preset.name} is measured on rows with responses: name a file with --data, e.g. "
            "held-out rows of the training data, or use --tiny"
        )
    evaluation = resolve(request)
    config, arms = evaluation.config, [arm for arm in evaluation.arms if arm.model is not None]
    tasks = preset.tiny.tasks if request.tiny else ()
    samples = read_samples(request.data, tasks, config.num_samples, config.seeds[0])
    settings = BiasSettings(
        num_steps=preset.num_steps or 2,
        response_length=None if request.tiny else preset.response_length,
        seed=config.seeds[0],
        batch_size=config.batch_size,
        chat_template=config.chat_template,
    )
    run_exposure_bias(
        arms,
        samples,
        settings,
        evaluation_folder(request.output, request.preset, request.tasks).path,
        title=titled(preset, request.tiny),
        overwrite=request.overwrite,
        quiet=request.quiet,
    )


def show_list_of_tasks() -> None:
    """Print tasks, groups and presets."""
    print("tasks (@N: a length, e.g. ruler_vt@4k):")
    for name, row in TASKS.items():
        length = f"@N, N of at least {row.shortest} {row.unit}" if row.has_length else ""
        print(f"  {name}{length}")
    print("groups:")
    for name, members in TASK_GROUPS.items():
        print(f"  {name}: {', '.join(members)}")
    print("presets:")
    for name, preset in PRESETS.items():
        print(f"  {name}: {preset.title}")
    for name, members in GROUPS.items():
        print(f"  {name}: {', '.join(members)}")
