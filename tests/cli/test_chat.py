"""`memdlm chat`: turns and memories, on a pipe and on a real terminal."""

import io
import os
import pty
import re
import select
import sys
import time
from contextlib import contextmanager, suppress

import pytest
import torch

from memdlm.answer_text import AnswerText
from memdlm.backbones.tiny import TinySizes, build_tiny
from memdlm.cli.chat_commands import Commands
from memdlm.cli.chat_run import typed_lines
from memdlm.cli.chat_view import ChatView, printable
from memdlm.cli.conversation import Conversation
from memdlm.cli.generation_run import GenerationConfig
from memdlm.cli.text_stream import TextStream
from memdlm.data.encoding import encode_prompt
from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.errors import ConfigError, DataError, NonFiniteError, UsageError
from memdlm.inference import GenerationUpdate, generate
from memdlm.memory.config import MemoryConfig
from memdlm.memory.parametric_memory import ParametricMemory
from memdlm.sampling.config import SamplingConfig
from memdlm.sampling.masked_decoding import DecodeStep
from tests.byte_tokenizer import Bytes

from .conftest import SOURCE

TEXT = "ada keeps the red key in a box near the old mill and bo keeps a blue one there"
DOCUMENT = "bo keeps a blue key in the old mill"
WORDY = ("--set", "sampling.suppress_tokens=[0,1,2,3]")


@pytest.fixture(scope="module")
def tokenizer():
    return build_word_tokenizer(TEXT.split())


@pytest.fixture(scope="module")
def model(tokenizer):
    sizes = TinySizes(width=32, num_layers=4, context_length=48, init_std=0.2)
    return build_tiny("llada", tokenizer, seed=1, sizes=sizes)


@pytest.fixture
def start(model, tokenizer):
    """Begin a conversation whose memory moves the answers of an untrained network."""

    def begin(**options) -> Conversation:
        config = GenerationConfig(
            sampling=SamplingConfig(max_new_tokens=6, suppress_tokens=(0, 1, 2, 3)),
            memory=MemoryConfig(layer_fraction=0.5, learning_rate=5.0, rank=8),
        )
        return Conversation(model, tokenizer, config, **options)

    return begin


def user(text):
    return {"role": "user", "content": text}


def test_an_answer_sees_all_turns_and_only_the_memories_asked_for(start, model, tokenizer) -> None:
    plain, own = start(), start(writes_memory=True)
    for conversation in (plain, own):
        first = conversation.ask("where is the key")
        said = [user("where is the key"), {"role": "assistant", "content": first.text}]
        second = conversation.ask("and bo")
        config = conversation.config
        memory = config.memory if conversation.writes_memory else None
        expected = generate(model, tokenizer, [[*said, user("and bo")]], config.sampling, memory)
        assert second == expected[0]
        assert conversation.num_turns == 2
    assert (first.memory, second.memory) == ("written", "written")
    assert plain.messages() != own.messages()


def test_what_is_remembered_stays_over_turns_until_it_is_forgotten(start, model, tokenizer) -> None:
    conversation, without = start(), start().ask("where is the key")
    assert conversation.remember(DOCUMENT) == "remembered 9 tokens"
    tensors = conversation.remembered.fast_weights.tensors
    held = {k: v.clone() for k, v in tensors.items()}
    kept = ParametricMemory(model, conversation.config.memory)
    kept.write(torch.tensor([encode_prompt(tokenizer, DOCUMENT)]))
    sampling = conversation.config.sampling
    prompt = [[user("where is the key")]]
    (expected,) = generate(model, tokenizer, prompt, sampling, memories=[kept])
    answer = conversation.ask("where is the key")
    assert (answer, answer.memory) == (expected, "kept")
    assert answer.token_ids != without.token_ids
    conversation.clear()
    conversation.writes_memory = True
    both = conversation.ask("where is the key")
    assert both.token_ids not in (answer.token_ids, without.token_ids)
    # The conversation was written into a copy.
    assert all(
        torch.equal(held[k], v) for k, v in conversation.remembered.fast_weights.tensors.items()
    )
    conversation.clear()
    conversation.writes_memory = False
    assert conversation.forget()
    assert conversation.ask("where is the key") == without


