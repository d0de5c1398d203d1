"""From presets and a recipe to trainings and evaluations; equal trainings are one.

A training is known by a hash of its resolved recipe, so that what two ablations have in common, or
two sweeps that share a folder, is trained once. Touches no disk but to read the recipe and, for the
way of decoding, the model's config.json.

<root>/<key>.yaml    recipe of a training       <root>/<key>/     its run folder
<root>/<key>.lock    held while it runs         <root>/<key>.log  what it printed
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from memdlm.backbones.reading import read_config
from memdlm.cli.recipe import Recipe, build_recipe, resolved
from memdlm.cli.run_folder import RunFolder
from memdlm.cli.settings import apply_overrides, build, nearest, to_plain
from memdlm.errors import UsageError
from memdlm.evaluation.config import Arm, EvalConfig
from memdlm.evaluation.presets import SAMPLING, Preset, Variant
from memdlm.evaluation.presets.preset import TRAIN_ONLY_SUFFIX
from memdlm.evaluation.presets.tiny import TINY_RECIPE
from memdlm.memory.config import MemoryConfig
from memdlm.quickstart.start import CHECKPOINT
from memdlm.sampling.config import SamplingConfig

# LLaDA2.x decodes in blocks.
_BLOCK_FAMILY, _BLOCK_ARCHITECTURE = "llada2", "LLaDA2MoeModelLM"


@dataclass(frozen=True)
class Training:
    """One training run of a sweep.

    Attributes:
        key: Hash of its recipe.
        recipe: Resolved, with its output folder.
        root: Folder that holds it.
        variants: What it is for, e.g. `scope: ffn_0.10`.
    """

    key: str
    recipe: Recipe
    root: Path
    variants: tuple[str, ...] = ()

    @property
    def place(self) -> Path:
        """Path without suffix of recipe, lock and log; its run folder."""
        return self.root / self.key

    @property
    def label(self) -> str:
        """What messages call it: the first of its variants, and how many more there are."""
        more = len(self.variants) - 1
        return self.variants[0] + (f" and {more} more" if more else "")

    @property
    def recipe_file(self) -> Path:
        """What `memdlm train` is given."""
        return self.root / f"{self.key}.yaml"

    @property
    def result(self) -> Path:
        """Folder of the trained model or adapter, which need not be there yet."""
        return self.place / ("model" if self.recipe.adapter.kind == "none" else "adapter")

    @property
    def is_finished(self) -> bool:
        """Whether the result is there."""
        return RunFolder(self.place).result() is not None


@dataclass(frozen=True)
class PlannedArm:
    """An arm and the key of the training it needs; `is_wanted` is off where it is left out."""

    arm: Arm
    training: str
    is_wanted: bool = True


@dataclass(frozen=True)
class PlannedEvaluation:
    """A preset's arms, to be evaluated into `folder`.

    Attributes:
        preset: The preset.
        folder: Where its results go.
        config: Tasks and settings.
        arms: All of the preset's, those that are left out included.
        is_tiny: Whether the tasks are those of its tiny counterpart.
        recipe: What all variants change.
        training_seed: Its recipe's seed, where trainings are repeated with several.
    """

    preset: Preset
    folder: Path
    config: EvalConfig
    arms: tuple[PlannedArm, ...]
    is_tiny: bool
    recipe: Recipe
    training_seed: int | None = None

    @property
    def name(self) -> str:
        """What messages call it."""
        seed = self.training_seed
        return self.preset.name + ("" if seed is None else f" with training seed {seed}")

    @property
    def wanted(self) -> tuple[Arm, ...]:
        """Arms that are not left out."""
        return tuple(planned.arm for planned in self.arms if planned.is_wanted)

    @property
    def trainings(self) -> tuple[str, ...]:
        """Keys of the trainings whose arms are wanted, once each."""
        return tuple(dict.fromkeys(arm.training for arm in self.arms if arm.is_wanted))


@dataclass(frozen=True)
class SweepPlan:
    """Everything a sweep does; `output` is the folder of all results and of the report."""

    trainings: tuple[Training, ...]
    evaluations: tuple[PlannedEvaluation, ...]
    output: Path


@dataclass(frozen=True)
class SweepRequest:
    """A sweep as it was asked for.

    Attributes:
        presets: What to sweep.
        recipe: The recipe as plain data; see `base_recipe`.
        source: What messages call it.
        is_tiny: Ask the tiny counterparts' tasks.
        output: Where results go; of several presets, each in a folder of its own.
        trainings: Where trainings go.
        only: Variants to keep; empty keeps all.
        evaluation: Differences in `EvalConfig`.
        training_seeds: Seeds to repeat every training with, each evaluated into a folder of its
            own; empty for the recipe's.
    """

    presets: Sequence[Preset]
    recipe: Mapping[str, Any]
    source: str
    is_tiny: bool
    output: Path
    trainings: Path
    only: Sequence[str] = ()
    evaluation: Mapping[str, Any] | None = None
    training_seeds: Sequence[int] = ()


def tiny_recipe(assignments: Sequence[str]) -> dict[str, Any]:
    """Return the tiny recipe on the quickstart's start, with `--set` applied."""
    return apply_overrides({"model": str(CHECKPOINT), **TINY_RECIPE}, assignments)


