"""What a recipe names, made: data and tokenizer, network, adapter, the Trainer and its settings.

Knows no run folder. What is wrong with the input is found here, before anything is written.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, PrinterCallback, ProgressCallback

from memdlm.backbones.adapters import add_lora
from memdlm.backbones.loading import default_device, load_model
from memdlm.backbones.tiny import build_tiny
from memdlm.backbones.tokenizers import load_tokenizer
from memdlm.cli.quiet import say_what_is_quantized
from memdlm.cli.recipe import Recipe, RecipeData, TinyConfig
from memdlm.data.dataset import (
    DataSplits,
    encode_rows,
    load_dataset,
    read_dialogues,
)
from memdlm.data.tasks import generate_examples, vocabulary
from memdlm.data.tasks.config import Example, TaskConfig
from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.errors import ConfigError
from memdlm.seeding import derive_seed, preserved_rng
from memdlm.training.config import MemDLMConfig
from memdlm.training.trainer import MemDLMTrainer

Echo = Callable[[str], None]


def load_data(recipe: Recipe, echo: Echo) -> tuple[PreTrainedTokenizerBase, DataSplits]:
    """Return the tokenizer and the encoded rows of a recipe."""
    data = recipe.data
    if data.tasks is None:
        if recipe.model is not None:
            tokenizer = load_tokenizer(recipe.model)
        else:
            assert recipe.tiny is not None
            tokenizer = build_word_tokenizer(_texts(data), max_words=recipe.tiny.max_words)
        return tokenizer, load_dataset(data, tokenizer, echo=echo)
    train, held_out = _generate(data, data.tasks)
    tokenizer = _task_tokenizer(recipe.model, recipe.tiny, train)
    sets = [encode_rows(train, data, tokenizer, source="generated tasks", split="train")]
    if held_out:
        sets.append(encode_rows(held_out, data, tokenizer, source="generated tasks", split="eval"))
    for encoded in sets:
        echo(encoded.report.line())
    return tokenizer, DataSplits(sets[0], sets[1] if held_out else None)


def _generate(data: RecipeData, tasks: TaskConfig) -> tuple[list[Example], list[Example]]:
    num_eval = data.num_eval_rows
    if num_eval is None:
        num_eval = ceil(data.test_fraction * tasks.num_examples)
    train = generate_examples(tasks)[: data.num_rows]
    if not num_eval:
        return train, []
    return train, generate_examples(replace(tasks, split="test", num_examples=num_eval))


def _task_tokenizer(
    model: str | None, tiny: TinyConfig | None, rows: list[Example]
) -> PreTrainedTokenizerBase:
    if model is not None:
        return load_tokenizer(model)
    assert tiny is not None
    texts = (row[key] for row in rows for key in ("prompt", "completion"))
    # Test values have the same words in other combinations; some may not occur in these rows.
    return build_word_tokenizer(texts, extra_words=vocabulary(), max_words=tiny.max_words)


def _texts(data: RecipeData) -> Iterable[str]:
    """Yield every text a tiny network's tokenizer must know, held-out rows included."""
    for source, limit in ((data.train, data.num_rows), (data.eval, data.num_eval_rows)):
        if source is not None:
            for dialogue in read_dialogues(source, data, limit):
                yield dialogue.prompt
                yield dialogue.response


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return the network that a recipe starts from."""
    if recipe.tiny is not None:
        return build_tiny(recipe.tiny.family, tokenizer, recipe.seed, recipe.tiny.sizes)
    assert recipe.model is not None
    model = load_model(
        recipe.model,
        dtype=recipe.dtype,
        # A 4-bit model is made where it is trained: quantising elsewhere is slower, on a CPU much.
        device=default_device() if recipe.quantization.is_on else None,
        tokenizer=tokenizer,
        attention=recipe.attention,
        quantization=recipe.quantization,
    )
    say_what_is_quantized(model)
    return model


def add_adapter(model: Any, recipe: Recipe, base: Path) -> nn.Module:
    """Put the recipe's adapter on `model`; `base` is where a tiny network is kept.

    Raises:
        ConfigError: The targets name no module of the model.
    """
    adapter = recipe.adapter
    if adapter.kind == "none":
        wrapped: nn.Module = model
        return wrapped
    from peft import LoraConfig

    config = LoraConfig(
        r=adapter.rank,
        # PEFT calls it whole but only ever divides it.
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]
        lora_dropout=adapter.dropout,
        target_modules=adapter.target_modules
        if isinstance(adapter.target_modules, str)
        else list(adapter.target_modules),
        base_model_name_or_path=str(base.absolute())
        if recipe.model is None
        else _location(recipe.model),
    )
    with preserved_rng(torch.device("cpu")):
        torch.manual_seed(derive_seed(recipe.seed, "adapter"))
        try:
            return add_lora(model, config)
        except ConfigError as error:
            raise ConfigError(f"adapter.{error}") from error


def _location(model: str) -> str:
    """Return a hub name as it is, and a path in a form that holds from any folder."""
    return str(Path(model).expanduser().absolute()) if Path(model).exists() else model


def runs_on_cpu(recipe: Recipe) -> bool:
    """Tell whether a run uses the CPU: where it asks for it, or where there is nothing else."""
    return bool(recipe.training.get("use_cpu", default_device().type == "cpu"))


def training_arguments(recipe: Recipe, checkpoints: Path) -> MemDLMConfig:
    """Return the Trainer's settings of a recipe.

    Beside MemDLMConfig's defaults, a command-line run logs every 10 steps, keeps 2 checkpoints,
    reports to nobody, and runs on the CPU where there is no accelerator.

    Raises:
        ConfigError: transformers refuses a setting or a combination, or no step would be taken.
    """
    on_cpu = runs_on_cpu(recipe)
    values: dict[str, Any] = {
        "report_to": "none",
        "project": "memdlm",
        "disable_tqdm": True,
        "logging_steps": 10,
        "save_total_limit": 2,
        "use_cpu": on_cpu,
        "dataloader_pin_memory": not on_cpu,
    }
    values |= recipe.training
    try:
        arguments = MemDLMConfig(
            output_dir=str(checkpoints),
            seed=recipe.seed,
            memory=recipe.memory,
            objective=recipe.objective,
            **values,
        )
    except ConfigError as error:
        raise ConfigError(f"training.{error}") from error
    except (ValueError, TypeError, KeyError, ImportError) as error:
        raise ConfigError(f"training: {' '.join(str(error).split())}") from error
    if arguments.num_train_epochs <= 0 and arguments.max_steps <= 0:
        raise ConfigError(
            f"training.num_train_epochs: {arguments.num_train_epochs:g} passes train nothing; use "
            "a number above 0, or set training.max_steps"
        )
    return arguments


def build_trainer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    splits: DataSplits,
    arguments: MemDLMConfig,
) -> MemDLMTrainer:
    """Return a Trainer without transformers' own printing."""
    try:
        trainer = MemDLMTrainer(
            model,
            arguments,
            train_dataset=splits.train,
            eval_dataset=splits.eval,
            processing_class=tokenizer,
        )
    except torch.OutOfMemoryError:
        raise
    except (ValueError, ImportError, RuntimeError) as error:  # a logger that is not installed, ...
        raise ConfigError(f"training: {' '.join(str(error).split())}") from error
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer
