"""`memdlm generate`: prompts from everywhere, memory on and off, and what cannot be answered."""

import json
import shutil
from pathlib import Path

import pytest

from .conftest import PEOPLE, spawn, write_recipe, write_rows

PROMPT = "ada hid the key in box 3 . where is it ?"
SHORT = ("-n", "4")


def test_memory_follows_the_run_unless_told_otherwise(memdlm, trained) -> None:
    for options, state in (
        ((), "written"),
        (("--memory", "on"), "written"),
        (("--memory", "off"), "off"),
    ):
        result = memdlm("generate", "--model", trained, *SHORT, *options, "--json", PROMPT)
        assert result.code == 0, result.err
        record = json.loads(result.out)
        assert record["memory"] == state
        assert record["prompt"] == PROMPT
        assert record["num_prompt_tokens"] == 12
        fields = {"prompt", "text", "num_prompt_tokens", "num_new_tokens", "memory"}
        assert record.keys() == {*fields, "tokens_per_step", "batch"}
        assert sum(record["tokens_per_step"]) <= 4
        assert (record["batch"]["memory_seconds"] > 1e-4) == (state == "written")


def test_a_baseline_run_answers_without_memory(memdlm, tmp_path, rows_file) -> None:
    recipe = write_recipe(tmp_path, rows_file, tmp_path / "run", memory={"enabled": False})
    assert memdlm("train", recipe, "-q").code == 0
    answer = memdlm("generate", "--model", tmp_path / "run", *SHORT, "--json", PROMPT)
    assert json.loads(answer.out)["memory"] == "off"


def test_a_model_folder_and_an_adapter_are_as_good_as_a_run(memdlm, tmp_path, rows_file) -> None:
    recipe = write_recipe(
        tmp_path, rows_file, tmp_path / "run", adapter={"kind": "lora", "rank": 2}
    )
    assert memdlm("train", recipe, "-q").code == 0
    run, options = (
        tmp_path / "run",
        (*SHORT, "--memory", "off", "--set", "sampling.stop_at_eos=false"),
    )
    expected = memdlm("generate", "--model", run, *options, PROMPT).out
    assert expected
    assert memdlm("generate", "--model", run / "adapter", *options, PROMPT).out == expected
    both = ("--model", run / "base", "--adapter", run / "adapter")
    assert memdlm("generate", *both, *options, PROMPT).out == expected


