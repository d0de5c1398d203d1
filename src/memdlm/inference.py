"""prompt -> memory -> sampler -> text: the one place where memory and sampling meet.

Every request has a memory of its own, written from its prompt, used for all its denoising steps and
erased (MemDLM section 4, inference); or one that was written before and is kept. Knows neither
files nor the command line. `generate` may be called from several threads: calls on one model take
turns batch by batch, since a memory is attached to the model itself. To serve many requests at
once, put them into one batch; each row has its own memory.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from memdlm.answer_text import AnswerText
from memdlm.backbones.wrapping import unwrap
from memdlm.data.encoding import check_prompt_fits, encode_prompt, end_of_turn_id
from memdlm.data.formatting import Message
from memdlm.diffusion.objective import ObjectiveConfig
from memdlm.errors import ConfigError, DataError, UsageError
from memdlm.memory.budget import COPIES_WHILE_WRITING, memory_bytes, rows_within
from memdlm.memory.config import MemoryConfig
from memdlm.memory.exclusive import exclusive
from memdlm.memory.parametric_memory import ParametricMemory
from memdlm.sampling.canvas import prompt_canvas
from memdlm.sampling.config import SamplingConfig
from memdlm.sampling.decoding import decode
from memdlm.sampling.end_of_text import IsComplete
from memdlm.sampling.masked_decoding import DecodeOutput, DecodeStep
from memdlm.sampling.streaming import decode_stream
from memdlm.sampling.token_choice import Draw, row_draws

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class BatchCost:
    """What a batch took; its prompts share it.

    Attributes:
        num_prompts: Prompts decoded together.
        num_new_tokens: Tokens of all their answers.
        num_forwards: Calls of the model while decoding.
        memory_seconds: Wall time of writing or laying out their memories.
        decode_seconds: Wall time of decoding, that of `on_update` included.
    """

    num_prompts: int
    num_new_tokens: int
    num_forwards: int
    memory_seconds: float
    decode_seconds: float


@dataclass(frozen=True)
class GenerationUpdate:
    """What one denoising step did to the batch that is being decoded.

    Attributes:
        rows: Places of the batch's prompts among all prompts.
        answer_starts: Per row the column of the canvas where its answer starts.
        step: The step, with the canvas after it.
        new_tokens: Per row the ids that became final, in order; those of all updates are the
            answer's `token_ids`. A character may span several of them.
        finished: Per row whether nothing more will come.
    """

    rows: range
    answer_starts: tuple[int, ...]
    step: DecodeStep
    new_tokens: list[list[int]]
    finished: list[bool]


@dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
        text: The decoded response, without special tokens, up to the first stop string.
        token_ids: The same as ids, up to and without the token that ends the answer: the end of the
            text or, with a chat template, of the turn. Where a stop string ended it, all tokens
            that were final by then.
        num_prompt_tokens: Length of the encoded prompt.
        memory: `off`, `written`, `kept` (one given in `memories`), or `dropped` where the inner
            loop met inf or nan, so that the answer is that of the model alone.
        tokens_per_step: How many slots each denoising step of this row filled.
        batch: What it took, together with the prompts it was decoded with.
    """

    text: str
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    memory: str
    tokens_per_step: tuple[int, ...]
    batch: BatchCost = field(compare=False)


