"""Ends a run in good order when it is told to: finishes the step, saves, then raises.

Signals are for the program, not for a library, so a Trainer has no handler unless it is given one:

    with StopOnSignal() as stop:
        trainer.add_callback(stop)
        trainer.train()
"""

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback

from memdlm.errors import StoppedError

SIGNALS = (signal.SIGTERM, signal.SIGINT)

# A launcher passes on what the terminal has already sent to every process.
_SAME_SIGNAL_SECONDS = 1.0


class StopOnSignal(TrainerCallback):
    """Turns SIGTERM and Ctrl-C into a checkpoint and a `StoppedError`.

    Handlers are in place inside the `with` block; there must be one Trainer, and the block must be
    run by the main thread (in another one nothing is handled). Outside training, and when a second
    signal comes a second later or more, the block ends at once.
    """

    def __init__(self, say: Callable[[str], None] = lambda line: None) -> None:
        """Tell `say` when a signal comes; it is called by the handler, so it must not buffer."""
        self._say = say
        self._before: dict[int, Any] = {}
        self._signal = 0
        self._since = 0.0
        self._is_agreed = False
        self._is_training = False
        self._is_saving = False
        self._asked: tuple[torch.Tensor, torch.cuda.Event | None] | None = None

    def __enter__(self) -> "StopOnSignal":
        """Install the handlers."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        """Put the handlers of before back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._is_training and not self._signal:
            self._signal, self._since = number, time.monotonic()
            self._say(
                f"{signal.Signals(number).name}: finishing this step and saving; once more to stop "
                "now, without saving"
            )
        elif self._is_training and time.monotonic() - self._since < _SAME_SIGNAL_SECONDS:
            return
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise StoppedError("stopped by SIGTERM without another save", number)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """From here on a signal waits for the end of the step."""
        self._is_training = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint if a signal came.

        The last step of an epoch, or of the run, is not over before the evaluation that follows,
        which a resumed run would not make up for.
        """
        self._is_agreed = self._is_agreed or self._ask(args)
        if self._is_agreed and not _ends_epoch(state):
            self._save(args, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for the checkpoint that the epoch's last step did not ask for."""
        if self._is_agreed and _ends_epoch(state):
            self._save(args, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Notice a signal that came during a long evaluation, before the next step begins."""
        if self._is_training and self._signal and args.world_size == 1:
            self._save(args, control)

    def _save(self, args: Any, control: Any) -> None:
        args.save_only_model = False  # weights alone could not be continued
        control.should_save = control.should_log = self._is_saving = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End training when the checkpoint that was asked for is written.

        Raises:
            StoppedError: It is.
        """
        if self._is_saving:
            self._is_training = False
            name = signal.Signals(self._signal).name
            raise StoppedError(
                f"stopped by {name} after step {state.global_step} of {state.max_steps}, which is "
                "saved",
                self._signal,
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """From here on a signal takes effect at once."""
        self._is_training = False

    def _ask(self, args: Any) -> bool:
        """Tell whether to stop after this step, in all processes alike.

        Several processes are asked after each step and answer after the next one, so that none
        waits for the device.
        """
        if args.world_size == 1:
            return self._signal != 0
        answer, self._asked = self._asked, _ask_all(self._signal, args.device)
        if answer is None:
            return False
        highest, event = answer
        if event is not None:
            event.synchronize()
        number = int(highest.item())
        self._signal = number or self._signal
        return number != 0


def _ends_epoch(state: Any) -> bool:
    return float(state.epoch).is_integer() or bool(state.global_step >= state.max_steps)


def _ask_all(number: int, device: torch.device) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """Start to fetch the largest signal number of all processes; the event says when it is here."""
    highest = torch.full((), number, device=device)  # torch.tensor would wait for the device
    distributed.all_reduce(highest, distributed.ReduceOp.MAX)
    if device.type != "cuda":
        return highest, None
    host = torch.empty_like(highest, device="cpu", pin_memory=True)
    host.copy_(highest, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event