@pytest.mark.parametrize("memory", ["on", "off"])
def test_many_prompts_answer_as_each_alone(memdlm, trained, tmp_path, memory) -> None:
    prompts = [f"{name} hid the key in box {i} {'.' * i} where ?" for i, name in enumerate(PEOPLE)]
    file = write_rows(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    options = (*SHORT, "--memory", memory, "--json", "--set", "memory.learning_rate=5")
    together = memdlm("generate", "--model", trained, *options, "--batch-size", 3, "--file", file)
    records = [json.loads(line) for line in together.out.splitlines()]
    alone = [
        json.loads(memdlm("generate", "--model", trained, *options, p).out) for p in prompts[:4]
    ]
    assert [record["prompt"] for record in records] == prompts
    assert [record.pop("batch")["num_prompts"] for record in records] == [3, 3, 3, 3, 3, 3, 2, 2]
    assert [record.pop("batch")["num_prompts"] for record in alone] == [1] * 4
    for record in records + alone:
        # At this rate the end of the text has probability 1 in every slot: their turn is a tie.
        del record["tokens_per_step"]
    assert records[:4] == alone


def test_a_text_file_and_standard_input_are_one_prompt(memdlm, trained, tmp_path) -> None:
    file = tmp_path / "book.txt"
    file.write_text("ada hid the key .\nwhere is it ?\n")
    options = ("--model", trained, *SHORT, "--json")
    result = memdlm("generate", *options, "--file", file)
    record = json.loads(result.out)
    assert record["prompt"] == "ada hid the key .\nwhere is it ?"
    piped = spawn("generate", *options, stdin=file.read_text())
    assert (piped.code, piped.err) == (0, "")
    again = json.loads(piped.out)
    for answer in (record, again):
        del answer["batch"]
    assert again == record


def test_what_a_batch_took_is_counted(memdlm, trained) -> None:
    options = (*SHORT, "--set", "sampling.stop_at_eos=false", "--json", "--memory", "off")
    two = ("--set", "sampling.num_unmasking_steps=2")
    record = json.loads(memdlm("generate", "--model", trained, *options, *two, PROMPT).out)
    assert record["tokens_per_step"] == [2, 2]
    batch = record["batch"]
    assert (batch["num_prompts"], batch["num_new_tokens"], batch["num_forwards"]) == (1, 4, 2)
    assert batch["tokens_per_second"] == pytest.approx(4 / batch["decode_seconds"], rel=0.01)


def test_a_stream_prints_what_would_be_printed_at_the_end(memdlm, trained, tmp_path) -> None:
    file = write_rows(tmp_path / "p.jsonl", [{"prompt": PROMPT}, {"prompt": "bo hid the key"}])
    options = ("generate", "--model", trained, *SHORT, "--memory", "off", "--file", file)
    plain = memdlm(*options, "--set", "sampling.suppress_tokens=[0, 1, 2, 3]")
    streamed = memdlm(*options, "--set", "sampling.suppress_tokens=[0, 1, 2, 3]", "--stream")
    assert len(plain.out.split()) == 8
    assert (streamed.code, streamed.out) == (0, plain.out)


def test_an_answer_ends_before_a_stop_string(memdlm, trained, tmp_path) -> None:
    file = write_rows(tmp_path / "p.jsonl", [{"prompt": PROMPT}, {"prompt": "bo hid the key"}])
    options = ("generate", "--model", trained, *SHORT, "--memory", "off", "--file", file)
    options += (
        "--set",
        "sampling.suppress_tokens=[0, 1, 2, 3]",
        "--set",
        "sampling.block_length=1",
    )
    plain = memdlm(*options).out.splitlines()
    stop = " " + plain[0].split()[1]
    expected = [answer.partition(stop)[0] for answer in plain]
    for output in ((), ("--stream",)):
        stopped = memdlm(*options, "--stop", stop, "--stop", "no such text", *output)
        assert (stopped.code, stopped.out.splitlines()) == (0, expected)
    first, *_ = memdlm(*options, "--stop", stop, "--json").out.splitlines()
    assert json.loads(first)["text"] == expected[0]
    assert json.loads(first)["num_new_tokens"] == 2


def test_settings_come_from_the_run_then_set_then_options(memdlm, trained) -> None:
    base = ("generate", "--model", trained, PROMPT, "--json", "--set", "sampling.stop_at_eos=false")
    longer = memdlm(*base, "--set", "sampling.max_new_tokens=6")
    assert json.loads(longer.out)["num_new_tokens"] == 6
    assert json.loads(memdlm(*base, *SHORT).out)["num_new_tokens"] == 4


def test_a_memory_that_was_dropped_is_said_so(memdlm, trained) -> None:
    wild = ("--set", "memory={learning_rate: 1e38, clip_norm: null, num_epochs: 3, rank: 2}")
    result = memdlm("generate", "--model", trained, *SHORT, *wild, "--json", PROMPT)
    assert result.code == 0
    assert json.loads(result.out)["memory"] == "dropped"
    assert "its answer uses no memory" in result.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([PROMPT], 1, "prompt of 12 tokens and 128 new ones exceeds the model's context of 64"),
        ([*SHORT, "key " * 70], 1, "prompt of 70 tokens and 4 new ones exceeds"),
        ([*SHORT, ""], 1, "prompt 1 is empty"),
        ([*SHORT, "key " * 70], 1, "or write a memory of the text, chunk by chunk"),
        (["-n", "0", PROMPT], 2, "sampling.max_new_tokens: 0"),
        (["-n", "-4", PROMPT], 2, "sampling.max_new_tokens: -4"),
        (["-n", "9" * 12, PROMPT], 2, "use an integer from 1 to 1000000"),
        ([*SHORT, "--set", "sampling.top_k=-1", PROMPT], 2, "sampling.top_k: -1"),
        ([*SHORT, "--set", "sampling.temperature=.nan", PROMPT], 2, "sampling.temperature: nan"),
        ([*SHORT, "--set", "sampling.temperature=1e9", PROMPT], 2, "at most 1000"),
        ([*SHORT, "--set", "sampling.block_length=3", PROMPT], 2, "3 does not divide"),
        ([*SHORT, "--set", "sampling.cache=exact", PROMPT], 2, "sampling.cache: 'exact'"),
        ([*SHORT, "--memory", "./absent", PROMPT], 2, "--memory ./absent: write on, off, or"),
        ([*SHORT, "--memory", "/usr", PROMPT], 1, "/usr"),
        ([*SHORT, "--trace", "/usr", PROMPT], 2, "--trace /usr is a folder"),
        ([*SHORT, "--trace", "/usr/absent/x.html", PROMPT], 1, "there is no folder /usr/absent"),
        ([*SHORT, "--overwrite", PROMPT], 2, "--overwrite is for --trace"),
        ([*SHORT, "--stream", "--json", PROMPT], 2, "leave out --json"),
        ([*SHORT, "--stop", "", PROMPT], 2, "--stop: the text is empty"),
        (
            [*SHORT, "--stop", "key", "--set", "sampling.infill=true", PROMPT],
            2,
            "stop_strings end answers, but sampling.infill fills gaps",
        ),
        ([*SHORT, "--batch-size", "0", PROMPT], 2, "batch_size: 0"),
        ([*SHORT, "--dtype", "int3", PROMPT], 2, "dtype: 'int3'"),
        ([*SHORT, "--chat-template", "no", PROMPT], 2, "--chat-template no"),
        ([*SHORT, "--set", "memory.rnak=1", PROMPT], 2, "did you mean memory.rank?"),
        ([*SHORT, "--set", "memory.rank=0", PROMPT], 2, "memory.rank: 0 is out of range"),
        (
            [*SHORT, "--set", "memory={scope: modules, modules: [no_such]}", PROMPT],
            2,
            "selects no module",
        ),
        ([*SHORT, "--adapter", "./absent", PROMPT], 1, "no model folder at ./absent"),
        ([*SHORT, "--file", "absent.txt"], 1, "cannot read absent.txt"),
        ([*SHORT, "--file", "absent.jsonl"], 1, "absent.jsonl does not exist"),
    ],
)
def test_what_cannot_be_answered_is_one_line(memdlm, trained, arguments, code, message) -> None:
    assert message in memdlm("generate", "--model", trained, *arguments).error_line(code)


