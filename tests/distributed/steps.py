"""The same five steps, as one of two processes or as the single process that they must equal.

Two processes average the gradients of two micro-batches, which is what one process does that
accumulates them. Random streams are named by (seed, step, micro-batch, rank): the single process
therefore calls its micro-batch m (step, 0, rank m).
"""

import os
from dataclasses import replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig
from torch import nn
from transformers import PrinterCallback, TrainerCallback

from memdlm import MemDLMConfig, MemDLMTrainer, MemoryConfig, ObjectiveConfig, add_lora
from memdlm.diffusion.corruption import corrupt
from memdlm.diffusion.schedule import get_schedule
from memdlm.diffusion.states import CleanBatch, State
from memdlm.memory.trajectories import Trajectory, TrajectoryRequest, build_trajectory
from memdlm.memory.trajectories.trajectory import Transition
from memdlm.training.outer_step import OuterStep, lay_out_step, plan_step
from tests.conftest import make_batch, make_model
from tests.families import MASK

ROOT = Path(__file__).parents[2]
NUM_STEPS = 5
NUM_RANKS = 2
MEMORY = MemoryConfig(rank=2, layer_fraction=0.5)
CASES = [
    f"{kind}{checkpointing}"
    for kind, checkpointing in product(("full", "lora"), ("", "_checkpointing"))
] + ["full_shared_prompt_checkpointing"]
NORMALISERS = ("token", "sequence", "batch", "reference_sequence")

Record = dict[str, Any]  # losses: a list; weights: tensors by name


def memory_of(case: str) -> MemoryConfig:
    """Return the memory of a case."""
    prefix = "shared_prompt" if "shared_prompt" in case else "exact"
    return replace(MEMORY, pre_anchor_prefix=prefix)


def model_of(case: str) -> nn.Module:
    """Build the network of a case, its adapter on every linear layer and expert, not zero."""
    model: nn.Module = make_model("llada_moe")
    if case.startswith("lora"):
        model = add_lora(model, LoraConfig(r=2, target_modules="all-linear"))
        draws = torch.Generator().manual_seed(1)
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.data.normal_(0, 0.1, generator=draws)
    return model.train()


def trained_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return every weight that is trained, gathered where it is sharded."""
    return {
        name.replace("_checkpoint_wrapped_module.", ""): getattr(
            parameter.detach(), "full_tensor", parameter.detach().clone
        )()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


class AsRanks(MemDLMTrainer):
    """Lets one process draw for its micro-batches what several would draw for theirs."""

    def _next_micro_batch(self) -> tuple[int, int, int]:
        step, count, rank = super()._next_micro_batch()
        return (step, count, rank) if self.args.world_size > 1 else (step, 0, count)


class Losses(TrainerCallback):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        """Start empty."""
        self.values: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep one."""
        if "loss" in logs:
            self.values.append(logs["loss"])


def with_trainer(case: str) -> Record:
    """Train by `MemDLMTrainer`: DDP where there are two processes. The last batch is not full."""
    rows = make_batch((12, 9, 14, 7, 11, 8, 10), seed=3)
    dataset = [
        {
            "input_ids": ids[~padding].tolist(),
            "labels": torch.where(maskable, ids, -100)[~padding].tolist(),
        }
        for ids, padding, maskable in zip(rows.clean, rows.padding, rows.maskable, strict=True)
    ]
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        dataset.append(dataset[0])  # what accelerate fills the last batch with
    losses = Losses()
    with TemporaryDirectory() as folder:
        args = MemDLMConfig(
            folder,
            use_cpu=True,
            memory=memory_of(case),
            max_steps=NUM_STEPS,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            train_sampling_strategy="sequential",
            gradient_checkpointing=case.endswith("_checkpointing"),
            gradient_accumulation_steps=NUM_RANKS // world_size,
        )
        model = model_of(case)
        trainer = AsRanks(model, args, train_dataset=dataset, callbacks=[losses])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return {
        "losses": losses.values,
        "weights": trained_weights(model),
        "wrapper": type(trainer.model_wrapped).__name__,
    }