def test_remembering_more_writes_on_in_the_same_memory(start) -> None:
    conversation = start()
    conversation.remember(DOCUMENT)
    conversation.remember("ada keeps the red one")
    assert "14 tokens are remembered" in conversation.describe_memory()
    held = conversation.remembered
    with pytest.raises(DataError, match="the text is empty"):
        conversation.remember("  ")
    assert conversation.remembered is held


def test_a_memory_that_meets_inf_is_not_kept(start) -> None:
    conversation = start()
    wild = MemoryConfig(learning_rate=1e38, clip_norm=None, num_epochs=3, layer_fraction=0.5)
    conversation.config = GenerationConfig(memory=wild)
    with pytest.raises(NonFiniteError, match="nothing was remembered"):
        conversation.remember(DOCUMENT)
    assert conversation.remembered is None


def test_a_full_context_says_what_to_do_and_trim_asks_again(start) -> None:
    conversation = start(system="keeps")
    commands = Commands(conversation)
    for _ in range(4):
        conversation.ask("where is the key")
    with pytest.raises(DataError, match=r"48: /trim drops the oldest turns and asks again"):
        conversation.ask("and bo")
    assert conversation.num_turns == 4
    commands.pending = "and bo"
    outcome = commands.take("/trim")
    assert outcome.notice == "dropped the oldest 1 of 4 turns"
    conversation.ask(outcome.question)
    assert conversation.messages()[0] == {"role": "system", "content": "keeps"}
    assert commands.take("/trim").question is None
    assert conversation.num_turns == 3
    with pytest.raises(DataError, match="ask a shorter one, lower --max-new-tokens, or /remember"):
        conversation.ask("key " * 50)
    commands.take("/clear")
    assert conversation.num_turns == 0


def test_a_stopped_answer_leaves_the_conversation_as_it_was(start) -> None:
    conversation = start(writes_memory=True)
    conversation.remember(DOCUMENT)
    conversation.ask("where is the key")
    before = conversation.messages()

    def stop(update) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.ask("and bo", stop)
    assert conversation.messages() == before
    assert conversation.ask("and bo").memory == "kept"


def test_infilling_is_no_way_to_chat(model, tokenizer) -> None:
    config = GenerationConfig(sampling=SamplingConfig(infill=True))
    with pytest.raises(ConfigError, match=r"sampling\.infill: a chat appends"):
        Conversation(model, tokenizer, config)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/nope", "there is no command /nope: /help lists them"),
        ("/remember", "/remember needs a text"),
        ("/memory maybe", "/memory maybe: write"),
        ("/save", "/save needs a folder"),
        ("/save x", "nothing is remembered"),
        ("/clear all", "/clear takes no words"),
    ],
)
def test_a_command_that_cannot_be_followed_is_one_line(start, line, message) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        Commands(start()).take(line)


def test_a_line_is_a_question_a_command_or_nothing(start, tmp_path) -> None:
    commands = Commands(start())
    assert commands.take(" /usr is a folder").question == "/usr is a folder"
    assert commands.take("   ") == commands.take("")
    assert commands.take("").question is None
    assert commands.take("/exit").ends
    assert "/remember" in commands.take("/help").notice
    assert commands.take("/forget").notice == "nothing is remembered"
    assert commands.take("/memory on").notice.startswith("memory on")
    file = tmp_path / "book.txt"
    file.write_text(DOCUMENT)
    assert commands.take(f"/remember @{file}").notice == "remembered 9 tokens"
    assert commands.take(f"/save {tmp_path / 'kept'}").notice == f"saved {tmp_path / 'kept'}"
    assert (tmp_path / "kept").is_dir()
    file.write_bytes(b"\xff")
    with pytest.raises(DataError, match="it is not UTF-8 text"):
        commands.take(f"/remember @{file}")


