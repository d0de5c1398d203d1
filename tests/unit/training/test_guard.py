"""A run stops before something that is not a number reaches the weights."""

import pytest
import torch
from transformers import TrainerCallback

from memdlm import MemoryConfig
from memdlm.errors import NonFiniteError

SMALL = {"rank": 3, "alpha": 6.0, "layer_fraction": 0.5}
OFF = MemoryConfig(enabled=False)
DIVERGING = MemoryConfig(learning_rate=1e25, clip_norm=None, num_steps=3, **SMALL)


class Poison(TrainerCallback):
    """Makes one weight nan before a given step, and keeps what the weights were then."""

    def __init__(self, at_step: int) -> None:
        self.at_step = at_step

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.at_step:
            with torch.no_grad():
                model.lm_head.weight[5, 0] = float("nan")
            self.weights = {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("memory", [OFF, MemoryConfig(**SMALL)])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_nan_loss_stops_before_the_update(memory, accumulation, build_model, train):
    model, poison = build_model("llada"), Poison(2)
    said = "loss became inf or nan at step 3, whose update was not made"
    with pytest.raises(NonFiniteError, match=said):
        train(
            model,
            memory=memory,
            callbacks=[poison],
            gradient_accumulation_steps=accumulation,
        )
    for name, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(7.0), poison.weights[name].nan_to_num(7.0)), name
    assert sum(len(module._forward_hooks) for module in model.modules()) == 0


def test_a_last_update_that_spoils_the_weights_is_no_success(build_model, train):
    class SpoilTheGradient(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                model.lm_head.weight.grad[5, 0] = float("nan")

    callbacks = [SpoilTheGradient()]
    with pytest.raises(NonFiniteError, match="ended at step 2 with inf or nan in the weights"):
        train(build_model("llada"), memory=OFF, callbacks=callbacks, max_steps=2)
    train(build_model("llada"), memory=OFF, callbacks=callbacks, max_steps=1)


def test_dropped_memories_are_counted_and_the_step_is_standard_mdlm(build_model, train):
    dropped = train(build_model("llada"), memory=DIVERGING, max_steps=9)
    plain = train(build_model("llada"), memory=OFF, max_steps=9)
    lines, expected = (
        [line for line in trainer.state.log_history if "loss" in line]
        for trainer in (dropped, plain)
    )
    for line, other in zip(lines, expected, strict=True):
        # A row in which nothing was masked has no gradient that could overflow.
        assert line["dropped_memories"] in (1, 2)
        assert line["loss"] == other["loss"] and line["grad_norm"] == other["grad_norm"]
    weights = plain.model.state_dict()
    assert all(torch.equal(v, weights[n]) for n, v in dropped.model.state_dict().items())


def test_ten_dropped_in_a_row_stop_the_run(build_model, train):
    with pytest.raises(NonFiniteError, match=r"10 batches in a row.*memory\.learning_rate"):
        train(build_model("llada"), memory=DIVERGING, max_steps=12)


def test_a_good_batch_between_starts_the_count_anew(build_model, train, monkeypatch):
    from memdlm.training import guard

    monkeypatch.setattr(guard, "MAX_DROPPED_IN_A_ROW", 2)
    result = train(build_model("llada"), memory=OFF, max_steps=1)
    watch = guard.NonFiniteGuard()

    def see(is_alive):
        watch._pending.append((torch.tensor([True, is_alive]), None))
        watch.on_pre_optimizer_step(result.args, result.state, result.control)

    see(False)
    see(True)
    see(False)
    with pytest.raises(NonFiniteError):
        see(False)