def with_fsdp2(case: str, shard: Any) -> Record:
    """Train by a plain loop; `shard` wraps the model, and None stands for the single process.

    Micro-batches have unequal numbers of rows.
    """
    model = model_of(case)
    if case.endswith("_checkpointing"):
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        inner.activation_checkpointing_enable({"use_reentrant": False})
    ranks = range(NUM_RANKS)
    if shard is not None:
        shard(model)
        ranks = [torch.distributed.get_rank()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    outer = OuterStep(model, memory_of(case))
    losses = []
    for step in range(NUM_STEPS):
        total = torch.zeros(())
        for rank in ranks:
            batch = make_batch((12, 9, 14) if rank == 0 else (11,), seed=2 * step + rank)
            plan = plan_step(batch, ObjectiveConfig(), outer.memory, MASK, (0, step, 0, rank))
            loss = outer.forward(model, plan).loss / len(ranks)
            loss.backward()
            outer.release()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        if shard is not None:
            torch.distributed.all_reduce(total)
            total /= NUM_RANKS
        losses.append(total.item())
    return {"losses": losses, "weights": trained_weights(model), "wrapper": type(model).__name__}


def shard_by_layer(model: nn.Module) -> None:
    """Apply `fully_shard` as its documentation does."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (NUM_RANKS,))
    layers = [m for m in model.modules() if type(m).__name__ == "DecoderLayer"]
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def shard_by_accelerate(model: nn.Module) -> None:
    """Let accelerate wrap the model as our config file tells it to where there are GPUs.

    Its Accelerator would choose DDP on a CPU, so its function is given what that would hand it.
    """
    from accelerate.commands import launch
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    line = ["--config_file", str(ROOT / "recipes" / "accelerate" / "fsdp2.yaml"), "script.py"]
    arguments, _, _ = launch._validate_launch_command(
        launch.launch_command_parser().parse_args(line)
    )
    variables = launch.prepare_multi_gpu_env(arguments)
    variables = {name: text for name, text in variables.items() if name.startswith("FSDP_")}
    assert variables["FSDP_VERSION"] == "2"
    with patch.dict(os.environ, variables):
        plugin = FullyShardedDataParallelPlugin()
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",
        is_main_process=torch.distributed.get_rank() == 0,
        device=torch.device("cpu"),
    )
    fsdp2_prepare_model(accelerator, model)


def shared_memory(normaliser: str) -> dict[str, torch.Tensor]:
    """Write one memory from all rows: those of this rank, or all four in a single process.

    Ranks have unequal numbers of rows and of masked tokens.
    """
    is_alone = not torch.distributed.is_initialized()
    memory = replace(
        MEMORY,
        sharing="batch" if is_alone else "global_batch",
        normaliser=normaliser,
        num_epochs=2,
    )
    rows = slice(0, 4) if is_alone else (slice(0, 3), slice(3, 4))[torch.distributed.get_rank()]
    batch = make_batch((12, 9, 14, 7), seed=5)
    draws = torch.Generator().manual_seed(6)
    t = torch.tensor([0.3, 0.8, 0.5, 0.6])
    anchor = corrupt(batch, t, get_schedule("linear"), MASK, draws)
    request = TrajectoryRequest(batch, anchor, t, memory, MASK, draws)
    transitions = tuple(
        Transition(_some(each.source, rows), _some(each.target, rows), each.t[rows])
        for each in build_trajectory(request).transitions
    )
    anchor = transitions[-1].source
    batch = CleanBatch(batch.clean[rows], batch.maskable[rows], batch.padding[rows])
    model = model_of("full")
    seed_indices = (0, 0, 0, 0 if is_alone else torch.distributed.get_rank())
    plan = lay_out_step(
        batch,
        anchor,
        t[rows],
        Trajectory(transitions, anchor),
        ObjectiveConfig(),
        memory,
        seed_indices,
    )
    outer = OuterStep(model, memory)
    result = outer.forward(model, plan)
    outer.release()
    assert result.fast_weights is not None and result.inner is not None
    return {**result.fast_weights.tensors, "inner losses": result.inner.losses}


def _some(state: State, rows: slice) -> State:
    return State(state.ids[rows], state.masked[rows])
