"""The work of `memdlm eval`: from arguments to arms, settings and a folder of results."""

import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console

from memdlm.cli.evaluation_arms import (
    ArmDefaults,
    ArmRequest,
    describe_arm,
    read_arms,
    resolve_arm,
)
from memdlm.cli.evaluation_progress import EvaluationProgress
from memdlm.cli.report import print_results
from memdlm.cli.settings import apply_overrides, build, nearest
from memdlm.errors import UsageError
from memdlm.evaluation.config import Arm, EvalConfig
from memdlm.evaluation.harness.sharding import Shard
from memdlm.evaluation.presets import EXPOSURE_BIAS, GROUPS, PRESETS, Preset, Variant, find_presets
from memdlm.evaluation.records import EVALUATION, FORMAT, EvaluationFolder
from memdlm.evaluation.runner import Provenance, Session, prepare_all, run_evaluation
from memdlm.evaluation.tasks.table import GROUPS as TASK_GROUPS
from memdlm.evaluation.tasks.table import TASKS, expand
from memdlm.reporting.evaluation_folder import read_results
from memdlm.versions import collect_commit, collect_devices, collect_versions

SOURCE = "memdlm eval"
MEMORY_CHOICES = ("on", "off", "both")


@dataclass(frozen=True)
class EvaluationRequest:
    """The command's arguments, read but not yet checked."""

    tasks: tuple[str, ...] = ()
    preset: str | None = None
    model: str | None = None
    adapter: str | None = None
    standard: str | None = None
    arms: tuple[str, ...] = ()
    memory: str | None = None
    tiny: bool = False
    num_samples: int | None = None
    seeds: str | None = None
    batch_size: int = 8
    output: Path | None = None
    only: tuple[str, ...] = ()
    assignments: tuple[str, ...] = ()
    shard: str | None = None
    dtype: str = "auto"
    quantization: str | None = None
    overwrite: bool = False
    dry_run: bool = False
    quiet: bool = False


@dataclass(frozen=True)
class Evaluation:
    """A request made whole: what is compared, on what, and how a folder describes it."""

    config: EvalConfig
    arms: tuple[Arm, ...]
    description: Mapping[str, Any]


def resolve(request: EvaluationRequest) -> Evaluation:
    """Return what a request asks for, every setting checked; no model is loaded.

    Raises:
        UsageError: Arguments that exclude each other or miss one, an unknown task, preset or key.
        ConfigError: A value is out of range.
        CheckpointError: A run has not finished.
    """
    preset = _preset(request)
    data, defaults = _settings(request, preset)
    config = build(EvalConfig, data, SOURCE)
    arms = tuple(resolve_arm(asked, defaults, SOURCE) for asked in _arms(request, preset))
    if all(arm.model is None for arm in arms):
        raise UsageError("there is no model: name one with --model, --standard or --arm")
    tasks, groups = expand(config.tasks)
    description = {
        "format": FORMAT,
        "preset": None if preset is None else preset.name,
        "title": _title(request, preset),
        "kind": "scores",
        "is_tiny": request.tiny,
        "command": command_line(),
        "arms": [describe_arm(arm) for arm in arms],
        "tasks": tasks,
        "groups": groups,
        "seeds": list(config.seeds),
        "num_samples": {
            name: config.num_samples or TASKS[name.partition("@")[0]].num_samples for name in tasks
        },
    }
    return Evaluation(config, arms, description)


def command_line() -> str:
    """Return what was typed, as a shell would read it again."""
    return shlex.join(["memdlm", *sys.argv[1:]])


def _preset(request: EvaluationRequest) -> Preset | None:
    """Return the preset of a request, its arguments checked against it."""
    if request.preset is None:
        if not request.tasks:
            raise UsageError("there is no task: name some, or a --preset; --list shows them")
        given = {"--standard": request.standard, "--arm": request.arms, "--tiny": request.tiny}
        for name, value in given.items():
            if value:
                raise UsageError(f"{name} is for a --preset: leave it out, or name one")
        if request.memory not in (None, *MEMORY_CHOICES):
            raise UsageError(f"--memory {request.memory}: write on, off or both")
        return None
    if request.memory is not None:
        raise UsageError("--memory: a preset says which arms have a memory; leave it out")
    found = find_presets(request.preset)
    if len(found) > 1:
        names = ", ".join(preset.name for preset in found)
        raise UsageError(f"--preset {request.preset} stands for several: name one of {names}")
    if found[0].kind == EXPOSURE_BIAS:
        raise UsageError(
            f"preset {found[0].name} measures exposure bias: use memdlm exposure-bias, or "
            f"memdlm sweep {found[0].name}"
        )
    return found[0]


