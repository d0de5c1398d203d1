"""What a figure or a bug report must say about the machine it comes from."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "memdlm",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "bitsandbytes",
)


def collect_versions() -> dict[str, str]:
    """Return the versions of Python, the system and the packages that decide numbers."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = _own_version() if name == "memdlm" else "not installed"
    return found


def collect_devices() -> dict[str, str]:
    """Return the accelerator and the processor's threads, as torch sees them."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    found = {"cpu_threads": str(torch.get_num_threads()), "accelerator": "none"}
    if accelerator is not None:
        name = torch.cuda.get_device_name() if accelerator.type == "cuda" else ""
        found["accelerator"] = f"{torch.accelerator.device_count()} x {accelerator.type} {name}"
    return found


def collect_commit(folder: Path) -> dict[str, str]:
    """Return the git commit of `folder`, "dirty" beside it where tracked files differ from it.

    Where there is none (no repository, no git, no commit yet), it says so.
    """
    # Reading must not refresh the index, which would wait for, or disturb, another git.
    git = ["git", "--no-optional-locks", "-C", str(folder)]
    try:
        commit = _output([*git, "rev-parse", "--verify", "HEAD"])
        changes = _output([*git, "status", "--porcelain", "--untracked-files=no"])
    except (OSError, subprocess.SubprocessError):
        return {"git_commit": "none"}
    return {"git_commit": f"{commit} dirty" if changes else commit}


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip()


def _own_version() -> str:
    """Return the version of a checkout that was not installed."""
    import memdlm

    return memdlm.__version__
