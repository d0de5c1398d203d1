"""Tiny models and lm-eval requests, built alike in every process of a test."""

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from torch import nn

from memdlm.backbones.tiny import TinySizes, build_tiny
from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.evaluation.harness.model import DiffusionLM
from memdlm.memory.config import MemoryConfig

TEXT = "ada keeps the red key in a box near the old mill and bo keeps a blue one there"
WORDS = TEXT.split()
# One step at this rate moves the answers of an untrained network.
MEMORY = MemoryConfig(layer_fraction=0.5, learning_rate=5.0, rank=8)
CONTEXT = 40


def build_tokenizer() -> Any:
    return build_word_tokenizer(WORDS)


def build_model(family: str = "llada") -> nn.Module:
    sizes = TinySizes(width=32, num_layers=4, context_length=CONTEXT, init_std=0.2)
    return build_tiny(family, build_tokenizer(), seed=1, sizes=sizes)


def build_lm(family: str = "llada", **settings: Any) -> DiffusionLM:
    return DiffusionLM(build_model(family), build_tokenizer(), **settings)


def text(length: int, start: int = 0) -> str:
    """Return so many words; which ones, `start` decides."""
    return " ".join(WORDS[(start + i) % len(WORDS)] for i in range(length))


def ask(prompts: Sequence[str], task: str | None = "task", **arguments: Any) -> list[Instance]:
    """Return one generation request per prompt."""
    arguments = {"max_gen_toks": 6, "until": [], **arguments}
    return [
        Instance("generate_until", {}, (prompt, arguments), 0, (task, document, 1))
        for document, prompt in enumerate(prompts)
    ]


def choose(pairs: Sequence[tuple[str, Sequence[str]]]) -> list[Instance]:
    """Return one likelihood request per continuation of each context."""
    return [
        Instance("loglikelihood", {}, (context, continuation), place, ("task", document, 1))
        for document, (context, continuations) in enumerate(pairs)
        for place, continuation in enumerate(continuations)
    ]


PROMPTS = [text(n, start=n) for n in (5, 17, 9, 26, 12, 7, 33, 6, 20, 14)]
QUESTIONS = [
    (text(n, start=n), (" red", " blue key", " the old mill and bo keeps")) for n in (4, 20, 9)
]
