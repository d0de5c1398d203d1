"""`memdlm memory`: what is written can be shown, used, exported and deleted, or is refused."""

import json
import os
import subprocess
import sys

import pytest

from memdlm.cli import main

from .conftest import SOURCE, spawn

TEXT = "ada hid the key in box 3 . bo hid the key in box 1 ."
QUESTION = "where is it ?"
STRONG = ("--set", "memory.learning_rate=5", "--set", "memory.rank=2")


@pytest.fixture(scope="module")
def kept(trained, tmp_path_factory):
    """A memory of the trained run."""
    folder = tmp_path_factory.mktemp("kept") / "memory"
    arguments = ["memory", "write", "-m", trained, TEXT, "-o", folder, *STRONG, "--seed", 3]
    assert main([str(argument) for argument in arguments]) == 0
    return folder


def test_a_kept_memory_answers_in_place_of_one_from_the_prompt(memdlm, trained, kept) -> None:
    options = ("generate", "--model", trained, "-n", "4", "--json", QUESTION)
    with_memory = json.loads(memdlm(*options, "--memory", kept).out)
    assert with_memory["memory"] == "kept"
    without = json.loads(memdlm(*options, "--memory", "off").out)
    assert without["memory"] == "off"


def test_show_tells_what_is_in_a_memory_without_loading_a_model(memdlm, kept, monkeypatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", fail)
    shown = memdlm("memory", "show", kept)
    assert (shown.code, shown.err) == (0, "")
    for text in ("LLaDAModelLM", "16 tokens in 1 chunk, seed 3", "layer 1", "rank 2", "none"):
        assert text in shown.out
    described = json.loads(memdlm("memory", "show", kept, "--json").out)
    row = described["rows"][0]
    assert row["num_tokens"] == 16 and row["norm"] > 0
    assert [layer["layer"] for layer in row["layers"]] == [1]
    assert described["bytes"] > 0


def test_a_memory_is_exported_as_an_adapter_that_answers_the_same(
    memdlm, trained, kept, tmp_path
) -> None:
    base = ("generate", "-n", "4", "--json", "--set", "sampling.stop_at_eos=false", QUESTION)
    expected = json.loads(memdlm(*base, "-m", trained, "--memory", kept).out)["text"]
    for layout in ("peft", "published"):
        target = tmp_path / layout
        result = memdlm("memory", "export", kept, "--output", target, "--layout", layout)
        assert (result.code, result.out) == (0, f"saved {target}\n"), result.err
        options = ("-m", trained / "model", "--adapter", target, "--memory", "off")
        answer = memdlm(*base, *options)
        assert answer.code == 0, answer.err
        assert json.loads(answer.out)["text"] == expected


def test_a_text_may_come_from_a_file_or_standard_input_and_be_long(
    memdlm, trained, kept, tmp_path
) -> None:
    file = tmp_path / "book.txt"
    file.write_text(TEXT + "\n")
    written = memdlm(
        "memory", "write", "-m", trained, "--file", file, "-o", tmp_path / "a", *STRONG, "--seed", 3
    )
    assert written.code == 0, written.err
    assert (tmp_path / "a" / "memory.safetensors").read_bytes() == (
        kept / "memory.safetensors"
    ).read_bytes()
    long = spawn("memory", "write", "-m", trained, "-o", tmp_path / "b", stdin="key " * 150)
    assert (long.code, long.err) == (0, "")
    assert long.out == f"wrote 150 tokens in 3 chunks; saved {tmp_path / 'b'}\n"


def test_delete_removes_a_memory_and_nothing_else(memdlm, trained, tmp_path) -> None:
    folder = tmp_path / "memory"
    assert memdlm("memory", "write", "-m", trained, TEXT, "-o", folder).code == 0
    assert memdlm("memory", "delete", folder).out == f"deleted {folder}\n"
    assert list(tmp_path.iterdir()) == []
    assert "holds no memory" in memdlm("memory", "delete", tmp_path).error_line(1)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["write", ""], 1, "the text is empty"),
        (["write", TEXT, "--file", "x.txt"], 2, "give a prompt or --file, not both"),
        (["write", "--file", "absent.txt"], 1, "cannot read absent.txt"),
        (["write", TEXT, "--set", "memory.chunk_length=65"], 2, "exceeds the model's context of"),
        (["write", TEXT, "--set", "memory.chunk_length=-1"], 2, "memory.chunk_length: -1"),
        (["write", TEXT, "--chat-template", "no"], 2, "--chat-template no"),
        (
            [
                "write",
                TEXT,
                "--set",
                "memory={learning_rate: 1e38, clip_norm: null, num_epochs: 3}",
            ],
            1,
            "met inf or nan, so nothing was kept",
        ),
        (["show", "absent"], 1, "absent holds no memory"),
        (["export", "absent", "-o", "x"], 1, "absent holds no memory"),
        (["delete", "absent"], 1, "absent holds no memory"),
        (["forget"], 2, "No such command 'forget'"),
        ([], 2, "Missing command"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(
    memdlm, trained, tmp_path, monkeypatch, arguments, code, message
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["-m", trained, "-o", "new"] if arguments[:1] == ["write"] else []
    assert message in memdlm("memory", *arguments, *options).error_line(code)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_taken_is_refused_before_anything_is_loaded(
    memdlm, trained, kept, tmp_path
) -> None:
    (tmp_path / "taken").mkdir()
    for arguments in (["write", TEXT, "-m", "./no-model"], ["export", kept]):
        line = memdlm("memory", *arguments, "-o", tmp_path / "taken").error_line(1)
        assert "taken exists: choose another place" in line
    assert list((tmp_path / "taken").iterdir()) == []


def test_a_memory_of_another_model_or_a_damaged_one_is_refused(
    memdlm, trained, kept, tmp_path
) -> None:
    options = ("generate", "-m", trained, "-n", "4", QUESTION)
    rounded = memdlm(*options, "--memory", kept, "--dtype", "bfloat16")
    assert "was written on other base weights" in rounded.error_line(1)
    assert "--memory ./absent: write on, off, or the folder" in memdlm(
        *options, "--memory", "./absent"
    ).error_line(2)
    assert "holds no memory" in memdlm(*options, "--memory", tmp_path).error_line(1)
    (tmp_path / "memory.json").write_bytes((kept / "memory.json").read_bytes()[:100])
    assert "is damaged" in memdlm(*options, "--memory", tmp_path).error_line(1)


def test_a_budget_too_small_for_one_memory_is_one_line(memdlm, trained) -> None:
    options = ("generate", "-m", trained, "-n", "4", QUESTION)
    line = memdlm(*options, "--max-memory-bytes", "100").error_line(2)
    assert "max_memory_bytes: one memory needs" in line
    assert memdlm(*options, "--max-memory-bytes", "1000000").code == 0


@pytest.mark.parametrize("command", ["generate", "memory"])
def test_standard_input_that_is_no_utf8_is_one_line(trained, tmp_path, command) -> None:
    arguments = {
        "generate": ["generate", "-m", trained],
        "memory": ["memory", "write", "-m", trained, "-o", tmp_path / "new"],
    }[command]
    program = "import sys; from memdlm.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        input=b"caf\xe9",
        capture_output=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(SOURCE), "LC_ALL": "C"},
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"standard input is not UTF-8 text (byte 3)" in done.stderr
    assert list(tmp_path.iterdir()) == []
