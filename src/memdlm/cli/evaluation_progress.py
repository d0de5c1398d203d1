"""What an evaluation shows while it runs: a live bar on a terminal, plain lines on a pipe."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from memdlm.evaluation.harness.progress import ProgressReport, describe, describe_start

# Seconds between two lines where there is no terminal.
_PAUSE = 15.0


class EvaluationProgress:
    """Shows what the harness reports: requests done, tokens, time left."""

    def __init__(self, console: Console, quiet: bool = False) -> None:
        """Show on `console`; nothing at all when `quiet`."""
        self.console = console
        self.quiet = quiet
        self._bar: Progress | None = None
        self._task: Any = None
        self._last_line = 0.0

    def say(self, line: str) -> None:
        """Show a line, above the bar if there is one."""
        if not self.quiet:
            self.console.print(line, highlight=False, soft_wrap=True, markup=False)

    def report(self, report: ProgressReport) -> None:
        """Show where a cell's requests are."""
        if self.quiet:
            return
        if report.num_done == 0 and report.work_done == 0 and report.num_awaited == 0:
            self.stop()
            if report.num_own:
                self.say(f"  {describe_start(report)}")
            self._last_line = time.monotonic()
            return
        if self.console.is_terminal:
            self._draw(report)
        elif time.monotonic() - self._last_line >= _PAUSE:
            self._last_line = time.monotonic()
            self.say(f"  {describe(report)}")

    def stop(self) -> None:
        """Take the bar down; harmless when there is none."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _draw(self, report: ProgressReport) -> None:
        if self._bar is None:
            self._bar = Progress(
                BarColumn(), TextColumn("{task.description}"), console=self.console, transient=True
            )
            self._task = self._bar.add_task("", total=max(1, report.work))
            self._bar.start()
        self._bar.update(self._task, completed=report.work_done, description=describe(report))
        if report.is_done:
            self.stop()
