"""The pretrained network both methods start from, as it lies in the package.

`checkpoint/` was made by `python -m memdlm.quickstart.make_start`; its `pretraining.json` holds the
settings and the log of that run.
"""

from pathlib import Path
from typing import Any

from memdlm.backbones.loading import load_model
from memdlm.backbones.tokenizers import load_tokenizer

CHECKPOINT = Path(__file__).parent / "checkpoint"


def load_start() -> tuple[Any, Any]:
    """Return a fresh copy of the starting model, float32, and its tokenizer."""
    return load_model(str(CHECKPOINT)), load_tokenizer(str(CHECKPOINT))
