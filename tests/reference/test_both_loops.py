"""The whole step, inner and outer, against the plain transcription."""

import pytest
import torch

from memdlm.diffusion.objective import ObjectiveConfig
from memdlm.memory.config import LOSS_NAMES, MemoryConfig
from memdlm.memory.trajectories import TrajectoryRequest, build_trajectory
from memdlm.training.outer_step import OuterStep, lay_out_step
from tests.reference import plain

# Row 1 hides little, row 2 has no masked token, row 3 hides all of its response.
HIDDEN = {0: [4, 6, 7, 10], 1: [5], 2: [], 3: [3, 4, 5, 6, 7]}
LENGTHS = (12, 9, 7, 8)


def lay_out(batch, memory, objective, mask_token_id):
    masked = torch.zeros_like(batch.maskable)
    for row, positions in HIDDEN.items():
        masked[row, positions] = True
    anchor = batch.state(masked, mask_token_id)
    t = torch.tensor([0.5, 0.2, 0.1, 0.9])
    draws = torch.Generator().manual_seed(3)
    trajectory = build_trajectory(TrajectoryRequest(batch, anchor, t, memory, mask_token_id, draws))
    plan = lay_out_step(batch, anchor, t, trajectory, objective, memory, (0, 1, 0, 0))
    return trajectory, plan, t


def omega(t):
    return 1 / (1 - (1 - t) + 1e-6)


def rows_of_step(step, batch, memory, members, lengths):
    """Cut every row to its real length and attach its weight, normalised within the memory."""
    supervised = step.supervised(memory.supervision)
    count = sum(int(supervised[row].sum()) for row in members)
    return [
        (
            step.source.ids[row, : lengths[row]],
            step.target.ids[row, : lengths[row]],
            batch.clean[row, : lengths[row]],
            supervised[row].nonzero()[:, 0].tolist(),
            omega(step.t[row].double()) / max(count, 1),
        )
        for row in members
    ]


def check(model, batch, memory, tolerance=2e-5):
    objective = ObjectiveConfig(padding="excluded")
    trajectory, plan, t = lay_out(batch, memory, objective, model.config.mask_token_id)
    step = OuterStep(model, memory)
    start = step.initial_fast_weights(plan)
    initial = {name: tensor.clone() for name, tensor in start.tensors.items()}
    for name in initial:  # B = 0 would hide half of the equations in the first step
        if not name.endswith(".A"):
            draws = torch.Generator().manual_seed(len(name))
            shape = initial[name].shape
            initial[name] = 0.05 * torch.randn(shape, generator=draws)
    result = step.forward(model, plan, initial)
    result.loss.backward()
    step.release()

    reference = plain.PlainModel(model)
    groups = [[row] for row in range(4)] if memory.sharing == "sequence" else [list(range(4))]
    outer = torch.zeros((), dtype=torch.float64)
    direction = {
        name: torch.randn(value.shape, generator=torch.Generator().manual_seed(i)).double()
        for i, (name, value) in enumerate(model.named_parameters())
    }
    shifted = {1: plain.PlainModel(model), -1: plain.PlainModel(model)}
    epsilon = 1e-5
    for sign, moved in shifted.items():
        for name, value in direction.items():
            moved.weights[name] = moved.weights[name] + sign * epsilon * value
    differences = 0.0
    for index, members in enumerate(groups):
        steps = [
            rows_of_step(transition, batch, memory, members, LENGTHS)
            for transition in trajectory.transitions
        ]
        fast, losses, grads = plain.inner_loop(
            reference,
            {name: tensor[index] for name, tensor in initial.items()},
            start.scale,
            steps,
            memory,
            memory.num_epochs,
        )
        torch.testing.assert_close(
            result.inner.losses[:, index].double(),
            torch.tensor(losses).double(),
            rtol=1e-5,
            atol=1e-6,
        )
        for name, tensor in fast.items():
            ours = result.fast_weights.tensors[name][index].double()
            moved = max(float((tensor - initial[name][index]).norm()), 1e-2)
            assert float((ours - tensor).norm()) <= tolerance * moved, name
        for update, grad in zip(result.inner.updates, grads, strict=True):
            norm = torch.stack([g.norm() for g in grad.values()]).norm()
            torch.testing.assert_close(update.grad_norm[index].double(), norm, rtol=1e-4, atol=1e-6)
        # the outer loss with phi_K, and its finite difference with phi_K held fixed
        counted = int(batch.maskable.sum())
        for row in members:
            ids = plan.noisy[row, : LENGTHS[row]]
            for position in HIDDEN[row]:
                weight = omega(t[row].double()) / counted
                label = batch.clean[row, position]
                outer -= (
                    weight * reference.log_probabilities(ids, fast, start.scale)[position, label]
                )
                for sign, moved in shifted.items():
                    value = moved.log_probabilities(ids, fast, start.scale)[position, label]
                    differences -= sign * float(weight * value) / (2 * epsilon)
    torch.testing.assert_close(result.loss.double(), outer, rtol=1e-5, atol=0)
    slope = sum(
        float((parameter.grad.double() * direction[name]).sum())
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    )
    assert slope == pytest.approx(differences, rel=2e-4)


@pytest.fixture
def batch(build_batch):
    return build_batch(LENGTHS).without_padding()


@pytest.mark.parametrize("sharing", ["sequence", "batch"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_kinds_and_sharings(family, kind, sharing, build_model, batch):
    memory = MemoryConfig(kind=kind, sharing=sharing, rank=3, alpha=6.0, layer_fraction=0.5)
    check(build_model(family), batch, memory)


@pytest.mark.parametrize("loss", LOSS_NAMES)
def test_inner_losses(loss, build_model, batch):
    memory = MemoryConfig(loss=loss, rank=3, alpha=6.0, layer_fraction=0.25, num_steps=3)
    check(build_model("llada"), batch, memory)


def test_kl_and_newly_revealed_on_experts(build_model, batch):
    memory = MemoryConfig(
        loss="kl", supervision="newly_revealed", rank=2, layer_fraction=0.25, num_steps=3
    )
    check(build_model("llada_moe"), batch, memory)


@pytest.mark.parametrize(
    ("clip_norm", "clip_scope"),
    [(None, "local"), (0.05, "local"), (0.05, "global"), (2.0, "global")],
)
def test_clipping(family, clip_norm, clip_scope, build_model, batch):
    memory = MemoryConfig(
        clip_norm=clip_norm, clip_scope=clip_scope, rank=3, alpha=6.0, layer_fraction=0.25
    )
    check(build_model(family), batch, memory)


def test_several_epochs_and_attention(build_model, batch):
    memory = MemoryConfig(
        scope="ffn_attention", num_epochs=2, rank=2, alpha=4.0, layer_fraction=0.5
    )
    check(build_model("llada"), batch, memory)


def test_one_and_four_steps(build_model, batch):
    for num_steps in (1, 4):
        memory = MemoryConfig(num_steps=num_steps, rank=2, alpha=4.0, layer_fraction=0.25)
        check(build_model("llada"), batch, memory)


@pytest.mark.parametrize(
    ("loss", "supervision"),
    [("cross_entropy", "masked"), ("kl", "newly_revealed"), ("hidden_mse", "masked")],
)
def test_a_backbone_that_predicts_the_next_token(loss, supervision, build_model, batch):
    memory = MemoryConfig(
        loss=loss,
        supervision=supervision,
        scope="ffn_attention",
        rank=3,
        alpha=6.0,
        layer_fraction=0.5,
    )
    # float64, since the slope in the direction drawn is small beside its float32 terms
    check(build_model("dream").double(), batch, memory)
