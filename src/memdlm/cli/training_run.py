"""From a recipe to a trained model: data, network, Trainer, run folder.

Everything that can be wrong with the input is found before the run folder appears.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from memdlm.cli.data_hashes import data_hashes
from memdlm.cli.progress import MetricsFile, TrainingProgress
from memdlm.cli.recipe import Recipe, resolved
from memdlm.cli.recipe_parts import (
    Echo,
    add_adapter,
    build_model,
    build_trainer,
    load_data,
    runs_on_cpu,
    training_arguments,
)
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
from memdlm.data.dataset import DataSplits, check_context
from memdlm.errors import StoppedError
from memdlm.files import write_text
from memdlm.training import processes
from memdlm.training.signals import StopOnSignal
from memdlm.training.trainer import MemDLMTrainer
from memdlm.versions import collect_commit, collect_devices, collect_versions


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
        run = _Run(recipe, folder, plain, hashes, tokenizer, splits, model)
        trainer, checkpoint = run.go_on(changed, exact, say) if resume else (run.start(), None)
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


@dataclass(frozen=True)
class _Run:
    """What a run is made of before it has a Trainer."""

    recipe: Recipe
    folder: RunFolder
    plain: dict[str, Any]
    hashes: dict[str, str]
    tokenizer: PreTrainedTokenizerBase
    splits: DataSplits
    model: Any

    def start(self) -> MemDLMTrainer:
        """Make the run folder, which appears once nothing can be wrong with the input any more."""
        with self.folder.staged() as staging:
            keeps_base = self.recipe.tiny is not None and self.recipe.adapter.kind == "lora"
            if keeps_base and self.folder.writes:
                self.model.save_pretrained(staging / BASE)
                self.tokenizer.save_pretrained(staging / BASE)
            trainer = self._trainer(staging)
            if self.folder.writes:
                versions = {**collect_versions(), **collect_devices(), **collect_commit(Path())}
                write_text(staging / VERSIONS, json.dumps(versions, indent=2) + "\n")
                self._record(staging)
        trainer.args.output_dir = str(self.folder.path / CHECKPOINTS)
        return trainer

    def go_on(
        self, changed: list[str], exact: bool, say: Echo
    ) -> tuple[MemDLMTrainer, Path | None]:
        """Return the Trainer and the checkpoint to go on from, None for the start."""
        trainer = self._trainer(self.folder.path)
        checkpoint = self.folder.latest_checkpoint(say)
        if checkpoint is not None:
            warning = processes.check_world_size(checkpoint, exact=exact)
            if warning is not None:
                say(warning)
        for line in changed:
            say(f"going on with other settings or data: {line}")
        if changed and self.folder.writes:
            self._record(self.folder.path)
        self.folder.note_resume(checkpoint, changed)
        return trainer, checkpoint

    def _trainer(self, place: Path) -> MemDLMTrainer:
        wrapped = add_adapter(self.model, self.recipe, self.folder.path / BASE)
        arguments = training_arguments(self.recipe, place / CHECKPOINTS)
        return build_trainer(wrapped, self.tokenizer, self.splits, arguments)

    def _record(self, place: Path) -> None:
        """Write down what the run is trained by and on."""
        write_text(place / DATA, json.dumps(self.hashes, indent=2) + "\n")
        write_text(place / RECIPE, to_yaml(self.plain))


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


def _printer(console: Console) -> Echo:
    def echo(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True, markup=False)

    return echo


def _say_nothing(line: str) -> None:
    """Take a line that nobody is to see."""


def _write_line(line: str) -> None:
    os.write(2, f"\n{line}\n".encode())
