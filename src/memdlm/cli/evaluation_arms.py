"""From what a user names (run folders, models, adapters) to the arms of an evaluation.

A run folder brings the memory and the noise schedule it was trained with; a preset's variant and
then `--set` come on top of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memdlm.backbones.quantization import QuantizationConfig
from memdlm.cli.generation_run import trained_model
from memdlm.cli.run_folder import RunFolder
from memdlm.cli.settings import build, to_plain
from memdlm.diffusion.objective import ObjectiveConfig
from memdlm.errors import UsageError
from memdlm.evaluation.config import Arm
from memdlm.memory.config import MemoryConfig
from memdlm.sampling.config import SamplingConfig


@dataclass(frozen=True)
class ArmRequest:
    """An arm as it is asked for, before any folder has been read.

    Attributes:
        name: What files call it.
        label: What a reader sees.
        model: Run folder, model or adapter folder, or hub name; None if it is not there yet.
        adapter: Run folder, adapter folder or hub name on top; None for none.
        memory: Whether a memory is written from each prompt.
        overrides: Sections `memory`, `objective` and `sampling` with what differs from the run's
            own and from the evaluation's.
    """

    name: str
    label: str
    model: str | None
    adapter: str | None = None
    memory: bool = False
    overrides: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ArmDefaults:
    """What the arms of one evaluation share.

    Attributes:
        sampling: Settings of decoding, as plain data.
        memory: Differences for every arm's memory, from `--set memory....`.
        objective: The same for the noise schedule.
        dtype: Type of the weights.
        quantization: `none` or `nf4`; None keeps what a run was trained with.
    """

    sampling: Mapping[str, Any] = field(default_factory=dict)
    memory: Mapping[str, Any] = field(default_factory=dict)
    objective: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "auto"
    quantization: str | None = None


def resolve_arm(request: ArmRequest, defaults: ArmDefaults, source: str) -> Arm:
    """Return the arm with every setting in place.

    Args:
        request: What is asked for.
        defaults: What it shares with the others.
        source: What to name in messages.

    Raises:
        UsageError: A setting is unknown or of the wrong type.
        ConfigError: A value is out of range.
        CheckpointError: A run has not finished.
    """
    recorded: Mapping[str, Any] = {}
    model, adapter = request.model, request.adapter
    for name in (model, adapter):
        if name is not None:
            recorded = _recorded(name) or recorded
    overrides = request.overrides
    memory = {
        **recorded.get("memory", {}),
        **overrides.get("memory", {}),
        **defaults.memory,
        "enabled": request.memory,
    }
    objective = {
        **recorded.get("objective", {}),
        **overrides.get("objective", {}),
        **defaults.objective,
    }
    sampling = {**defaults.sampling, **overrides.get("sampling", {})}
    quantization = build(
        QuantizationConfig, recorded.get("quantization") or {}, source, "quantization"
    )
    return Arm(
        name=request.name,
        label=request.label,
        model=None if model is None else _resolve(model),
        adapter=None if adapter is None else _resolve(adapter),
        memory=build(MemoryConfig, memory, source, "memory"),
        objective=build(ObjectiveConfig, objective, source, "objective"),
        sampling=build(SamplingConfig, sampling, source, "sampling"),
        dtype=defaults.dtype,
        quantization=defaults.quantization or quantization.kind,
    )


def read_arms(texts: Sequence[str]) -> dict[str, tuple[str, str | None]]:
    """Return name -> (model, adapter) of `NAME=MODEL[,ADAPTER]` texts.

    Raises:
        UsageError: A text is not of that form, or a name is given twice.
    """
    found: dict[str, tuple[str, str | None]] = {}
    for text in texts:
        name, equals, place = text.partition("=")
        model, comma, adapter = place.partition(",")
        if not equals or not name or not model or (comma and not adapter):
            raise UsageError(f"--arm {text}: write --arm NAME=MODEL or NAME=MODEL,ADAPTER")
        if name in found:
            raise UsageError(f"--arm {name} is given twice: name every arm once")
        found[name] = (model, adapter or None)
    return found


def describe_arm(arm: Arm) -> dict[str, Any]:
    """Return an arm as `evaluation.json` has it."""
    settings = {name: to_plain(getattr(arm, name)) for name in ("memory", "objective", "sampling")}
    if not arm.memory.enabled:
        settings["memory"] = {"enabled": False}
    settings |= {"dtype": arm.dtype, "quantization": arm.quantization}
    return {**arm.described(), "settings": settings}


def _recorded(name: str) -> Mapping[str, Any]:
    """Return the recipe of the run that a folder is, or is a result of; empty if it is none."""
    path = Path(name).expanduser()
    for folder in (path, path.parent):
        run = RunFolder(folder)
        if path.is_dir() and run.is_run:
            return run.recorded_recipe()
    return {}


def _resolve(name: str) -> str:
    """Return the model or adapter that a name stands for: a run folder's result, else itself."""
    run = RunFolder(Path(name).expanduser())
    return str(trained_model(run)) if run.is_run else name
