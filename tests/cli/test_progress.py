"""The live display on a terminal, and the metrics file across a cut."""

import io
import json
from types import SimpleNamespace

from rich.console import Console

from memdlm.cli.progress import MetricsFile, TrainingProgress


def state(step: int) -> SimpleNamespace:
    return SimpleNamespace(global_step=step, max_steps=4, is_world_process_zero=True)


def test_a_terminal_shows_step_loss_speed_and_time_left() -> None:
    screen = io.StringIO()
    progress = TrainingProgress(Console(file=screen, force_terminal=True, width=100))
    progress.on_train_begin(None, state(0), None)
    for step in (1, 2):
        progress.on_step_end(None, state(step), None)
        progress.on_log(None, state(step), None, {"loss": 1.5, "tokens_per_second": 1234.0})
    progress.on_log(None, state(2), None, {"eval_loss": 2.25})
    progress.on_train_end(None, state(2), None)
    progress.stop()
    shown = screen.getvalue()
    for part in ("training", "2/4", "loss 1.5000", "1,234 tokens/s", "0:00:", "2.2500"):
        assert part in shown


def test_quiet_shows_nothing() -> None:
    screen = io.StringIO()
    progress = TrainingProgress(Console(file=screen, force_terminal=True), quiet=True)
    progress.on_train_begin(None, state(0), None)
    progress.on_step_end(None, state(1), None)
    progress.on_log(None, state(1), None, {"loss": 1.5, "eval_loss": 1.0})
    progress.on_train_end(None, state(1), None)
    assert screen.getvalue() == ""


def test_a_resumed_run_drops_the_lines_it_takes_again(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    metrics.on_train_begin(None, state(0), None)
    for step in (1, 2, 3):
        metrics.on_log(None, state(step), None, {"loss": float(step)})
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # cut off by a full disk
    metrics.on_train_begin(None, state(2), None)
    metrics.on_log(None, state(3), None, {"loss": 30.0})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]