def test_a_frame_shows_blocks_for_masks_and_nothing_behind_the_end(model, tokenizer) -> None:
    key, red = tokenizer.convert_tokens_to_ids(["key", "red"])
    mask, end = tokenizer.mask_token_id, tokenizer.eos_token_id
    canvas = torch.tensor([[key, key, red, mask, mask, end, red, mask]])
    committed = torch.zeros_like(canvas, dtype=torch.bool)
    committed[0, 2] = True
    step = DecodeStep(0, 4, canvas, committed)
    update = GenerationUpdate(range(1), (1,), step, [[]], [False])
    frame = ChatView(tokenizer, mask, 7).frame(update)
    assert frame.plain == "key red░░"
    assert [(frame.plain[span.start : span.end], span.style) for span in frame.spans] == [
        (" red", "bold green"),
        ("░░", "dim"),
    ]


def test_a_terminal_is_given_no_escape_sequences() -> None:
    assert printable("a\x1b[2Jb\tc\n\x07é") == "a�[2Jb\tc\n�é"


def reading(*stop_strings: str) -> AnswerText:
    return AnswerText.of(Bytes(), stop_strings, SamplingConfig())  # type: ignore[arg-type]


def test_a_stream_never_writes_half_a_character() -> None:
    written: list[str] = []
    stream = TextStream(reading(), written.append)
    for byte in "né€ !".encode():
        stream.add([byte])
    stream.end()
    assert written == ["n", "é", "€", " ", "!", "\n"]


def test_a_stream_writes_nothing_of_a_stop_string() -> None:
    written: list[str] = []
    stream = TextStream(reading("end.", "é!"), written.append)
    for byte in "an end, é? the end. more".encode():
        stream.add([byte])
    assert "".join(written) == "an end, é? the "
    assert written[3:5] == ["end,", " "]  # held back until it is no stop string
    stream.end()
    assert "".join(written) == "an end, é? the \n"


def test_typed_lines_go_on_after_a_backslash_and_survive_ctrl_c(tokenizer) -> None:
    typed = iter(["a\\", "b", KeyboardInterrupt(), "c\\", KeyboardInterrupt(), "\udcff", "d"])

    def read(prompt: str) -> str:
        line = next(typed, None)
        if isinstance(line, KeyboardInterrupt):
            raise line
        if line is None:
            raise EOFError
        return line

    view = ChatView(tokenizer, 0, 1)
    assert list(typed_lines(view, read)) == ["a\nb", "d"]


@pytest.fixture
def pipe(memdlm, trained, monkeypatch):
    """Chat with bytes on standard input."""

    def run(said: bytes, *options: object):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(said)))
        return memdlm("chat", "--model", trained, "-n", "4", *WORDY, *options)

    return run


def test_piped_lines_are_answered_one_per_line(pipe) -> None:
    result = pipe(b"ada hid the key\r\n\nwhere is it ?\n/exit\nnever\n")
    assert result.code == 0
    answers = result.out.splitlines()
    assert [len(answer.split()) for answer in answers] == [4, 4]
    assert result.err.count("the tokenizer has no chat template") == 1
    assert pipe(b"ada hid the key\nwhere is it ?").out == result.out


def test_a_line_that_cannot_be_answered_is_one_line_and_the_others_are(pipe) -> None:
    result = pipe(b"/nope\nada hid the key\n" + b"key " * 70)
    assert result.code == 1
    assert len(result.out.splitlines()) == 1
    errors = [line for line in result.err.splitlines() if line.startswith("memdlm: error: ")]
    assert "there is no command /nope" in errors[0]
    assert "exceeds the model's context of 64" in errors[1]
    assert len(errors) == 2


def test_a_kept_memory_is_chatted_with(pipe, tmp_path, trained) -> None:
    strong = ("--set", "memory.learning_rate=5")
    folder = tmp_path / "kept"
    saved = pipe(f"/remember ada hid the key\n/save {folder}\nwhere\n".encode(), *strong)
    assert saved.code == 0, saved.err
    again = pipe(b"where\n", "--memory", folder)
    assert (again.code, again.out) == (0, saved.out)
    assert pipe(f"/remember bo\n/save {folder}\n".encode()).code == 1


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--memory", "./absent"), 2, "--memory ./absent: write on, off, or"),
        (("--memory", "/usr"), 1, "/usr"),
        (("-n", "0"), 2, "sampling.max_new_tokens: 0"),
        (("--set", "sampling.temperature=.nan"), 2, "sampling.temperature: nan"),
        (("--set", "sampling.infill=true"), 2, "sampling.infill"),
        (("--chat-template", "no"), 2, "--chat-template no"),
    ],
)
def test_a_chat_that_cannot_begin_is_one_line(pipe, options, code, message) -> None:
    assert message in pipe(b"hi\n", *options).error_line(code)


