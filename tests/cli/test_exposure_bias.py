"""`memdlm exposure-bias`: arms on the same samples, kept results, and what cannot be measured."""

import json
import shutil
from pathlib import Path

import pytest

from memdlm.cli.run_folder import RunFolder

from .conftest import write_recipe, write_rows

# Words that the tiny network's tokenizer knows.
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"{name} hid the key . where is it ?"},
            {"role": "assistant", "content": f"in box {i}"},
        ]
    }
    for i, name in enumerate(("ada", "bo", "cy"))
]


@pytest.fixture
def measure(memdlm, trained, rows_file, tmp_path):
    """Run the command on the tiny network and rows."""

    def run(*arguments: object, arm: object = None, data: object = rows_file):
        place = arm or f"tiny={trained}"
        source = () if data is None else ("--data", data)
        output = ("--output", tmp_path / "out")
        return memdlm("exposure-bias", "--arm", place, *source, *output, *arguments)

    return run


def read(folder: Path) -> dict:
    return json.loads((folder / "exposure_bias.json").read_text())


def test_one_command_gives_curves_intervals_pairs_and_a_page(measure, trained, tmp_path) -> None:
    result = measure("--memory", "both", "--set", "memory.learning_rate=0.5")
    assert result.code == 0, result.err
    assert "tiny with memory" in result.out
    assert "difference" in result.out
    found = read(tmp_path / "out")
    assert found["format"] == 1
    assert (found["num_samples"], found["num_slots"], found["num_steps"]) == (8, 4, 48)
    assert found["command"].startswith("memdlm ")
    assert found["commit"]
    assert "torch" in found["versions"]
    off, on = found["arms"]
    assert (off["name"], off["memory"], on["name"], on["memory"]) == (
        "tiny",
        False,
        "tiny_memory",
        True,
    )
    assert on["model"] == str(RunFolder(trained).result())
    assert on["settings"]["memory"]["learning_rate"] == 0.5
    assert on["settings"]["memory"]["rank"] == 2  # as the run was trained
    for arm in (off, on):
        assert arm["mask_ratio"] == [1.0, 0.75, 0.5, 0.25]
        assert arm["num_tokens"] == [32, 24, 16, 8]
        ratios = [x / y for x, y in zip(arm["sequential_nll"], arm["static_nll"], strict=True)]
        assert arm["ratio"] == pytest.approx(ratios)
        assert arm["ratio"][0] == 1.0
        for low, ratio, high in zip(arm["ratio_low"], arm["ratio"], arm["ratio_high"], strict=True):
            assert low <= ratio * (1 + 1e-9) and ratio <= high * (1 + 1e-9)
    (pair,) = found["pairs"]
    change = on["overall"]["value"] - off["overall"]["value"]
    assert (pair["first"], pair["second"]) == ("tiny", "tiny_memory")
    assert pair["difference"] == pytest.approx(change)
    assert pair["low"] <= change <= pair["high"]
    page = (tmp_path / "out" / "exposure_bias.html").read_text()
    assert page.count("data:image/png") == 2
    assert (tmp_path / "out" / "exposure_bias_ratio.png").read_bytes()[:4] == b"\x89PNG"


def test_results_are_kept_and_never_mixed(measure, tmp_path) -> None:
    assert measure("--quiet").code == 0
    first = (tmp_path / "out" / "exposure_bias" / "tiny.json").read_bytes()
    before = read(tmp_path / "out")
    again = measure()
    assert again.code == 0
    assert "tiny: measured before" in again.err
    assert read(tmp_path / "out") | {"command": ""} == before | {"command": ""}
    before = read(tmp_path / "out")

    line = measure("--seed", "1", "--quiet").error_line(2)
    assert "was measured with other settings (seed: 0 -> 1)" in line
    assert "--overwrite" in line
    assert (tmp_path / "out" / "exposure_bias" / "tiny.json").read_bytes() == first
    assert read(tmp_path / "out") == before

    assert measure("--seed", "1", "--overwrite").code == 0
    assert read(tmp_path / "out")["seed"] == 1
    assert measure("--overwrite", "--quiet").code == 0
    assert (tmp_path / "out" / "exposure_bias" / "tiny.json").read_bytes() == first

    result = measure("--memory", "both")  # adds an arm
    assert result.code == 0
    line = measure().error_line(2)
    assert "has results of tiny_memory, which this command would drop" in line


