"""A prompt as the inner loop sees it: chunks that fit the context, each with its own trajectory.

A prompt of more than `chunk_length` tokens is cut into as few chunks as possible, of lengths that
differ by at most one token (the longer ones first), so that no chunk is a useless rest. Every chunk
is a text of its own: its positions start at 0. Chunks of different rows go side by side, round by
round. Knows no model. Shapes: B rows, L length, n rows of a round.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from memdlm.diffusion.corruption import corrupt
from memdlm.diffusion.objective import ObjectiveConfig
from memdlm.diffusion.schedule import get_schedule
from memdlm.diffusion.states import CleanBatch, State
from memdlm.errors import DataError, UsageError
from memdlm.memory.config import MemoryConfig
from memdlm.memory.trajectories import (
    Trajectory,
    TrajectoryRequest,
    Transition,
    build_trajectory,
)
from memdlm.seeding import generator


@dataclass(frozen=True)
class Round:
    """One chunk of every prompt that has so many.

    Attributes:
        rows: Their rows in the batch, ascending.
        input_ids: Tokens [n, l] int64 on the CPU.
        attention_mask: 1 on real tokens [n, l]; None where no row is padded.
    """

    rows: tuple[int, ...]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None


def check_tokens(input_ids: Any, attention_mask: Any) -> None:
    """Refuse anything but int64 tokens [B, L] and a mask of the same shape, in one line."""
    given = f"a {type(input_ids).__name__}"
    if isinstance(input_ids, torch.Tensor):
        given = f"{str(input_ids.dtype).removeprefix('torch.')} {list(input_ids.shape)}"
        if input_ids.dtype == torch.int64 and input_ids.dim() == 2 and len(input_ids):
            if attention_mask is None or attention_mask.shape == input_ids.shape:
                return
            raise UsageError(
                f"attention_mask {list(attention_mask.shape)} differs from input_ids "
                f"{list(input_ids.shape)}; give one entry per token"
            )
    raise UsageError(
        f"input_ids is {given}; give int64 tokens [B, L] of one row or more, as a tokenizer "
        "returns with padding=True and return_tensors='pt'"
    )


def real_tokens(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """Return every row's tokens [L_i] on the CPU, without padding.

    Raises:
        DataError: If a row has none.
    """
    ids = input_ids.cpu()
    if attention_mask is None:
        rows = tuple(ids)
    else:
        rows = tuple(row[real] for row, real in zip(ids, attention_mask.cpu().bool(), strict=True))
    if any(len(row) == 0 for row in rows):
        raise DataError("cannot write a memory from an empty prompt; give at least one token")
    return rows


def chunk_sizes(num_tokens: int, chunk_length: int) -> list[int]:
    """Return the lengths of the chunks that a prompt of `num_tokens` >= 1 is written in."""
    number = -(-num_tokens // chunk_length)
    size, longer = divmod(num_tokens, number)
    return [size + 1] * longer + [size] * (number - longer)


def plan_rounds(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, chunk_length: int
) -> list[Round]:
    """Cut a batch [B, L] into rounds; one round is the batch as it was given.

    Raises:
        DataError: If a row is empty.
    """
    prompts = real_tokens(input_ids, attention_mask)
    if max(len(prompt) for prompt in prompts) <= chunk_length:
        mask = None if attention_mask is None else attention_mask.cpu()
        return [Round(tuple(range(len(prompts))), input_ids.cpu(), mask)]
    chunks = [prompt.split(chunk_sizes(len(prompt), chunk_length)) for prompt in prompts]
    rounds = []
    for index in range(max(len(row) for row in chunks)):
        rows = tuple(row for row, parts in enumerate(chunks) if index < len(parts))
        parts = [chunks[row][index] for row in rows]
        mask = torch.nn.utils.rnn.pad_sequence(
            [torch.ones_like(part) for part in parts], batch_first=True
        )
        ids = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
        rounds.append(Round(rows, ids, None if bool(mask.all()) else mask))
    return rounds


def prompt_trajectory(
    chunk: Round,
    seeds: Sequence[int],
    indices: Sequence[int],
    config: MemoryConfig,
    objective: ObjectiveConfig,
    mask_token_id: int,
) -> tuple[Trajectory, CleanBatch]:
    """Draw every row's trajectory as if it were alone, then lay the rows side by side.

    Args:
        chunk: The tokens.
        seeds: One per row of the chunk.
        indices: How many chunks each row's memory holds already; later chunks draw other masks.
        config: Trajectory and `prompt_mask_ratio`; all real tokens may be masked.
        objective: Noise schedule that draws the anchor.
        mask_token_id: Id of the mask token.
    """
    ids = chunk.input_ids
    real = torch.ones_like(ids) if chunk.attention_mask is None else chunk.attention_mask
    real = real.bool()
    schedule = get_schedule(objective.schedule)
    rows = []
    for tokens, is_real, seed, index in zip(ids, real, seeds, indices, strict=True):
        kept = tokens[is_real][None]
        row = CleanBatch(
            kept, torch.ones_like(kept, dtype=torch.bool), torch.zeros_like(kept).bool()
        )
        t = torch.full((1,), config.prompt_mask_ratio)
        place = [index] if index else []  # the first chunk draws what an uncut prompt does
        anchor = corrupt(row, t, schedule, mask_token_id, generator(seed, "prompt_anchor", *place))
        draws = generator(seed, "prompt_trajectory", *place)
        rows.append(
            build_trajectory(TrajectoryRequest(row, anchor, t, config, mask_token_id, draws))
        )
    batch = CleanBatch(ids, real, ~real)
    return _side_by_side(rows, batch), batch


def _side_by_side(rows: list[Trajectory], batch: CleanBatch) -> Trajectory:
    """Merge one-row trajectories into one of the batch, padding tokens staying visible."""
    merged: dict[int, State] = {}

    def merge(states: list[State]) -> State:
        key = id(states[0])
        if key not in merged:
            ids, masked = batch.clean.clone(), torch.zeros_like(batch.maskable)
            for index, state in enumerate(states):
                where = batch.maskable[index]
                ids[index, where], masked[index, where] = state.ids[0], state.masked[0]
            merged[key] = State(ids, masked)
        return merged[key]

    transitions = tuple(
        Transition(
            merge([step.source for step in steps]),
            merge([step.target for step in steps]),
            torch.cat([step.t for step in steps]),
        )
        for steps in zip(*(row.transitions for row in rows), strict=True)
    )
    return Trajectory(transitions, merge([row.anchor for row in rows]))