def _settings(
    request: EvaluationRequest, preset: Preset | None
) -> tuple[dict[str, Any], ArmDefaults]:
    """Return the data of `EvalConfig`, and what arms share: preset, then options, then `--set`."""
    data: dict[str, Any] = {"tasks": list(request.tasks), "batch_size": request.batch_size}
    if preset is not None:
        tasks = preset.tiny.tasks if request.tiny else preset.tasks
        data["tasks"] = list(request.tasks or tasks)
        data["num_samples"] = preset.tiny.num_samples if request.tiny else preset.num_samples
        data["seeds"] = list(preset.seeds)
        if not request.tiny:
            data["context_length"] = preset.context_length
    if request.num_samples is not None:
        data["num_samples"] = request.num_samples
    if request.seeds is not None:
        data["seeds"] = _read_seeds(request.seeds)
    data = apply_overrides(data, request.assignments)
    own = {name: data.pop(name) for name in ("memory", "objective") if name in data}
    for name, section in own.items():
        if not isinstance(section, dict):
            raise UsageError(f"{SOURCE}: {name} is {section!r}; it must be a section of keys")
    known = [f.name for f in fields(EvalConfig)]
    for key in data:
        if key not in known:
            hint = nearest(key, [*known, "memory", "objective"])
            raise UsageError(f"{SOURCE}: unknown key {key}{hint}")
    defaults = ArmDefaults(
        sampling=data.get("sampling") or {},
        memory=own.get("memory", {}),
        objective=own.get("objective", {}),
        dtype=request.dtype,
        quantization=request.quantization,
    )
    return data, defaults


def _arms(request: EvaluationRequest, preset: Preset | None) -> list[ArmRequest]:
    """Return the arms of a request, those without a model included."""
    if preset is None:
        wanted = {"on": (True,), "off": (False,), "both": (False, True)}[request.memory or "off"]
        if request.model is None:
            raise UsageError("there is no model: name one with --model")
        return [
            ArmRequest(
                "memory_on" if has_memory else "memory_off",
                "with prompt memory" if has_memory else "without memory",
                request.model,
                request.adapter,
                has_memory,
            )
            for has_memory in wanted
        ]
    places = read_arms(request.arms)
    names = [variant.name for variant in preset.variants]
    for name in (*places, *request.only):
        if name not in names:
            raise UsageError(f"preset {preset.name} has no arm {name!r}{nearest(name, names)}")
    return [_variant_arm(request, variant, places) for variant in preset.variants]


def _variant_arm(
    request: EvaluationRequest,
    variant: Variant,
    places: Mapping[str, tuple[str, str | None]],
) -> ArmRequest:
    """Return the arm of a preset's variant with the model that was named for it, if any was."""
    model: str | None = None
    adapter: str | None = None
    if variant.name in places:
        model, adapter = places[variant.name]
    elif variant.train == {"memory": {"enabled": False}}:
        if request.standard is not None:
            model, _, given = request.standard.partition(",")
            adapter = given or None
    elif not variant.train:  # trained with the paper's own settings
        model, adapter = request.model, request.adapter
    if request.only and variant.name not in request.only:
        model = adapter = None
    return ArmRequest(variant.name, variant.label, model, adapter, variant.memory, variant.evaluate)


def _read_seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--seeds {text}: write whole numbers, e.g. 0,1,2") from None


def _title(request: EvaluationRequest, preset: Preset | None) -> str:
    if preset is None:
        return f"{request.model} on {', '.join(request.tasks)}"
    return f"{preset.title}{', tiny tasks' if request.tiny else ''}"


def run_request(request: EvaluationRequest) -> None:
    """Evaluate what a request asks for, and show the table.

    Raises:
        MemDLMError: Whatever is wrong with arguments, data, models or the folder.
    """
    evaluation = resolve(request)
    shard = Shard.parse(request.shard) if request.shard else Shard.from_environment()
    is_quiet = request.quiet or shard.index > 0
    progress = EvaluationProgress(Console(stderr=True), is_quiet)
    folder = EvaluationFolder(_output(request))
    if not request.dry_run:
        _check_place(folder, request.overwrite)
    # Whatever is wrong with the input is found before the folder is there.
    plan = prepare_all(evaluation.config, evaluation.arms, progress.say)
    if request.dry_run:
        return
    if request.overwrite and shard.index == 0 and folder.path.exists():
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


def _output(request: EvaluationRequest) -> Path:
    if request.output is not None:
        return request.output.expanduser()
    name = request.preset or "_".join(request.tasks).replace("@", "_")
    return Path("runs/eval") / name


def _check_place(folder: EvaluationFolder, overwrite: bool) -> None:
    """Refuse a place that holds something else, before time is spent.

    Raises:
        UsageError: It is a file, or a folder with other files than an evaluation's.
    """
    path = folder.path
    is_empty = not path.exists() or (path.is_dir() and not any(path.iterdir()))
    if not is_empty and not (path / EVALUATION).is_file():
        verb = "holds no evaluation" if overwrite else "holds other files"
        raise UsageError(f"{path} {verb}: choose another place with --output")