def generate(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str | Sequence[Message] | torch.Tensor],
    sampling: SamplingConfig | None = None,
    memory: MemoryConfig | None = None,
    *,
    memories: Sequence[ParametricMemory | None] | None = None,
    objective: ObjectiveConfig | None = None,
    seed: int | Sequence[int] = 0,
    sampling_seeds: Sequence[int] | None = None,
    chat_template: str = "auto",
    batch_size: int = 8,
    max_memory_bytes: int | None = None,
    stop_strings: Sequence[str] = (),
    on_update: Callable[[GenerationUpdate], None] | None = None,
) -> list[Generation]:
    """Answer every prompt; an answer does not depend on the other prompts or on the batch size.

    Args:
        model: A backbone, possibly a PEFT model around one.
        tokenizer: The model's.
        prompts: Texts, conversations as lists of {role, content}, or token ids [L] int64 as they
            are to be read.
        sampling: How to decode; the paper's evaluation by default.
        memory: Write a memory from each prompt first. None, or `enabled` off, is plain decoding.
            `sharing` is always per sequence here: no request may see another's memory.
        memories: In place of `memory`, one memory per prompt that was written before (a single
            row each), or None for none. They are left as they are.
        objective: Noise schedule that draws the memory's anchor; the one trained with.
        seed: Decides masks and initial fast weights of the memory; one for all prompts, or one per
            prompt. Decoding draws from `sampling.seed`.
        sampling_seeds: In place of `sampling.seed`, one per prompt, so that prompts that are alike
            draw apart.
        chat_template: As in `DataConfig`; `never` for raw prompts, as the paper evaluates.
        batch_size: Prompts decoded together.
        max_memory_bytes: Most that fast weights and inner gradients of one batch may take (see
            `memdlm.memory.budget`); batches get smaller to keep to it. None for no limit.
        stop_strings: Strings that end an answer as an end-of-text token does: with
            `sampling.stop_early` the row is done once one stands. `text` is cut before the first,
            `token_ids` are all that were final by then.
        on_update: Called after every denoising step, for streams and traces. What it raises ends
            the call; the memory is erased all the same.

    Returns:
        One `Generation` per prompt, in order.

    Raises:
        ConfigError: A setting is out of range, the memory's scope selects no module, or a single
            memory exceeds `max_memory_bytes`.
        DataError: A prompt is empty or, with the new tokens, exceeds the model's context.
        UsageError: `prompts` is no sequence of texts, conversations and ids, or `memories`, `seed`
            or `sampling_seeds` do not fit them; a stop string is empty, or there are some for
            `sampling.infill`.
    """
    if isinstance(prompts, str):
        raise UsageError("prompts is one text; give a list of them, e.g. [prompt]")
    sampling = _with_ends(sampling or SamplingConfig(), tokenizer)
    if batch_size < 1:
        raise ConfigError(f"batch_size: {batch_size} is out of range; use 1 or more")
    sources = _memory_sources(model, prompts, memory, memories, objective, seed)
    draws = [sampling.seed] * len(prompts) if sampling_seeds is None else list(sampling_seeds)
    _check_number("sampling_seeds", draws, prompts)
    reading = AnswerText.of(tokenizer, stop_strings, sampling)
    batch_size = min(batch_size, sources.most_rows(max_memory_bytes, batch_size))
    # All are checked before any is decoded: a bad last prompt must not cost the others theirs.
    encoded = [
        _encode(model, tokenizer, prompt, sampling, chat_template, number)
        for number, prompt in enumerate(prompts, start=1)
    ]
    answers: list[Generation] = []
    for start in range(0, len(encoded), batch_size):
        rows = range(start, min(start + batch_size, len(encoded)))
        answers += _answer(model, reading, encoded, rows, sampling, sources, draws, on_update)
    return answers


@dataclass(frozen=True)
class _MemorySources:
    """Where the memory of every prompt comes from."""

    writer: ParametricMemory | None
    seeds: Sequence[int]
    kept: Sequence[ParametricMemory | None] | None

    def most_rows(self, max_bytes: int | None, batch_size: int) -> int:
        """Return how many rows of a batch keep to `max_bytes`; at most `batch_size`."""
        if max_bytes is None:
            return batch_size
        sizes = [memory.num_bytes for memory in self.kept or () if memory is not None]
        if self.writer is not None:
            one = memory_bytes(self.writer.placement, self.writer.config)
            sizes = [COPIES_WHILE_WRITING * one]
        return rows_within(max_bytes, max(sizes)) if sizes else batch_size

    def provide(
        self, prompts: list[torch.Tensor], rows: range
    ) -> tuple[ParametricMemory | None, list[str]]:
        """Return the memory of a batch, to be erased after it, and the state of each row."""
        if self.writer is not None:
            return self.writer, _write(self.writer, prompts, [self.seeds[row] for row in rows])
        chosen = [None] * len(prompts) if self.kept is None else [self.kept[row] for row in rows]
        states = ["off" if memory is None else _state(memory) for memory in chosen]
        if all(memory is None for memory in chosen):
            return None, states
        return ParametricMemory.stack(chosen), states


def _memory_sources(
    model: nn.Module,
    prompts: Sequence[object],
    memory: MemoryConfig | None,
    memories: Sequence[ParametricMemory | None] | None,
    objective: ObjectiveConfig | None,
    seed: int | Sequence[int],
) -> _MemorySources:
    """Check what `generate` was given about memories."""
    seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
    _check_number("seed", seeds, prompts)
    if memories is not None:
        _check_number("memories", memories, prompts)
    writes = memory is not None and memory.enabled
    if memories is None:
        writer = None
        if memory is not None and writes:
            writer = ParametricMemory(model, replace(memory, sharing="sequence"), objective)
        return _MemorySources(writer, seeds, None)
    if writes:
        raise UsageError("give memory to write one from each prompt, or memories to use, not both")
    first = next((kept for kept in memories if kept is not None), None)
    for number, kept in enumerate(memories, start=1):
        if kept is None or first is None:
            continue
        if kept.backbone is not unwrap(model):
            raise UsageError(f"memory {number} belongs to another model; write or load it on this")
        if len(kept.rows) != 1:
            raise UsageError(
                f"memory {number} has {len(kept.rows)} rows; give one with a single row, as "
                "memory.row(0) does"
            )
        first.check_alike(kept)  # now rather than at the batch where they meet
    return _MemorySources(None, seeds, memories)


def _check_number(name: str, given: Sequence[object], prompts: Sequence[object]) -> None:
    if len(given) != len(prompts):
        raise UsageError(f"{name}: {len(given)} for {len(prompts)} prompts; give one each")


def _state(memory: ParametricMemory) -> str:
    row = memory.rows[0]
    return "dropped" if row is not None and row.is_dropped else "kept"


