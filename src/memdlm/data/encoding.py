"""Turn dialogues into token ids that fit the window, and prompts into the same ids at inference.

With a chat template: prompt = template of the turns before the response with its generation prompt,
whole = template of all turns; the prompt's ids must be a prefix of the whole's, and what a template
adds behind the token that ends the response's turn is dropped. Without: prompt and
response are encoded apart and joined, the end-of-text token closes the response (a tokenizer that
opens every text with a begin-of-text token keeps it). The prompt is never masked: its labels are
-100; the response is labelled up to and with its end. This file knows no file and no batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from memdlm.data.config import DataConfig
from memdlm.data.formatting import Dialogue, Message, plain_text, user_turn
from memdlm.data.readers import one_line
from memdlm.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED_LABEL = -100

# What `end_of_turn_id` looks for in a rendered conversation.
_TRIAL_ANSWER = "ANSWER"


@dataclass(frozen=True, slots=True)
class Example:
    """One encoded row: `input_ids` [length] int32, of which the first `prompt_length` are prompt.

    int32 arrays, not lists: 12,000 rows of 4,096 tokens take 0.2 GB instead of 1.8.
    """

    input_ids: np.ndarray
    prompt_length: int


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise a DataError unless the tokenizer has a mask, an end-of-text and a padding token."""
    for token, fix in (
        ("mask", "use a masked diffusion model's tokenizer, or set tokenizer.mask_token"),
        ("eos", "set tokenizer.eos_token to the token that ends a text"),
        ("pad", "set tokenizer.pad_token; LLaDA pads with its end-of-text token"),
    ):
        if getattr(tokenizer, f"{token}_token_id") is None:
            name = tokenizer.name_or_path or type(tokenizer).__name__
            raise DataError(f"the tokenizer of {name} has no {token} token: {fix}")


def check_prompt_fits(num_prompt_tokens: int, context_length: int, num_new_tokens: int = 0) -> None:
    """Raise a DataError if prompt and new tokens exceed the model's context, all in tokens."""
    if num_prompt_tokens + num_new_tokens > context_length:
        extra = f" and {num_new_tokens:,} new ones" if num_new_tokens else ""
        raise DataError(
            f"the prompt of {num_prompt_tokens:,} tokens{extra} exceeds the model's context of "
            f"{context_length:,} tokens: shorten the prompt"
            + (" or ask for fewer new tokens" if num_new_tokens else "")
        )


def uses_template(tokenizer: "PreTrainedTokenizerBase", chat_template: str) -> bool:
    """Tell whether texts go through the tokenizer's chat template (`DataConfig.chat_template`)."""
    return chat_template == "auto" and bool(getattr(tokenizer, "chat_template", None))


