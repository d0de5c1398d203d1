"""`memdlm train`: real runs of a few steps, exact resume, and every way in which they may fail."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from memdlm.backbones.loading import load_model
from memdlm.cli.settings import read_yaml
from memdlm.training.trainer import MemDLMTrainer

from .conftest import spawn, write_recipe, write_rows


def entries(folder: Path) -> list[str]:
    """Everything in a folder, hidden things included."""
    return sorted(path.name for path in folder.iterdir())


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The final weights of a run."""
    return load_file(next(run.glob("*/*model.safetensors")))


def losses(run: Path) -> list[tuple[int, float]]:
    """Step and training loss of every log."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def test_a_run_leaves_a_whole_folder(trained) -> None:
    assert entries(trained) == [
        "checkpoints",
        "data.json",
        "metrics.jsonl",
        "model",
        "recipe.yaml",
        "versions.json",
    ]
    assert entries(trained / "model") == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert json.loads((trained / "versions.json").read_text())["torch"] == torch.__version__
    assert [step for step, _ in losses(trained)] == [1, 2, 3, 4]
    assert read_yaml(trained / "recipe.yaml")["memory"]["rank"] == 2
    assert not load_model(trained / "model").training


def test_memory_and_baseline_are_one_recipe(memdlm, recipe, tmp_path, trained) -> None:
    result = memdlm(
        "train", recipe, "--set", "memory.enabled=false", "--set", f"output_dir={tmp_path}/off"
    )
    assert result.code == 0, result.err
    assert "inner_loss_1" not in (tmp_path / "off" / "metrics.jsonl").read_text()
    assert "inner_loss_1" in (trained / "metrics.jsonl").read_text()
    off, on = weights(tmp_path / "off"), weights(trained)
    assert any(not torch.equal(off[name], on[name]) for name in on)


def test_on_a_pipe_progress_is_plain_lines(memdlm, recipe) -> None:
    result = memdlm("train", recipe)
    assert "\x1b" not in result.err + result.out
    lines = result.err.splitlines()
    assert lines[0].startswith("train data ")
    assert [line.split("  ")[0] for line in lines if "tokens/s" in line] == [
        f"step {step}/4" for step in range(1, 5)
    ]
    assert sum("eval loss (no memory)" in line for line in lines) == 1
    assert len(lines) == 7
    assert result.out.splitlines()[1].startswith("4 steps; saved ")


def test_another_process_gets_the_same_numbers_and_prints_nothing_else(
    recipe, tmp_path, trained
) -> None:
    again = spawn("train", recipe, "--quiet")
    assert (again.code, again.err) == (0, "")
    assert again.out.splitlines()[0].startswith("eval loss (no memory): ")
    assert losses(tmp_path / "run") == losses(trained)
    before, after = weights(trained), weights(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_resume_equals_the_uninterrupted_run(
    memdlm, monkeypatch, tmp_path, rows_file, adapter
) -> None:
    settings = {"adapter": {"kind": adapter, "rank": 2}}
    whole = write_recipe(tmp_path, rows_file, tmp_path / "whole", **settings)
    assert memdlm("train", whole, "-q").code == 0
    cut = write_recipe(tmp_path, rows_file, tmp_path / "cut", **settings)
    with monkeypatch.context() as patch:
        step = MemDLMTrainer.training_step

        def stop_at_four(self, *args: object, **kwargs: object) -> torch.Tensor:
            if self.state.global_step == 3:
                raise KeyboardInterrupt
            return step(self, *args, **kwargs)

        patch.setattr(MemDLMTrainer, "training_step", stop_at_four)
        assert memdlm("train", cut, "-q").code == 130
    assert "model" not in entries(tmp_path / "cut")
    resumed = memdlm("train", cut, "--resume", "-q")
    assert resumed.code == 0, resumed.err
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    before, after = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "already finished" in memdlm("train", cut, "--resume").out


def test_a_lora_run_can_be_moved_and_holds_no_memory(memdlm, tmp_path, rows_file) -> None:
    recipe = write_recipe(
        tmp_path, rows_file, tmp_path / "run", adapter={"kind": "lora", "rank": 2}
    )
    assert memdlm("train", recipe, "-q").code == 0
    run = tmp_path / "run"
    assert {"adapter", "base"} <= set(entries(run))
    assert all("lora_" in name for name in weights(run))
    trained = load_model(run / "adapter").state_dict()
    moved = Path(shutil.move(run, tmp_path / "elsewhere"))
    again = load_model(moved / "adapter").state_dict()
    assert all(torch.equal(trained[name], again[name]) for name in trained)
    assert any(again[name].any() for name in again if "lora_B" in name)


def test_a_saved_model_can_be_trained_further(memdlm, tmp_path, rows_file, trained) -> None:
    recipe = write_recipe(tmp_path, rows_file, tmp_path / "run", tiny=None)
    result = memdlm("train", recipe, "-q", "--set", f"model={trained / 'model'}")
    assert result.code == 0, result.err
    assert not torch.equal(
        weights(tmp_path / "run")["model.transformer.wte.weight"],
        weights(trained)["model.transformer.wte.weight"],
    )


def test_generated_tasks_are_a_source(memdlm, tmp_path, rows_file) -> None:
    tasks = {"tasks": ["single_needle"], "length": 40, "num_examples": 8}
    recipe = write_recipe(
        tmp_path, rows_file, tmp_path / "run", data={"train": None, "tasks": tasks}
    )
    result = memdlm("train", recipe)
    assert result.code == 0, result.err
    assert "train data generated tasks: 8 rows read, 8 kept" in result.err
    assert "eval data generated tasks: 2 rows read, 2 kept" in result.err


# Everything below fails: one line, the right exit code, and nothing left behind.

GOOD = {"prompt": "where is the key ?", "completion": "in the box"}


def bad_rows(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps(GOOD) + "\n{oops\n", "bad.jsonl:2 is not valid JSON"),
        (json.dumps({**GOOD, "completion": " "}) + "\n", "bad.jsonl:1 has an empty response"),
        (json.dumps({"question": "x"}) + "\n", "bad.jsonl:1"),
        ("", "bad.jsonl holds no rows"),
        (json.dumps({**GOOD, "prompt": "long " * 80}) + "\n", "no train row is left"),
    ],
)
def test_bad_rows_are_named_and_leave_nothing(memdlm, tmp_path, text, message) -> None:
    rows = bad_rows(tmp_path / "bad.jsonl", text)
    recipe = write_recipe(tmp_path, rows, tmp_path / "runs" / "a", data={"test_fraction": 0})
    before = entries(tmp_path)
    assert message in memdlm("train", recipe).error_line(1)
    assert entries(tmp_path) == before


@pytest.mark.parametrize(
    ("assignment", "code", "message"),
    [
        ("data.train=absent.jsonl", 1, "absent.jsonl does not exist"),
        ("memory.rank=0", 2, "memory.rank: 0 is out of range"),
        ("memory.layer_fraction=1.5", 2, "memory.layer_fraction: 1.5 is out of range"),
        ("memory={scope: modules, modules: [no_such]}", 2, "selects no module"),
        ("adapter={kind: lora, target_modules: [no_such]}", 2, "adapter.target_modules: "),
        ("data.max_length=65", 2, "exceeds the model's context of 64 tokens"),
        ("memory.rnak=3", 2, "did you mean memory.rank?"),
        ("training.lr_scheduler_type=bogus", 2, "training: "),
        ("training.report_to=nobody", 2, "training: nobody is not supported"),
        ("training={bf16: true, fp16: true}", 2, "training: At most one of fp16 and bf16"),
        ("training.label_smoothing_factor=0.1", 2, "training.label_smoothing_factor"),
        ("training.learning_rate=-1", 2, "training.learning_rate: -1.0 is out of range"),
        ("training.per_device_train_batch_size=0", 2, "training.per_device_train_batch_size: 0"),
        ("training={num_train_epochs: 0, max_steps: -1}", 2, "passes train nothing"),
        ("tiny=null", 2, "give exactly one of model"),
        ("{tiny: null}", 2, "write --set key=value"),
    ],
)
def test_bad_settings_leave_nothing(memdlm, recipe, tmp_path, assignment, code, message) -> None:
    before = entries(tmp_path)
    assert message in memdlm("train", recipe, "-q", "--set", assignment).error_line(code)
    assert entries(tmp_path) == before


@pytest.mark.parametrize(
    ("model", "message"),
    [("./absent", "no model folder at ./absent"), ("nobody/nothing", "cannot load the tokenizer")],
)
def test_a_model_that_cannot_be_had_leaves_nothing(
    memdlm, tmp_path, rows_file, monkeypatch, model, message
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    recipe = write_recipe(tmp_path, rows_file, tmp_path / "run", tiny=None, model=model)
    assert message in memdlm("train", recipe).error_line(1)
    assert entries(tmp_path) == ["tiny.yaml"]


def test_a_tokenizer_without_mask_token_is_refused(memdlm, tmp_path, rows_file, trained) -> None:
    model = Path(shutil.copytree(trained / "model", tmp_path / "model"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (model / name).read_text().replace("<|mask|>", "unmask")
        (model / name).write_text(text)
    config = json.loads((model / "tokenizer_config.json").read_text())
    del config["mask_token"]
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    # Nor does the model's config say which token it is.
    config = json.loads((model / "config.json").read_text())
    del config["mask_token_id"]
    (model / "config.json").write_text(json.dumps(config))
    recipe = write_recipe(tmp_path, rows_file, tmp_path / "run", tiny=None, model=str(model))
    assert 'has no mask token: set "mask_token"' in memdlm("train", recipe).error_line(1)


@pytest.mark.parametrize("name", ["absent.yaml", "."])
def test_a_recipe_that_cannot_be_read(memdlm, tmp_path, name) -> None:
    assert "cannot read" in memdlm("train", tmp_path / name).error_line(2)


def test_another_run_is_never_overwritten_by_accident(memdlm, tmp_path, rows_file, trained) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    recipe = write_recipe(tmp_path, rows_file, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    line = memdlm("train", recipe).error_line(2)
    assert "already holds a run: continue it with --resume, replace it with --overwrite" in line
    failed = memdlm("train", recipe, "-q", "--overwrite", "--set", "adapter.kind=lora", "--set",
                    "adapter.target_modules=[no_such]")  # fmt: skip
    assert failed.code == 2
    changed = memdlm("train", recipe, "--resume", "--set", "memory.rank=3").error_line(2)
    assert "was started with other settings (memory.rank: 2 -> 3)" in changed
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    replaced = memdlm("train", recipe, "--overwrite", "-q", "--set", "memory.enabled=false")
    assert replaced.code == 0, replaced.err
    assert not read_yaml(run / "recipe.yaml")["memory"]["enabled"]
    assert entries(tmp_path) == ["run", "tiny.yaml"]


def test_a_link_to_a_run_stays_a_link(memdlm, tmp_path, rows_file) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "scratch")
    recipe = write_recipe(tmp_path, rows_file, tmp_path / "run")
    for options in ([], ["--overwrite"]):
        assert memdlm("train", recipe, "-q", *options).code == 0
    assert (tmp_path / "run").is_symlink()
    assert entries(tmp_path) == ["run", "scratch", "tiny.yaml"]


def test_several_processes_need_a_launcher(memdlm, recipe, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "WORLD_SIZE is 2 but RANK and MASTER_ADDR" in memdlm("train", recipe).error_line(2)
    assert entries(tmp_path) == ["tiny.yaml"]


@pytest.mark.parametrize(
    "training",
    [
        {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True},
        {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
        {"bf16": True},
    ],
    ids=["best", "checkpointing", "bf16"],
)
@pytest.mark.parametrize("family", ["llada", "llada_moe"])
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_settings_of_transformers_work_together(
    memdlm, tmp_path, rows_file, training, family, adapter
) -> None:
    recipe = write_recipe(
        tmp_path,
        rows_file,
        tmp_path / "run",
        tiny={"family": family},
        adapter={"kind": adapter, "rank": 2},
        training=training,
    )
    result = memdlm("train", recipe, "-q")
    assert result.code == 0, result.err
    assert result.err == ""
    answer = memdlm("generate", "--model", tmp_path / "run", "-n", "2", "ada hid the key")
    assert answer.code == 0, answer.err


def test_a_folder_of_other_things_is_left_alone(memdlm, tmp_path, rows_file) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").touch()
    recipe = write_recipe(tmp_path, rows_file, home)
    for options in ([], ["--overwrite"]):
        assert "is not a run folder" in memdlm("train", recipe, *options).error_line(2)
    assert "holds no run to resume" in memdlm("train", recipe, "--resume").error_line(2)
    assert entries(home) == ["thesis.tex"]
    (home / "thesis.tex").unlink()
    assert memdlm("train", recipe, "-q").code == 0  # an empty folder is free


def test_an_output_folder_that_cannot_be_written(memdlm, tmp_path, rows_file, monkeypatch) -> None:
    (tmp_path / "file").touch()
    recipe = write_recipe(tmp_path, rows_file, tmp_path / "file" / "run")
    assert "cannot write to" in memdlm("train", recipe).error_line(1)
    access = os.access
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path and access(path, mode))
    recipe = write_recipe(tmp_path, rows_file, tmp_path / "locked" / "run")
    assert f"cannot write to {tmp_path}: check its rights" in memdlm("train", recipe).error_line(1)
    assert entries(tmp_path) == ["file", "tiny.yaml"]


def full_disk(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_is_full_at_the_start_leaves_nothing(
    memdlm, recipe, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr("memdlm.cli.training_run.collect_versions", full_disk)
    assert "the disk is full" in memdlm("train", recipe, "-q").error_line(1)
    assert entries(tmp_path) == ["tiny.yaml"]


def test_a_disk_that_fills_up_leaves_a_run_to_resume(memdlm, recipe, tmp_path, monkeypatch) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_rng_state", full_disk)
        assert "the disk is full" in memdlm("train", recipe, "-q").error_line(1)
    assert entries(run / "checkpoints") == []
    save = Trainer.save_model

    def fill_at_the_end(self, output_dir=None, _internal_call=False) -> None:
        save(self, output_dir, _internal_call)
        if not _internal_call:
            full_disk()

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save_model", fill_at_the_end)
        assert "the disk is full" in memdlm("train", recipe, "--resume", "-q").error_line(1)
    assert entries(run) == [
        "checkpoints",
        "data.json",
        "metrics.jsonl",
        "recipe.yaml",
        "resumes.jsonl",
        "versions.json",
    ]
    assert memdlm("train", recipe, "--resume", "-q").code == 0
    assert "model" in entries(run)


def test_a_loss_that_explodes_is_one_line_and_can_be_resumed(memdlm, recipe, tmp_path) -> None:
    rows = "training.learning_rate=1e38"
    result = memdlm("train", recipe, "-q", "--set", rows, "--set", "training.warmup_steps=0")
    assert "became inf or nan" in result.error_line(1)
    assert "model" not in entries(tmp_path / "run")


def test_a_row_longer_than_the_window_is_counted(memdlm, tmp_path) -> None:
    rows = write_rows(
        tmp_path / "rows.jsonl", [GOOD, {**GOOD, "prompt": "long " * 80}, GOOD, GOOD, GOOD]
    )
    recipe = write_recipe(tmp_path, rows, tmp_path / "run", data={"test_fraction": 0})
    result = memdlm("train", recipe)
    assert result.code == 0, result.err
    assert "dropped 1 over-long" in result.err
    assert "eval" not in result.err + result.out


def test_a_stream_trains_stops_at_max_steps_and_resumes(memdlm, tmp_path, rows_file) -> None:
    data = {"streaming": True, "test_fraction": 0, "shuffle_buffer": 4, "num_eval_rows": 2}
    recipe = write_recipe(
        tmp_path, rows_file, tmp_path / "run", data={**data, "eval": str(rows_file)}
    )
    result = memdlm("train", recipe)
    assert result.code == 0, result.err
    assert "4 steps; saved" in result.out
    assert "streamed, 4 rows at a time" in result.err
    shutil.rmtree(tmp_path / "run" / "model")
    weights = load_file(tmp_path / "run" / "checkpoints" / "checkpoint-4" / "model.safetensors")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-4")
    assert memdlm("train", recipe, "--resume", "-q").code == 0
    for name, value in load_file(tmp_path / "run" / "model" / "model.safetensors").items():
        assert torch.equal(value, weights[name]), name


def test_rows_encoded_once_are_taken_from_the_cache(memdlm, recipe) -> None:
    assert memdlm("train", recipe).code == 0
    again = memdlm("train", recipe, "--overwrite")
    assert again.code == 0, again.err
    assert "encoded rows come from the cache, " in again.err
