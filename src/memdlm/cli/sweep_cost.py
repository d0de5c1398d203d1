"""What trainings and evaluations cost on one GPU: FLOPs counted, seconds by a stated utilisation.

Every number is a count times a number: requests of a task times the FLOPs of one of them, optimizer
steps times the FLOPs of one. Prompts are taken to be as long as their task allows, those of a task
without a length to fill the context, and answers to use all their steps: the sums are upper bounds.
A step on few tokens takes as long as reading the weights, whatever it computes; the seconds of a
decode are at least those of reading all weights at every step of every batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from memdlm.backbones.base import DiffusionMaskedLM
from memdlm.backbones.outline import load_outline
from memdlm.backbones.wrapping import unwrap
from memdlm.cli.recipe import Recipe
from memdlm.cli.recipe_parts import add_adapter
from memdlm.cli.sweep_jobs import duration
from memdlm.errors import ConfigError, MemDLMError
from memdlm.evaluation.config import Arm, EvalConfig
from memdlm.evaluation.presets import EXPOSURE_BIAS, Preset
from memdlm.evaluation.tasks.table import expand, find_task
from memdlm.planning.gpus import find_speed
from memdlm.planning.requests import RequestCounter

if TYPE_CHECKING:
    from memdlm.cli.sweep_plan import SweepPlan, Training

# Share of a GPU's speed that is assumed to be reached. Not a measurement.
UTILISATION = 0.3

# The longest rows of the paper's training data, on which exposure bias is measured.
_ROW_LENGTH = 4096


@dataclass(frozen=True)
class ArmCost:
    """What an arm's answers take.

    Attributes:
        arm: Its name.
        num_requests: Prompts.
        write: FLOPs of writing their memories.
        decode: FLOPs of decoding them.
        read: Bytes of weights that the steps of all batches read.
    """

    arm: str
    num_requests: int
    write: int
    decode: int
    read: int

    @property
    def total(self) -> int:
        """FLOPs of both."""
        return self.write + self.decode

    def seconds(self, gpu: str, utilisation: float = UTILISATION) -> float:
        """Return the time on one GPU of which `utilisation` of the speed is reached.

        Raises:
            UsageError: Its speed is not known.
        """
        speed = find_speed(gpu)
        decode = max(self.decode / speed.flops, self.read / speed.bytes)
        return (self.write / speed.flops + decode) / utilisation


class CostModel:
    """Counts what one backbone's requests cost; equal ones once."""

    def __init__(self, model: torch.nn.Module) -> None:
        """Take `model` from the meta device, adapter included; it is used up."""
        self.context = int(unwrap(model).config.max_position_embeddings)
        parameters = list(model.parameters())
        self.num_bytes = sum(each.numel() * each.element_size() for each in parameters)
        self._counter = RequestCounter(model)

    @classmethod
    def of_recipe(cls, recipe: Recipe) -> "CostModel":
        """Return the costs of the model that `recipe` trains, its adapter left on top.

        Raises:
            ConfigError: The recipe builds its network from its data.
            CheckpointError: There is no config.json to read.
        """
        if recipe.model is None:
            raise ConfigError("--gpu: a recipe with `tiny` builds its network from its data")
        return cls(with_adapter(load_outline(recipe.model, "bfloat16"), recipe))

    def scores(self, arm: Arm, config: EvalConfig) -> ArmCost:
        """Return what `arm` costs on all tasks and seeds of `config`."""
        num_requests = write = decode = num_forwards = 0
        context = config.context_length or self.context
        for name in expand(config.tasks)[0]:
            row, length = find_task(name)
            number = min(config.num_samples or row.num_samples, row.num_samples)
            number *= len(config.seeds)
            whole = min(length or context, context)
            flops = self._counter.count(
                max(1, whole - row.max_new_tokens),
                row.max_new_tokens,
                arm.memory,
                block_length=arm.sampling.block_length if _in_blocks(arm) else None,
                objective=arm.objective,
            )
            num_requests += number
            write += number * flops.write
            decode += number * (flops.total - flops.write)
            num_forwards += ceil(number / config.batch_size) * flops.num_steps
        return ArmCost(arm.name, num_requests, write, decode, num_forwards * self.num_bytes)

    def exposure_bias(self, arm: Arm, config: EvalConfig, preset: Preset) -> ArmCost:
        """Return what `arm` costs on the longest rows of the paper's training data."""
        number, num_steps = config.num_samples or 1, preset.num_steps or 1
        response = preset.response_length or num_steps
        flops = self._counter.count(
            _ROW_LENGTH - response, response, arm.memory, objective=arm.objective
        )
        # A step decodes, and scores what is masked in both contexts.
        num_forwards = 3 * min(num_steps, response)
        read = ceil(number / config.batch_size) * num_forwards * self.num_bytes
        decode = number * num_forwards * flops.step
        return ArmCost(arm.name, number, number * flops.write, decode, read)


def with_adapter(model: DiffusionMaskedLM, recipe: Recipe) -> torch.nn.Module:
    """Put a recipe's adapter on a model of the meta device."""
    with torch.device("meta"):
        return add_adapter(model, recipe, Path("base"))


def preset_costs(
    preset: Preset, arms: Sequence[Arm], config: EvalConfig, model: CostModel
) -> list[ArmCost]:
    """Return what the arms of a preset cost, in order."""
    if preset.kind == EXPOSURE_BIAS:
        return [model.exposure_bias(arm, config, preset) for arm in arms]
    return [model.scores(arm, config) for arm in arms]


def training_flops(recipe: Recipe) -> int:
    """Return the FLOPs of one optimizer step on full rows, all but one of a row's tokens masked."""
    from memdlm.cli.planning_run import plan_recipe

    return plan_recipe(recipe).step.flops


def show_costs(plan: "SweepPlan", gpu: str) -> None:
    """Print what a plan costs on one GPU.

    Raises:
        UsageError: The GPU's speed is not known.
    """
    find_speed(gpu)
    print(
        f"on one {gpu}, at {UTILISATION:.0%} of its speed (an assumption); rows and prompts as "
        "long as they can be, and as many steps"
    )
    for training in plan.trainings:
        print(f"  training {training.label}: {_training_line(training, gpu)}", flush=True)
    if not plan.trainings:
        return
    model = CostModel.of_recipe(plan.trainings[0].recipe)
    for evaluation in plan.evaluations:
        arms = evaluation.wanted
        costs = preset_costs(evaluation.preset, arms, evaluation.config, model)
        for cost in costs:
            print(f"  {evaluation.name}, {cost.arm}: {_cost_line(cost, gpu)}", flush=True)
        total = sum(cost.seconds(gpu) for cost in costs)
        print(f"  {evaluation.name}, all: {duration(total)}", flush=True)


def _training_line(training: "Training", gpu: str) -> str:
    try:
        flops = training_flops(training.recipe)
    except MemDLMError as error:
        return f"not known ({error})"
    one = flops / (find_speed(gpu).flops * UTILISATION)
    steps = training.recipe.training.get("max_steps", -1)
    if steps and steps > 0:
        return f"{steps:,} steps, {duration(steps * one)}"
    return f"{duration(1000 * one)} for every 1,000 optimizer steps"


def _cost_line(cost: ArmCost, gpu: str) -> str:
    return (
        f"{cost.num_requests:,} requests, {cost.total / 1e15:,.1f} PFLOP, "
        f"{duration(cost.seconds(gpu))}"
    )


def _in_blocks(arm: Arm) -> bool:
    return arm.sampling.decoder == "block"
