"""A naive MemDLM step, kept as an oracle: slow, plain, and the same numbers as the library's.

It runs the whole network for every inner step and again for the outer pass, and computes logits at
all positions, as the published code does. It knows `model(input_ids)` and the equations only: no
split forward, no packed positions, no plans. It shares the fast weights and their SGD step with the
library, since both must start from the same phi_0 and clip alike.

Covers the paper's settings: cross-entropy on all masked tokens (MemDLM Eq. 8), weights omega(t),
token normalisers, padding attended to. Shapes: B batch, L length, V vocabulary, b memories.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from memdlm.backbones import DiffusionMaskedLM
from memdlm.backbones.wrapping import unwrap
from memdlm.diffusion.objective import ObjectiveConfig
from memdlm.diffusion.schedule import get_schedule
from memdlm.diffusion.states import CleanBatch, State
from memdlm.memory.config import MemoryConfig
from memdlm.memory.fast_weights import FastWeights
from memdlm.memory.placement import place
from memdlm.memory.trajectories import Trajectory
from memdlm.memory.update import sgd_step
from memdlm.seeding import generator


@dataclass(frozen=True)
class NaiveResult:
    """What one naive step leaves behind; gradients are on the model's parameters.

    Attributes:
        loss: Outer loss, a detached scalar.
        inner_losses: Inner loss of every step, summed over memories.
        fast_weights: phi_K.
    """

    loss: torch.Tensor
    inner_losses: tuple[torch.Tensor, ...]
    fast_weights: FastWeights


def naive_memdlm_step(
    model: nn.Module,
    batch: CleanBatch,
    anchor: State,
    t: torch.Tensor,
    trajectory: Trajectory,
    objective: ObjectiveConfig,
    memory: MemoryConfig,
    seed_indices: tuple[int, ...],
) -> NaiveResult:
    """Run forward and backward of one MemDLM step, everything from scratch every time.

    Args:
        model: A backbone, wrapped or not.
        batch: Clean tokens and maskable positions, on the CPU.
        anchor: Outer state x_t.
        t: Time of the anchor [B] float32.
        trajectory: Inner steps.
        objective: Schedule and weights.
        memory: Fast weights and inner loop.
        seed_indices: (seed, step, micro-batch, rank) as in `plan_step`; names phi_0.

    Raises:
        ValueError: For settings that the oracle does not cover.
    """
    _check_covered(objective, memory)
    backbone = unwrap(model)
    device = backbone.lm_head.weight.device
    schedule = get_schedule(objective.schedule)
    clean = batch.clean.to(device)
    fast = _initial_fast_weights(backbone, memory, clean.shape[0], device, seed_indices)
    alive = torch.ones(fast.num_rows, dtype=torch.bool, device=device)

    inner_losses = []
    for transition in trajectory.transitions * memory.num_epochs:
        supervised = transition.source.masked
        # One memory per sequence: every row is normalised as if it were alone.
        divisor = supervised.sum(dim=1) if memory.sharing == "sequence" else supervised.sum()
        weights = supervised * (schedule.weight(transition.t) / divisor.clamp(min=1))[:, None]
        fast.tensors = {
            name: tensor.detach().requires_grad_() for name, tensor in fast.tensors.items()
        }
        with fast.attached(backbone.model):
            loss = weighted_loss(model, transition.source.ids.to(device), clean, weights.to(device))
            grads = torch.autograd.grad(loss, list(fast.tensors.values()))
        fast.tensors, _ = sgd_step(
            fast.tensors,
            dict(zip(fast.tensors, grads, strict=True)),
            learning_rate=memory.learning_rate,
            clip_norm=memory.clip_norm,
            clip_scope=memory.clip_scope,
            alive=alive,
        )
        inner_losses.append(loss.detach())

    weights = anchor.masked * (schedule.weight(t) / batch.maskable.sum())[:, None]
    with fast.attached(backbone.model):
        loss = weighted_loss(model, anchor.ids.to(device), clean, weights.to(device))
        loss.backward()
    return NaiveResult(loss.detach(), tuple(inner_losses), fast)


def weighted_loss(
    model: nn.Module, noisy: torch.Tensor, clean: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Return sum(weights * -log p(clean)) with logits [B, L, V] at every position of `noisy`."""
    logits = model(input_ids=noisy).logits.float()
    nll = F.cross_entropy(logits.flatten(0, 1), clean.flatten(), reduction="none")
    return (nll.view_as(weights) * weights).sum()


def _initial_fast_weights(
    backbone: DiffusionMaskedLM,
    memory: MemoryConfig,
    batch_size: int,
    device: torch.device,
    seed_indices: tuple[int, ...],
) -> FastWeights:
    seed, *indices = seed_indices
    source = "cpu" if device.type == "meta" else device
    return FastWeights(
        place(backbone.model, memory),
        memory,
        1 if memory.sharing == "batch" else batch_size,
        device,
        generator(seed, "fast_weights", *indices, device=source),
    )


def _check_covered(objective: ObjectiveConfig, memory: MemoryConfig) -> None:
    covered = {
        "memory.loss": (memory.loss, "cross_entropy"),
        "memory.supervision": (memory.supervision, "masked"),
        "memory.weighting": (memory.weighting, "schedule"),
        "memory.normaliser": (memory.normaliser, "token"),
        "memory.pre_anchor_prefix": (memory.pre_anchor_prefix, "exact"),
        "objective.weighting": (objective.weighting, "schedule"),
        "objective.normaliser": (objective.normaliser, "token"),
        "objective.padding": (objective.padding, "supervised"),
    }
    for name, (value, expected) in covered.items():
        if value != expected:
            raise ValueError(f"{name}: the naive oracle covers {expected!r} only, not {value!r}")
