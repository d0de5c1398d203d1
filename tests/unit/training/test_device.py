"""What only an accelerator can show; run with `-m gpu` on a machine that has one."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from memdlm.diffusion.states import CleanBatch
from memdlm.memory.config import MemoryConfig
from memdlm.training.outer_step import OuterStep, StepPlan

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("loss", ["cross_entropy", "kl", "hidden_mse"])
def test_a_step_never_waits_for_the_device(
    family: str,
    loss: str,
    build_model: Callable[..., nn.Module],
    build_batch: Callable[..., CleanBatch],
    lay_out: Callable[..., StepPlan],
) -> None:
    device = torch.device("cuda")
    model = build_model(family, 0).to(device, torch.bfloat16).train()
    memory = MemoryConfig(rank=8, alpha=16.0, layer_fraction=0.5, loss=loss)
    plan = lay_out(build_batch(), memory).to(device)
    step = OuterStep(model, memory)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = step.forward(model, plan)
        result.loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        step.release()
    assert bool(result.loss.isfinite())


def test_device_and_host_agree_in_float32(
    build_model: Callable[..., nn.Module],
    build_batch: Callable[..., CleanBatch],
    lay_out: Callable[..., StepPlan],
) -> None:
    memory = MemoryConfig(rank=3, alpha=6.0, layer_fraction=0.5)
    plan = lay_out(build_batch(), memory)
    losses = []
    initial = None
    for name in ("cpu", "cuda"):
        device = torch.device(name)
        model = build_model("llada", 0).to(device).train()
        step = OuterStep(model, memory)
        if initial is None:
            # Generators of different devices draw different numbers.
            initial = {
                key: value.clone() for key, value in step.initial_fast_weights(plan).tensors.items()
            }
        losses.append(step.forward(model, plan.to(device), initial=initial).loss.item())
        step.release()
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
