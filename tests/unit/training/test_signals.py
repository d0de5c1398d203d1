"""Stopping in good order, at any step, and continuing as if nobody had asked."""

import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from memdlm import MemoryConfig
from memdlm.errors import StoppedError
from memdlm.training.checkpoints import CheckpointFolder
from memdlm.training.signals import StopOnSignal

from .test_checkpoints import SMALL, history


class Sender(TrainerCallback):
    """Sends this process a signal at an event of a step."""

    def __init__(self, event: str, step: int, number: int = signal.SIGTERM) -> None:
        self.step, self.number = step, number
        setattr(self, event, self._send)

    def _send(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


# Six batches per epoch. A step's begin belongs to the step before it; a signal that comes during an
# evaluation is heeded right after it.
@pytest.mark.parametrize(
    ("event", "step", "saved"),
    [
        ("on_step_begin", 1, 2),
        ("on_step_begin", 5, 6),
        ("on_step_begin", 6, 7),
        ("on_prediction_step", 6, 6),
        ("on_step_begin", 9, 10),
    ],
)
def test_a_stopped_run_continues_as_the_undisturbed_one(
    event, step, saved, tmp_path, build_model, train, rows
):
    settings = {
        "max_steps": 10,
        "eval_dataset": rows[:4],
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "save_total_limit": 1,
        "memory": MemoryConfig(**SMALL),
        "learning_rate": 0.3,  # so that the best model is not the last one
    }

    def build(seed):
        return build_model("llada", seed=seed, attention_dropout=0.1)

    whole = train(build(0), output_dir=str(tmp_path / "whole"), **settings)
    with StopOnSignal() as stop, pytest.raises(StoppedError) as caught:
        train(build(0), callbacks=[Sender(event, step), stop], **settings)
    assert str(caught.value) == f"stopped by SIGTERM after step {saved} of 10, which is saved"
    assert caught.value.exit_code == 143
    newest = CheckpointFolder(tmp_path / "run").newest()
    assert newest.name == f"checkpoint-{saved}"
    resumed = train(build(1), resume=True, **settings)
    assert history(resumed) == history(whole)
    expected = whole.model.state_dict()
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_ctrl_c_saves_once_and_a_second_one_stops_at_once(tmp_path, build_model, train):
    lines = []
    with StopOnSignal(lines.append) as stop, pytest.raises(StoppedError) as caught:
        train(build_model("llada"), callbacks=[Sender("on_step_begin", 1, signal.SIGINT), stop])
    assert caught.value.exit_code == 130
    assert lines == [
        "SIGINT: finishing this step and saving; once more to stop now, without saving"
    ]

    class Later(Sender):
        def _send(self, args, state, control, **kwargs):
            super()._send(args, state, control, **kwargs)
            stop._since -= 2  # two seconds later
            super()._send(args, state, control, **kwargs)

    with StopOnSignal() as stop, pytest.raises(KeyboardInterrupt):
        train(build_model("llada"), callbacks=[Later("on_step_begin", 2, signal.SIGINT), stop])


def test_a_launcher_that_repeats_the_signal_does_not_cut_the_save_short(build_model, train):
    with StopOnSignal() as stop, pytest.raises(StoppedError, match="after step 2 of 4"):
        senders = [Sender("on_step_begin", 1), Sender("on_substep_end", 1), stop]
        train(build_model("llada"), callbacks=[senders[0], *senders])


def test_outside_training_a_signal_takes_effect_at_once_and_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(StoppedError) as caught, StopOnSignal():
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.exit_code == 143
    with pytest.raises(KeyboardInterrupt), StopOnSignal():
        os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_another_thread_leaves_the_handlers_alone():
    before, inside = signal.getsignal(signal.SIGTERM), []

    def work():
        with StopOnSignal():
            inside.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [before]


def test_weights_alone_are_not_what_a_stop_saves(tmp_path, build_model, train):
    settings = {"save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    with StopOnSignal() as stop, pytest.raises(StoppedError):
        train(build_model("llada"), callbacks=[Sender("on_step_begin", 1), stop], **settings)
    newest = CheckpointFolder(tmp_path / "run").newest()
    assert (Path(newest) / "optimizer.pt").exists()
