"""prompt -> memory -> sampler -> text: the one place where memory and sampling meet.

Every request has a memory of its own, written from its prompt, used for all its denoising steps and
erased (MemDLM section 4, inference). Knows neither files nor the command line.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from memdlm.data.encoding import check_prompt_fits, encode_prompt, end_of_turn_id
from memdlm.data.formatting import Message
from memdlm.diffusion.objective import ObjectiveConfig
from memdlm.errors import ConfigError, DataError, UsageError
from memdlm.memory.config import MemoryConfig
from memdlm.memory.parametric_memory import ParametricMemory, unwrap
from memdlm.sampling.canvas import prompt_canvas
from memdlm.sampling.config import SamplingConfig
from memdlm.sampling.masked_decoding import decode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
        text: The decoded response, without special tokens.
        token_ids: The same as ids, up to and without the token that ends the answer: the end of the
            text or, with a chat template, of the turn.
        num_prompt_tokens: Length of the encoded prompt.
        memory: `off`, `written`, or `dropped` where the inner loop met inf or nan, so that the
            answer is that of the model alone.
    """

    text: str
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    memory: str


def generate(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str | Sequence[Message]],
    sampling: SamplingConfig | None = None,
    memory: MemoryConfig | None = None,
    *,
    objective: ObjectiveConfig | None = None,
    seed: int = 0,
    chat_template: str = "auto",
    batch_size: int = 8,
) -> list[Generation]:
    """Answer every prompt; an answer does not depend on the other prompts or on the batch size.

    Args:
        model: A backbone, possibly a PEFT model around one.
        tokenizer: The model's.
        prompts: Texts, or conversations as lists of {role, content}.
        sampling: How to decode; the paper's evaluation by default.
        memory: Write a memory from each prompt first. None, or `enabled` off, is plain decoding.
            `sharing` is always per sequence here: no request may see another's memory.
        objective: Noise schedule that draws the memory's anchor; the one trained with.
        seed: Decides masks and initial fast weights of the memory, alike for every prompt. Decoding
            draws from `sampling.seed`.
        chat_template: As in `DataConfig`; `never` for raw prompts, as the paper evaluates.
        batch_size: Prompts decoded together.

    Returns:
        One `Generation` per prompt, in order.

    Raises:
        ConfigError: A setting is out of range, or the memory's scope selects no module.
        DataError: A prompt is empty or, with the new tokens, exceeds the model's context.
        UsageError: `prompts` is no sequence of texts and conversations.
    """
    if isinstance(prompts, str):
        raise UsageError("prompts is one text; give a list of them, e.g. [prompt]")
    sampling = _with_ends(sampling or SamplingConfig(), tokenizer)
    if batch_size < 1:
        raise ConfigError(f"batch_size: {batch_size} is out of range; use 1 or more")
    writer = None
    if memory is not None and memory.enabled:
        writer = ParametricMemory(model, replace(memory, sharing="sequence"), objective)
    # All are checked before any is decoded: a bad last prompt must not cost the others theirs.
    encoded = [
        _encode(model, tokenizer, prompt, sampling, chat_template, number)
        for number, prompt in enumerate(prompts, start=1)
    ]
    answers: list[Generation] = []
    for start in range(0, len(encoded), batch_size):
        batch = encoded[start : start + batch_size]
        answers += _answer(model, tokenizer, batch, sampling, writer, seed)
    return answers


def _with_ends(sampling: SamplingConfig, tokenizer: "PreTrainedTokenizerBase") -> SamplingConfig:
    """Let answers end with the tokenizer's end of text and end of turn, besides the model's own."""
    ends = (tokenizer.eos_token_id, end_of_turn_id(tokenizer))
    known = (token for token in ends if token is not None)
    return replace(sampling, stop_tokens=tuple(dict.fromkeys((*sampling.stop_tokens, *known))))


def _encode(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str | Sequence[Message],
    sampling: SamplingConfig,
    chat_template: str,
    number: int,
) -> torch.Tensor:
    """Return the ids [L] int64 of a prompt that fits the model."""
    if not isinstance(prompt, str | Sequence):
        raise UsageError(
            f"prompt {number} is a {type(prompt).__name__}; give a text or a list of messages"
        )
    try:
        ids = encode_prompt(tokenizer, prompt, chat_template=chat_template)
        context = unwrap(model).config.max_position_embeddings
        check_prompt_fits(len(ids), context, sampling.max_new_tokens)
    except DataError as error:
        raise DataError(f"prompt {number}: {error}") from error
    if not ids:
        raise DataError(f"prompt {number} is empty: give it at least one word")
    return torch.tensor(ids, dtype=torch.int64)


def _answer(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: list[torch.Tensor],
    sampling: SamplingConfig,
    writer: ParametricMemory | None,
    seed: int,
) -> list[Generation]:
    """Write, decode and erase for one batch of prompts [L_i]."""
    states = ["off"] * len(prompts)
    attached: AbstractContextManager[None] = nullcontext()
    try:
        if writer is not None:
            states = _write(writer, prompts, seed)
            attached = writer.attached()
        with attached:
            output = decode(model, prompts, sampling)
    finally:
        if writer is not None:
            writer.erase()
    return [
        Generation(
            text=str(tokenizer.decode(tokens, skip_special_tokens=True)),
            token_ids=tuple(tokens.tolist()),
            num_prompt_tokens=len(prompt),
            memory=state,
        )
        for prompt, tokens, state in zip(prompts, output.tokens, states, strict=True)
    ]


def _write(writer: ParametricMemory, prompts: list[torch.Tensor], seed: int) -> list[str]:
    """Write one memory per prompt, rows in the order of the canvas; return what became of each."""
    config = writer.backbone.config
    device = writer.backbone.lm_head.weight.device
    # A canvas without slots: the prompts, padded as they will be decoded.
    canvas = prompt_canvas(prompts, 0, config.mask_token_id, config.pad_token_id, device)
    stats = writer.write(canvas.tokens, canvas.attention_mask, seed=seed)
    return ["written" if is_alive else "dropped" for is_alive in stats.alive.tolist()]