def test_a_row_without_prompt_and_a_malformed_line_are_named(memdlm, trained, tmp_path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"prompt": PROMPT}, {"text": "x"}])
    options = ("generate", "--model", trained, *SHORT, "--file", file)
    assert f"{file}:2 has no `prompt`" in memdlm(*options).error_line(1)
    file.write_text('{"prompt": \n')
    assert f"{file}:1 is not valid JSON" in memdlm(*options).error_line(1)


def test_an_unfinished_run_and_a_missing_model_are_named(memdlm, trained, tmp_path) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    shutil.rmtree(run / "model")
    line = memdlm("generate", "--model", run, PROMPT).error_line(1)
    assert "has no final model yet: finish it with" in line
    assert "./absent" in memdlm("generate", "--model", "./absent", PROMPT).error_line(1)


def test_bytes_that_are_no_text_are_one_line(trained) -> None:
    code = (
        "import io, sys; sys.stdin = io.TextIOWrapper(io.BytesIO(b'key \\xff\\xfe'))\n"
        "from memdlm.cli import main; sys.exit(main())"
    )
    result = spawn("generate", "--model", trained, *SHORT, code=code)
    assert "standard input is not UTF-8 text (byte 4)" in result.error_line(1)


def test_a_damaged_memory_and_that_of_another_base_are_one_line(
    memdlm, trained, tmp_path, rows_file
) -> None:
    kept = tmp_path / "kept"
    assert memdlm("memory", "write", "-m", trained, "-o", kept, PROMPT).code == 0
    generate = ("generate", *SHORT, "--memory", kept, PROMPT, "--model")
    assert memdlm(*generate, trained).code == 0
    other = write_recipe(tmp_path, rows_file, tmp_path / "run", training={"max_steps": 2})
    assert memdlm("train", other, "-q").code == 0
    assert "on other base weights" in memdlm(*generate, tmp_path / "run").error_line(1)
    weights = next(kept.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-20])
    assert str(kept) in memdlm(*generate, trained).error_line(1)


def test_a_full_disk_behind_standard_output_is_one_line(trained) -> None:
    code = (
        "import sys; sys.stdout = open('/dev/full', 'w')\n"
        "from memdlm.cli import main; code = main(); sys.stdout = None; sys.exit(code)"
    )
    result = spawn("generate", "--model", trained, *SHORT, "--json", PROMPT, code=code)
    assert "the disk is full" in result.error_line(1)
