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
        assert record.keys() == {"prompt", "text", "num_prompt_tokens", "num_new_tokens", "memory"}


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
    lines = together.out.splitlines()
    alone = [memdlm("generate", "--model", trained, *options, p).out.strip() for p in prompts[:4]]
    assert [json.loads(line)["prompt"] for line in lines] == prompts
    assert lines[:4] == alone


def test_a_text_file_and_standard_input_are_one_prompt(memdlm, trained, tmp_path) -> None:
    file = tmp_path / "book.txt"
    file.write_text("ada hid the key .\nwhere is it ?\n")
    options = ("--model", trained, *SHORT, "--json")
    result = memdlm("generate", *options, "--file", file)
    record = json.loads(result.out)
    assert record["prompt"] == "ada hid the key .\nwhere is it ?"
    piped = spawn("generate", *options, stdin=file.read_text())
    assert (piped.code, piped.err) == (0, "")
    assert json.loads(piped.out) == record


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
        (["-n", "0", PROMPT], 2, "sampling.max_new_tokens: 0"),
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


def test_a_full_disk_behind_standard_output_is_one_line(trained) -> None:
    code = (
        "import sys; sys.stdout = open('/dev/full', 'w')\n"
        "from memdlm.cli import main; code = main(); sys.stdout = None; sys.exit(code)"
    )
    result = spawn("generate", "--model", trained, *SHORT, "--json", PROMPT, code=code)
    assert "the disk is full" in result.error_line(1)