def _with_ends(sampling: SamplingConfig, tokenizer: "PreTrainedTokenizerBase") -> SamplingConfig:
    """Let answers end with the tokenizer's end of text and end of turn, besides the model's own."""
    ends = (tokenizer.eos_token_id, end_of_turn_id(tokenizer))
    known = (token for token in ends if token is not None)
    return replace(sampling, stop_tokens=tuple(dict.fromkeys((*sampling.stop_tokens, *known))))


def _encode(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str | Sequence[Message] | torch.Tensor,
    sampling: SamplingConfig,
    chat_template: str,
    number: int,
) -> torch.Tensor:
    """Return the ids [L] int64 of a prompt that fits the model."""
    if not isinstance(prompt, str | Sequence | torch.Tensor):
        raise UsageError(
            f"prompt {number} is a {type(prompt).__name__}; give a text or a list of messages"
        )
    try:
        if isinstance(prompt, torch.Tensor):
            ids = prompt.tolist()
        else:
            ids = encode_prompt(tokenizer, prompt, chat_template=chat_template)
    except DataError as error:
        raise DataError(f"prompt {number}: {error}") from error
    try:
        context = unwrap(model).config.max_position_embeddings
        check_prompt_fits(len(ids), context, 0 if sampling.infill else sampling.max_new_tokens)
    except DataError as error:
        raise DataError(
            f"prompt {number}: {error}; or write a memory of the text, chunk by chunk "
            "(`memdlm memory write`), and ask with a short prompt"
        ) from error
    if not ids:
        raise DataError(f"prompt {number} is empty: give it at least one word")
    return torch.tensor(ids, dtype=torch.int64)


def _answer(
    model: nn.Module,
    reading: AnswerText,
    encoded: list[torch.Tensor],
    rows: range,
    sampling: SamplingConfig,
    sources: _MemorySources,
    sampling_seeds: Sequence[int],
    on_update: Callable[[GenerationUpdate], None] | None,
) -> list[Generation]:
    """Write, decode and erase for one batch: the prompts `rows` of `encoded`, [L_i] each."""
    prompts = [encoded[row] for row in rows]
    draw = row_draws([sampling_seeds[row] for row in rows], next(model.parameters()).device)
    memory = sources.writer
    # Another thread's forward would see this batch's memory, and ours that thread's.
    with exclusive(unwrap(model)):
        try:
            start = _now(model)
            memory, states = sources.provide(prompts, rows)
            written = _now(model)
            with nullcontext() if memory is None else memory.attached():
                if on_update is None:
                    complete = reading.is_complete
                    output = decode(model, prompts, sampling, draw=draw, is_complete=complete)
                else:
                    output = _decode_watched(
                        model, prompts, sampling, rows, draw, reading.is_complete, on_update
                    )
            decoded = _now(model)
        finally:
            if memory is not None:
                memory.erase()
    num_new_tokens = sum(len(tokens) for tokens in output.tokens)
    cost = BatchCost(
        len(rows), num_new_tokens, output.num_forwards, written - start, decoded - written
    )
    answers = zip(prompts, output.tokens, states, output.tokens_per_step, strict=True)
    return [
        Generation(
            text=reading.read(tokens.tolist()),
            token_ids=tuple(tokens.tolist()),
            num_prompt_tokens=len(prompt),
            memory=state,
            tokens_per_step=tuple(filled),
            batch=cost,
        )
        for prompt, tokens, state, filled in answers
    ]


def _decode_watched(
    model: nn.Module,
    prompts: list[torch.Tensor],
    sampling: SamplingConfig,
    rows: range,
    draw: Draw,
    is_complete: IsComplete | None,
    on_update: Callable[[GenerationUpdate], None],
) -> DecodeOutput:
    """Decode, telling of every step."""
    starts = tuple(0 if sampling.infill else len(prompt) for prompt in prompts)
    stream = decode_stream(model, prompts, sampling, draw=draw, is_complete=is_complete)
    try:
        while True:
            try:
                update = next(stream)
            except StopIteration as end:
                output: DecodeOutput = end.value
                return output
            on_update(
                GenerationUpdate(rows, starts, update.step, update.new_tokens, update.finished)
            )
    finally:
        stream.close()


def _now(model: nn.Module) -> float:
    """Return the time in seconds when what was asked of the model's device is done."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _write(
    writer: ParametricMemory, prompts: list[torch.Tensor], seeds: Sequence[int]
) -> list[str]:
    """Write one memory per prompt, rows in the order of the canvas; return what became of each."""
    config = writer.backbone.config
    device = writer.backbone.lm_head.weight.device
    # A canvas without slots: the prompts, padded as they will be decoded.
    canvas = prompt_canvas(prompts, 0, config.mask_token_id, config.pad_token_id, device)
    stats = writer.write(canvas.tokens, canvas.attention_mask, seed=seeds)
    return ["written" if is_alive else "dropped" for is_alive in stats.alive.tolist()]
