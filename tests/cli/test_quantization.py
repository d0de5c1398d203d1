"""4-bit weights from the command line: train, resume, generate, and what is refused."""

import json
from pathlib import Path

import pytest

from .conftest import write_recipe

PROMPT = "ada hid the key in box 3 . where is it ?"
LORA = {"kind": "lora", "rank": 2}


@pytest.fixture
def four_bit(tmp_path: Path, rows_file: Path, trained: Path) -> Path:
    """A recipe that trains a LoRA on the 4-bit weights of a finished run."""
    return write_recipe(
        tmp_path,
        rows_file,
        tmp_path / "run",
        tiny=None,
        model=str(trained / "model"),
        adapter=LORA,
        quantization={"kind": "nf4"},
    )


def test_a_run_says_what_is_quantised_and_its_adapter_answers(memdlm, four_bit, tmp_path) -> None:
    done = memdlm("train", four_bit, "--quiet")
    assert done.code == 0, done.err
    assert done.err.count("memdlm: 4-bit NF4 (double): 14 linear layers, ") == 1
    assert "Failed to load" not in done.err  # bitsandbytes' own noise
    run = tmp_path / "run"
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    options = ("-n", "4", "--memory", "off", "--json", "--set", "sampling.stop_at_eos=false")
    as_trained = memdlm("generate", "--model", run, *options, PROMPT)
    assert "4-bit NF4" in as_trained.err
    assert json.loads(as_trained.out)["num_new_tokens"] == 4
    unquantised = memdlm("generate", "--model", run, *options, "--quantization", "none", PROMPT)
    assert unquantised.code == 0, unquantised.err
    assert "4-bit" not in unquantised.err
    alone = memdlm(
        "generate", "--model", run / "adapter", *options, "--quantization", "nf4", PROMPT
    )
    assert json.loads(alone.out)["text"] == json.loads(as_trained.out)["text"]


def test_a_run_resumes(memdlm, four_bit, tmp_path) -> None:
    assert memdlm("train", four_bit, "--quiet").code == 0
    whole = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    for path in (tmp_path / "run" / "adapter").iterdir():
        path.unlink()
    (tmp_path / "run" / "adapter").rmdir()
    last = max((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))
    last.rename(tmp_path / "later")
    again = memdlm("train", four_bit, "--quiet", "--resume")
    assert again.code == 0, again.err
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == whole


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["adapter.kind=none"], "quantization.kind: nf4 freezes the model's own weights; set"),
        (["dtype=float16"], "dtype: float16 excludes quantization.kind nf4"),
        (["dtype=float32"], "dtype: float32 excludes quantization.kind nf4"),
        (["training.fp16=true"], "quantization.kind: nf4 computes in bfloat16; set training.bf16"),
        (["quantization.kind=int8"], "quantization.kind: 'int8' is not one of none, nf4"),
        (["quantization.bits=4"], "unknown key quantization.bits"),
        (["training.bf16=true", "training.fp16=true", "quantization.kind=none"], "fp16"),
    ],
)
def test_options_that_exclude_each_other_are_one_line(
    memdlm, four_bit, tmp_path, assignments, message
) -> None:
    options = [part for assignment in assignments for part in ("--set", assignment)]
    result = memdlm("train", four_bit, *options)
    assert message in result.error_line(2)
    assert not (tmp_path / "run").exists()


def test_a_network_built_here_is_not_quantised(memdlm, tmp_path, rows_file) -> None:
    recipe = write_recipe(
        tmp_path, rows_file, tmp_path / "run", adapter=LORA, quantization={"kind": "nf4"}
    )
    assert "use it with model, not with tiny" in memdlm("train", recipe).error_line(2)


def test_without_bitsandbytes_it_is_one_line(memdlm, four_bit, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    assert "pip install 'memdlm[quant]'" in memdlm("train", four_bit).error_line(2)
    assert not (tmp_path / "run").exists()


def test_an_unknown_kind_for_an_answer_is_one_line(memdlm, trained) -> None:
    result = memdlm("generate", "--model", trained, "--quantization", "nf3", PROMPT)
    assert "quantization.kind: 'nf3' is not one of none, nf4" in result.error_line(2)


def test_env_names_bitsandbytes(memdlm) -> None:
    assert json.loads(memdlm("env", "--json").out)["bitsandbytes"][0].isdigit()
