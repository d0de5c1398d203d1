"""Committed text as it becomes final, on top of the steps of a decode. Knows no text, only ids.

Slots are filled in any order, but what stands without a gap from the left is final; where a decode
edits tokens, as far as the step says (`DecodeStep.final`).
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memdlm.sampling.config import SamplingConfig
from memdlm.sampling.decoding import decode_steps
from memdlm.sampling.end_of_text import IsComplete, stop_ids
from memdlm.sampling.masked_decoding import DecodeOutput, DecodeStep
from memdlm.sampling.token_choice import Draw


@dataclass(frozen=True)
class StreamUpdate:
    """What one step made final.

    Attributes:
        step: The step, with the whole canvas.
        new_tokens: Per row the ids that became final, in order; together over all updates they are
            the row's `DecodeOutput.tokens`.
        finished: Per row whether nothing more will come.
    """

    step: DecodeStep
    new_tokens: list[list[int]]
    finished: list[bool]


@torch.no_grad()
def decode_stream(
    model: nn.Module,
    prompts: Sequence[Tensor],
    config: SamplingConfig | None = None,
    *,
    draw: Draw | None = None,
    is_complete: IsComplete | None = None,
) -> Generator[StreamUpdate, None, DecodeOutput]:
    """Yield an update per step and return the output of `decode`; arguments and errors as there.

    A character may span several tokens: decode a row's ids so far, not each update by itself.
    Closing the generator ends the decode and gives the model its mode back.
    """
    config = config or SamplingConfig()
    mask_token_id = _mask_token_id(model)
    cuts = config.stop_at_eos and not config.infill
    stops = stop_ids(model.config, config) if cuts else ()
    rows = [
        # An infilled prompt is final text as far as it reaches; otherwise only slots are.
        _Row(0, len(prompt))
        if config.infill
        else _Row(len(prompt), len(prompt) + config.max_new_tokens)
        for prompt in prompts
    ]
    complete: set[int] = set()

    def noting(row: int, tokens: list[int]) -> bool:
        assert is_complete is not None
        if ends := is_complete(row, tokens):
            complete.add(row)
        return ends

    watch = None if is_complete is None else noting
    steps = decode_steps(model, prompts, config, draw=draw, is_complete=watch)
    step = None
    while True:
        try:
            step = next(steps)
        except StopIteration as end:
            output: DecodeOutput = end.value
            break
        canvas = step.canvas.tolist()
        limits = [row.end for row in rows] if step.final is None else step.final
        new_tokens = [
            row.take(tokens, mask_token_id, stops, limit)
            for row, tokens, limit in zip(rows, canvas, limits, strict=True)
        ]
        for place in complete:
            rows[place].is_finished = True
        yield StreamUpdate(step, new_tokens, [row.is_finished for row in rows])
    if step is not None and not all(row.is_finished for row in rows):
        # An abandoned block keeps its masks, behind which nothing was given out yet.
        rest = zip(rows, output.tokens, strict=True)
        new_tokens = [tokens[row.position - row.start :].tolist() for row, tokens in rest]
        yield StreamUpdate(step, new_tokens, [True] * len(rows))
    return output


@dataclass
class _Row:
    """How far a row is given out: its columns from `start` to `position`, of those up to `end`."""

    start: int
    end: int
    is_finished: bool = False

    def __post_init__(self) -> None:
        self.position = self.start

    def take(
        self, tokens: list[int], mask_token_id: int, stops: tuple[int, ...], limit: int
    ) -> list[int]:
        """Return the ids that follow without a gap, up to the end, a stop id or column `limit`."""
        first = self.position
        while (
            not self.is_finished
            and self.position < limit
            and tokens[self.position] != mask_token_id
        ):
            if tokens[self.position] in stops:
                self.is_finished = True
                break
            self.position += 1
            self.is_finished = self.position == self.end
        return tokens[first : self.position]


def _mask_token_id(model: nn.Module) -> int:
    config: Any = model.config
    mask_token_id: int = config.mask_token_id
    return mask_token_id
