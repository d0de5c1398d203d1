"""The quickstart: one pretrained start, two trainings, three settings, one comparison.

Standard MDLM and MemDLM start from the same weights and see the same batches and masks; they differ
in `memory.enabled` alone. The MemDLM model is then evaluated without a memory (Train-Only) and with
one written from each prompt (Train & Inference).
"""

import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback

from memdlm.data.config import DataConfig
from memdlm.data.dataset import EncodedDataset, encode_rows
from memdlm.data.tasks import TaskConfig, generate_examples
from memdlm.diffusion.objective import ObjectiveConfig
from memdlm.memory.config import MemoryConfig
from memdlm.quickstart.config import SETTINGS, QuickstartConfig
from memdlm.quickstart.evaluate import (
    evaluate_accuracy,
    evaluate_exposure_bias,
    guessing_accuracy,
)
from memdlm.quickstart.start import load_start
from memdlm.training.config import MemDLMConfig
from memdlm.training.trainer import MemDLMTrainer
from memdlm.versions import collect_versions

Announce = Callable[[str], None]

# Answers are a few tokens long; supervised padding would be most of the loss.
OBJECTIVE = ObjectiveConfig(padding="excluded")


def run_quickstart(
    config: QuickstartConfig, output: Path, announce: Announce, callbacks: Sequence[Any] = ()
) -> dict[str, Any]:
    """Train, evaluate and store everything below `output`; return the results.

    Writes `mdlm/` and `memdlm/` (models in the official layout with their tokenizer) and
    `results.json`. The report is drawn from the results by `memdlm.quickstart.report`.

    Args:
        config: What to run.
        output: An existing, empty folder.
        announce: Receives one line per stage.
        callbacks: Trainer callbacks, such as a progress display.
    """
    begin = time.perf_counter()
    num_threads = torch.get_num_threads()
    torch.set_num_threads(config.num_threads)
    try:
        results = _run(config, output, announce, callbacks)
    finally:
        torch.set_num_threads(num_threads)
    results["seconds"]["total"] = round(time.perf_counter() - begin, 1)
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def _run(
    config: QuickstartConfig, output: Path, announce: Announce, callbacks: Sequence[Any]
) -> dict[str, Any]:
    """Train both methods and evaluate all settings; return the results."""
    start, tokenizer = load_start()
    rows = training_rows(config, tokenizer)
    announce(rows.report.line())
    models, curves, seconds = {}, {}, {}
    for name, is_enabled in (("mdlm", False), ("memdlm", True)):
        announce(f"training {name}: {config.num_steps} steps of {config.batch_size} rows")
        memory = replace(config.memory, enabled=is_enabled)
        since = time.perf_counter()
        models[name], curves[name] = train(
            copy.deepcopy(start), tokenizer, rows, memory, config, output / name, callbacks
        )
        seconds[f"train_{name}"] = round(time.perf_counter() - since, 1)
        models[name].save_pretrained(output / name)
        tokenizer.save_pretrained(output / name)

    since = time.perf_counter()
    settings: dict[str, dict[str, Any]] = {}
    combinations = (("mdlm", False), ("memdlm", False), ("memdlm", True))
    for setting, (name, use_memory) in zip(SETTINGS, combinations, strict=True):
        announce(f"evaluating {setting}")
        memory_config = config.memory if use_memory else None
        settings[setting] = evaluate_setting(models[name], tokenizer, config, memory_config)
    seconds["evaluate"] = round(time.perf_counter() - since, 1)
    return {
        "config": asdict(config),
        "objective": asdict(OBJECTIVE),
        "versions": collect_versions(),
        "seconds": seconds,
        "num_parameters": sum(p.numel() for p in start.parameters()),
        "guessing": {
            str(factor): guessing_accuracy(config, factor * config.train_length)
            for factor in config.length_factors
        },
        "settings": settings,
        "curves": curves,
    }


def training_rows(config: QuickstartConfig, tokenizer: Any) -> EncodedDataset:
    """Generate and encode the training split; lengths vary up to `train_length`."""
    tasks = TaskConfig(
        tasks=config.tasks,
        length=config.train_length,
        shortest_length=max(1, 2 * config.train_length // 3),
        num_examples=config.num_train_examples,
        seed=config.seed,
        split="train",
    )
    # One token per word, plus the end-of-text token.
    window = DataConfig(max_length=config.train_length + 8)
    return encode_rows(generate_examples(tasks), window, tokenizer, source="generated tasks")


def train(
    model: Any,
    tokenizer: Any,
    rows: EncodedDataset,
    memory: MemoryConfig,
    config: QuickstartConfig,
    output: Path,
    callbacks: Sequence[Any],
) -> tuple[Any, list[dict[str, float]]]:
    """Fine-tune all weights of `model`; return it and its logged metrics."""
    arguments = MemDLMConfig(
        output_dir=str(output),
        memory=memory,
        objective=OBJECTIVE,
        max_steps=config.num_steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        seed=config.seed,
        data_seed=config.seed,
        train_sampling_strategy="random",
        logging_steps=max(1, config.num_steps // 30),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.accelerator.is_available(),
    )
    trainer = MemDLMTrainer(
        model,
        arguments,
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    # What the run shows is the caller's business.
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return model, history


def evaluate_setting(
    model: Any, tokenizer: Any, config: QuickstartConfig, memory: MemoryConfig | None
) -> dict[str, Any]:
    """Return accuracies by length factor and the exposure bias of one setting."""
    bias = evaluate_exposure_bias(model, tokenizer, config, memory)
    return {
        "accuracy": {
            str(factor): evaluate_accuracy(
                model, tokenizer, config, factor * config.train_length, memory
            )
            for factor in config.length_factors
        },
        "exposure_bias": {
            **asdict(bias),
            "ratios": bias.ratios,
            "overall_ratio": bias.overall_ratio,
        },
    }
