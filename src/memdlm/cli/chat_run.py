"""The work of `memdlm chat`: load, then read lines and answer them until there are none."""

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from memdlm.cli.chat_commands import Commands
from memdlm.cli.chat_view import ChatView
from memdlm.cli.conversation import Conversation
from memdlm.cli.generation_run import GenerationRequest, generation_config, load
from memdlm.cli.run_folder import RunFolder
from memdlm.errors import DataError, MemDLMError
from memdlm.memory.parametric_memory import ParametricMemory

_PROMPT, _PROMPT_FOR_MORE = "> ", ". "


def run_chat(request: GenerationRequest, system: str | None) -> bool:
    """Chat on the terminal, or answer standard input line by line; return whether all went well."""
    run = RunFolder(Path(request.model).expanduser())
    config = generation_config(request, run)
    model, tokenizer = load(request, run)
    folder = request.kept_memory
    conversation = Conversation(
        model,
        tokenizer,
        config,
        system=system,
        chat_template=request.chat_template,
        seed=request.seed,
        writes_memory=request.memory == "on",
        remembered=None if folder is None else ParametricMemory.from_pretrained(folder, model),
    )
    own: Any = model.config
    view = ChatView(tokenizer, own.mask_token_id, config.sampling.max_new_tokens)
    if not conversation.has_template:
        view.notice(
            "the turns are joined as plain text, without roles: "
            + (
                "--chat-template never"
                if request.chat_template == "never"
                else "the tokenizer has no chat template"
            )
        )
    if sys.stdin.isatty():
        view.notice(f"{request.model}, {conversation.describe_memory()}. /help, Ctrl-D ends")
        return Chat(conversation, view, is_interactive=True).run(typed_lines(view))
    return Chat(conversation, view, is_interactive=False).run(piped_lines())


class Chat:
    """Takes lines to the conversation and answers to the view."""

    def __init__(self, conversation: Conversation, view: ChatView, *, is_interactive: bool) -> None:
        """Chat; only an interactive one outlives Ctrl-C and says what an answer took."""
        self.conversation, self.view, self.is_interactive = conversation, view, is_interactive
        self.commands = Commands(conversation)

    def run(self, lines: Iterator[str]) -> bool:
        """Take every line; return whether all of them could be followed."""
        went_well = True
        for line in lines:
            try:
                outcome = self.commands.take(line)
                if outcome.notice is not None:
                    self.view.notice(outcome.notice)
                if outcome.ends:
                    break
                if outcome.question is not None:
                    self._answer(outcome.question)
            except MemDLMError as error:
                print(f"memdlm: error: {error}", file=sys.stderr, flush=True)
                went_well = False
            except KeyboardInterrupt:
                if not self.is_interactive:
                    raise
                self.view.notice("stopped; the conversation is as it was before this line")
        return went_well or self.is_interactive

    def _answer(self, question: str) -> None:
        self.commands.pending = question
        self.conversation.check_fits(question)  # before the view makes room for an answer
        self.commands.pending = None
        with self.view.answering() as shown:
            answer = self.conversation.ask(question, shown.update)
            shown.finish(answer)
        if answer.memory == "dropped":
            self.view.notice(
                "the inner loop met inf or nan, so this answer uses no memory; lower "
                "memory.learning_rate"
            )
        if self.is_interactive:
            cost = answer.batch
            written = f"memory {cost.memory_seconds:.1f} s, " * (answer.memory != "off")
            self.view.notice(
                f"{len(answer.token_ids)} tokens in {len(answer.tokens_per_step)} steps, {written}"
                f"{cost.decode_seconds:.1f} s"
            )


def typed_lines(view: ChatView, read: Callable[[str], str] = input) -> Iterator[str]:
    """Yield what is typed at the terminal, lines that end with a backslash joined."""
    with suppress(ImportError):  # some builds of Python are without it
        import readline  # noqa: F401  gives `input` history and editing
    parts: list[str] = []
    while True:
        try:
            line = read(_PROMPT_FOR_MORE if parts else _PROMPT)
            line.encode("utf-8")  # a terminal's bad bytes arrive as surrogates
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            parts.clear()
            print(file=sys.stderr)
            view.notice("Ctrl-D or /exit ends")
            continue
        except UnicodeError:
            view.notice("that line is not UTF-8 text and was ignored")
            continue
        if line.endswith("\\"):
            parts.append(line[:-1])
            continue
        yield "\n".join([*parts, line])
        parts.clear()


def piped_lines() -> Iterator[str]:
    """Yield the lines of standard input.

    Raises:
        DataError: One is not UTF-8.
    """
    # Bytes, since what a text stream makes of bad ones depends on the locale.
    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            yield line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise DataError(
                f"line {number} of standard input is not UTF-8 text: convert it first"
            ) from error
