import math

import pytest
import torch

from memdlm.memory.update import sgd_step
from tests.reference import plain


def tensors_and_grads(rows=3):
    """Fast weights of one linear layer and one stack of two experts, one gradient large."""
    draws = torch.Generator().manual_seed(0)
    shapes = {"a.A": (rows, 2, 5), "a.B": (rows, 4, 2), "e.A": (rows, 2, 2, 5)}
    tensors = {name: torch.randn(shape, generator=draws) for name, shape in shapes.items()}
    grads = {name: torch.randn(shape, generator=draws) for name, shape in shapes.items()}
    grads["e.A"][:, 0] *= 0.01
    return tensors, grads


def step(tensors, grads, alive=None, **settings):
    defaults = {"learning_rate": 0.1, "clip_norm": 1.0, "clip_scope": "local"}
    alive = torch.ones(3, dtype=torch.bool) if alive is None else alive
    return sgd_step(tensors, grads, alive=alive, **{**defaults, **settings})


@pytest.mark.parametrize("clip_norm", [None, 0.3, 2.0, 100.0])
@pytest.mark.parametrize("clip_scope", ["local", "global"])
def test_every_row_and_matrix_is_clipped_as_in_a_hand_loop(clip_norm, clip_scope):
    tensors, grads = tensors_and_grads()
    updated, stats = step(tensors, grads, clip_norm=clip_norm, clip_scope=clip_scope)
    for row in range(3):
        mine = {name: grad[row].double() for name, grad in grads.items()}
        clipped = plain.clip(mine, clip_norm, clip_scope)
        for name, tensor in tensors.items():
            expected = tensor[row].double() - 0.1 * clipped[name]
            torch.testing.assert_close(updated[name][row].double(), expected, rtol=1e-6, atol=1e-7)
        joint = math.sqrt(sum(float(grad.square().sum()) for grad in mine.values()))
        assert stats.grad_norm[row].item() == pytest.approx(joint, rel=1e-6)


def test_clipped_matrices_are_counted_one_by_one():
    tensors, grads = tensors_and_grads()
    norms = [[float(grads[n][r].norm()) for n in ("a.A", "a.B")] for r in range(3)]
    norms = [row + [float(m.norm()) for m in grads["e.A"][r]] for r, row in enumerate(norms)]
    _, stats = step(tensors, grads, clip_norm=1.0)
    assert stats.num_clipped.tolist() == [sum(norm > 1.0 for norm in row) for row in norms]
    _, stats = step(tensors, grads, clip_norm=1.0, clip_scope="global")
    assert stats.num_clipped.tolist() == [4, 4, 4]  # a joint norm above the limit scales them all
    _, stats = step(tensors, grads, clip_norm=None)
    assert stats.num_clipped.tolist() == [0, 0, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("clip_scope", ["local", "global"])
def test_a_non_finite_gradient_freezes_its_own_memory_only(bad, clip_scope):
    tensors, grads = tensors_and_grads()
    expected, _ = step(tensors, grads, clip_scope=clip_scope)
    grads["a.B"][1, 0, 0] = bad
    updated, stats = step(tensors, grads, clip_scope=clip_scope)
    assert stats.is_finite.tolist() == [True, False, True]
    for name, tensor in tensors.items():
        assert torch.equal(updated[name][1], tensor[1])
        assert torch.equal(updated[name][0], expected[name][0])
        assert torch.equal(updated[name][2], expected[name][2])


def test_a_dead_memory_stays_where_it_is():
    tensors, grads = tensors_and_grads()
    updated, _ = step(tensors, grads, alive=torch.tensor([True, False, True]))
    assert torch.equal(updated["a.A"][1], tensors["a.A"][1])
    assert not torch.equal(updated["a.A"][0], tensors["a.A"][0])
    assert not any(tensor.requires_grad for tensor in updated.values())
