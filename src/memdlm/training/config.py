"""Settings of a training run: transformers' `TrainingArguments` plus objective and memory.

Defaults are the paper's outer loop; every inherited field keeps its transformers meaning.
"""

import difflib
import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from transformers import TrainingArguments

from memdlm.diffusion.objective import ObjectiveConfig
from memdlm.errors import ConfigError
from memdlm.memory.config import MemoryConfig
from memdlm.training.outer_step import check_prefix
from memdlm.training.processes import check_strategy

LENGTH_GROUPINGS = ("megabatches", "buckets")

Section = TypeVar("Section", MemoryConfig, ObjectiveConfig)


@dataclass
class MemDLMConfig(TrainingArguments):
    """`TrainingArguments` for `MemDLMTrainer`.

    `memory` and `objective` also take plain dicts, as they come out of YAML or JSON.

    Raises:
        ConfigError: For a value that training with fast weights cannot honour.
    """

    memory: MemoryConfig = field(
        default_factory=MemoryConfig, metadata={"help": "Parametric memory and its inner loop."}
    )
    objective: ObjectiveConfig = field(
        default_factory=ObjectiveConfig, metadata={"help": "The masked diffusion objective."}
    )

    learning_rate: float = field(
        default=2e-5, metadata={"help": "Outer AdamW learning rate (paper: 2e-5)."}
    )
    lr_scheduler_type: str = field(
        default="cosine", metadata={"help": "Learning-rate schedule (paper: cosine)."}
    )
    warmup_steps: float = field(
        default=0.1,
        metadata={"help": "Warm-up steps, or their share of all steps if below 1 (paper: 0.1)."},
    )
    num_train_epochs: float = field(
        default=5.0, metadata={"help": "Passes over the training rows (paper: 5)."}
    )
    per_device_train_batch_size: int = field(
        default=2, metadata={"help": "Sequences per device and micro-batch (paper: 2)."}
    )
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={"help": "Order of rows: group_by_length (paper), random or sequential."},
    )
    length_grouping: str = field(
        default="megabatches",
        metadata={
            "help": "How group_by_length groups: megabatches (transformers', the paper's: few rows "
            "sorted at a time) or buckets (all rows: a step's padding stays under 10 %).",
            "choices": LENGTH_GROUPINGS,
        },
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Our collator picks its columns itself."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={"help": "Every trained weight takes part in every step; looking costs time."},
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Hiding nan losses costs a device sync per step; we stop on them."},
    )

    def __post_init__(self) -> None:
        """Build nested configs from dicts and refuse what cannot work."""
        self.memory = _section(MemoryConfig, self.memory, "memory")
        self.objective = _section(ObjectiveConfig, self.objective, "objective")
        check_prefix(self.memory, self.objective)
        self._check_ranges()
        check_strategy(self)  # before transformers looks for packages that it would need
        # transformers 5.23 renamed these and warns about the old names, which most people know.
        if self.activation_checkpointing is None:
            self.activation_checkpointing = self.gradient_checkpointing
        if self.activation_checkpointing_kwargs is None:
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs
        super().__post_init__()
        if self.activation_checkpointing:
            given = self.activation_checkpointing_kwargs
            kwargs: dict[str, Any] = dict(given) if isinstance(given, dict) else {}
            if kwargs.setdefault("use_reentrant", False):
                raise ConfigError(
                    "activation_checkpointing_kwargs: use_reentrant=True cannot differentiate fast "
                    "weights; use {'use_reentrant': False}"
                )
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs = kwargs
        if self.label_smoothing_factor:
            raise ConfigError(
                "label_smoothing_factor: the diffusion objective has none; set it to 0"
            )

    def _check_ranges(self) -> None:
        """Refuse early what torch would refuse once a run has begun."""
        if self.length_grouping not in LENGTH_GROUPINGS:
            raise ConfigError(
                f"length_grouping: {self.length_grouping!r} is not one of "
                f"{', '.join(LENGTH_GROUPINGS)}"
            )
        if not 0 <= self.learning_rate < math.inf:
            raise ConfigError(
                f"learning_rate: {self.learning_rate} is out of range; use 0 or a positive number"
            )
        for name in (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)} is out of range; use 1 or more")

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain data, nested configs as dicts."""
        fields = super().to_dict()
        fields["memory"], fields["objective"] = asdict(self.memory), asdict(self.objective)
        return fields


def _section(config_class: type[Section], value: Any, name: str) -> Section:
    """Return `value`, or build it from a dict.

    Raises:
        ConfigError: An unknown key (with the nearest valid one), or neither of the two.
    """
    if isinstance(value, config_class):
        return value
    if not isinstance(value, dict):
        raise ConfigError(f"{name}: {value!r} is neither a {config_class.__name__} nor a dict")
    known = [f.name for f in fields(config_class)]
    for key in value:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean {name}.{close[0]}?" if close else f"choose of {', '.join(known)}"
            raise ConfigError(f"unknown key {name}.{key}; {hint}")
    return config_class(**value)