def test_conversations_and_generated_tasks_are_as_good_as_rows(measure, tmp_path) -> None:
    rows = write_rows(tmp_path / "chats.jsonl", CHATS)
    assert measure("-n", "2", "--response-length", "3", data=rows).code == 0
    assert read(tmp_path / "out")["num_samples"] == 2
    assert read(tmp_path / "out")["num_slots"] == 3
    # The tiny network knows none of the words of generated tasks.
    line = measure(data=None).error_line(2)
    assert "there is nothing to measure on" in line
    line = measure("--tasks", "generated_single_needle@32", data=None).error_line(1)
    assert "generated_single_needle@32 0: the tokenizer does not know" in line


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--steps", "1"], 2, "num_steps: 1 is out of range"),
        (["--batch-size", "0"], 2, "batch_size: 0"),
        (["--num-samples", "0"], 2, "--num-samples 0"),
        (["--response-length", "1"], 2, "response_length: 1"),
        (["--seed", "-1"], 2, "seed: -1"),
        (["--memory", "maybe"], 2, "--memory maybe: write on, off or both"),
        (["--chat-template", "no"], 2, "chat_template: 'no'"),
        (["--tasks", "generated@96"], 2, "give --data or --tasks, not both"),
        (["--set", "sampling.seed=1"], 2, "unknown key sampling"),
        (["--set", "memory.rnak=1"], 2, "did you mean memory.rank?"),
        (["--set", "memory=3"], 2, "memory is 3"),
        (["--arm", "other"], 2, "write --arm NAME=MODEL"),
        (["--arm", "tiny=elsewhere"], 2, "--arm tiny is given twice"),
        (["--arm", "a/b=elsewhere"], 2, "the name is that of a file"),
        (["--arm", "other=./absent"], 1, "./absent"),
        (["--dtype", "int3"], 2, "dtype: 'int3'"),
        (["--output", "/proc/nowhere"], 1, "cannot write to /proc/nowhere"),
    ],
)
def test_what_cannot_be_measured_is_one_line(measure, tmp_path, arguments, code, message) -> None:
    assert message in measure(*arguments, "--quiet").error_line(code)
    assert not (tmp_path / "out" / "exposure_bias.json").exists()


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("generated_single_neddle@96", "did you mean generated_single_needle?"),
        ("generated", "needs a length in words, as in generated@96"),
        ("generated@many", "'many' is no length"),
    ],
)
def test_unknown_tasks_name_their_neighbours(measure, tasks, message) -> None:
    assert message in measure("--tasks", tasks, "--quiet", data=None).error_line(2)


def test_bad_rows_are_named(measure, tmp_path) -> None:
    absent = tmp_path / "absent.jsonl"
    assert "absent.jsonl does not exist" in measure("--quiet", data=absent).error_line(1)
    rows = write_rows(tmp_path / "rows.jsonl", [])
    assert "holds no rows" in measure("--quiet", data=rows).error_line(1)
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "where is it ?", "completion": " "}])
    assert f"{rows}:1 has an empty response" in measure("--quiet", data=rows).error_line(1)
    long = {"prompt": "key " * 62, "completion": "box"}
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "key", "completion": "box 1 2"}, long])
    line = measure("--quiet", data=rows).error_line(1)
    # The slots of the longest response count for every sample.
    assert f"{rows}:2: the prompt of 62 tokens and 4 new ones exceeds" in line


def test_arms_of_other_tokenizers_are_refused(measure, trained, tmp_path, rows_file) -> None:
    model = Path(shutil.copytree(RunFolder(trained).result(), tmp_path / "model"))
    vocabulary = json.loads((model / "tokenizer.json").read_text())
    words = vocabulary["model"]["vocab"]
    words["ada"], words["bo"] = words["bo"], words["ada"]
    (model / "tokenizer.json").write_text(json.dumps(vocabulary))
    line = measure("--arm", f"other={model}", "--quiet").error_line(2)
    assert "arms tiny and other have different tokenizers" in line


def test_a_damaged_cell_is_named(measure, tmp_path) -> None:
    assert measure("--quiet").code == 0
    cell = tmp_path / "out" / "exposure_bias" / "tiny.json"
    cell.write_text(cell.read_text()[:100])
    assert f"cannot read {cell}" in measure("--quiet").error_line(1)
    assert measure("--quiet", "--overwrite").code == 0


def test_a_run_with_an_adapter_is_its_base_with_the_adapter_on_it(
    measure, memdlm, tmp_path, rows_file
) -> None:
    recipe = write_recipe(
        tmp_path, rows_file, tmp_path / "run", adapter={"kind": "lora", "rank": 2}
    )
    assert memdlm("train", recipe, "-q").code == 0
    run = tmp_path / "run"
    apart = f"apart={run / 'base'},{run / 'adapter'}"
    result = measure("--arm", apart, "--memory", "on", arm=f"run={run}")
    assert result.code == 0, result.err
    first, second = read(tmp_path / "out")["arms"]
    assert first["settings"]["adapter_fingerprint"] is not None
    assert first["settings"] == second["settings"]
    assert first["ratio"] == second["ratio"]
