"""What training asks of a backbone: gradients that are true, with and without a memory."""

import pytest
import torch
from torch.nn import functional as F

from memdlm.diffusion.objective import ObjectiveConfig
from memdlm.memory.config import MemoryConfig
from memdlm.training.outer_step import OuterStep, plan_step
from tests.families import MASK

MEMORY = MemoryConfig(loss="kl", scope="ffn_attention", rank=3, alpha=6.0, layer_fraction=0.5)


def one_step(model, batch, memory):
    """Run forward and backward of one step; return its result."""
    plan = plan_step(batch, ObjectiveConfig(), memory, MASK, (0, 4, 0, 0))
    step = OuterStep(model, memory)
    try:
        result = step.forward(model, plan)
        result.loss.backward()
    finally:
        step.release()
    return result


def test_gradients_are_the_slope_of_the_loss(family, build_model):
    def loss_of(model):
        logits = model(ids).logits  # float64; a loss asked for by `labels` is float32
        return F.cross_entropy(logits.flatten(0, 1), ids.flatten())

    model = build_model(family).double()
    ids = torch.arange(22).view(2, 11)
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        direction = [
            torch.randn(p.shape, generator=draws, dtype=p.dtype) for p in model.parameters()
        ]
    loss_of(model).backward()
    slope = 0.0
    for (name, parameter), towards in zip(model.named_parameters(), direction, strict=True):
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
        slope += float((parameter.grad * towards).sum())
    epsilon = 1e-4  # norms and rotations are computed in float32 whatever the weights' type
    losses = []
    with torch.no_grad():
        for sign in (1, -2):  # to one side, then from there to the other
            for parameter, towards in zip(model.parameters(), direction, strict=True):
                parameter += sign * epsilon * towards
            losses.append(float(loss_of(model)))
    assert (losses[0] - losses[1]) / (2 * epsilon) == pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize("is_narrow", [False, True], ids=["no memory", "memory"])
def test_gradient_checkpointing_gives_the_same_step(family, is_narrow, build_model, build_batch):
    memory = MEMORY if is_narrow else MemoryConfig(enabled=False)
    results, grads = [], []
    for is_checkpointed in (False, True):
        model = build_model(family).train()
        if is_checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        results.append(one_step(model, build_batch(), memory))
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert torch.equal(results[0].loss, results[1].loss)
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-6, atol=1e-7)
    if is_narrow:
        for name, tensor in results[0].fast_weights.tensors.items():
            assert torch.equal(results[1].fast_weights.tensors[name], tensor), name


def test_a_step_in_bf16_stays_near_the_one_in_fp32(family, build_model, build_batch):
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        model = build_model(family).to(dtype).train()
        result = one_step(model, build_batch(), MEMORY)
        assert result.inner.alive.all()
        for name, parameter in model.named_parameters():
            assert parameter.grad.dtype == dtype and parameter.grad.isfinite().all(), name
        losses.append(result.loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
