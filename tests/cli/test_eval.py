"""`memdlm eval`: presets and tasks to results that no batch, kill or process count changes."""

import errno
import importlib.util
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from memdlm.backbones.tiny import TinySizes, build_tiny
from memdlm.backbones.tokenizers import load_tokenizer
from memdlm.cli.evaluation_request import EvaluationRequest, resolve
from memdlm.evaluation import records
from memdlm.quickstart.start import CHECKPOINT

from .conftest import SOURCE, spawn

MODEL = ("--model", CHECKPOINT)
TASK = "generated_single_needle@64"
FEW = ("-n", "6", "-q")


def cells(folder: Path) -> dict[str, dict[str, Any]]:
    """Return every result of an evaluation by its place."""
    root = folder / "results"
    return {
        path.relative_to(root).as_posix(): json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(root.rglob("*.json"))
    }


def start(folder: Path, *arguments: object, **environment: str) -> "subprocess.Popen[str]":
    """Start a command in a process of its own whose working directory is `folder`."""
    path = os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", "import sys; from memdlm.cli import main; sys.exit(main())"]
        + [str(argument) for argument in arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **environment},
    )


def finish(process: "subprocess.Popen[str]") -> str:
    """Wait for a process that has to end well; return what it printed."""
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    return out


def num_answers(folder: Path) -> int:
    """Return how many answers the response cache in `folder` holds by now."""
    total = 0
    for path in folder.glob("responses/*.sqlite"):
        try:
            connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
            total += connection.execute("SELECT COUNT(*) FROM answers").fetchone()[0]
            connection.close()
        except sqlite3.OperationalError:  # only just made
            continue
    return total


def test_both_settings_are_scored_on_the_same_samples(memdlm, tmp_path) -> None:
    output = tmp_path / "eval"
    result = memdlm("eval", TASK, *MODEL, "--memory", "both", *FEW, "-o", output)
    assert result.code == 0, result.err
    assert "with prompt memory" in result.out
    found = cells(output)
    assert list(found) == [f"memory_{state}/{TASK}/seed0.json" for state in ("off", "on")]
    off, on = found.values()
    assert {sample["memory"] for sample in off["samples"]} == {"off"}
    assert {sample["memory"] for sample in on["samples"]} == {"written"}
    assert [s["prompt_sha256"] for s in off["samples"]] == [
        s["prompt_sha256"] for s in on["samples"]
    ]
    for cell in found.values():
        scores = [sample["metrics"]["score"] for sample in cell["samples"]]
        assert cell["metrics"]["score"]["value"] == pytest.approx(sum(scores) / 6)
        assert cell["metrics"]["score"]["num_samples"] == 6
        assert cell["settings"]["sampling"]["max_new_tokens"] == 128  # a task's own goes before
        assert cell["provenance"]["versions"]["torch"]


def test_a_start_that_has_learnt_to_look_up_scores_above_chance(memdlm, tmp_path) -> None:
    output = tmp_path / "eval"
    assert memdlm("eval", TASK, *MODEL, "-n", "40", "-q", "-o", output).code == 0
    (cell,) = cells(output).values()
    answers = [sample["response"] for sample in cell["samples"]]
    assert len(set(answers)) > 10  # it answers the question, not always the same


def test_the_same_command_again_answers_nothing_again(memdlm, tmp_path) -> None:
    command = ("eval", TASK, *MODEL, *FEW, "-o", tmp_path / "eval")
    assert memdlm(*command).code == 0
    path = tmp_path / "eval" / "results" / "memory_off" / TASK / "seed0.json"
    before = path.stat().st_mtime_ns
    assert memdlm(*command).code == 0
    assert path.stat().st_mtime_ns == before


