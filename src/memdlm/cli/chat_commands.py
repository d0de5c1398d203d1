"""What a line of a chat means: a question, or one of the commands that begin with a slash."""

from dataclasses import dataclass
from pathlib import Path

from memdlm.cli.conversation import Conversation
from memdlm.errors import DataError, UsageError

HELP = """\
/remember TEXT    write a text into the memory that stays; @FILE for a file, of any length
/forget           erase what is remembered
/memory           tell what is remembered; /memory on, /memory off: write the conversation into a
                  memory before every answer, or do not
/save DIR         keep what is remembered in a new folder, for --memory DIR
/trim             drop the oldest turn, or as many as a question that did not fit asks for
/clear            drop all turns; what is remembered stays
/exit             end, as Ctrl-D does; Ctrl-C stops an answer
A line that ends with \\ goes on in the next. Begin with a space to say a slash."""

_WITHOUT_WORDS = ("/forget", "/trim", "/clear", "/exit", "/help")


@dataclass(frozen=True)
class Outcome:
    """What a line asks of the one who reads lines.

    Attributes:
        notice: To tell the user.
        question: To be answered.
        ends: Whether the chat is over.
    """

    notice: str | None = None
    question: str | None = None
    ends: bool = False


class Commands:
    """Carries out commands on a conversation."""

    def __init__(self, conversation: Conversation) -> None:
        """Act on `conversation`."""
        self.conversation = conversation
        # The question that the context had no room for, which /trim asks again.
        self.pending: str | None = None

    def take(self, line: str) -> Outcome:
        """Return what a line asks for, having done what it commands.

        Raises:
            MemDLMError: It commands what cannot be done.
        """
        if not line.startswith("/"):
            return Outcome(question=line.strip() or None)
        name, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if rest and name in _WITHOUT_WORDS:
            raise UsageError(f"{name} takes no words: leave out {rest!r}")
        if name == "/remember":
            return Outcome(self.conversation.remember(_text(rest)))
        if name == "/memory":
            return self._memory(rest)
        if name == "/save":
            if not rest:
                raise UsageError("/save needs a folder: /save DIR")
            self.conversation.save(Path(rest).expanduser())
            return Outcome(f"saved {rest}")
        if name == "/forget":
            return Outcome("forgotten" if self.conversation.forget() else "nothing is remembered")
        if name == "/trim":
            return self._trim()
        if name == "/clear":
            self.conversation.clear()
            self.pending = None
            return Outcome("the conversation is empty")
        if name in ("/exit", "/help"):
            return Outcome(HELP) if name == "/help" else Outcome(ends=True)
        raise UsageError(
            f"there is no command {name}: /help lists them; begin with a space to say it"
        )

    def _memory(self, word: str) -> Outcome:
        if word not in ("", "on", "off"):
            raise UsageError(f"/memory {word}: write /memory, /memory on or /memory off")
        if word:
            self.conversation.writes_memory = word == "on"
        return Outcome(self.conversation.describe_memory())

    def _trim(self) -> Outcome:
        question, self.pending = self.pending, None
        dropped = self.conversation.trim(question)
        left = self.conversation.num_turns
        notice = f"dropped the oldest {dropped} of {dropped + left} turns"
        return Outcome(notice, question)


def _text(words: str) -> str:
    """Return the text of `/remember`: the words, or those of the file that @ names."""
    if not words:
        raise UsageError("/remember needs a text: /remember TEXT or /remember @FILE")
    if not words.startswith("@"):
        return words
    file = Path(words[1:].strip()).expanduser()
    try:
        return file.read_text(encoding="utf-8").strip("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise DataError(f"cannot read {file} ({reason}): check the path") from error
