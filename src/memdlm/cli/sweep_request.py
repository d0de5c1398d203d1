"""The arguments of `memdlm sweep`, read and checked against one another."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memdlm.cli.settings import apply_overrides, read_yaml
from memdlm.cli.sweep_plan import SweepRequest, tiny_recipe
from memdlm.errors import UsageError
from memdlm.evaluation.presets import find_presets

TINY = "tiny"


@dataclass(frozen=True)
class SweepArguments:
    """What was typed; see `memdlm sweep --help`."""

    preset: str | None = None
    recipe: Path | None = None
    model: str | None = None
    assignments: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    output: Path | None = None
    trainings: Path | None = None
    seeds: str | None = None
    num_samples: int | None = None
    limit_variants: str | None = None
    training_seeds: str | None = None


def read_request(arguments: SweepArguments) -> SweepRequest:
    """Return the sweep that is asked for.

    Raises:
        UsageError: Arguments are missing or exclude one another, or there is no such preset.
    """
    if arguments.preset is None:
        raise UsageError("there is no preset: name one, e.g. ablations/scope; --list shows them")
    presets = find_presets(arguments.preset)
    if (arguments.recipe is None) == (arguments.model is None):
        raise UsageError("give exactly one of --recipe RECIPE.yaml and --model tiny")
    if arguments.model not in (None, TINY):
        raise UsageError(
            f"--model {arguments.model}: a sweep trains what a recipe says; write the model into "
            "one and give it with --recipe, or use --model tiny"
        )
    if arguments.recipe is None:
        recipe, source = tiny_recipe(arguments.assignments), "the tiny recipe"
    else:
        recipe = apply_overrides(read_yaml(arguments.recipe), arguments.assignments)
        source = str(arguments.recipe)
    output = (arguments.output or Path("runs/sweep") / arguments.preset).expanduser()
    trainings = output / "trainings" if arguments.trainings is None else arguments.trainings
    return SweepRequest(
        presets=presets,
        recipe=recipe,
        source=source,
        is_tiny=arguments.recipe is None,
        output=output,
        trainings=trainings.expanduser(),
        only=_names(arguments.limit_variants),
        evaluation=_evaluation(arguments),
        training_seeds=_training_seeds(arguments),
    )


def _evaluation(arguments: SweepArguments) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    if arguments.num_samples is not None:
        settings["num_samples"] = arguments.num_samples
    if arguments.seeds is not None:
        settings["seeds"] = _numbers("--seeds", arguments.seeds)
    return apply_overrides(settings, arguments.settings)


def _training_seeds(arguments: SweepArguments) -> tuple[int, ...]:
    if arguments.training_seeds is None:
        return ()
    seeds = _numbers("--training-seeds", arguments.training_seeds)
    if min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise UsageError(
            f"--training-seeds {arguments.training_seeds}: name different seeds of 0 or more"
        )
    return tuple(seeds)


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} {text}: write whole numbers, e.g. 0,1,2") from None


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",")) if text else ()
