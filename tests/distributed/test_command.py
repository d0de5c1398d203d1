"""`memdlm train` in several processes: one folder, one voice, and what ends it."""

import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from memdlm.cli import main
from memdlm.errors import ConfigError
from memdlm.memory.config import MemoryConfig
from memdlm.memory.parametric_memory import ParametricMemory
from memdlm.training.config import MemDLMConfig
from tests.conftest import make_model
from tests.distributed.conftest import TORCHRUN, environment


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A run of four tiny steps, a checkpoint every two."""
    rows = [
        {"prompt": f"{name} hid the key in box {i} . where is it ?", "completion": f"in box {i}"}
        for i, name in enumerate(["ada", "bo", "cy", "di", "ed", "flo", "gus", "hal", "ida"])
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = {"width": 16, "num_layers": 2, "num_heads": 2, "mlp_width": 16, "context_length": 64}
    training = {
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
    }
    path = tmp_path / "tiny.yaml"
    settings = {
        "tiny": {"sizes": sizes},
        "adapter": {"kind": "lora", "rank": 2},
        "data": {"train": str(tmp_path / "rows.jsonl"), "max_length": 64, "test_fraction": 0.25},
        "memory": {"rank": 2},
        "training": training,
        "output_dir": str(tmp_path / "run"),
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def launch(program: list[str], **values: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the two processes' environment."""
    return subprocess.run(
        [sys.executable, *program],
        env=environment(**values),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_a_killed_process_ends_all_within_a_minute_and_the_run_can_go_on(
    recipe, tmp_path, capsys
) -> None:
    killed = str(Path(__file__).with_name("killed.py"))
    done = launch([*TORCHRUN, killed, "train", str(recipe)])
    ended = time.time()
    run = tmp_path / "run"
    last_step = (run / "metrics.jsonl").stat().st_mtime  # step 3; rank 1 dies at the next one
    assert ended - last_step < 60
    assert done.returncode != 0
    assert "Signal 9 (SIGKILL)" in done.stderr  # torchrun's own words
    assert "Root Cause" in done.stderr and "rank      : 1 " in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("step ")]
    assert [line.split("  ")[0] for line in lines] == ["step 1/4", "step 2/4", "step 3/4"]
    assert done.stderr.count("train data ") == 1
    assert (run / "checkpoints" / "checkpoint-2").is_dir()
    assert not (run / "adapter").exists()

    capsys.readouterr()
    assert main(["train", str(recipe), "--resume", "--exact"]) == 2
    assert "written by 2 processes and 1 process would go on" in capsys.readouterr().err
    assert main(["train", str(recipe), "--resume"]) == 0
    captured = capsys.readouterr()
    assert "written by 2 processes and 1 process goes on: rows come in" in captured.err
    assert "4 steps; saved " in captured.out
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == [1, 2, 3, 4]


def test_a_global_batch_memory_is_of_training_alone(recipe, tmp_path, capsys) -> None:
    with pytest.raises(ConfigError, match="global_batch joins the processes of a training run"):
        ParametricMemory(make_model(), MemoryConfig(sharing="global_batch"))
    assert main(["train", str(recipe), "-q", "--set", "memory.sharing=global_batch"]) == 0
    written = str(tmp_path / "memory")
    text = tmp_path / "text.txt"
    text.write_text("ada hid the key in box 0 .")
    prompt = ["--file", str(text)]
    run = str(tmp_path / "run")
    assert main(["memory", "write", "--model", run, *prompt, "--output", written]) == 0
    assert "saved " in capsys.readouterr().out


def test_a_port_in_use_is_one_clear_line(recipe, tmp_path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = launch(
            ["-m", "memdlm.cli", "train", str(recipe)],
            RANK="0",
            LOCAL_RANK="0",
            WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
    assert done.returncode == 2, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("memdlm: error: ")]
    assert said == [
        f"memdlm: error: port {port} is in use: set MASTER_PORT to another, or launch with "
        "torchrun --standalone, which finds a free one"
    ]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("where", ["setting", "file", "accelerate", "accelerate_file"])
def test_zero_3_is_refused_with_the_reason(tmp_path, monkeypatch, where) -> None:
    stage = {"zero_optimization": {"stage": 3}}
    file = tmp_path / "zero.json"
    file.write_text(json.dumps(stage))
    settings: dict[str, Any] = {"setting": {"deepspeed": stage}, "file": {"deepspeed": str(file)}}
    if where.startswith("accelerate"):
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    if where == "accelerate_file":
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    with pytest.raises(ConfigError, match=r"ZeRO-3 .* inner loop runs the last layers several"):
        MemDLMConfig(str(tmp_path), **settings.get(where, {}))


def test_fsdp_on_a_cpu_is_refused_rather_than_replaced(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="accelerate has no FSDP on a CPU"):
        MemDLMConfig(str(tmp_path), use_cpu=True)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2"])
def test_accelerate_reads_the_config_files(name) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(
        str(Path(__file__).parents[2] / "recipes" / "accelerate" / f"{name}.yaml")
    )
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED"}
    assert config.distributed_type == kinds[name]