def end_of_turn_id(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """Return the special token with which the chat template ends an assistant's turn, if any.

    Instruction-tuned models end their answers with it rather than with the end-of-text token.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    trial = (*user_turn("a"), {"role": "assistant", "content": _TRIAL_ANSWER})
    try:
        text = _apply_template(tokenizer, trial, "a trial conversation")
    except DataError:
        return None
    _, answer, closing = text.rpartition(_TRIAL_ANSWER)
    ids = _encode_texts(tokenizer, [closing])[0] if answer and closing else []
    added = tokenizer.added_tokens_decoder
    return ids[0] if ids and ids[0] in added and added[ids[0]].special else None


def encode_prompt(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str | Sequence[Message],
    *,
    chat_template: str = "auto",
) -> list[int]:
    """Return the ids a prompt has in training, for inference.

    Args:
        tokenizer: Any tokenizer of transformers.
        prompt: A text, or the turns of a conversation; a text is one user turn for a template.
        chat_template: As in `DataConfig`; `"never"` for raw prompts, as the paper evaluates.
    """
    text, opening = render_prompt(tokenizer, prompt, chat_template=chat_template)
    return opening + _encode_texts(tokenizer, [text])[0]


def render_prompt(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str | Sequence[Message],
    *,
    chat_template: str = "auto",
) -> tuple[str, list[int]]:
    """Return the text that `encode_prompt` encodes, and the ids that it puts before it."""
    if uses_template(tokenizer, chat_template):
        messages = user_turn(prompt) if isinstance(prompt, str) else prompt
        return _apply_template(tokenizer, messages, "the prompt", generation_prompt=True), []
    text = prompt if isinstance(prompt, str) else plain_text(prompt)
    return text, _opening(tokenizer)


def columns_of(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str | Sequence[Message],
    parts: Sequence[str],
    *,
    chat_template: str = "auto",
) -> list[bool]:
    """Tell of every id of `encode_prompt` whether it holds a character of one of `parts`.

    Every place where a part occurs counts.

    Raises:
        DataError: A part is empty or not in the prompt, or the tokenizer cannot say which
            characters its tokens stand for.
    """
    text, opening = render_prompt(tokenizer, prompt, chat_template=chat_template)
    is_part = np.zeros(len(text) + 1, dtype=bool)
    for part in parts:
        # Many tokenizers count a space to the word behind it, which is no part of this one.
        part = part.strip()
        place = text.find(part) if part else -1
        if place < 0:
            raise DataError(f"the prompt does not contain {shorten(part)!r}: give a text from it")
        while place >= 0:
            is_part[place : place + len(part)] = True
            place = text.find(part, place + 1)
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"the tokenizer {type(tokenizer).__name__} does not tell which characters a token "
            "stands for: use a fast one (tokenizer.json)"
        )
    encoded: Any = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    return [False] * len(opening) + [
        bool(is_part[start:end].any()) for start, end in encoded["offset_mapping"]
    ]


def shorten(text: str, longest: int = 60) -> str:
    """Return the beginning of a text, for messages."""
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def encode_dialogues(
    dialogues: Sequence[Dialogue],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    chat_template: str = "auto",
) -> list[Example]:
    """Encode dialogues, all in one call of the tokenizer; every example has a response token.

    Raises:
        DataError: The template refuses a row, does not extend its prompt, or adds no response; or a
            row contains the mask token. Names the row.
    """
    templated = uses_template(tokenizer, chat_template)
    build: Callable[..., Example] = _from_template if templated else _from_texts
    end_id = end_of_turn_id(tokenizer) if templated else tokenizer.eos_token_id
    if templated:
        firsts = [
            _apply_template(tokenizer, d.messages, d.where, generation_prompt=True)
            for d in dialogues
        ]
        seconds = [
            _apply_template(
                tokenizer, (*d.messages, {"role": "assistant", "content": d.response}), d.where
            )
            for d in dialogues
        ]
    else:
        firsts = [d.prompt for d in dialogues]
        seconds = [d.response for d in dialogues]
    ids = _encode_texts(tokenizer, firsts + seconds)
    opening = [] if templated else _opening(tokenizer)
    examples = []
    for dialogue, first, second in zip(
        dialogues, ids[: len(firsts)], ids[len(firsts) :], strict=True
    ):
        example = build(opening + first, second, end_id, dialogue.where)
        if (example.input_ids == tokenizer.mask_token_id).any():
            raise DataError(
                f"{dialogue.where} contains the mask token {tokenizer.mask_token!r}, which the "
                "model could never tell from a hidden token: remove it from the text"
            )
        examples.append(example)
    return examples


def as_item(example: Example) -> dict[str, list[int]]:
    """Return an example as a data set's row: `input_ids` and `labels`, -100 on the prompt."""
    ids: list[int] = example.input_ids.tolist()
    prompt = example.prompt_length
    return {"input_ids": ids, "labels": [IGNORED_LABEL] * prompt + ids[prompt:]}


def fit(example: Example, config: DataConfig) -> Example | None:
    """Return an example, cut to the window if it has to be and may be; None if it is dropped."""
    if len(example.input_ids) <= config.max_length:
        return example
    if config.overlong == "filter":
        return None
    if config.overlong == "truncate_right" and example.prompt_length >= config.max_length:
        return None
    return fit_window(example, config.max_length)


def fit_window(example: Example, max_length: int) -> Example:
    """Cut an example to `max_length` tokens (2 or more), keeping at least one response token.

    The response loses its right end first, because its beginning answers the prompt. If the prompt
    alone fills the window, it loses its left end, because the end of a prompt holds the question
    and the template's generation prompt; one response token follows. A cut response has no
    end-of-text token: nothing tells the model to stop where we cut.
    """
    if len(example.input_ids) <= max_length:
        return example
    start = max(0, example.prompt_length + 1 - max_length)
    return Example(
        example.input_ids[start : start + max_length].copy(), example.prompt_length - start
    )


def _from_template(prompt: list[int], whole: list[int], end_id: int | None, where: str) -> Example:
    if whole[: len(prompt)] != prompt:
        raise DataError(
            f"{where}: the chat template's prompt is not the beginning of its whole conversation, "
            "so prompt and response cannot be told apart: remove white space around the texts, "
            "use another template, or set data.chat_template to never"
        )
    if len(whole) == len(prompt):
        raise DataError(
            f"{where}: the chat template adds no token for the response: use another template, or "
            "set data.chat_template to never"
        )
    if end_id in whole[len(prompt) :]:
        # Behind it ChatML has a line break, and LLaDA's published template a generation prompt that
        # it adds whether asked to or not: neither is for the model to write.
        whole = whole[: len(whole) - whole[::-1].index(end_id)]
    return Example(np.asarray(whole, dtype=np.int32), len(prompt))


def _from_texts(prompt: list[int], response: list[int], end_id: int, where: str) -> Example:
    ids = np.asarray([*prompt, *response, end_id], dtype=np.int32)
    return Example(ids, len(prompt))


def _apply_template(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Message],
    where: str,
    *,
    generation_prompt: bool = False,
) -> str:
    from jinja2 import TemplateError

    try:
        text: Any = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=generation_prompt
        )
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{where}: the tokenizer's chat template refuses the conversation "
            f"({one_line(error)}): change the row, or set data.chat_template to never"
        ) from error
    return str(text)


def _encode_texts(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    # verbose=False: rows beyond model_max_length are cut or dropped by us, and counted.
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    ids: Any = encoded["input_ids"]
    return list(ids)


def _opening(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the begin-of-text token if this tokenizer opens every text with it."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return []
    ids: Any = tokenizer("", return_attention_mask=False)["input_ids"]
    return [bos] if list(ids[:1]) == [bos] else []