def test_bytes_that_are_no_text_end_the_chat_with_one_line(pipe) -> None:
    result = pipe(b"ada hid the key\n\xff\xfe\n")
    assert result.code == 1
    assert len(result.out.splitlines()) == 1
    assert "line 2 of standard input is not UTF-8 text" in result.err


class Terminal:
    """A chat on a pseudo-terminal of its own."""

    def __init__(self, *arguments: object) -> None:
        """Start it; every step is slow enough to be seen, and stopped."""
        slow = (
            "import signal, sys, time; from memdlm.cli import chat_view, main\n"
            # A shell lets what it starts in the background ignore Ctrl-C, and so these tests.
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "update = chat_view.LiveAnswer.update\n"
            "def slowly(self, step):\n    time.sleep(0.06); update(self, step)\n"
            "chat_view.LiveAnswer.update = slowly\n"
            "sys.exit(main())"
        )
        self.pid, self.file = pty.fork()
        if self.pid == 0:
            changes = {"PYTHONPATH": str(SOURCE), "HF_HUB_OFFLINE": "1", "TERM": "xterm-256color"}
            os.execve(
                sys.executable,
                [sys.executable, "-c", slow, "chat", *map(str, arguments)],
                {**os.environ, **changes, "COLUMNS": "100"},
            )
        self.seen = ""

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """Return what was shown up to and with `text`."""
        until = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < until, f"{text!r} did not come: {self.seen!r}"
            if select.select([self.file], [], [], 0.2)[0]:
                try:
                    self.seen += os.read(self.file, 65536).decode("utf-8", errors="replace")
                except OSError:
                    assert text in self.seen, f"it ended before {text!r}: {self.seen!r}"
        shown, _, self.seen = self.seen.partition(text)
        return shown + text

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self.file, text.encode())

    def press(self, key: str, text: str) -> str:
        """Press a key until `text` is shown.

        As a person would: a signal that comes between the prompt and the wait for keys is seen by
        Python only with the next one.
        """
        for _ in range(20):
            self.type(key)
            with suppress(AssertionError):
                return self.wait_for(text, seconds=3)
        return self.wait_for(text)

    def exit_code(self) -> int:
        """Wait for the end."""
        for _ in range(600):
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if select.select([self.file], [], [], 0.05)[0]:
                with suppress_io():
                    os.read(self.file, 65536)
        raise AssertionError("the chat did not end")


@contextmanager
def suppress_io():
    """Ignore that the other side is closed, as Linux says it."""
    try:
        yield
    except OSError:
        time.sleep(0.05)


def test_on_a_terminal_answers_are_seen_denoising_and_can_be_stopped(trained) -> None:
    terminal = Terminal("--model", trained, "-n", "12", *WORDY)
    terminal.wait_for("Ctrl-D ends")
    terminal.wait_for("> ")
    terminal.type("ada hid the key\n")
    shown = terminal.wait_for("12 tokens in 12 steps")
    assert "░" * 6 in shown
    frames = shown.split("\x1b[2K")  # rich erases a frame before it draws the next
    masks = [frame.count("░") for frame in frames if "░" in frame]
    assert len(masks) >= 5
    assert masks == sorted(masks, reverse=True)
    terminal.wait_for("> ")
    terminal.type("where is it ?\n")
    terminal.wait_for("░")
    terminal.type("\x03")
    shown = terminal.wait_for("stopped; the conversation is as it was before this line")
    assert "tokens in" not in shown
    terminal.wait_for("> ")
    terminal.press("\x03", "Ctrl-D or /exit ends")
    terminal.wait_for("> ")
    terminal.type("/trim\n")
    terminal.wait_for("dropped the oldest 1 of 1 turns")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.exit_code() == 0
    os.close(terminal.file)
