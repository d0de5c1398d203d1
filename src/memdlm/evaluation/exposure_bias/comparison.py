"""Exposure bias of several arms on the same samples and masks, arm by arm, restartable.

<output>/exposure_bias/<arm>.json   a cell: what decides its numbers, and the sums of every sample
<output>/exposure_bias.json         curves, intervals and pairs, made of the cells

A cell that is there and was made with the same settings is not measured again; one of other
settings is never mixed in. Knows no figure and no command line.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memdlm.data.config import CHAT_TEMPLATE
from memdlm.data.encoding import Example
from memdlm.errors import ConfigError, UsageError
from memdlm.evaluation.config import Arm
from memdlm.evaluation.exposure_bias.measuring import measure_bias_sums
from memdlm.evaluation.exposure_bias.results import BiasSums, curve_record, pair_records
from memdlm.evaluation.loaded import (
    LoadedModel,
    arm_tokenizer,
    by_model,
    check_arms,
    load_arm,
    memory_settings,
)
from memdlm.evaluation.measured_cells import FORMAT, read_cell, write_cell
from memdlm.evaluation.samples import Sample, check_context, encode_samples, ids_hash
from memdlm.plain import as_json_gives_it
from memdlm.uncertainty import NUM_RESAMPLES

CELLS = "exposure_bias"
RESULT = "exposure_bias.json"
# The paper's Figure 3.
NUM_STEPS = 48

Say = Callable[[str], None]


@dataclass(frozen=True)
class BiasSettings:
    """How exposure bias is measured, for all arms alike.

    Raises:
        ConfigError: A value is out of range.
    """

    num_steps: int = field(
        default=NUM_STEPS,
        metadata={"help": "Denoising steps (paper: 48); fewer where responses are shorter."},
    )
    response_length: int | None = field(
        default=None,
        metadata={"help": "Cut longer responses to this many tokens. Default: the longest one."},
    )
    seed: int = field(
        default=0, metadata={"help": "Seed of orders, memories, resamples and generated rows."}
    )
    batch_size: int = field(
        default=16, metadata={"help": "Samples decoded together; changes no figure."}
    )
    chat_template: str = field(default="auto", metadata={"help": "auto, or never for raw prompts."})
    num_resamples: int = field(
        default=NUM_RESAMPLES, metadata={"help": "Resamples of the samples for intervals."}
    )

    def __post_init__(self) -> None:
        """Check ranges."""
        least = {"num_steps": 2, "batch_size": 1, "num_resamples": 1, "seed": 0}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ConfigError(
                    f"{name}: {getattr(self, name)} is out of range; use {minimum} or more"
                )
        if self.response_length is not None and self.response_length < 2:
            raise ConfigError(
                f"response_length: {self.response_length} is out of range; use 2 or more"
            )
        if self.chat_template not in CHAT_TEMPLATE:
            raise ConfigError(f"chat_template: {self.chat_template!r}: write auto or never")


def compare_exposure_bias(
    arms: Sequence[Arm],
    samples: Sequence[Sample],
    settings: BiasSettings,
    output: Path,
    *,
    overwrite: bool = False,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Measure every arm on the same samples and masks; return curves, intervals and pairs.

    Args:
        arms: What is compared; models that arms share are loaded once.
        samples: At least one.
        settings: How to measure.
        output: Folder of the cells; made if missing.
        overwrite: Replace cells of other settings.
        say: Receives a line per arm.

    Returns:
        `{"format", "num_steps", "num_samples", "num_slots", "seed", "data_hash", "arms", "pairs"}`;
        each of `arms` as `curve_record` gives it, with its name, model and settings.

    Raises:
        UsageError: No arm or two of one name, arms that do not share a tokenizer, or a cell of
            other settings.
        DataError: A sample cannot be encoded or exceeds a context.
        CheckpointError: A model or a cell cannot be read.
    """
    check_arms(arms)
    encoded = _encode(arms[0], samples, settings)
    data_hash = ids_hash(encoded)
    for arm in arms[1:]:
        if ids_hash(_encode(arm, samples, settings)) != data_hash:
            raise UsageError(
                f"arms {arms[0].name} and {arm.name} have different tokenizers, and so neither "
                "the same tokens nor the same masks: compare models of one family"
            )
    prompts, responses = _split(encoded, settings.response_length)
    num_slots = max(len(response) for response in responses)
    common = {
        "data_hash": data_hash,
        "num_samples": len(samples),
        "num_steps": settings.num_steps,
        "num_slots": num_slots,
        "seed": settings.seed,
    }
    measured: dict[str, tuple[BiasSums, dict[str, Any]]] = {}
    for group in by_model(arms):
        loaded = load_arm(group[0])
        check_context(samples, encoded, loaded.context_length, num_slots)
        for arm in group:
            facts = {**loaded.identity, **common, **memory_settings(arm)}
            path = output / CELLS / f"{arm.name}.json"
            cell = read_cell(path, facts, overwrite)
            if cell is None:
                sums = _measure(loaded, arm, prompts, responses, settings, say)
                write_cell(path, facts, _to_cell(sums))
            else:
                sums = _of_cell(cell)
                say(f"{arm.name}: measured before")
            measured[arm.name] = (sums, facts)
        del loaded
    draws = {"num_resamples": settings.num_resamples, "seed": settings.seed}
    return {
        "format": FORMAT,
        **common,
        "chat_template": settings.chat_template,
        "num_resamples": settings.num_resamples,
        "arms": [
            {**_describe(arm, facts), **curve_record(sums, **draws)}
            for arm in arms
            for sums, facts in [measured[arm.name]]
        ],
        "pairs": pair_records(
            [arm.name for arm in arms], [measured[arm.name][0] for arm in arms], **draws
        ),
    }


