"""From a recipe to a plan, and from a plan that does not fit to settings that would.

Needs no weights and, unless the recipe builds a tiny network for its own words, no data.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from memdlm.backbones.outline import load_outline
from memdlm.backbones.tiny import build_tiny
from memdlm.cli.recipe import Recipe, load_recipe
from memdlm.cli.recipe_parts import add_adapter, load_data, training_arguments
from memdlm.data.dataset import check_context
from memdlm.errors import ConfigError
from memdlm.planning.gpus import Gpu
from memdlm.planning.plan import Plan, make_plan
from memdlm.training.config import MemDLMConfig

# What the device decides, which here is none, or what no step depends on.
_IGNORED = ("tf32", "fp16", "torch_compile", "dataloader_pin_memory", "push_to_hub", "report_to")
# What would spread the model over several devices.
_SHARDING = ("deepspeed", "fsdp", "fsdp_config", "parallelism_config")


@dataclass(frozen=True)
class Remedy:
    """A change of the recipe and what training would need with it.

    Attributes:
        assignments: As for `--set`.
        peak: Bytes of tensors at the peak.
        fits: Whether that fits the GPU in question.
    """

    assignments: tuple[str, ...]
    peak: int
    fits: bool


def plan_recipe(recipe: Recipe, response: int | None = None) -> Plan:
    """Plan what `recipe` trains, on rows of `data.max_length` tokens, `response` of them masked.

    Raises:
        MemDLMError: Whatever is wrong with settings, config.json or (tiny networks) data.
    """
    with TemporaryDirectory() as place:
        folder = Path(place)
        arguments = _arguments(recipe, folder)
        if recipe.tiny is not None:
            tokenizer, _ = load_data(recipe, lambda line: None)
            with torch.device("meta"):
                base = build_tiny(recipe.tiny.family, tokenizer, recipe.seed, recipe.tiny.sizes)
        else:
            # Beside 4-bit weights all others are bfloat16, whatever the file says.
            dtype = "bfloat16" if recipe.quantization.is_on else recipe.dtype
            base = load_outline(str(recipe.model), dtype)
        check_context(recipe.data, base.config.max_position_embeddings)

        def wrap(model: torch.nn.Module) -> torch.nn.Module:
            with torch.device("meta"):
                return add_adapter(model, recipe, folder)

        autocast = "float16" if recipe.training.get("fp16") else None
        return make_plan(
            base,
            wrap,
            arguments,
            recipe.data.max_length,
            response,
            recipe.quantization,
            autocast,
        )


def remedies(
    path: Path, assignments: Sequence[str], gpu: Gpu, response: int | None = None
) -> Iterator[Remedy]:
    """Yield changes that lower the peak, each alone; then, if none of them fits, all together.

    Args:
        path: The recipe.
        assignments: What is set beside it.
        gpu: What it should fit.
        response: As for `plan_recipe`.
    """
    changes = _changes(load_recipe(path, assignments))
    some_fit = False
    for change in changes:
        remedy = _try(path, assignments, change, gpu, response)
        some_fit = some_fit or remedy.fits
        yield remedy
    if not some_fit and len(changes) > 1:
        together = dict.fromkeys(assignment for change in changes for assignment in change)
        yield _try(path, assignments, tuple(together), gpu, response)


def _changes(recipe: Recipe) -> list[tuple[str, ...]]:
    """Return what could be changed, mildest first."""
    training = recipe.training
    changes: list[tuple[str, ...]] = []
    if not (training.get("gradient_checkpointing") or training.get("activation_checkpointing")):
        changes.append(("training.gradient_checkpointing=true",))
    batch_size = training.get("per_device_train_batch_size", 2)
    if batch_size > 1:
        micro_batches = batch_size * training.get("gradient_accumulation_steps", 1)
        changes.append(
            (
                "training.per_device_train_batch_size=1",
                f"training.gradient_accumulation_steps={micro_batches}",
            )
        )
    is_lora = recipe.adapter.kind == "lora"
    if not is_lora:
        changes.append(("adapter.kind=lora",))
    is_bfloat16 = recipe.dtype in ("auto", "bfloat16") and not training.get("fp16")
    can_quantize = recipe.tiny is None and is_bfloat16 and find_spec("bitsandbytes") is not None
    if can_quantize and not recipe.quantization.is_on:
        adapter = () if is_lora else ("adapter.kind=lora",)
        changes.append((*adapter, "quantization.kind=nf4"))
    return changes


def _try(
    path: Path,
    assignments: Sequence[str],
    change: tuple[str, ...],
    gpu: Gpu,
    response: int | None,
) -> Remedy:
    plan = plan_recipe(load_recipe(path, [*assignments, *change]), response)
    peak = plan.step.peak_bytes
    return Remedy(change, peak, gpu.margin(peak) >= 0)


def _arguments(recipe: Recipe, folder: Path) -> MemDLMConfig:
    """Return the Trainer's settings as they count for memory, on the CPU.

    Raises:
        ConfigError: As `training_arguments`, or the recipe shards the model.
    """
    training = recipe.training
    for name in _SHARDING:
        if training.get(name):
            raise ConfigError(
                f"training.{name}: a plan is for one device without sharding; leave it out with "
                f"--set training.{name}=null"
            )
    kept = {name: value for name, value in training.items() if name not in _IGNORED}
    # float16 autocast needs a GPU to be set up; bfloat16 takes the same bytes.
    kept["bf16"] = bool(training.get("bf16") or training.get("fp16"))
    kept["use_cpu"] = True
    return training_arguments(replace(recipe, training=kept), folder)
