"""A signal to one of several processes: all finish the same step, and one checkpoint is saved."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from memdlm.training.checkpoints import CheckpointFolder
from tests.distributed.conftest import TORCHRUN, environment


def launch(folder: Path, *program: str) -> subprocess.CompletedProcess[str]:
    """Run `memdlm train` in two processes by way of a Python file."""
    return subprocess.run(
        [sys.executable, *TORCHRUN, *program],
        env=environment(),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_the_same_step(tmp_path: Path) -> None:
    rows = [{"prompt": f"where is key {i} ?", "completion": f"in box {i}"} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = {"width": 16, "num_layers": 2, "num_heads": 2, "mlp_width": 16, "context_length": 64}
    recipe = {
        "tiny": {"sizes": sizes},
        "data": {"train": "rows.jsonl", "max_length": 64, "test_fraction": 0},
        "memory": {"rank": 2},
        "training": {"max_steps": 6, "save_strategy": "no", "logging_steps": 1},
    }
    for name in ("whole", "cut"):
        text = yaml.safe_dump({**recipe, "output_dir": name})
        (tmp_path / f"{name}.yaml").write_text(text)
    plain = Path(tmp_path / "plain.py")
    plain.write_text("import sys\nfrom memdlm.cli import main\nsys.exit(main())\n")
    signalled = Path(__file__).with_name("signalled.py")
    stopped = launch(tmp_path, str(signalled), "train", "cut.yaml", "-q")
    assert stopped.returncode != 0
    # Asked after step 2, answered after step 3.
    line = "memdlm: stopped by SIGTERM after step 3 of 6, which is saved: continue with "
    assert stopped.stderr.count(line) == 1, stopped.stderr
    assert "exitcode  : 143" in stopped.stderr
    newest = CheckpointFolder(tmp_path / "cut" / "checkpoints").newest()
    assert newest is not None and newest.name == "checkpoint-3"
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in newest.iterdir()}
    for arguments in (("cut.yaml", "--resume"), ("whole.yaml",)):
        done = launch(tmp_path, str(plain), "train", *arguments, "-q")
        assert done.returncode == 0, done.stderr
    ours, whole = (
        load_file(tmp_path / n / "model" / "model.safetensors") for n in ("cut", "whole")
    )
    assert all(torch.equal(ours[name], whole[name]) for name in whole)