def _encode(arm: Arm, samples: Sequence[Sample], settings: BiasSettings) -> list[Example]:
    return encode_samples(samples, arm_tokenizer(arm), chat_template=settings.chat_template)


def _split(
    encoded: Sequence[Example], response_length: int | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Return prompts and responses as 1-D int64 tensors, responses cut to `response_length`."""
    prompts, responses = [], []
    for example in encoded:
        ids = torch.as_tensor(example.input_ids, dtype=torch.int64)
        prompts.append(ids[: example.prompt_length])
        responses.append(ids[example.prompt_length :][:response_length])
    return prompts, responses


def _measure(
    loaded: LoadedModel,
    arm: Arm,
    prompts: Sequence[Tensor],
    responses: Sequence[Tensor],
    settings: BiasSettings,
    say: Say,
) -> BiasSums:
    say(f"{arm.name}: {len(prompts)} samples, {settings.num_steps} steps")
    sums = measure_bias_sums(
        loaded.model,
        prompts,
        responses,
        memory=arm.memory,
        objective=arm.objective,
        num_steps=settings.num_steps,
        seed=settings.seed,
        batch_size=settings.batch_size,
    )
    if sums.num_dropped:
        say(
            f"{arm.name}: {sums.num_dropped} memories met inf or nan and were left out; lower "
            "memory.learning_rate"
        )
    return sums


def _describe(arm: Arm, facts: Mapping[str, Any]) -> dict[str, Any]:
    return {**arm.described(), "settings": as_json_gives_it(facts)}


def _to_cell(sums: BiasSums) -> dict[str, Any]:
    return {
        "mask_ratio": list(sums.mask_ratio),
        "num_dropped": sums.num_dropped,
        "num_tokens": sums.num_tokens.tolist(),
        "static_nll": sums.static_nll.tolist(),
        "sequential_nll": sums.sequential_nll.tolist(),
    }


def _of_cell(cell: Mapping[str, Any]) -> BiasSums:
    return BiasSums(
        mask_ratio=tuple(cell["mask_ratio"]),
        static_nll=np.array(cell["static_nll"], dtype=np.float64),
        sequential_nll=np.array(cell["sequential_nll"], dtype=np.float64),
        num_tokens=np.array(cell["num_tokens"], dtype=np.int64),
        num_dropped=int(cell["num_dropped"]),
    )
