"""What `memdlm eval` is asked: from its arguments to arms and settings, each checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from memdlm.backbones.reading import read_config
from memdlm.cli.evaluation_arms import (
    ArmDefaults,
    ArmRequest,
    describe_arm,
    read_arms,
    resolve_arm,
)
from memdlm.cli.invocation import command_line
from memdlm.cli.settings import apply_overrides, build, nearest
from memdlm.errors import UsageError
from memdlm.evaluation.config import Arm, EvalConfig
from memdlm.evaluation.loaded import base_of
from memdlm.evaluation.presets import EXPOSURE_BIAS, Preset, Variant, find_presets
from memdlm.evaluation.records import FORMAT
from memdlm.evaluation.tasks.table import expand, find_task
from memdlm.reporting.paper import paper_figures

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
    data: str | None = None
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
    processes: int = 1
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
    preset = preset_of(request)
    data, defaults = _settings(request, preset)
    config = build(EvalConfig, data, SOURCE)
    arms = tuple(resolve_arm(asked, defaults, SOURCE) for asked in _arms(request, preset))
    if all(arm.model is None for arm in arms):
        raise UsageError("there is no model: name one with --model, --standard or --arm")
    if preset is None:
        title = f"{request.model} on {', '.join(request.tasks)}"
        return Evaluation(config, arms, describe_evaluation(None, title, config, arms))
    title = titled(preset, request.tiny)
    described = describe_evaluation(
        preset, title, config, arms, is_tiny=request.tiny, backbone=_architecture(arms)
    )
    return Evaluation(config, arms, described)


def titled(preset: Preset, is_tiny: bool) -> str:
    """Return the title of a preset's evaluation."""
    return f"{preset.title}{', tiny tasks' if is_tiny else ''}"


def describe_evaluation(
    preset: Preset | None,
    title: str,
    config: EvalConfig,
    arms: Sequence[Arm],
    *,
    is_tiny: bool = False,
    command: str | None = None,
    backbone: str | None = None,
    training_seed: int | None = None,
) -> dict[str, Any]:
    """Return what `evaluation.json` says: what is compared, on what, by which command.

    Args:
        preset: The preset; None for tasks that the user has named.
        title: Of the comparison.
        config: Its settings.
        arms: What is compared.
        is_tiny: Whether the preset's tiny tasks are asked.
        command: What was typed; this process's own by default.
        backbone: A name of the base model, by which the paper's backbones are told apart.
        training_seed: What its models were trained with, where there are several such evaluations.

    Raises:
        UsageError: A task is unknown.
    """
    tasks, groups = expand(config.tasks)
    repeated = {} if training_seed is None else {"training_seed": training_seed}
    return {
        **repeated,
        "format": FORMAT,
        "preset": None if preset is None else preset.name,
        "title": title,
        "kind": "scores",
        "is_tiny": is_tiny,
        "command": command_line() if command is None else command,
        "arms": [describe_arm(arm) for arm in arms],
        "tasks": tasks,
        "groups": groups,
        "seeds": list(config.seeds),
        "num_samples": {
            name: config.num_samples or find_task(name)[0].num_samples for name in tasks
        },
        "paper": _published(preset, arms, [*tasks, *groups], backbone),
    }


def _published(
    preset: Preset | None, arms: Sequence[Arm], columns: Sequence[str], backbone: str | None
) -> dict[str, dict[str, float]]:
    """Return the paper's scores: arm -> column -> percent; ranges are left out."""
    found: dict[str, dict[str, float]] = {}
    for arm in arms:
        for column in columns:
            name = None if preset is None else preset.name
            figure = paper_figures(name, arm.name, column, backbone)
            if figure is not None and figure.low == figure.high:
                found.setdefault(arm.name, {})[column] = figure.low
    return found


def _architecture(arms: Sequence[Arm]) -> str | None:
    """Return the architecture of the first model there is."""
    model = next(arm.model for arm in arms if arm.model is not None)
    return next(iter(read_config(base_of(model)).get("architectures") or []), None)


def preset_of(request: EvaluationRequest) -> Preset | None:
    """Return the preset of a request, its arguments checked against it; None without one.

    Raises:
        UsageError: There is no such preset, or arguments do not fit it, or fit nothing else.
    """
    if request.preset is None:
        if not request.tasks:
            raise UsageError("there is no task: name some, or a --preset; --list shows them")
        given = {
            "--standard": request.standard,
            "--arm": request.arms,
            "--tiny": request.tiny,
            "--data": request.data,
        }
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
    if found[0].kind != EXPOSURE_BIAS and request.data is not None:
        raise UsageError("--data is for paper/figure3; other presets have tasks of their own")
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
