"""Pad examples into a batch, and keep on the CPU what drawing masks needs.

B rows, L length. Right padding; see `Collator` for what is supervised on it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from memdlm.diffusion.objective import PADDINGS
from memdlm.diffusion.states import IGNORED_LABEL, CleanBatch
from memdlm.errors import ConfigError, DataError


@dataclass(frozen=True)
class Collator:
    """Pad a list of {input_ids, labels} to the longest and return a batch.

    The batch is a dict: `input_ids` [B, L] int64; `labels` [B, L] int64, -100 on prompts;
    `attention_mask` [B, L] int64, 1 on tokens, 0 on padding; `host`, the same batch as a
    `CleanBatch`, which stays on the CPU: neither a mapping nor a sequence and without a `.to`, it
    is handed on as it is, so that masks are drawn without waiting for the device.

    Attributes:
        pad_token_id: Fills `input_ids` on the right.
        padding: What labels on padding say (`ObjectiveConfig.padding`). `"supervised"` and
            `"excluded_inner"`: the pad id, so that padding is trained like a response, as the
            published code does; `"excluded"`: -100. Which loop uses them is the objective's.
        pad_to_multiple_of: Round L up to a multiple; None: no rounding.

    Raises:
        ConfigError: An unknown `padding`, or a multiple below 1.
    """

    pad_token_id: int
    padding: str = "supervised"
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.padding not in PADDINGS:
            raise ConfigError(f"padding is {self.padding!r}: choose one of {', '.join(PADDINGS)}")
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise ConfigError(
                f"pad_to_multiple_of is {self.pad_to_multiple_of}: use 1 or more, or null"
            )

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the batch of these examples, in their order.

        Raises:
            DataError: An example lacks a column, or its two columns differ in length.
        """
        for feature in features:
            _check_example(feature)
        multiple = self.pad_to_multiple_of or 1
        longest = max(len(feature["input_ids"]) for feature in features)
        length = -(-longest // multiple) * multiple
        label = IGNORED_LABEL if self.padding == "excluded" else self.pad_token_id

        input_ids = torch.full((len(features), length), self.pad_token_id, dtype=torch.int64)
        labels = torch.full((len(features), length), label, dtype=torch.int64)
        attention_mask = torch.zeros((len(features), length), dtype=torch.int64)
        for row, feature in enumerate(features):
            end = len(feature["input_ids"])
            input_ids[row, :end] = torch.as_tensor(feature["input_ids"], dtype=torch.int64)
            labels[row, :end] = torch.as_tensor(feature["labels"], dtype=torch.int64)
            attention_mask[row, :end] = 1
        # A copy: on a CPU run the batch's own tensors are not moved, and writing to one must not
        # change the other.
        host = CleanBatch.from_labels(input_ids.clone(), labels, attention_mask == 0)
        return {
            "input_ids": input_ids,
            "labels": labels,
            "attention_mask": attention_mask,
            "host": host,
        }


def _check_example(example: Mapping[str, Any]) -> None:
    for name in ("input_ids", "labels"):
        if name not in example:
            raise DataError(
                f"a row has no {name}, only {', '.join(map(repr, example)) or 'nothing'}; give "
                "input_ids and labels, labels -100 on the prompt (memdlm.data.dataset.load_dataset "
                "makes both from texts)"
            )
    num_ids, num_labels = len(example["input_ids"]), len(example["labels"])
    if num_ids != num_labels:
        raise DataError(
            f"a row has {num_ids} input_ids and {num_labels} labels; give one label per token"
        )
