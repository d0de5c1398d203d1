"""What a training run shows and records: a live bar on a terminal, plain lines on a pipe.

Trainer callbacks; they read what the Trainer logs and change nothing.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback


class TrainingProgress(TrainerCallback):
    """Shows steps, loss, tokens per second and time left."""

    def __init__(self, console: Console, quiet: bool = False) -> None:
        """Show on `console`; nothing at all when `quiet`."""
        self.console = console
        self.quiet = quiet
        self._bar: Progress | None = None
        self._task: Any = None
        self._started = (0.0, 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start at the step the run is at."""
        self._started = (time.monotonic(), state.global_step)
        if self.quiet or not state.is_world_process_zero or not self.console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._task = self._bar.add_task(
            "", total=state.max_steps, completed=state.global_step, figures=""
        )
        self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Show the figures of a log."""
        if logs is None or self.quiet or not state.is_world_process_zero:
            return
        if "eval_loss" in logs:
            self.console.print(
                f"step {state.global_step}/{state.max_steps}  eval loss (no memory) "
                f"{logs['eval_loss']:.4f}",
                highlight=False,
            )
        if "loss" not in logs:
            return
        speed = logs.get("tokens_per_second", 0.0)
        figures = f"loss {logs['loss']:.4f}  {speed:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, figures=figures)
        elif not self.console.is_terminal:
            self.console.print(
                f"step {state.global_step}/{state.max_steps}  {figures}  "
                f"{self._time_left(state)} left",
                highlight=False,
                soft_wrap=True,
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the terminal as it was."""
        self.stop()

    def stop(self) -> None:
        """Take the bar down; harmless when there is none."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _time_left(self, state: Any) -> str:
        since, first = self._started
        done = max(1, state.global_step - first)
        seconds = int((time.monotonic() - since) / done * (state.max_steps - state.global_step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


class MetricsFile(TrainerCallback):
    """Appends every log to a JSONL file, one object per line, with its step and Unix time."""

    def __init__(self, path: Path) -> None:
        """Write to `path`."""
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop the lines of steps that a resumed run will take again."""
        if not state.is_world_process_zero or not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if _logged_step(line) <= state.global_step]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(kept), encoding="utf-8")
        os.replace(partial, self.path)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Append one line."""
        if logs is None or not state.is_world_process_zero:
            return
        record = {"step": state.global_step, **logs, "time": round(time.time(), 3)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def _logged_step(line: str) -> float:
    """Return the step of a line; infinity for one that was cut off while being written."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):
        return float("inf")
