"""Starts processes with torchrun, as users do."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def environment(**values: str) -> dict[str, str]:
    """Return the environment of a child that finds memdlm and tests."""
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {
        **os.environ,
        "PYTHONPATH": path,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **values,
    }


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes has to show for all cases; started once."""
    output = tmp_path_factory.mktemp("two_processes")
    done = subprocess.run(
        [sys.executable, *TORCHRUN, str(Path(__file__).with_name("worker.py")), str(output)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(output / f"rank_{rank}.pt", weights_only=True) for rank in range(2)]
