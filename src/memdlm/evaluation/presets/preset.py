"""What a preset is: a table or figure of the paper as arms, tasks and settings.

Knows names and settings only. A preset can be evaluated with trained models, or swept: trained,
then evaluated. Settings are differences, as nested mappings: from a recipe (`train`), or from what
the trained recipe says of memory and sampling (`evaluate`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from memdlm.errors import ConfigError

Settings = Mapping[str, Any]

SCORES = "scores"
EXPOSURE_BIAS = "exposure_bias"

# What the paper decodes with, by the way a model decodes: LLaDA all slots in one block, a token a
# step; LLaDA2.x blocks of 32 (docs/paper-notes.md, Inference). A task decides the answer's length.
SAMPLING: dict[str, Settings] = {
    "masked": {},
    "block": {"decoder": "block", "block_length": 32, "threshold": 0.95},
}

# Separates the two arms of one training in an ablation.
TRAIN_ONLY_SUFFIX = "__train_only"


@dataclass(frozen=True)
class Variant:
    """One arm: how its model is trained and how it is asked.

    Attributes:
        name: What files call it; of an ablation's variants, what the published table calls them.
        label: What a reader sees.
        train: Differences from the recipe, e.g. {"memory": {"loss": "kl"}}.
        memory: Whether a memory is written from each prompt.
        evaluate: Differences in `memory` and `sampling` while it is asked.
    """

    name: str
    label: str
    train: Settings = field(default_factory=dict)
    memory: bool = False
    evaluate: Settings = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the sections.

        Raises:
            ConfigError: `evaluate` has other sections than memory and sampling.
        """
        unknown = set(self.evaluate) - {"memory", "sampling"}
        if unknown:
            raise ConfigError(f"variant {self.name}: evaluate.{min(unknown)} is no section")


@dataclass(frozen=True)
class Tiny:
    """What a preset becomes on the tiny network: generated tasks at a scale of seconds."""

    tasks: tuple[str, ...]
    num_samples: int


@dataclass(frozen=True)
class Preset:
    """A table or figure of the paper.

    Attributes:
        name: How commands call it, e.g. `paper/table1`.
        title: One line.
        description: What it shows and what differs from the paper, for `--list` and reports.
        variants: The arms, in the order of the table.
        tasks: Tasks and groups, one for every column of the table. None for exposure bias: it is
            measured on rows of the recipe's data that no training has seen.
        tiny: What is asked of the tiny network instead.
        kind: `scores` or `exposure_bias`.
        num_samples: Documents per task; None for as many as the paper scores.
        seeds: Seeds of the evaluation.
        context_length: What the model's context is taken to be, where the paper tests beyond the
            trained one; None for what its config says.
        num_steps: Denoising steps over which exposure bias is measured; None elsewhere.
        response_length: Tokens that responses are cut to for that; None for none.
    """

    name: str
    title: str
    description: str
    variants: tuple[Variant, ...]
    tasks: tuple[str, ...]
    tiny: Tiny
    kind: str = SCORES
    num_samples: int | None = None
    seeds: tuple[int, ...] = (0,)
    context_length: int | None = None
    num_steps: int | None = None
    response_length: int | None = None

    def __post_init__(self) -> None:
        """Check that names differ.

        Raises:
            ConfigError: Two variants have one name.
        """
        names = [variant.name for variant in self.variants]
        if len(set(names)) < len(names):
            raise ConfigError(f"preset {self.name}: two variants have one name")
