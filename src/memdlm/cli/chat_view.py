"""What a chat shows: an answer that denoises before one's eyes, or as plain text on a pipe."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby, takewhile
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.text import Text

from memdlm.cli.text_stream import piece
from memdlm.data.encoding import end_of_turn_id
from memdlm.inference import Generation, GenerationUpdate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MASK = "\u2591"
_SECONDS_PER_FRAME = 1 / 20


class ChatView:
    """Shows answers on standard output and everything else on standard error."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        mask_token_id: int,
        num_slots: int,
        console: Console | None = None,
    ) -> None:
        """Show answers of `num_slots` tokens on `console`, standard output by default."""
        self.tokenizer, self.mask_token_id, self.num_slots = tokenizer, mask_token_id, num_slots
        self.console = console or Console(highlight=False, soft_wrap=False)
        self.notices = Console(stderr=True, highlight=False)
        self._special = set(tokenizer.all_special_ids)
        self._ends = {tokenizer.eos_token_id, end_of_turn_id(tokenizer)} - {None}

    def notice(self, text: str) -> None:
        """Say something that is no answer."""
        self.notices.print(Text(text, style="dim"), soft_wrap=not self.notices.is_terminal)

    @contextmanager
    def answering(self) -> Iterator["LiveAnswer"]:
        """Give what `on_update` and the whole answer go to; leave the terminal as it was."""
        if not self.console.is_terminal:
            yield LiveAnswer(self, None)
            return
        with Live(console=self.console, auto_refresh=False, vertical_overflow="crop") as live:
            yield LiveAnswer(self, live)

    def frame(self, update: GenerationUpdate) -> Text:
        """Return the one answer of an update as it stands, with a block for every mask.

        Tokens filled in this step are bold. Nothing is shown behind the end of the text.
        """
        start = update.answer_starts[0]
        slots = slice(start, start + self.num_slots)
        tokens = update.step.canvas[0, slots].tolist()
        is_new = update.step.committed[0, slots].tolist()
        text = Text()
        left: int | None = None
        # Tokens are decoded together where they can be: a character may span several.
        for (is_masked, is_fresh), group in groupby(
            zip(tokens, is_new, strict=True), lambda pair: (pair[0] == self.mask_token_id, pair[1])
        ):
            run = [token for token, _ in group]
            if is_masked:
                text.append(MASK * len(run), "dim")
                left = None
                continue
            shown = list(takewhile(lambda token: token not in self._ends, run))
            words = [token for token in shown if token not in self._special]
            if words:
                style = "bold green" if is_fresh else ""
                text.append(printable(piece(self.tokenizer, left, words)), style)
                left = words[-1]
            if len(shown) < len(run):
                break
        return text


class LiveAnswer:
    """One answer on its way."""

    def __init__(self, view: ChatView, live: Live | None) -> None:
        """Show in `live`; without one, print the whole at the end."""
        self.view, self.live = view, live
        self._shown = float("-inf")

    def update(self, update: GenerationUpdate) -> None:
        """Show a step, unless the last one was shown a moment ago."""
        now = time.monotonic()
        if self.live is None or now - self._shown < _SECONDS_PER_FRAME:
            return
        self._shown = now
        self.live.update(self.view.frame(update), refresh=True)

    def finish(self, answer: Generation) -> None:
        """Show the whole answer."""
        if self.live is None:
            print(answer.text, flush=True)
            return
        # What is longer than the screen was cut while it moved.
        self.live.vertical_overflow = "visible"
        self.live.update(Text(printable(answer.text)), refresh=True)


def printable(text: str) -> str:
    """Return text without characters that a terminal would obey, such as escape."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
