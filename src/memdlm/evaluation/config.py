"""What an evaluation is: which arms are compared, on which tasks, and how answers are made."""

from dataclasses import dataclass, field, replace
from typing import Any

from memdlm.data.config import CHAT_TEMPLATE
from memdlm.diffusion.objective import ObjectiveConfig
from memdlm.errors import ConfigError
from memdlm.evaluation.harness.likelihood import LikelihoodConfig
from memdlm.evaluation.tasks.task import TaskSources
from memdlm.memory.config import MemoryConfig
from memdlm.sampling.config import SamplingConfig


@dataclass(frozen=True)
class EvalConfig:
    """What every arm of an evaluation has in common.

    Raises:
        ConfigError: A value is out of range.
    """

    tasks: tuple[str, ...] = field(
        default=(), metadata={"help": "Tasks and groups, e.g. [ruler_vt@4k, babilong@1k]."}
    )
    num_samples: int | None = field(
        default=None,
        metadata={"help": "Documents of each task (default: as many as the paper scores)."},
    )
    seeds: tuple[int, ...] = field(
        default=(0,),
        metadata={"help": "Seeds of documents that are generated, of memories and of sampling."},
    )
    batch_size: int = field(
        default=8, metadata={"help": "Most requests answered together; changes no answer."}
    )
    batch_tokens: int | None = field(
        default=None,
        metadata={"help": "Most tokens of a batch, with padding and answers; unset: no limit."},
    )
    context_length: int | None = field(
        default=None,
        metadata={
            "help": "Take the model's context to be this many tokens, e.g. to test beyond the "
            "length it was trained for (the paper's Table 2). Default: what its config says."
        },
    )
    chat_template: str = field(
        default="never",
        metadata={"help": "never (raw prompts, the paper) or auto (the tokenizer's template)."},
    )
    sampling: SamplingConfig = field(
        default_factory=SamplingConfig,
        metadata={"help": "How answers are decoded; a task decides their length."},
    )
    likelihood: LikelihoodConfig = field(
        default_factory=LikelihoodConfig,
        metadata={"help": "Bound on the likelihood, for tasks that choose among answers."},
    )
    sources: TaskSources = field(
        default_factory=TaskSources, metadata={"help": "Local data in place of the hub's."}
    )

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("num_samples", "batch_size", "batch_tokens", "context_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: {value} is out of range; use 1 or more")
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds: {list(self.seeds)}: name different seeds of 0 or more")
        if self.chat_template not in CHAT_TEMPLATE:
            raise ConfigError(
                f"chat_template: {self.chat_template!r} is not one of {', '.join(CHAT_TEMPLATE)}"
            )


@dataclass(frozen=True)
class Arm:
    """One side of a comparison: a model, with or without a memory written from each prompt.

    Attributes:
        name: What files and tables call it; `standard`, `train_only`, `train_inference` are the
            paper's three.
        label: What a reader sees.
        model: Folder or hub name; None for an arm that is named but has no model yet.
        adapter: PEFT adapter folder or hub name on top; None for none.
        memory: Settings of the memory; `enabled` off for none.
        objective: Noise schedule of the memory's anchor.
        sampling: How its answers are decoded.
        dtype: Type of its weights, as `load_model` takes it.
        quantization: `none` or `nf4`.
    """

    name: str
    label: str
    model: str | None
    adapter: str | None = None
    memory: MemoryConfig = field(default_factory=lambda: MemoryConfig(enabled=False))
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    dtype: str = "auto"
    quantization: str = "none"

    @property
    def source(self) -> tuple[str | None, str | None, str, str]:
        """What has to be loaded; arms that agree here share the loaded model."""
        return self.model, self.adapter, self.dtype, self.quantization

    def without_memory(self) -> "Arm":
        """Return the arm with its memory off."""
        return replace(self, memory=replace(self.memory, enabled=False))

    def described(self) -> dict[str, Any]:
        """Return what result files call it, and what it asks; its settings are theirs to add."""
        return {
            "name": self.name,
            "label": self.label,
            "model": self.model,
            "adapter": self.adapter,
            "memory": self.memory.enabled,
        }