@pytest.mark.parametrize("memory", ["on", "off"])
def test_the_batch_size_changes_no_sample(memdlm, tmp_path, memory) -> None:
    tasks = ("generated_multi_value_needle@64", "generated_two_fact_story@64")
    found = []
    for size in (1, 16):
        output = tmp_path / str(size)
        options = ("--memory", memory, "--batch-size", size, "-n", "20", "-q", "-o", output)
        assert memdlm("eval", *tasks, *MODEL, *options).code == 0
        found.append(cells(output))
    for alone, together in zip(*(cell.values() for cell in found), strict=True):
        assert alone["samples"] == together["samples"]
        assert alone["metrics"] == together["metrics"]
        assert alone["settings"] == together["settings"]


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path) -> None:
    command = ("eval", TASK, *MODEL, "--memory", "on", "-n", "60", "--batch-size", "2", "-o", "out")
    for name in ("killed", "undisturbed"):
        (tmp_path / name).mkdir()
    whole = start(tmp_path / "undisturbed", *command)
    killed = start(tmp_path / "killed", *command)
    place = tmp_path / "killed" / "out"
    end = time.monotonic() + 100
    while num_answers(place) < 4:
        assert killed.poll() is None, killed.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    stored = num_answers(place)
    assert 4 <= stored < 60
    assert cells(place) == {}
    printed = finish(start(tmp_path / "killed", *command))
    assert f"{stored} of them answered before" in printed
    finish(whole)
    for path in (tmp_path / "undisturbed" / "out" / "results").rglob("*.json"):
        other = tmp_path / "killed" / path.relative_to(tmp_path / "undisturbed")
        assert path.read_bytes() == other.read_bytes()


