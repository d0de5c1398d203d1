"""What a figure or a bug report must say about the machine it comes from."""

import platform
from importlib import metadata

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


def _own_version() -> str:
    """Return the version of a checkout that was not installed."""
    import memdlm

    return memdlm.__version__
