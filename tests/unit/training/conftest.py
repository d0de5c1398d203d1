"""Plans of one step, and a watch for anything that makes the host wait for the device."""

from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from memdlm import MemDLMConfig, MemDLMTrainer
from memdlm.data.collation import Collator
from memdlm.diffusion.objective import ObjectiveConfig
from memdlm.diffusion.states import CleanBatch
from memdlm.memory.config import MemoryConfig
from memdlm.training.outer_step import StepPlan, plan_step

SMALL = {"rank": 3, "alpha": 6.0, "layer_fraction": 0.5}

# Operators whose result, or whose result's shape, the host has to fetch.
WAITING = (
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "unique",
    "_unique",
    "_unique2",
    "unique_consecutive",
    "unique_dim",
    "bincount",
    "histc",
)


class NoHostSync(TorchDispatchMode):
    """Raise on every operator that waits for the device; count the others."""

    def __init__(self) -> None:
        super().__init__()
        self.num_operators = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        assert name not in WAITING, f"{func.name()} makes the host wait for the device"
        if name == "repeat_interleave":
            assert (kwargs or {}).get("output_size") is not None, "repeat_interleave counts"
        self.num_operators += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_host_sync() -> NoHostSync:
    return NoHostSync()


@pytest.fixture
def lay_out() -> Callable[..., StepPlan]:
    """The function that plans one step of a batch."""

    def plan(
        batch: CleanBatch,
        memory: MemoryConfig,
        objective: ObjectiveConfig | None = None,
        indices: tuple[int, ...] = (0, 4, 0, 0),
    ) -> StepPlan:
        return plan_step(batch, objective or ObjectiveConfig(), memory, 60, indices)

    return plan


class RecordingCollator(Collator):
    """The library's collator, which also remembers what it gave."""

    def __call__(self, features):
        batch = super().__call__(features)
        RecordingCollator.given.append(batch["host"])
        return batch


@pytest.fixture
def rows() -> list[dict[str, list[int]]]:
    """Twelve examples of unequal length, a prompt of three tokens each."""
    draws = torch.Generator().manual_seed(0)
    examples = []
    for index in range(12):
        ids = torch.randint(0, 59, (8 + index % 5,), generator=draws).tolist()
        examples.append({"input_ids": ids, "labels": [-100] * 3 + ids[3:]})
    return examples


@pytest.fixture
def make_args(tmp_path) -> Callable[..., MemDLMConfig]:
    """The function that gives the settings of a short run on the CPU."""

    def make(**settings) -> MemDLMConfig:
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "memory": MemoryConfig(**SMALL),
            "use_cpu": True,
            "dataloader_pin_memory": False,
            "report_to": "none",
            "disable_tqdm": True,
            "max_steps": 4,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "linear",
            "warmup_steps": 0,
            "logging_steps": 1,
            "save_strategy": "no",
            "optim": "adamw_torch",
            "seed": 3,
        }
        return MemDLMConfig(**{**defaults, **settings})

    return make


@pytest.fixture
def train(rows, make_args) -> Callable[..., MemDLMTrainer]:
    """The function that trains a model, on `rows` by default, and returns the trainer.

    `trainer.batches` are the clean batches in the order in which they were used.
    """

    def run(
        model,
        resume=None,
        peft_config=None,
        train_dataset=None,
        eval_dataset=None,
        callbacks=None,
        **settings,
    ):
        args = make_args(**settings)
        RecordingCollator.given = []
        trainer = MemDLMTrainer(
            model,
            args,
            train_dataset=rows if train_dataset is None else train_dataset,
            eval_dataset=eval_dataset,
            data_collator=RecordingCollator(59, padding=args.objective.padding),
            peft_config=peft_config,
            callbacks=callbacks,
        )
        trainer.batches = RecordingCollator.given
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run
