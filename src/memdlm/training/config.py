"""Settings of a training run: transformers' `TrainingArguments` plus objective and memory.

Defaults are the paper's outer loop; every inherited field keeps its transformers meaning.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import TrainingArguments

from memdlm.diffusion.objective import ObjectiveConfig
from memdlm.errors import ConfigError
from memdlm.memory.config import MemoryConfig


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
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Our collator picks its columns itself."}
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Hiding nan losses costs a device sync per step; we stop on them."},
    )

    def __post_init__(self) -> None:
        """Build nested configs from dicts and refuse what cannot work."""
        if isinstance(self.memory, dict):
            self.memory = MemoryConfig(**self.memory)
        if isinstance(self.objective, dict):
            self.objective = ObjectiveConfig(**self.objective)
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

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain data, nested configs as dicts."""
        fields = super().to_dict()
        fields["memory"], fields["objective"] = asdict(self.memory), asdict(self.objective)
        return fields
