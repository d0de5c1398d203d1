"""A conversation with a model and with a memory. Knows no terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from memdlm.cli.generation_run import GenerationConfig
from memdlm.data.encoding import encode_prompt, uses_template
from memdlm.data.formatting import Message
from memdlm.errors import ConfigError, DataError, NonFiniteError, UsageError
from memdlm.inference import Generation, GenerationUpdate, generate
from memdlm.memory.parametric_memory import ParametricMemory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Conversation:
    """The turns so far, what is remembered besides, and the model that answers.

    Two memories meet in an answer: `remembered` holds documents until they are forgotten; with
    `writes_memory` every answer has, on top of a copy of it, a memory of the conversation itself,
    which is erased with the answer.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: "PreTrainedTokenizerBase",
        config: GenerationConfig,
        *,
        system: str | None = None,
        chat_template: str = "auto",
        seed: int = 0,
        writes_memory: bool = False,
        remembered: ParametricMemory | None = None,
    ) -> None:
        """Begin without turns.

        Raises:
            ConfigError: The settings fill in prompts, which a conversation has no use for.
            UsageError: `remembered` holds several memories.
        """
        if config.sampling.infill:
            raise ConfigError("sampling.infill: a chat appends answers; use `memdlm generate`")
        if remembered is not None and len(remembered.rows) != 1:
            raise UsageError(
                f"the memory folder holds {len(remembered.rows)} memories; give one that holds one"
            )
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.chat_template, self.seed = chat_template, seed
        self.writes_memory, self.remembered = writes_memory, remembered
        self._system: list[Message] = [] if system is None else [_message("system", system)]
        self._turns: list[tuple[Message, Message]] = []

    @property
    def num_turns(self) -> int:
        """Questions that were answered and are still part of the conversation."""
        return len(self._turns)

    @property
    def has_template(self) -> bool:
        """Whether the turns go through a chat template that tells the model who speaks."""
        return uses_template(self.tokenizer, self.chat_template)

    @property
    def context(self) -> int:
        """Tokens that the model sees at once."""
        own: Any = self.model.config
        length: int = own.max_position_embeddings
        return length

    def messages(self, question: str | None = None) -> list[Message]:
        """Return the system's message, all turns and a question."""
        said = [message for turn in self._turns for message in turn]
        asked = [] if question is None else [_message("user", question)]
        return [*self._system, *said, *asked]

    def num_tokens(self, question: str | None = None) -> int:
        """Return the length of the conversation as the model reads it, in tokens."""
        return self._length(self.messages(question))

    def _length(self, messages: list[Message]) -> int:
        if not messages:
            return 0
        return len(encode_prompt(self.tokenizer, messages, chat_template=self.chat_template))

    def fits(self, question: str) -> bool:
        """Tell whether a question and its answer keep to the context."""
        return self.num_tokens(question) + self.config.sampling.max_new_tokens <= self.context

    def check_fits(self, question: str) -> None:
        """Refuse a question that does not fit.

        Raises:
            DataError: With what can be done about it.
        """
        if not self.fits(question):
            raise DataError(self._overflow(question))

    def ask(
        self, question: str, on_update: Callable[[GenerationUpdate], None] | None = None
    ) -> Generation:
        """Answer a question and add both to the conversation; if that fails, it stays as it was.

        Raises:
            DataError: It exceeds the context.
        """
        self.check_fits(question)
        # Turns with the same words in the same place would else draw the same answer.
        sampling = replace(self.config.sampling, seed=self.config.sampling.seed + len(self._turns))
        with self._kept_memory(question) as kept:
            (answer,) = generate(
                self.model,
                self.tokenizer,
                [self.messages(question)],
                sampling,
                None if kept else replace(self.config.memory, enabled=self.writes_memory),
                memories=[kept] if kept else None,
                objective=self.config.objective,
                seed=self.seed,
                chat_template=self.chat_template,
                on_update=on_update,
            )
        self._turns.append((_message("user", question), _message("assistant", answer.text)))
        return answer

    @contextmanager
    def _kept_memory(self, question: str) -> Iterator[ParametricMemory | None]:
        """Give what is remembered, with the conversation written on top of it if so wished."""
        if self.remembered is None or not self.writes_memory:
            yield self.remembered
            return
        both = self.remembered.row(0)
        try:
            both.write(self._ids(self.messages(question)), extend=True)
            yield both
        finally:
            both.erase()

    def _overflow(self, question: str) -> str:
        new = self.config.sampling.max_new_tokens
        said = (
            f"the conversation takes {self.num_tokens(question):,} tokens with this question, "
            f"which with {new:,} new ones exceeds the model's context of {self.context:,}"
        )
        alone = self._length([*self._system, _message("user", question)])
        if self._turns and alone + new <= self.context:
            return f"{said}: /trim drops the oldest turns and asks again, /clear drops all"
        return (
            f"{said}: ask a shorter one, lower --max-new-tokens, or /remember a long text and ask "
            "about it"
        )

    def trim(self, question: str | None = None) -> int:
        """Drop the oldest turns until a question fits, or one turn; return how many."""
        before = len(self._turns)
        if question is None:
            del self._turns[:1]
        while question is not None and self._turns and not self.fits(question):
            del self._turns[0]
        return before - len(self._turns)

    def clear(self) -> None:
        """Drop all turns; the system's message and what is remembered stay."""
        self._turns.clear()

    def remember(self, text: str) -> str:
        """Write a text into the memory that stays; return what was done.

        Raises:
            DataError: There is no text.
            NonFiniteError: The inner loop met inf or nan; the memory stays as it was.
        """
        ids = self._ids(text)
        if self.remembered is None:
            config = replace(self.config.memory, enabled=True, sharing="sequence")
            memory = ParametricMemory(self.model, config, self.config.objective)
            memory.write(ids, seed=self.seed)
        else:
            memory = self.remembered.row(0)
            memory.write(ids, extend=True)
        (row,) = memory.rows
        if row is None or row.is_dropped:
            raise NonFiniteError(
                "the inner loop met inf or nan, so nothing was remembered; lower "
                "memory.learning_rate"
            )
        self.forget()
        self.remembered = memory
        return f"remembered {ids.shape[1]:,} tokens"

    def forget(self) -> bool:
        """Erase what is remembered; return whether there was anything."""
        if self.remembered is None:
            return False
        self.remembered.erase()
        self.remembered = None
        return True

    def save(self, folder: Path) -> None:
        """Keep what is remembered in a new folder.

        Raises:
            UsageError: Nothing is remembered.
            CheckpointError: The folder exists or cannot be written.
        """
        if self.remembered is None:
            raise UsageError("nothing is remembered: /remember TEXT or @FILE first")
        self.remembered.save_pretrained(folder)

    def describe_memory(self) -> str:
        """Return what is remembered and what is written before every answer, as one line."""
        of_turns = "on (the conversation is written before every answer)"
        line = f"memory {of_turns if self.writes_memory else 'off'}"
        if self.remembered is None:
            return f"{line}; nothing is remembered"
        row = self.remembered.rows[0]
        num_tokens = 0 if row is None else row.num_tokens
        return (
            f"{line}; {num_tokens:,} tokens are remembered, in {self.remembered.num_bytes:,} bytes"
        )

    def _ids(self, text: str | list[Message]) -> torch.Tensor:
        ids = encode_prompt(self.tokenizer, text, chat_template=self.chat_template)
        if not ids or not text:
            raise DataError("the text is empty: give it at least one word")
        return torch.tensor([ids], dtype=torch.int64)


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
