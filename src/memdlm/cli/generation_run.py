"""The work of `memdlm generate`: which settings hold, load, answer, print."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from memdlm.answer_text import AnswerText
from memdlm.backbones.loading import default_device, load_model
from memdlm.backbones.quantization import QuantizationConfig
from memdlm.backbones.tokenizers import load_tokenizer
from memdlm.cli.quiet import say_what_is_quantized
from memdlm.cli.run_folder import RunFolder
from memdlm.cli.settings import apply_overrides, build
from memdlm.cli.text_stream import TextStream
from memdlm.cli.trace import TraceRecorder, write_page
from memdlm.data.config import CHAT_TEMPLATE
from memdlm.data.formatting import Message, plain_text
from memdlm.diffusion.objective import ObjectiveConfig
from memdlm.errors import CheckpointError, UsageError
from memdlm.inference import Generation, GenerationUpdate
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
    stop_strings: tuple[str, ...] = ()

    @property
    def kept_memory(self) -> Path | None:
        """Folder of the memory to answer with; None if memory is on, off or as trained."""
        if self.memory is None or self.memory in ("on", "off"):
            return None
        return Path(self.memory)


@dataclass(frozen=True)
class Output:
    """What is shown of the answers: their text, or with `as_json` a record of each.

    With `stream` the text comes as it becomes final; `trace` is a file for the page that plays it.
    """

    as_json: bool = False
    stream: bool = False
    trace: Path | None = None


def run_generation(request: GenerationRequest, output: Output) -> None:
    """Answer the prompts of a request on standard output."""
    run = RunFolder(Path(request.model).expanduser())
    config = generation_config(request, run)
    model, tokenizer = load(request, run)
    folder = request.kept_memory
    kept = None if folder is None else ParametricMemory.from_pretrained(folder, model)
    own: Any = model.config
    recorder = None if output.trace is None else TraceRecorder(own.mask_token_id)
    reading = AnswerText.of(tokenizer, request.stop_strings, config.sampling)
    printer = _Printer(reading) if output.stream else None

    def on_update(update: GenerationUpdate) -> None:
        if recorder is not None:
            recorder.record(update)
        if printer is not None:
            printer.show(update)

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
        # Two answers cannot be written at once.
        batch_size=min(request.batch_size, 1) if output.stream else request.batch_size,
        max_memory_bytes=request.max_memory_bytes,
        stop_strings=request.stop_strings,
        on_update=on_update if recorder is not None or printer is not None else None,
    )
    for number, (prompt, given) in enumerate(zip(request.prompts, answers, strict=True), start=1):
        if given.memory == "dropped":
            print(
                f"memdlm: prompt {number}: the inner loop met inf or nan, so its answer uses no "
                "memory; lower memory.learning_rate",
                file=sys.stderr,
            )
        if printer is None:
            print(_json_line(prompt, given) if output.as_json else given.text)
    if recorder is not None and output.trace is not None:
        num_slots = None if config.sampling.infill else config.sampling.max_new_tokens
        about = f"{request.model} \u00b7 {_changed(config.sampling)}"
        texts = [p if isinstance(p, str) else plain_text(p) for p in request.prompts]
        write_page(output.trace, recorder, texts, answers, tokenizer, num_slots, about)


class _Printer:
    """Prints answers, one at a time, as they become final."""

    def __init__(self, reading: AnswerText) -> None:
        self._new_stream = lambda: TextStream(reading, self._write)
        self._stream: TextStream | None = None

    def show(self, update: GenerationUpdate) -> None:
        """Print what the step made final of the one answer it belongs to."""
        self._stream = self._stream or self._new_stream()
        self._stream.add(update.new_tokens[0])
        if update.finished[0]:
            self._stream.end()
            self._stream = None

    @staticmethod
    def _write(text: str) -> None:
        print(text, end="", flush=True)


def _changed(sampling: SamplingConfig) -> str:
    """Return the settings that differ from the defaults, and the length of an answer."""
    default = asdict(SamplingConfig())
    given = asdict(sampling)
    kept = {name for name in given if given[name] != default[name]} | {"max_new_tokens"}
    return ", ".join(f"{name}={given[name]}" for name in given if name in kept)


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


def _json_line(prompt: str | Sequence[Message], given: Generation) -> str:
    record = {"prompt": prompt, **asdict(given), "num_new_tokens": len(given.token_ids)}
    del record["token_ids"]
    batch = record.pop("batch")
    seconds = batch["decode_seconds"]
    # Prompts that are decoded together share their costs.
    record["batch"] = {
        **{name: round(v, 6) if isinstance(v, float) else v for name, v in batch.items()},
        "tokens_per_second": round(batch["num_new_tokens"] / seconds, 3) if seconds else None,
    }
    return json.dumps(record, ensure_ascii=False)
