"""`memdlm probe`: questions with their evidence cut, kept results, and what cannot be asked."""

import json
from pathlib import Path

import pytest

from .conftest import PEOPLE, write_rows

QUESTION = "where is it ?"
ROWS = [
    {
        "prompt": f"{name} hid the key in box {i} . {QUESTION}",
        "completion": f"in box {i}",
        "evidence": f"{name} hid the key in box {i} .",
        "question": QUESTION,
        "answers": [f"box {i}"],
    }
    for i, name in enumerate(PEOPLE)
]


@pytest.fixture
def ask(memdlm, trained, tmp_path):
    """Run the command on the tiny network."""

    def run(*arguments: object, rows: list[dict] | None = None, data: object = None):
        file = data or write_rows(tmp_path / "rows.jsonl", ROWS if rows is None else rows)
        places = ("--arm", f"tiny={trained}", "--data", file, "--output", tmp_path / "out")
        return memdlm("probe", *places, *arguments)

    return run


def read(folder: Path) -> dict:
    return json.loads((folder / "probe.json").read_text())


def test_one_command_gives_conditions_differences_and_a_page(ask, tmp_path) -> None:
    result = ask("--set", "memory.learning_rate=1.0", "--set", "memory.prompt_mask_ratio=0.5")
    assert result.code == 0, result.err
    assert "all blocked" in result.out
    found = read(tmp_path / "out")
    assert (found["format"], found["num_samples"], found["seed"]) == (1, 8, 0)
    assert found["conditions"] == ["normal", "answer_blocked", "all_blocked", "question_only"]
    assert found["command"].startswith("memdlm ")
    (arm,) = found["arms"]
    assert arm["settings"]["memory"]["learning_rate"] == 1.0
    assert arm["settings"]["memory"]["rank"] == 2  # as the run was trained
    assert list(arm["settings"]["sampling"]["max_new_tokens"].values()) == [4]
    assert len(arm["cells"]) == 4 * 2 * 3
    for cell in arm["cells"]:
        assert cell["low"] <= cell["value"] * (1 + 1e-9) and cell["value"] <= cell["high"] + 1e-9
    nll = {(c["condition"], c["memory"]): c["value"] for c in arm["cells"] if c["metric"] == "nll"}
    assert len(set(nll.values())) == 8  # a network that has learnt next to nothing sees little
    for effect in arm["memory_effects"]:
        if effect["metric"] == "nll":
            key = effect["condition"]
            assert effect["difference"] == pytest.approx(nll[key, "prompt"] - nll[key, "none"])
    assert {r["condition"] for r in arm["recovered"]} == set(found["conditions"]) - {"normal"}

    samples = json.loads((tmp_path / "out" / "probe" / "tiny.json").read_text())["measured"]
    assert len(samples["samples"]) == 8
    first = samples["samples"][0]
    assert first["target"] == "in box 0"
    assert first["where"].endswith("rows.jsonl:1")
    assert first["answers"]["normal"]["none"]["memory"] == "off"
    assert first["answers"]["question_only"]["prompt"]["memory"] == "kept"
    page = (tmp_path / "out" / "probe.html").read_text()
    assert page.count("data:image/png") == 1
    assert (tmp_path / "out" / "probe_recall.png").is_file()


def test_results_are_kept_and_never_mixed(ask, tmp_path) -> None:
    assert ask("--batch-size", "1", "--quiet").code == 0
    cell = tmp_path / "out" / "probe" / "tiny.json"
    first, before = cell.read_bytes(), read(tmp_path / "out")
    again = ask("--batch-size", "16")
    assert "tiny: measured before" in again.err
    assert read(tmp_path / "out") | {"command": ""} == before | {"command": ""}
    before = read(tmp_path / "out")

    # Another needle in the same text is another question.
    others = [{**row, "evidence": "the key"} for row in ROWS]
    for arguments, rows in ((("--seed", "1"), ROWS), ((), others)):
        line = ask("--quiet", *arguments, rows=rows).error_line(2)
        assert "was measured with other settings" in line
    assert (cell.read_bytes(), read(tmp_path / "out")) == (first, before)
    assert ask("--seed", "1", "--overwrite", "--quiet").code == 0
    assert read(tmp_path / "out")["seed"] == 1


def test_some_conditions_only(ask, tmp_path) -> None:
    rows = [{k: v for k, v in row.items() if k not in ("question", "answers")} for row in ROWS]
    result = ask("--condition", "normal", "--condition", "all_blocked", "-n", "3", rows=rows)
    assert result.code == 0, result.err
    found = read(tmp_path / "out")
    assert found["conditions"] == ["normal", "all_blocked"]
    assert found["num_samples"] == 3
    assert "question only" not in result.out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--condition", "blind"], 2, "conditions: 'blind' is not one of normal"),
        (["--condition", "normal", "--condition", "normal"], 2, "name each once"),
        (["--batch-size", "0"], 2, "batch_size: 0"),
        (["--max-new-tokens", "0"], 2, "max_new_tokens: 0"),
        (["--max-new-tokens", "60"], 1, "rows.jsonl:1: the prompt of 12 tokens and 60 new ones"),
        (["--seed", "-1"], 2, "seed: -1"),
        (["--num-samples", "0"], 2, "--num-samples 0"),
        (["--tasks", "generated@96"], 2, "give --data or --tasks, not both"),
        (["--set", "data.seed=1"], 2, "unknown key data"),
        (["--set", "sampling.decoder=block"], 2, "sampling.decoder: block needs a model"),
        (["--arm", "tiny=other"], 2, "--arm tiny is given twice"),
        (["--arm", "other=./absent"], 1, "./absent"),
    ],
)
def test_what_cannot_be_asked_is_one_line(ask, tmp_path, arguments, code, message) -> None:
    assert message in ask(*arguments, "--quiet").error_line(code)
    assert not (tmp_path / "out" / "probe.json").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": QUESTION, "completion": "box"}, "has no `evidence`"),
        ({**ROWS[0], "question": None}, "has no `question`"),
        ({**ROWS[0], "evidence": "the treasure"}, "does not contain 'the treasure'"),
        ({**ROWS[0], "evidence": []}, "has no `evidence`"),
        ({**ROWS[0], "answers": "Paris", "completion": "Paris"}, "does not know 1 word(s)"),
    ],
)
def test_bad_rows_are_named(ask, row, message) -> None:
    line = ask("--quiet", rows=[ROWS[1], row]).error_line(1)
    assert "rows.jsonl:2" in line and message in line


def test_missing_data_is_named(ask, memdlm, trained, tmp_path) -> None:
    assert "absent.jsonl does not exist" in ask(data=tmp_path / "absent.jsonl").error_line(1)
    line = memdlm("probe", "--arm", f"tiny={trained}", "-o", tmp_path / "out").error_line(2)
    assert "there is nothing to measure on" in line
    assert "Missing option '--arm'" in memdlm("probe", "--tasks", "generated@96").err
