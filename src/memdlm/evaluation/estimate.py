"""How long an evaluation will take, said before it starts: one forward is timed, the rest counted.

The forward has the length of the longest request, where a token costs the most, so the estimate is
rather too long than too short. Once batches are done, the harness's own reports know better.
"""

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from memdlm.sampling.evaluation_mode import evaluation_mode

if TYPE_CHECKING:
    from memdlm.evaluation.harness.model import DiffusionLM


class Estimate:
    """Tells, model by model, what is left to do."""

    def __init__(self, say: Callable[[str], None]) -> None:
        """Tell `say`."""
        self._say = say
        self.num_models_left = 0

    def begin(self, cells: Sequence[tuple["DiffusionLM", Sequence[Any]]]) -> None:
        """Say how much work the cells of one model are, and about how long it takes.

        Raises:
            DataError, UsageError: A request cannot be answered (see `DiffusionLM.plan`).
        """
        if not cells:
            return
        reports = [report for lm, requests in cells for report in lm.plan(requests)]
        own = sum(report.num_own for report in reports)
        if not own:
            return
        work = sum(report.work for report in reports)
        longest = max(_longest(lm, requests) for lm, requests in cells)
        seconds = round(work * _seconds_per_token(cells[0][0], longest))
        line = f"{own:,} requests to compute, about {_clock(seconds)}"
        if self.num_models_left:
            line += f"; {self.num_models_left} more models after this one"
        self._say(line)


def _longest(lm: "DiffusionLM", requests: Sequence[Any]) -> int:
    """Return about how many tokens the longest request has, the answer left out."""
    text = max((str(request.args[0]) for request in requests), key=len)
    return min(max(1, len(lm.subject.encode(text))), lm.subject.max_length)


@torch.no_grad()
def _seconds_per_token(lm: "DiffusionLM", length: int) -> float:
    """Time one forward of one row."""
    model = lm.subject.model
    device = next(model.parameters()).device
    ids = torch.zeros((1, length), dtype=torch.int64, device=device)
    last = torch.tensor([[length - 1]], device=device)
    with evaluation_mode(model):
        for _ in range(2):  # the first one warms up
            since = time.perf_counter()
            model(ids, positions=last)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - since
    return seconds / length


def _clock(seconds: int) -> str:
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