def test_two_processes_give_what_one_gives(tmp_path) -> None:
    command = ("eval", TASK, *MODEL, "-n", "12", "--batch-size", "2", "-o", "out")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    alone = start(tmp_path / "one", *command)
    pair = [start(tmp_path / "two", *command, RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    for process in (alone, *pair):
        finish(process)
    (one,) = cells(tmp_path / "one" / "out").values()
    (two,) = cells(tmp_path / "two" / "out").values()
    assert one == two
    files = sorted(path.name for path in (tmp_path / "two" / "out" / "responses").glob("*.sqlite"))
    assert files == ["0-of-2.sqlite", "1-of-2.sqlite"]


def test_a_preset_runs_on_the_tiny_network(memdlm, tmp_path) -> None:
    output = tmp_path / "table1"
    result = memdlm(
        *("eval", "--preset", "paper/table1", "--tiny", *MODEL, "-n", "1", "-q", "-o", output),
        *("--set", "tasks=[generated_common_words@64]"),
    )
    assert result.code == 0, result.err
    assert "not run" in result.out  # nobody named a model for Standard MDLM
    description = json.loads((output / "evaluation.json").read_text())
    assert [arm["model"] is None for arm in description["arms"]] == [True, False, False]
    assert {place.split("/")[0] for place in cells(output)} == {"train_only", "train_inference"}


def test_the_paper_stands_beside_a_preset_by_the_models_backbone(memdlm, tmp_path) -> None:
    figures = {}
    for family in ("llada_moe", "llada2"):
        tokenizer = load_tokenizer(CHECKPOINT)
        model = tmp_path / family
        build_tiny(family, tokenizer).save_pretrained(model)
        tokenizer.save_pretrained(model)
        request = EvaluationRequest(preset="paper/table1", model=str(model))
        figures[family] = resolve(request).description["paper"]["train_only"]["babilong@2k"]
    assert figures == {"llada_moe": 59.4, "llada2": 63.5}


def test_a_dry_run_counts_and_writes_nothing(memdlm, tmp_path) -> None:
    output = tmp_path / "eval"
    result = memdlm("eval", TASK, *MODEL, "-n", "3", "--dry-run", "-o", output)
    assert result.code == 0
    assert "3 requests" in result.err
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generated_single_needel@96", *MODEL), "did you mean generated_single_needle?"),
        (("ruler_vt", *MODEL), "needs a length, as in ruler_vt@4k"),
        (("ruler_vt@8k", *MODEL), "set context_length=8192 to test beyond it"),
        (("--preset", "paper/tabel1", *MODEL), "did you mean paper/table1?"),
        ((TASK,), "name one with --model"),
        ((*MODEL,), "there is no task"),
        ((TASK, *MODEL, "--standard", "x"), "--standard is for a --preset"),
        ((TASK, *MODEL, "--set", "sampling.policy=best"), "sampling.policy"),
        ((TASK, *MODEL, "--set", "samplign.policy=margin"), "did you mean sampling?"),
        ((TASK, *MODEL, "--set", "memory.rnk=2"), "did you mean memory.rank?"),
        (("babilong_qa1@1k", *MODEL, "--set", "sources.babi=/nowhere"), "give the folder of bAbI"),
        (("ruler_vt@1k", *MODEL), "tokenizer"),
        (("--preset", "ablations/scope", "--tiny", "--arm", "x=y"), "has no arm 'x'"),
        (("--preset", "paper/figure3", *MODEL), "name a file with --data"),
        (("--preset", "paper", *MODEL), "name one of paper/table1"),
        (("--preset", "paper/table1", *MODEL, "--memory", "on"), "a preset says which arms"),
        ((TASK, "--model", "/nowhere/at/all"), "no model folder"),
        ((TASK, *MODEL, "--shard", "3/2"), "shard 3 of 2"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(memdlm, tmp_path, arguments, message) -> None:
    output = tmp_path / "eval"
    result = memdlm("eval", *arguments, "-n", "2", "-q", "-o", output)
    is_usage = message not in ("tokenizer", "give the folder of bAbI", "no model folder")
    line = result.error_line(2 if is_usage else 1)
    assert message in line
    assert not output.exists()


def test_the_context_is_what_the_evaluation_says_it_is(memdlm, tmp_path) -> None:
    tokenizer = load_tokenizer(CHECKPOINT)
    model = tmp_path / "short"
    build_tiny("llada", tokenizer, sizes=TinySizes(context_length=48)).save_pretrained(model)
    tokenizer.save_pretrained(model)
    command = ("eval", TASK, "--model", model, "-n", "2", "-q", "-o", tmp_path / "eval")
    assert "the context of 48 tokens" in memdlm(*command).err
    beyond = memdlm(*command, "--overwrite", "--set", "context_length=128")
    assert beyond.code == 0, beyond.err
    (cell,) = cells(tmp_path / "eval").values()
    assert cell["settings"]["context_length"] == 128


def test_results_of_other_settings_are_never_mixed_in(memdlm, tmp_path) -> None:
    command = ("eval", TASK, *MODEL, "-q", "-o", tmp_path / "eval")
    assert memdlm(*command, "-n", "2").code == 0
    assert "never mixed" in memdlm(*command, "-n", "3").error_line(2)
    other = memdlm(*command, "-n", "2", "--set", "sampling.policy=random")
    assert "never mixed" in other.error_line(2)
    assert memdlm(*command, "-n", "3", "--overwrite").code == 0
    assert len(next(iter(cells(tmp_path / "eval").values()))["samples"]) == 3


def test_overwrite_spares_what_is_no_evaluation(memdlm, tmp_path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    result = memdlm("eval", TASK, *MODEL, "-q", "-n", "1", "--overwrite", "-o", tmp_path)
    assert "holds no evaluation" in result.error_line(2)
    assert (tmp_path / "thesis.tex").exists()


def test_a_hub_that_does_not_answer_is_said_before_and_after(tmp_path) -> None:
    # In a process of its own, since the hub's client reads the environment when it is imported.
    output = tmp_path / "eval"
    result = spawn("eval", "babilong_qa1@0k", *MODEL, "-n", "1", "-o", output)
    assert result.code == 1
    first, *_, last = result.err.strip().splitlines()
    assert first.startswith("babilong_qa1@0k needs the network: RMT-team/babilong-1k-samples")
    assert "sources.babi" in last
    assert "Traceback" not in result.err
    assert not output.exists()


def test_the_extra_is_named_where_it_is_missing(memdlm, tmp_path, monkeypatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "lm_eval" else real(name)
    )
    result = memdlm("eval", TASK, *MODEL, "-q", "-o", tmp_path / "eval")
    assert "pip install 'memdlm[eval]'" in result.error_line(2)


def test_a_full_disk_loses_no_answer(memdlm, tmp_path, monkeypatch) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    command = ("eval", TASK, *MODEL, "-n", "4", "-o", tmp_path / "eval")
    with monkeypatch.context() as patch:
        real = records.write_text
        patch.setattr(
            records, "write_text", lambda p, t: (full if "seed0" in p.name else real)(p, t)
        )
        result = memdlm(*command)
    assert result.code == 1
    assert "the disk is full" in result.err.splitlines()[-1]
    again = memdlm(*command)
    assert again.code == 0
    assert "to compute" not in again.err  # every answer was stored
    assert len(cells(tmp_path / "eval")) == 1


def test_figure_3_is_a_preset_like_the_others(memdlm, tmp_path) -> None:
    command = ("eval", "--preset", "paper/figure3", "--tiny", *MODEL, "--standard", CHECKPOINT)
    result = memdlm(*command, "-n", "4", "-q", "-o", tmp_path / "bias")
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "bias" / "exposure_bias.json").read_text())
    assert [arm["name"] for arm in found["arms"]] == ["standard", "train_only", "train_inference"]


def test_the_list_names_tasks_and_presets(memdlm) -> None:
    out = memdlm("eval", "--list").out
    for name in ("ruler_vt@N", "babilong", "longbench_trec", "paper/table1", "ablations/scope"):
        assert name in out