def plan_sweep(request: SweepRequest) -> SweepPlan:
    """Build every recipe and every arm, which checks them all.

    Raises:
        UsageError: A recipe or a setting is wrong, or `only` names no variant.
        ConfigError: A value is out of range.
    """
    _check_only(request)
    trainings: dict[str, Training] = {}
    evaluations = []
    for preset in request.presets:
        for seed in request.training_seeds or (None,):
            evaluations.append(_evaluation(request, preset, seed, trainings))
    return SweepPlan(tuple(trainings.values()), tuple(evaluations), request.output)


def _evaluation(
    request: SweepRequest, preset: Preset, seed: int | None, trainings: dict[str, Training]
) -> PlannedEvaluation:
    """Return the evaluation of a preset's variants, and add the trainings it needs."""
    short = _short(preset.name)
    folder = request.output if len(request.presets) == 1 else request.output / short
    if seed is not None:
        folder = folder / f"training_seed{seed}"
        request = replace(request, recipe={**request.recipe, "seed": seed})
    base = build_recipe(request.recipe, request.source)
    decoder = _decoder(base)
    arms = []
    for variant in preset.variants:
        training = _training(request, variant)
        base_name = _base_name(variant.name)
        is_wanted = not request.only or not {variant.name, base_name}.isdisjoint(request.only)
        if is_wanted:
            repeat = "" if seed is None else f", seed {seed}"
            _share(trainings, training, f"{short}: {base_name}{repeat}")
        arms.append(PlannedArm(_arm(variant, training, decoder), training.key, is_wanted))
    config = _config(request, preset)
    return PlannedEvaluation(preset, folder, config, tuple(arms), request.is_tiny, base, seed)


def variant_recipe(base: Mapping[str, Any], variant: Variant, source: str) -> Recipe:
    """Return the recipe of a variant: `base` with the variant's changes on top."""
    return build_recipe(_merged(base, variant.train), f"{source} for {variant.name}")


def variant_memory(recipe: Recipe, variant: Variant) -> MemoryConfig:
    """Return the memory that a variant is asked with: as trained, with its changes."""
    changes = variant.evaluate.get("memory", {})
    settings = {**to_plain(recipe.memory), **changes, "enabled": variant.memory}
    return build(MemoryConfig, settings, f"variant {variant.name}", "memory")


def variant_sampling(variant: Variant, decoder: str) -> SamplingConfig:
    """Return how a variant's answers are decoded by a model of that decoder."""
    settings = {**SAMPLING[decoder], **variant.evaluate.get("sampling", {})}
    return build(SamplingConfig, settings, f"variant {variant.name}", "sampling")


def training_key(recipe: Recipe) -> str:
    """Return the hash of a recipe, wherever it writes."""
    plain = resolved(recipe)
    del plain["output_dir"]
    text = json.dumps(plain, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def _training(request: SweepRequest, variant: Variant) -> Training:
    recipe = variant_recipe(request.recipe, variant, request.source)
    key = training_key(recipe)
    place = request.trainings / key
    return Training(key, replace(recipe, output_dir=str(place)), request.trainings)


def _share(trainings: dict[str, Training], training: Training, label: str) -> None:
    known = trainings.get(training.key, training)
    labels = tuple(dict.fromkeys([*known.variants, label]))
    trainings[training.key] = replace(known, variants=labels)


def _arm(variant: Variant, training: Training, decoder: str) -> Arm:
    recipe = training.recipe
    return Arm(
        name=variant.name,
        label=variant.label,
        model=str(training.result),
        memory=variant_memory(recipe, variant),
        objective=recipe.objective,
        sampling=variant_sampling(variant, decoder),
        dtype=recipe.dtype,
        quantization=recipe.quantization.kind,
    )


def _config(request: SweepRequest, preset: Preset) -> EvalConfig:
    settings: dict[str, Any] = {
        "tasks": preset.tiny.tasks if request.is_tiny else preset.tasks,
        "num_samples": preset.tiny.num_samples if request.is_tiny else preset.num_samples,
        "seeds": preset.seeds,
        "context_length": None if request.is_tiny else preset.context_length,
    }
    return build(EvalConfig, {**settings, **(request.evaluation or {})}, preset.name)


def _decoder(recipe: Recipe) -> str:
    """Return `block` for a LLaDA2.x model, `masked` for all others."""
    if recipe.tiny is not None:
        return "block" if recipe.tiny.family == _BLOCK_FAMILY else "masked"
    named = read_config(str(recipe.model)).get("architectures") or []
    return "block" if _BLOCK_ARCHITECTURE in named else "masked"


def _check_only(request: SweepRequest) -> None:
    names = [variant.name for preset in request.presets for variant in preset.variants]
    for name in request.only:
        if name not in names:
            hint = nearest(name, tuple(dict.fromkeys(map(_base_name, names))))
            raise UsageError(f"--limit-variants: there is no variant {name!r}{hint}")


def _base_name(variant: str) -> str:
    """Return the variant whose training an arm shares."""
    return variant.removesuffix(TRAIN_ONLY_SUFFIX)


def _short(preset: str) -> str:
    return preset.rpartition("/")[2]


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested mappings as one, `above` winning."""
    result = dict(below)
    for key, value in above.items():
        known = below.get(key)
        both = isinstance(known, Mapping) and isinstance(value, Mapping)
        result[key] = _merged(known, value) if both else value  # type: ignore[arg-type]
    return result
