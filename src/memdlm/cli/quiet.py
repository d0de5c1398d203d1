"""Silences the chatter of the libraries below, so that what the user reads is ours."""

import logging
import os
import sys
import warnings
from typing import Any


def silence_libraries() -> None:
    """Turn off progress bars, notices and warnings of transformers, datasets, PEFT and the hub.

    What matters reaches the user as an error of ours. Call it before those libraries are imported.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore")
    silence_loggers()
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()


def silence_loggers() -> None:
    """Turn off notices and warnings of those libraries that only need to be told so."""
    # bitsandbytes warns, as it is imported, of an optional CPU kernel; what it cannot do at all is
    # an error of ours. What memdlm logs for Python callers, a command says itself.
    for name in ("accelerate", "peft", "huggingface_hub", "torch", "bitsandbytes", "memdlm"):
        logging.getLogger(name).setLevel(logging.ERROR)


def say_what_is_quantized(model: Any) -> None:
    """Tell on standard error, even a quiet command's, which weights of `model` are 4-bit."""
    from memdlm.backbones.quantization import is_quantized, report

    if is_quantized(model):
        print(f"memdlm: {report(model).line()}", file=sys.stderr)
