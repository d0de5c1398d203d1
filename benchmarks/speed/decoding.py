"""What the benchmark of decoding measures: tiny models, prompts, ways of decoding, a memory.

Weights and prompts are random. How long a forward takes does not depend on them. How many tokens a
confidence threshold commits does: such a model is never sure, and the threshold is low accordingly.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from memdlm.backbones.base import DiffusionMaskedLM
from memdlm.backbones.tiny import TINY_FAMILIES, TinySizes, tiny_config
from memdlm.memory.config import MemoryConfig
from memdlm.memory.parametric_memory import ParametricMemory
from memdlm.sampling.config import SamplingConfig
from memdlm.sampling.decoding import decode
from memdlm.sampling.masked_decoding import DecodeOutput
from memdlm.seeding import generator

VOCABULARY = 2048
BLOCK = 8
THRESHOLD = 0.02
# (family, name) -> settings besides the number of tokens.
MODES: dict[tuple[str, str], dict[str, Any]] = {
    ("llada", "one token a step"): {},
    ("llada", "four tokens a step"): {"tokens_a_step": 4},
    ("llada", "confidence threshold"): {"threshold": THRESHOLD},
    ("llada", "blocks"): {"block_length": BLOCK},
    ("llada", "blocks, prefix cache"): {"block_length": BLOCK, "cache": "prefix"},
    ("llada", "blocks, dual cache"): {"block_length": BLOCK, "cache": "dual"},
    ("llada2", "block decoding, no cache"): {"block_length": BLOCK, "cache": "none"},
    ("llada2", "block decoding, exact cache"): {"block_length": BLOCK, "cache": "exact"},
}
FAMILIES = ("llada", "llada2")
# A cached way of decoding, and the one it is compared with.
REFERENCES = {
    "blocks, prefix cache": "blocks",
    "blocks, dual cache": "blocks",
    "block decoding, exact cache": "block decoding, no cache",
}


@dataclass(frozen=True)
class DecodeCase:
    """One family, one batch of prompts, with or without a memory of them.

    Attributes:
        family: A key of `TINY_FAMILIES`.
        prompt: Tokens of each prompt.
        memory: Whether each prompt has its memory.
        batch_size: Prompts decoded together.
    """

    family: str
    prompt: int
    memory: bool
    batch_size: int


def build_model(family: str, context: int, device: torch.device) -> DiffusionMaskedLM:
    """Return the tiny model of a family with its default sizes, float32, in evaluation mode."""
    row = TINY_FAMILIES[family]
    ids = {"mask_token_id": VOCABULARY - 1, "pad_token_id": 0, "eos_token_id": 0}
    sizes = TinySizes(context_length=context, init_std=0.2)
    torch.manual_seed(0)
    with device:
        model = row.model_class(tiny_config(family, sizes, vocab_size=VOCABULARY, **ids))
    return model.eval()


def sampling(mode: str, family: str, num_new_tokens: int) -> SamplingConfig:
    """Return the settings of a mode; no answer ends before its last token."""
    settings = dict(MODES[family, mode])
    if tokens := settings.pop("tokens_a_step", None):
        settings["num_unmasking_steps"] = -(-num_new_tokens // tokens)
    return SamplingConfig(max_new_tokens=num_new_tokens, stop_at_eos=False, **settings)


class DecodeWorkload:
    """A model, prompts and perhaps their memory, on which every mode can run."""

    def __init__(self, case: DecodeCase, num_new_tokens: int, device: torch.device) -> None:
        """Build all of it; the memory is written here."""
        self.case, self.num_new_tokens = case, num_new_tokens
        context = case.prompt + num_new_tokens + BLOCK
        self.model = build_model(case.family, context, device)
        draws = generator(0, "decode_prompts")
        shape = (case.batch_size, case.prompt)
        self.prompts = torch.randint(1, VOCABULARY - 1, shape, generator=draws).to(device)
        self.memory = ParametricMemory(self.model, MemoryConfig())
        if case.memory:
            self.write()

    def modes(self) -> Iterator[tuple[str, Callable[[], DecodeOutput]]]:
        """Yield every way of decoding that the family has."""
        for family, mode in MODES:
            if family == self.case.family:
                yield mode, self._decoder(sampling(mode, family, self.num_new_tokens))

    def _decoder(self, config: SamplingConfig) -> Callable[[], DecodeOutput]:
        def run() -> DecodeOutput:
            with self.memory.attached() if self.case.memory else nullcontext():
                return decode(self.model, list(self.prompts), config)

        return run

    def write(self) -> None:
        """Write the memory of every prompt."""
        self.memory.write(self.prompts)

    @torch.no_grad()
    def forward(self) -> None:
        """Run the prompts once, with logits everywhere."""
        self.model(self.prompts)
