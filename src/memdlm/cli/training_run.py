"""From a recipe to a trained model: data, network, Trainer, run folder.

Everything that can be wrong with the input is found before the run folder appears.
"""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import PreTrainedTokenizerBase, PrinterCallback, ProgressCallback

from memdlm.backbones.adapters import add_lora
from memdlm.backbones.loading import default_device, load_model
from memdlm.backbones.tiny import build_tiny
from memdlm.backbones.tokenizers import load_tokenizer
from memdlm.cli.data_hashes import data_hashes
from memdlm.cli.progress import MetricsFile, TrainingProgress
from memdlm.cli.quiet import say_what_is_quantized
from memdlm.cli.recipe import Recipe, RecipeData, TinyConfig, resolved
from memdlm.cli.resuming import compare_data, compare_recipe
from memdlm.cli.run_folder import (
    BASE,
    CHECKPOINTS,
    DATA,
    METRICS,
    RECIPE,
    TRACKING,
    VERSIONS,
    RunFolder,
)
from memdlm.cli.settings import to_yaml
from memdlm.cli.tracking import tracking
from memdlm.data.dataset import (
    DataSplits,
    check_context,
    encode_rows,
    load_dataset,
    read_dialogues,
)
from memdlm.data.tasks import generate_examples, vocabulary
from memdlm.data.tasks.config import Example, TaskConfig
from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.errors import ConfigError, StoppedError
from memdlm.files import write_text
from memdlm.seeding import derive_seed, preserved_rng
from memdlm.training import processes
from memdlm.training.config import MemDLMConfig
from memdlm.training.signals import StopOnSignal
from memdlm.training.trainer import MemDLMTrainer
from memdlm.versions import collect_commit, collect_devices, collect_versions

Echo = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """What a run ended with: where the result lies, steps taken, last loss without memory."""

    result: Path
    num_steps: int
    eval_loss: float | None


def run_recipe(
    recipe: Recipe,
    folder: RunFolder,
    console: Console,
    *,
    resume: bool = False,
    force: bool = False,
    exact: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> Outcome:
    """Train what `recipe` says into `folder`, or continue it there.

    Args:
        recipe: What to train.
        folder: Where; see `memdlm.cli.run_folder`.
        console: For progress and for remarks.
        resume: Continue from the newest whole checkpoint, or from the start if there is none.
        force: Continue although recipe or data are not those of the run.
        exact: Refuse to continue with another number of processes, which changes the order of rows.
        overwrite: Replace a run that is there.
        quiet: Show no progress; remarks are shown all the same.

    Raises:
        UsageError: The folder holds another run, or there is nothing to resume.
        StoppedError: SIGTERM or Ctrl-C came; training had begun, so a checkpoint was written.
        MemDLMError: Whatever is wrong with settings, data, checkpoint or the run itself.
    """
    processes.join(on_cpu=runs_on_cpu(recipe))
    quiet = quiet or not folder.writes
    plain = {**resolved(recipe), "output_dir": str(folder.path)}
    changed: list[str] = []
    if resume:
        changed = compare_recipe(folder, plain, force)
        finished = folder.result()
        if finished is not None:
            return Outcome(finished, 0, None)
        processes.wait()  # until all have seen the folder as it is
        folder.remove_partial()
    else:
        folder.check_free(overwrite)
    processes.wait()
    say = _printer(console) if folder.writes else _say_nothing
    # A handler must not use the console, which may be in the middle of something.
    notice: Echo = _write_line if console.is_terminal and not quiet else lambda line: None
    trackers = tracking(recipe.training.get("report_to"), folder.path / TRACKING)
    with StopOnSignal(notice) as stop, trackers:
        tokenizer, splits = load_data(recipe, _say_nothing if quiet else say)
        hashes = data_hashes(recipe.data, splits)
        if resume:
            changed += compare_data(folder, hashes, force, say)
        model = build_model(recipe, tokenizer)
        check_context(recipe.data, model.config.max_position_embeddings)

        def prepare(place: Path) -> MemDLMTrainer:
            wrapped = add_adapter(model, recipe, folder.path / BASE)
            arguments = training_arguments(recipe, place / CHECKPOINTS)
            return build_trainer(wrapped, tokenizer, splits, arguments)

        checkpoint = None
        if resume:
            trainer = prepare(folder.path)
            checkpoint = folder.latest_checkpoint(say)
            if checkpoint is not None:
                warning = processes.check_world_size(checkpoint, exact=exact)
                if warning is not None:
                    say(warning)
            for line in changed:
                say(f"going on with other settings or data: {line}")
            if changed and folder.writes:
                _record(folder.path, plain, hashes)
            folder.note_resume(checkpoint, changed)
        else:
            with folder.staged() as staging:
                keeps_base = recipe.tiny is not None and recipe.adapter.kind == "lora"
                if keeps_base and folder.writes:
                    model.save_pretrained(staging / BASE)
                    tokenizer.save_pretrained(staging / BASE)
                trainer = prepare(staging)
                if folder.writes:
                    versions = {**collect_versions(), **collect_devices(), **collect_commit(Path())}
                    write_text(staging / VERSIONS, json.dumps(versions, indent=2) + "\n")
                    _record(staging, plain, hashes)
            trainer.args.output_dir = str(folder.path / CHECKPOINTS)
        trainer.args.run_name = trainer.args.run_name or folder.path.resolve().name
        progress = TrainingProgress(console, quiet)
        for callback in (progress, MetricsFile(folder.path / METRICS), stop):
            trainer.add_callback(callback)
        try:
            outcome = _train(trainer, folder, recipe, checkpoint)
        finally:
            progress.stop()
            folder.remove_partial()
    processes.leave()
    return outcome


def _record(place: Path, plain: dict[str, Any], hashes: dict[str, str]) -> None:
    """Write down what the run is trained by and on."""
    write_text(place / DATA, json.dumps(hashes, indent=2) + "\n")
    write_text(place / RECIPE, to_yaml(plain))


def _train(
    trainer: MemDLMTrainer, folder: RunFolder, recipe: Recipe, checkpoint: Path | None
) -> Outcome:
    """Train to the end, evaluate without memory, and write the result."""
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except StoppedError:
        # Trackers close their files only then.
        trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
        raise
    state = trainer.state
    eval_loss = None
    if trainer.eval_dataset is not None:
        evaluated = [log for log in state.log_history if "eval_loss" in log]
        if not evaluated or evaluated[-1]["step"] != state.global_step:
            trainer.evaluate()
            evaluated = [log for log in state.log_history if "eval_loss" in log]
        eval_loss = float(evaluated[-1]["eval_loss"])
    name = "model" if recipe.adapter.kind == "none" else "adapter"
    with folder.writing_result(name) as place:
        trainer.save_model(str(place))
        # A pickle of this process's settings; they are in recipe.yaml, which anyone can read.
        (place / "training_args.bin").unlink(missing_ok=True)
        if name == "adapter" and recipe.tiny is not None and folder.writes:
            _name_base(place / "adapter_config.json", f"../{BASE}")
    return Outcome(folder.path / name, state.global_step, eval_loss)


def _name_base(config: Path, base: str) -> None:
    """Let an adapter name its base by a relative path, so that a run folder can be moved."""
    fields = json.loads(config.read_text(encoding="utf-8"))
    fields["base_model_name_or_path"] = base
    config.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


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


def _printer(console: Console) -> Echo:
    def echo(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True, markup=False)

    return echo


def _say_nothing(line: str) -> None:
    """Take a line that nobody is to see."""


def _write_line(line: str) -> None:
    os.write(2, f"\n{line}\n".encode())
