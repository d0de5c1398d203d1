"""A recipe: everything a training run needs to know, as a YAML file of differences from defaults.

Baseline and memory are one recipe with `memory.enabled` off and on. Imports the real config classes
(and with them torch and the Trainer), so commands import this file when they run, not before.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from memdlm.backbones.loading import DTYPES
from memdlm.backbones.quantization import QuantizationConfig, check_dtype
from memdlm.backbones.tiny import TINY_FAMILIES, TinySizes
from memdlm.cli.presets import PRESETS, with_preset
from memdlm.cli.settings import apply_overrides, build, check_values, read_yaml, to_plain
from memdlm.data.config import DataConfig
from memdlm.data.tasks.config import TaskConfig
from memdlm.diffusion.objective import ObjectiveConfig
from memdlm.errors import ConfigError, UsageError
from memdlm.memory.config import MemoryConfig
from memdlm.training.config import MemDLMConfig

ADAPTERS = ("none", "lora")

# Fields of MemDLMConfig that a recipe states elsewhere, or that a run folder decides.
SET_ELSEWHERE = ("memory", "objective", "seed", "output_dir", "resume_from_checkpoint")


@dataclass(frozen=True)
class TinyConfig:
    """A tiny network with random weights and a word tokenizer built from the data."""

    family: str = field(default="llada", metadata={"help": f"One of {', '.join(TINY_FAMILIES)}."})
    max_words: int | None = field(
        default=None,
        metadata={"help": "Keep only the most frequent words of the data; null: all of them."},
    )
    sizes: TinySizes = field(default_factory=TinySizes, metadata={"help": "Sizes of the network."})

    def __post_init__(self) -> None:
        """Check the family."""
        if self.family not in TINY_FAMILIES:
            raise ConfigError(
                f"tiny.family: {self.family!r} is not one of {', '.join(TINY_FAMILIES)}"
            )


@dataclass(frozen=True)
class AdapterConfig:
    """The outer adapter that training updates in place of the model's own weights."""

    kind: str = field(
        default="none",
        metadata={"help": "none: full fine-tuning; lora: a PEFT LoRA on the frozen model (paper)."},
    )
    rank: int = field(default=32, metadata={"help": "Rank of the LoRA (paper: 32)."})
    alpha: float = field(default=64.0, metadata={"help": "LoRA scale is alpha / rank (paper: 64)."})
    dropout: float = field(
        default=0.05, metadata={"help": "Dropout before the LoRA (paper: 0.05)."}
    )
    target_modules: str | tuple[str, ...] = field(
        default="all-linear",
        metadata={
            "help": "all-linear: every linear layer but the head, with routed and shared experts "
            "and LLaDA-MoE's router (paper); or names, e.g. [q_proj, v_proj, experts]."
        },
    )

    def __post_init__(self) -> None:
        """Check kind and ranges."""
        if self.kind not in ADAPTERS:
            raise ConfigError(f"adapter.kind: {self.kind!r} is not one of {', '.join(ADAPTERS)}")
        if self.rank < 1:
            raise ConfigError(f"adapter.rank: {self.rank} is out of range; use 1 or more")
        if not self.alpha > 0:
            raise ConfigError(f"adapter.alpha: {self.alpha} is out of range; use above 0")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"adapter.dropout: {self.dropout} is out of range; use 0 to below 1")
        if not self.target_modules:
            raise ConfigError("adapter.target_modules: it is empty; use all-linear or name modules")


@dataclass(frozen=True)
class RecipeData(DataConfig):
    """`DataConfig`, or generated tasks in place of files."""

    tasks: TaskConfig | None = field(
        default=None,
        metadata={
            "help": "Generate long-context tasks in place of reading `train`. They are evaluated "
            "on `num_eval_rows` examples of the test split (null: `test_fraction` of their number)."
        },
    )

    def __post_init__(self) -> None:
        """Check the sources against each other, then every value."""
        super().__post_init__()
        if self.tasks is not None and (self.train or self.eval):
            raise ConfigError("data.tasks excludes data.train and data.eval: keep one source")
        if self.tasks is not None and self.tasks.split != "train":
            raise ConfigError("data.tasks.split: a run trains on train and evaluates on test")


@dataclass(frozen=True)
class Recipe:
    """One training run. Only differences from these defaults need to be written."""

    preset: str | None = field(
        default=None,
        metadata={
            "help": "A named set of defaults, which the recipe's own keys override: reference (the "
            "published code's choices; docs/paper-notes.md lists them). null: none.",
            "choices": tuple(PRESETS),
        },
    )
    model: str | None = field(
        default=None,
        metadata={"help": "Folder or hub name of a checkpoint; exclusive with `tiny`."},
    )
    dtype: str = field(
        default="auto",
        metadata={"help": f"Type of the model's weights: {', '.join(DTYPES)} (auto: the file's)."},
    )
    attention: str | None = field(
        default=None,
        metadata={
            "help": "full or, for LLaDA2.x, block_causal; null: as the checkpoint says, which is "
            "full for published ones (the paper's code trains with full attention)."
        },
    )
    tiny: TinyConfig | None = field(
        default=None, metadata={"help": "Build a tiny network instead; `tiny: {}` suffices."}
    )
    quantization: QuantizationConfig = field(
        default_factory=QuantizationConfig,
        metadata={"help": "4-bit weights below the adapter (QLoRA); see docs/quantization.md."},
    )
    adapter: AdapterConfig = field(
        default_factory=AdapterConfig, metadata={"help": "What training updates."}
    )
    data: RecipeData = field(
        default_factory=RecipeData, metadata={"help": "Rows to train and evaluate on."}
    )
    objective: ObjectiveConfig = field(
        default_factory=ObjectiveConfig, metadata={"help": "The masked diffusion objective."}
    )
    memory: MemoryConfig = field(
        default_factory=MemoryConfig, metadata={"help": "Parametric memory and its inner loop."}
    )
    training: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "Any field of MemDLMConfig, which is transformers' TrainingArguments with the "
            "paper's defaults; see `memdlm recipe --training`.",
            "config": MemDLMConfig,
        },
    )
    output_dir: str | None = field(
        default=None,
        metadata={"help": "Run folder; null: runs/ and the name of the recipe file."},
    )
    seed: int = field(
        default=42, metadata={"help": "The run's one seed: weights, batches, masks, memories."}
    )

    def __post_init__(self) -> None:
        """Check what sections cannot check alone.

        Raises:
            ConfigError: No model or two, no data, or a value out of range.
        """
        if (self.model is None) == (self.tiny is None):
            raise ConfigError(
                "give exactly one of model (folder or hub name) and tiny (a network built here)"
            )
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype: {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.quantization.is_on:
            self._check_quantization()
        if self.attention not in (None, "full") and self.tiny is not None:
            raise ConfigError(f"attention: {self.attention!r} is for checkpoints; leave it out")
        if self.data.train is None and self.data.tasks is None:
            raise ConfigError(
                "data.train is not set: name a .jsonl, .json or .parquet file or hub id, or "
                "generate rows with data.tasks"
            )
        if self.data.streaming:
            self._check_streaming()
        if self.seed < 0:
            raise ConfigError(f"seed: {self.seed} is out of range; use 0 or more")

    def _check_streaming(self) -> None:
        if self.data.tasks is not None:
            raise ConfigError("data.streaming reads data.train; generated tasks have no source")
        max_steps = self.training.get("max_steps")
        if max_steps is None or (isinstance(max_steps, int) and max_steps <= 0):
            raise ConfigError(
                "data.streaming: a stream has no end, so set training.max_steps to the number of "
                "optimizer steps"
            )
        if self.training.get("dataloader_num_workers", 0) not in (0, 1):
            raise ConfigError(
                "training.dataloader_num_workers: with data.streaming every worker would read all "
                "rows; use 0 or 1"
            )

    def _check_quantization(self) -> None:
        kind = f"quantization.kind: {self.quantization.kind}"
        if self.tiny is not None:
            raise ConfigError(f"{kind} quantises a checkpoint; use it with model, not with tiny")
        if self.adapter.kind == "none":
            raise ConfigError(
                f"{kind} freezes the model's own weights; set adapter.kind: lora to train on top"
            )
        check_dtype(self.quantization, self.dtype)
        if self.training.get("fp16"):
            raise ConfigError(f"{kind} computes in bfloat16; set training.bf16 in place of fp16")


def load_recipe(path: Path, assignments: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply `--set` assignments, and check everything that needs no file.

    Raises:
        UsageError: The file is unreadable or not YAML, a key is unknown, or a value is of the wrong
            type or out of range; the message names the file and the dotted key.
    """
    return build_recipe(apply_overrides(read_yaml(path), assignments), str(path))


def build_recipe(data: Mapping[str, Any], source: str) -> Recipe:
    """Build a recipe from plain data; `source` names it in messages (see `load_recipe`)."""
    recipe = build(Recipe, with_preset(data, source), source)
    for key in SET_ELSEWHERE:
        if key in recipe.training:
            place = "--resume" if key == "resume_from_checkpoint" else f"the top-level key {key}"
            raise UsageError(f"{source}: training.{key} is not set here; use {place}")
    training = check_values(MemDLMConfig, recipe.training, source, "training", SET_ELSEWHERE)
    return build(Recipe, {**to_plain(recipe), "training": training}, source)


def resolved(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as plain data with every default filled in.

    Of `training` the fields that memdlm itself defines are filled in; transformers' many others
    keep the defaults of the version recorded beside the recipe.
    """
    plain: dict[str, Any] = to_plain(recipe)
    own = MemDLMConfig.__annotations__
    defaults = {f.name: f.default for f in fields(MemDLMConfig) if f.name in own}
    kept = {key: value for key, value in defaults.items() if key not in SET_ELSEWHERE}
    plain["training"] = {**kept, **plain["training"]}
    return plain
