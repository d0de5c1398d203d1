"""The outer step: the weighted MDLM loss at the anchor, conditioned on phi_K (MemDLM Eq. 3, 10).

    plan_step    on the host: t, anchor x_t, supervised positions, trajectory
    OuterStep    on the device: one forward of the model, with the inner loop as its interlude

First order: phi_K is a constant of the outer gradient. Without a memory this is Standard MDLM, the
same code and the same draws. Shapes: B batch, L length, N supervised positions.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from memdlm.backbones.base import Interlude
from memdlm.backbones.kv_cache import KeyRecorder
from memdlm.backbones.layer_inputs import LayerInputs
from memdlm.backbones.row_columns import RowColumns
from memdlm.backbones.token_losses import Scored
from memdlm.backbones.wrapping import unwrap
from memdlm.diffusion.corruption import corrupt, draw_time
from memdlm.diffusion.objective import ObjectiveConfig, coefficients, row_weights
from memdlm.diffusion.schedule import get_schedule
from memdlm.diffusion.states import CleanBatch, State
from memdlm.diffusion.supervision import Supervision
from memdlm.errors import ConfigError
from memdlm.memory.config import MemoryConfig
from memdlm.memory.fast_weights import FastWeights
from memdlm.memory.inner_loop import (
    GradientObserver,
    InnerPlan,
    InnerStats,
    plan_inner_loop,
    run_inner_loop,
)
from memdlm.memory.placement import Placement, place
from memdlm.memory.trajectories import Trajectory, TrajectoryRequest, build_trajectory
from memdlm.seeding import generator


@dataclass(frozen=True)
class StepPlan:
    """Everything one training step needs, drawn and counted by the host.

    Attributes:
        noisy: Outer input x_t [B, L] int64.
        attention_mask: Real tokens [B, L], or None where padding is attended to.
        supervision: Masked positions of x_t with labels and coefficients.
        inner: The inner loop; None for Standard MDLM.
        num_rows: Memories to write.
        seed_indices: (seed, step, micro-batch, rank) that name this step's random draws.
        logits_budget: Bytes that logits may take at a time.
    """

    noisy: torch.Tensor
    attention_mask: torch.Tensor | None
    supervision: Supervision
    inner: InnerPlan | None
    num_rows: int
    seed_indices: tuple[int, ...]
    logits_budget: int

    def to(self, device: torch.device) -> "StepPlan":
        """Return a copy on `device`, without waiting for it."""
        mask = self.attention_mask
        return StepPlan(
            self.noisy.to(device, non_blocking=True),
            None if mask is None else mask.to(device, non_blocking=True),
            self.supervision.to(device),
            None if self.inner is None else self.inner.to(device),
            self.num_rows,
            self.seed_indices,
            self.logits_budget,
        )


def plan_step(
    batch: CleanBatch,
    objective: ObjectiveConfig,
    memory: MemoryConfig,
    mask_token_id: int,
    seed_indices: tuple[int, ...],
) -> StepPlan:
    """Draw one step from named random streams; the outer draws do not depend on `memory`.

    Args:
        batch: Clean tokens on the CPU.
        objective: Schedule, weights, normaliser, padding.
        memory: With `enabled` off the plan has no inner loop.
        mask_token_id: Id of the mask token.
        seed_indices: (seed, step, micro-batch, rank).
    """
    if objective.padding == "excluded":
        batch = batch.without_padding()
    seed, *indices = seed_indices
    draws = generator(seed, "outer_mask", *indices)
    t = draw_time(batch.clean.shape[0], objective.time_epsilon, draws)
    anchor = corrupt(batch, t, get_schedule(objective.schedule), mask_token_id, draws)
    trajectory = None
    if memory.enabled:
        inner_batch, inner_anchor = inner_view(batch, anchor, objective, mask_token_id)
        draws = generator(seed, "trajectory", *indices)
        trajectory = build_trajectory(
            TrajectoryRequest(inner_batch, inner_anchor, t, memory, mask_token_id, draws)
        )
    return lay_out_step(batch, anchor, t, trajectory, objective, memory, seed_indices)


def check_prefix(memory: MemoryConfig, objective: ObjectiveConfig) -> None:
    """Refuse to share the prompt's early layers where prompt and padding are not the anchor's.

    Raises:
        ConfigError: For `shared_prompt` with `excluded_inner`.
    """
    if memory.pre_anchor_prefix == "shared_prompt" and objective.padding == "excluded_inner":
        raise ConfigError(
            "memory.pre_anchor_prefix: shared_prompt needs inner states whose padding is the outer "
            "state's, unlike objective.padding: excluded_inner; use exact, or padding: excluded"
        )


def inner_view(
    batch: CleanBatch, anchor: State, objective: ObjectiveConfig, mask_token_id: int
) -> tuple[CleanBatch, State]:
    """Return batch and anchor as the inner loop sees them.

    Only `excluded_inner` makes a difference: there the inner loop shows padding that the outer loop
    masks, so its anchor is another state and shares no layers with the outer pass.
    """
    if objective.padding != "excluded_inner":
        return batch, anchor
    batch = batch.without_padding()
    return batch, batch.state(anchor.masked & batch.maskable, mask_token_id)


def lay_out_step(
    batch: CleanBatch,
    anchor: State,
    t: torch.Tensor,
    trajectory: Trajectory | None,
    objective: ObjectiveConfig,
    memory: MemoryConfig,
    seed_indices: tuple[int, ...],
) -> StepPlan:
    """Turn drawn states into a plan; `t` [B] weighs the outer loss (see `plan_step`).

    Raises:
        ConfigError: See `check_prefix`.
    """
    factors = coefficients(
        anchor.masked,
        counted=batch.maskable,
        weights=row_weights(t, objective.weighting, objective.schedule),
        normaliser=objective.normaliser,
    )
    inner = None
    if trajectory is not None:
        inner_batch = batch if objective.padding == "supervised" else batch.without_padding()
        inner = plan_inner_loop(trajectory, inner_batch, memory, objective)
        if trajectory.anchor is not anchor:
            inner = replace(inner, anchor=None)
        if memory.pre_anchor_prefix == "shared_prompt":
            check_prefix(memory, objective)
            inner = replace(inner, responses=RowColumns.pack(inner_batch.maskable))
    return StepPlan(
        noisy=anchor.ids,
        attention_mask=(~batch.padding).long() if objective.padding == "excluded" else None,
        supervision=Supervision.pack(anchor.masked, batch.clean, factors),
        inner=inner,
        num_rows=batch.clean.shape[0] if memory.sharing == "sequence" else 1,
        seed_indices=seed_indices,
        logits_budget=objective.logits_budget_bytes,
    )


@dataclass(frozen=True)
class OuterResult:
    """What one outer forward gives, on the device.

    Attributes:
        loss: Weighted MDLM loss, a scalar to call `backward()` on.
        nll: Unweighted negative log-likelihood of every supervised token [N], detached.
        logits: Logits at the supervised positions [N, V], detached; None unless asked for.
        inner: What the inner loop did; None without a memory.
        fast_weights: phi_K; None without a memory.
    """

    loss: torch.Tensor
    nll: torch.Tensor
    logits: torch.Tensor | None
    inner: InnerStats | None
    fast_weights: FastWeights | None


class OuterStep:
    """Runs outer forwards of one model and keeps the memory attached until released.

    The memory must outlive the backward pass (gradient checkpointing runs the layers again), so the
    caller releases it: `forward`, `loss.backward()`, `release`.
    """

    def __init__(self, model: nn.Module, memory: MemoryConfig) -> None:
        """Find the backbone in `model` and the memory's place in it.

        Raises:
            ConfigError: If the memory's scope selects no module.
            UsageError: If `model` holds no backbone.
        """
        self.memory = memory
        self.backbone = unwrap(model)
        self.placement: Placement | None = None
        if memory.enabled:
            self.placement = place(self.backbone.model, memory)
        self._detach: Callable[[], None] | None = None

    def forward(
        self,
        model: nn.Module,
        plan: StepPlan,
        initial: dict[str, torch.Tensor] | None = None,
        observe: GradientObserver | None = None,
        *,
        keep_logits: bool = False,
    ) -> OuterResult:
        """Run the step of `plan` through `model` (the backbone, wrapped or not).

        Args:
            model: What to call; DDP, FSDP2 and PEFT wrappers see one ordinary forward.
            plan: On the model's device.
            initial: Fast weights to start from in place of random ones.
            observe: Sees every inner gradient; see `run_inner_loop`.
            keep_logits: Return the logits at all supervised positions, whatever they take.
        """
        self.release()
        fast: FastWeights | None = None
        stats: InnerStats | None = None
        interlude = None
        if plan.inner is not None:
            assert self.placement is not None
            inner_plan = plan.inner
            recorder = None if inner_plan.responses is None else KeyRecorder()
            fast = self.initial_fast_weights(plan)
            if initial is not None:
                fast.load(initial)

            def write_and_attach(hidden: torch.Tensor, inputs: LayerInputs) -> None:
                nonlocal stats
                stats = run_inner_loop(
                    self.backbone,
                    fast,
                    inner_plan,
                    self.memory,
                    inputs,
                    hidden,
                    observe,
                    None if recorder is None else recorder.take(),
                )
                self._detach = fast.attach(self.backbone.model)

            interlude = Interlude(self.placement.first_layer, write_and_attach, recorder)
        scored = plan.supervision
        output = model(
            input_ids=plan.noisy,
            attention_mask=plan.attention_mask,
            positions=scored.positions,
            valid=scored.valid,
            scored=Scored(scored.labels, scored.coefficients, plan.logits_budget, keep_logits),
            interlude=interlude,
        )
        return OuterResult(output.loss, output.nll, output.logits, stats, fast)

    def release(self) -> None:
        """Take the memory off the model; harmless when there is none."""
        if self._detach is not None:
            self._detach()
            self._detach = None

    def initial_fast_weights(self, plan: StepPlan) -> FastWeights:
        """Return phi_0 as `forward` would draw it for `plan`; memory must be enabled."""
        assert self.placement is not None
        device = plan.noisy.device
        seed, *indices = plan.seed_indices
        if self.memory.sharing == "global_batch":
            indices[-1] = 0  # one memory: every rank starts from the same
        # A meta tensor has no values to draw; its generator is the CPU's.
        source = torch.device("cpu") if device.type == "meta" else device
        return FastWeights(
            self.placement,
            self.memory,
            plan.num_rows,
            device,
            generator(seed, "fast_weights", *indices, device=source),
        )
