"""Settings of the quickstart; the defaults fit ten minutes on two CPU cores."""

from dataclasses import dataclass, field

from memdlm.data.tasks.config import TaskConfig
from memdlm.errors import ConfigError
from memdlm.memory.config import MemoryConfig

SETTINGS = ("Standard MDLM", "MemDLM (Train-Only)", "MemDLM (Train & Inference)")


@dataclass(frozen=True)
class QuickstartConfig:
    """What is trained, on what, and how it is compared."""

    seed: int = field(default=0, metadata={"help": "Seed of data, masks and fast weights."})
    tasks: tuple[str, ...] = field(
        default=TaskConfig().tasks,
        metadata={"help": "Generated tasks to train and evaluate on."},
    )
    train_length: int = field(
        default=96, metadata={"help": "Longest training text in words, prompt and answer."}
    )
    length_factors: tuple[int, ...] = field(
        default=(1, 2, 4), metadata={"help": "Evaluate at these multiples of train_length."}
    )
    num_train_examples: int = field(default=9600, metadata={"help": "Generated training rows."})
    num_steps: int = field(default=300, metadata={"help": "Training steps of each method."})
    batch_size: int = field(default=32, metadata={"help": "Rows per training step."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak AdamW learning rate."})
    num_eval_examples: int = field(
        default=200, metadata={"help": "Held-out rows per length, all tasks together."}
    )
    num_bias_examples: int = field(
        default=96, metadata={"help": "Held-out variable_tracking rows for the exposure bias."}
    )

    num_threads: int = field(
        default=1,
        metadata={
            "help": "CPU threads. More hardly pay for a network this small, cost up to ten times "
            "on a busy machine, and round differently."
        },
    )
    memory: MemoryConfig = field(
        default_factory=lambda: MemoryConfig(learning_rate=0.02),
        metadata={
            "help": "Memory of the MemDLM run, in training and at inference. The paper's settings "
            "but for the inner learning rate: at 0.1 a network of this width leans on the labels "
            "its memory holds and answers worse without them (docs/log.md)."
        },
    )

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ConfigError: Naming the setting.
        """
        counts = ("train_length", "num_train_examples", "num_steps", "batch_size", "num_threads")
        for name in (*counts, "num_eval_examples", "num_bias_examples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"quickstart.{name}: {getattr(self, name)} must be at least 1")
        if not self.length_factors or min(self.length_factors) < 1:
            raise ConfigError("quickstart.length_factors: name at least one factor of 1 or more")
