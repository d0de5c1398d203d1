"""Models whose memory is mostly that of a step, small enough to train on one core in a second."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForMaskedLM

from memdlm.backbones.adapters import add_lora
from memdlm.backbones.tiny import TinySizes, tiny_config
from memdlm.diffusion.objective import ObjectiveConfig
from memdlm.memory.config import MemoryConfig
from memdlm.training.config import MemDLMConfig

BATCH, LENGTH, VOCABULARY = 4, 256, 1000
SIZES = TinySizes(width=128, mlp_width=512, context_length=LENGTH, expert_width=128)


def build(
    family: str,
    device: str,
    dtype: torch.dtype = torch.float32,
    is_lora: bool = False,
    sizes: TinySizes = SIZES,
) -> tuple[nn.Module, frozenset[str]]:
    """Return a model on `device` and the names of its adapter's parameters."""
    config = tiny_config(
        family,
        sizes,
        vocab_size=VOCABULARY,
        mask_token_id=VOCABULARY - 1,
        pad_token_id=VOCABULARY - 2,
        eos_token_id=VOCABULARY - 2,
    )
    with torch.device(device):
        model: nn.Module = AutoModelForMaskedLM.from_config(config, dtype=dtype)
        own = {id(parameter) for parameter in model.parameters()}
        if is_lora:
            from peft import LoraConfig

            lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear")
            model = add_lora(model, lora)
    return model, frozenset(name for name, p in model.named_parameters() if id(p) not in own)


def arguments_for(folder: Path, has_memory: bool = True, **changes: Any) -> MemDLMConfig:
    """Return the Trainer's settings, drawing t so close to 1 that every token is masked."""
    values = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "max_steps": 2,
        "per_device_train_batch_size": BATCH,
        "memory": MemoryConfig(enabled=has_memory, rank=8),
        "objective": ObjectiveConfig(time_epsilon=0.99999),
    }
    return MemDLMConfig(**(values | changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a Trainer may write."""
    return tmp_path
