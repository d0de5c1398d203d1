"""A model that cannot be loaded: one line on standard error, whatever is wrong with it."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.bad_checkpoints import BAD_CHECKPOINTS, write_checkpoint

from .conftest import spawn


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
def test_generate_says_what_is_wrong_in_one_line(name, memdlm, checkpoint, tmp_path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    BAD_CHECKPOINTS[name].spoil(folder)
    line = memdlm("generate", "--model", folder, "the cat", "-n", "4").error_line(1)
    assert str(folder) in line


def test_the_good_one_answers(memdlm, checkpoint) -> None:
    result = memdlm("generate", "--model", checkpoint, "the cat", "-n", "4", "--memory", "off")
    assert result.code == 0, result.err


@pytest.mark.parametrize("dtype", ["int8", "nf4", "fp16"])
def test_an_unknown_precision_lists_those_there_are(dtype, memdlm, checkpoint) -> None:
    line = memdlm("generate", "--model", checkpoint, "the cat", "--dtype", dtype).error_line(2)
    assert f"'{dtype}' is not one of auto, float32, bfloat16, float16" in line


def test_a_hub_name_without_network_is_one_line(monkeypatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    program = "import sys; from memdlm.cli import main; sys.exit(main())"
    online = "import os; os.environ['HF_HUB_OFFLINE'] = '0'; " + program
    result = spawn("generate", "--model", "nobody/nothing", "the cat", code=online)
    assert "cannot load the" in result.error_line(1)


def test_a_hub_model_of_pickles_alone_is_refused(monkeypatch, tmp_path, checkpoint) -> None:
    revision = "0" * 40
    snapshot = tmp_path / "models--nobody--pickled" / "snapshots" / revision
    shutil.copytree(checkpoint, snapshot, ignore=shutil.ignore_patterns("*.safetensors*"))
    torch.save({"weight": torch.zeros(2)}, snapshot / "pytorch_model.bin")
    (tmp_path / "models--nobody--pickled" / "refs").mkdir()
    (tmp_path / "models--nobody--pickled" / "refs" / "main").write_text(revision)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    result = spawn("generate", "--model", "nobody/pickled", "the cat")
    assert "model.safetensors" in result.error_line(1)
    assert json.loads((snapshot / "config.json").read_text())["model_type"] == "llada"
