"""Where a response ends, and which tokens may end it. Knows neither model nor loop.

Shapes: `B` rows, `S` slots of a row, `P` slots of a block, `V` vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memdlm.errors import ConfigError
from memdlm.sampling.config import SamplingConfig

IsComplete = Callable[[int, list[int]], bool]
"""`is_complete(row, tokens)`: whether a row's answer is complete with `tokens`, which are final.

How a caller who can read ends a row where no end-of-text token does. It is asked once for every
length of a row's tokens that a step leaves.
"""


def stop_ids(model_config: Any, config: SamplingConfig) -> tuple[int, ...]:
    """Return the ids that end a response: the model's end-of-text ids and `stop_tokens`, sorted.

    Args:
        model_config: Has `eos_token_id`: None, one id or a list of them.
        config: Adds `stop_tokens`.
    """
    eos = getattr(model_config, "eos_token_id", None)
    of_model = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    return tuple(sorted({*of_model, *config.stop_tokens}))


def check_vocabulary(config: SamplingConfig, vocabulary: int) -> None:
    """Refuse token ids in `config` that the model does not have.

    Raises:
        ConfigError: An id is not below `vocabulary`.
    """
    for name in ("suppress_tokens", "defer_tokens", "stop_tokens"):
        beyond = [token for token in getattr(config, name) if token >= vocabulary]
        if beyond:
            raise ConfigError(
                f"sampling.{name}: id {beyond[0]} is beyond the model's vocabulary of "
                f"{vocabulary}; use ids up to {vocabulary - 1}"
            )


def forbid_early_end(
    logits: Tensor, slots_before: Tensor, min_new_tokens: int, ids: tuple[int, ...]
) -> Tensor:
    """Return logits [B, P, V] in which the first `min_new_tokens` slots cannot end the response.

    Args:
        logits: [B, P, V] float.
        slots_before: [B] int64, slots of the row before the block.
        min_new_tokens: Slots that must not hold one of `ids`.
        ids: Ids that end a response, below V.
    """
    place = slots_before.unsqueeze(1) + torch.arange(logits.shape[1], device=logits.device)
    index = torch.tensor(ids, dtype=torch.int64, device=logits.device)
    is_early = (place < min_new_tokens).unsqueeze(-1)
    ending = logits.index_select(-1, index).masked_fill(is_early, float("-inf"))
    return logits.index_copy(-1, index, ending)


def has_ended(tokens: Tensor, is_filled: Tensor, ids: tuple[int, ...]) -> Tensor:
    """Return whether a stop id stands with no masked slot before it: [B] bool.

    Args:
        tokens: [B, S] int64.
        is_filled: [B, S] bool, the slots that are committed.
        ids: The stop ids.
    """
    index = torch.tensor(ids, dtype=torch.int64, device=tokens.device)
    return (_without_gap(is_filled) & torch.isin(tokens, index)).any(dim=1)


def before_first_gap(tokens: Tensor, is_filled: Tensor) -> list[list[int]]:
    """Return each row's tokens up to its first slot that is not filled.

    Args:
        tokens: [B, S] int64.
        is_filled: [B, S] bool.
    """
    lengths = _without_gap(is_filled).sum(dim=1, keepdim=True)
    seen = torch.cat([lengths, tokens], dim=1).tolist()  # one look at the device
    return [row[1 : 1 + row[0]] for row in seen]


def _without_gap(is_filled: Tensor) -> Tensor:
    return is_filled.to(torch.int64).cumprod(dim=1).bool()


def before_first(row: Tensor, ids: tuple[int, ...]) -> Tensor:
    """Return the 1-D row up to, and without, its first token in `ids`."""
    for index, token in enumerate(row.tolist()):
        if token in ids:
            return row[:index]
    return row


class CompleteAnswers:
    """The rows that a caller ended, since their answers are complete.

    Attributes:
        answers: Row -> the tokens it was complete with.
    """

    def __init__(self, is_complete: IsComplete, num_rows: int) -> None:
        """Begin with no token of any row."""
        self.answers: dict[int, list[int]] = {}
        self._is_complete = is_complete
        self._lengths = [0] * num_rows

    def look(self, final: list[list[int]], is_done: list[bool]) -> None:
        """Ask about the rows that go on and have more final tokens than before.

        Args:
            final: Each row's final tokens, from the first slot on.
            is_done: Rows to leave alone; those found complete are set.
        """
        for row, answer in enumerate(final):
            if is_done[row] or len(answer) == self._lengths[row]:
                continue
            self._lengths[row] = len(answer)
            if self._is_complete(row, answer):
                self.answers[row] = answer
                is_done[row] = True
