"""The work of `memdlm generate`: which settings hold, load, answer, print."""

import json
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from memdlm.backbones.loading import default_device, load_model
from memdlm.backbones.quantization import QuantizationConfig
from memdlm.backbones.tokenizers import load_tokenizer
from memdlm.cli.quiet import say_what_is_quantized
from memdlm.cli.run_folder import RunFolder
from memdlm.cli.settings import apply_overrides, build
from memdlm.data.config import CHAT_TEMPLATE
from memdlm.data.formatting import Message
from memdlm.diffusion.objective import ObjectiveConfig
from memdlm.errors import CheckpointError, UsageError
from memdlm.inference import Generation
from memdlm.inference import generate as answer
from memdlm.memory.config import MemoryConfig
from memdlm.memory.parametric_memory import ParametricMemory
from memdlm.sampling.config import SamplingConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class GenerationConfig:
    """What `--set` can change."""

    sampling: SamplingConfig = field(
        default_factory=SamplingConfig, metadata={"help": "How the answer is decoded."}
    )
    memory: MemoryConfig = field(
        default_factory=MemoryConfig, metadata={"help": "The memory written from the prompt."}
    )
    objective: ObjectiveConfig = field(
        default_factory=ObjectiveConfig, metadata={"help": "Noise schedule of the memory's anchor."}
    )


@dataclass(frozen=True)
class GenerationRequest:
    """The command's arguments, read but not yet checked against a model."""

    prompts: list[str | list[Message]]
    model: str
    adapter: str | None
    memory: str | None
    max_new_tokens: int | None
    assignments: tuple[str, ...]
    chat_template: str
    seed: int
    batch_size: int
    dtype: str
    quantization: str | None = None
    max_memory_bytes: int | None = None

    @property
    def kept_memory(self) -> Path | None:
        """Folder of the memory to answer with; None if memory is on, off or as trained."""
        if self.memory is None or self.memory in ("on", "off"):
            return None
        return Path(self.memory)


def run_generation(request: GenerationRequest, as_json: bool) -> None:
    """Answer the prompts of a request on standard output."""
    run = RunFolder(Path(request.model).expanduser())
    config = generation_config(request, run)
    model, tokenizer = load(request, run)
    folder = request.kept_memory
    kept = None if folder is None else ParametricMemory.from_pretrained(folder, model)
    answers = answer(
        model,
        tokenizer,
        request.prompts,
        config.sampling,
        None if kept else config.memory,
        memories=[kept] * len(request.prompts) if kept else None,
        objective=config.objective,
        seed=request.seed,
        chat_template=request.chat_template,
        batch_size=request.batch_size,
        max_memory_bytes=request.max_memory_bytes,
    )
    for number, (prompt, given) in enumerate(zip(request.prompts, answers, strict=True), start=1):
        if given.memory == "dropped":
            print(
                f"memdlm: prompt {number}: the inner loop met inf or nan, so its answer uses no "
                "memory; lower memory.learning_rate",
                file=sys.stderr,
            )
        print(_json_line(prompt, given) if as_json else given.text)


def load(request: GenerationRequest, run: RunFolder) -> "tuple[nn.Module, PreTrainedTokenizerBase]":
    """Load the model that a request names, and its tokenizer."""
    source = str(trained_model(run)) if run.is_run else request.model
    tokenizer = load_tokenizer(source)
    model = load_model(
        source,
        dtype=request.dtype,
        adapter=request.adapter,
        device=default_device(),
        tokenizer=tokenizer,
        quantization=base_quantization(request, run),
    )
    say_what_is_quantized(model)
    return model, tokenizer


def generation_config(request: GenerationRequest, run: RunFolder) -> GenerationConfig:
    """Return the settings of a request: a run's recipe first, then `--set`, then options."""
    if request.chat_template not in CHAT_TEMPLATE:
        raise UsageError(f"--chat-template {request.chat_template}: write auto or never")
    data: dict[str, Any] = {}
    if run.is_run:
        recorded = run.recorded_recipe()
        data = {name: recorded.get(name, {}) for name in ("memory", "objective")}
    data = apply_overrides({"sampling": {"seed": request.seed}, **data}, request.assignments)
    config = build(GenerationConfig, data, "memdlm generate")
    if request.max_new_tokens is not None:
        changed = replace(config.sampling, max_new_tokens=request.max_new_tokens)
        config = replace(config, sampling=changed)
    if request.memory in ("on", "off"):
        memory = replace(config.memory, enabled=request.memory == "on")
        config = replace(config, memory=memory)
    return config


def base_quantization(request: GenerationRequest, run: RunFolder) -> QuantizationConfig:
    """Return how the base weights are stored: as asked, else as the run was trained."""
    recorded = run.recorded_recipe().get("quantization") if run.is_run else None
    config = build(QuantizationConfig, recorded or {}, "memdlm generate", "quantization")
    return config if request.quantization is None else replace(config, kind=request.quantization)


def trained_model(run: RunFolder) -> Path:
    """Return the final model or adapter of a run.

    Raises:
        CheckpointError: The run has not finished.
    """
    result = run.result()
    if result is None:
        raise CheckpointError(
            f"{run.path} has no final model yet: finish it with `memdlm train ... --resume`, or "
            f"name one of its checkpoints"
        )
    return result


def _json_line(prompt: str | list[Message], given: Generation) -> str:
    record = {"prompt": prompt, **asdict(given), "num_new_tokens": len(given.token_ids)}
    del record["token_ids"]
    return json.dumps(record, ensure_ascii=False)
