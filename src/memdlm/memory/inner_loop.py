"""The inner loop: write a trajectory into fast weights, K SGD steps (MemDLM Eq. 7-9).

    plan_inner_loop   on the host, before the step: states, supervised positions, coefficients
    run_inner_loop    on the device: suffix -> loss -> gradient of phi only -> clip -> SGD

Only the layers from the first adapted one on are run per step; the layers below see each state
once, without gradient, or not at all where the outer pass has already computed them; with
`memory.pre_anchor_prefix: shared_prompt`, an approximation, only at the response. Shapes:
B batch, L length, N supervised positions, b memories, K steps.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from memdlm.backbones.base import DiffusionMaskedLM
from memdlm.backbones.kv_cache import Recorded
from memdlm.backbones.layer_inputs import LayerInputs
from memdlm.backbones.partial_prefix import partial_prefix
from memdlm.backbones.row_columns import RowColumns
from memdlm.backbones.sharded import forward_goes_on
from memdlm.backbones.token_losses import weighted_sum
from memdlm.diffusion.objective import ObjectiveConfig, coefficients, row_weights
from memdlm.diffusion.states import CleanBatch, State
from memdlm.diffusion.supervision import Supervision
from memdlm.memory import across_processes
from memdlm.memory.config import MemoryConfig
from memdlm.memory.fast_weights import FastWeights
from memdlm.memory.losses import INNER_LOSSES, Prediction
from memdlm.memory.trajectories import Trajectory
from memdlm.memory.update import UpdateStats, sgd_step
from memdlm.seeding import preserved_rng

GradientObserver = Callable[[int, Mapping[str, torch.Tensor]], None]


@dataclass(frozen=True)
class InnerStep:
    """One planned step: indices into the plan's states, and what is scored."""

    source: int
    target: int
    supervision: Supervision


@dataclass(frozen=True)
class InnerPlan:
    """Everything the device needs, counted and laid out by the host.

    Attributes:
        states: Distinct token ids [B, L] int64 that steps refer to.
        anchor: Index of the outer state x_t among them; None if no step visits it.
        steps: All steps, epochs unrolled.
        logits_budget: Bytes that logits may take at a time.
        counts: What the normaliser counts in this process [steps] float32, where the memory is
            shared by all processes; None elsewhere.
        responses: Columns at which states other than the anchor pass the early layers, the rest
            being the anchor's; None: all columns.
    """

    states: tuple[torch.Tensor, ...]
    anchor: int | None
    steps: tuple[InnerStep, ...]
    logits_budget: int
    counts: torch.Tensor | None = None
    responses: RowColumns | None = None

    def to(self, device: torch.device) -> "InnerPlan":
        """Return a copy on `device`, without waiting for it."""
        return InnerPlan(
            tuple(ids.to(device, non_blocking=True) for ids in self.states),
            self.anchor,
            tuple(
                InnerStep(step.source, step.target, step.supervision.to(device))
                for step in self.steps
            ),
            self.logits_budget,
            None if self.counts is None else self.counts.to(device, non_blocking=True),
            None if self.responses is None else self.responses.to(device),
        )


@dataclass(frozen=True)
class InnerStats:
    """What the inner loop did, on the device.

    Attributes:
        losses: Weighted inner loss of every step and memory [steps, b].
        updates: Gradient norms and clipping of every step.
        alive: Memories [b] bool in which no loss or gradient was ever inf or nan.
        num_matrices: Fast matrices per memory, the base of the clipped share.
    """

    losses: torch.Tensor
    updates: tuple[UpdateStats, ...]
    alive: torch.Tensor
    num_matrices: int


def merge_stats(parts: Sequence[tuple[Sequence[int], InnerStats]], num_memories: int) -> InnerStats:
    """Return the statistics of several inner loops on some memories [n] of a batch as one [b].

    Steps that a memory did not take have loss nan and zeros. Each part comes with its memories.
    """
    if len(parts) == 1 and len(parts[0][0]) == num_memories:
        return parts[0][1]

    def spread(values: torch.Tensor, rows: Sequence[int], blank: float | bool) -> torch.Tensor:
        whole = values.new_full((*values.shape[:-1], num_memories), blank)
        whole[..., list(rows)] = values
        return whole

    losses, updates, alive = [], [], torch.ones_like(parts[0][1].alive[:1]).repeat(num_memories)
    for rows, stats in parts:
        losses.append(spread(stats.losses, rows, torch.nan))
        alive = alive & spread(stats.alive, rows, True)
        for update in stats.updates:
            updates.append(
                UpdateStats(
                    spread(update.grad_norm, rows, 0.0),
                    spread(update.num_clipped, rows, 0.0),
                    spread(update.is_finite, rows, True),
                )
            )
    return InnerStats(torch.cat(losses), tuple(updates), alive, parts[0][1].num_matrices)


def plan_inner_loop(
    trajectory: Trajectory,
    batch: CleanBatch,
    config: MemoryConfig,
    objective: ObjectiveConfig,
) -> InnerPlan:
    """Lay out `trajectory` for `run_inner_loop`; all tensors on the CPU."""
    states: list[State] = []

    def index_of(state: State) -> int:
        for index, known in enumerate(states):
            if known is state:
                return index
        states.append(state)
        return len(states) - 1

    steps = []
    counts = []
    for transition in trajectory.transitions:
        supervised = transition.supervised(config.supervision)
        factors = coefficients(
            supervised,
            counted=supervised,
            weights=row_weights(transition.t, config.weighting, objective.schedule),
            normaliser=config.normaliser,
            rows_are_independent=config.sharing == "sequence",
        )
        counts.append(float(supervised.sum() if config.normaliser == "token" else len(supervised)))
        steps.append(
            InnerStep(
                index_of(transition.source),
                index_of(transition.target),
                Supervision.pack(supervised, batch.clean, factors),
            )
        )
    anchor = next((i for i, state in enumerate(states) if state is trajectory.anchor), None)
    shared = config.sharing == "global_batch"
    return InnerPlan(
        tuple(state.ids for state in states),
        anchor,
        tuple(steps) * config.num_epochs,
        objective.logits_budget_bytes,
        torch.tensor(counts * config.num_epochs) if shared else None,
    )


def run_inner_loop(
    lm: DiffusionMaskedLM,
    fast: FastWeights,
    plan: InnerPlan,
    config: MemoryConfig,
    inputs: LayerInputs,
    anchor_hidden: torch.Tensor | None = None,
    observe: GradientObserver | None = None,
    anchor_keys: Recorded | None = None,
) -> InnerStats:
    """Write `plan` into `fast`, in place; a memory that meets inf or nan is dropped.

    Args:
        lm: The backbone, unwrapped. Its gradients, mode and random state are left as they are.
        fast: phi_0; holds phi_K afterwards.
        plan: On the same device as `lm`.
        config: Loss, learning rate and clipping.
        inputs: Attention mask and rotary embeddings of the batch.
        anchor_hidden: Hidden states [B, L, H] of the anchor before the first adapted layer, where
            the outer pass already has them.
        observe: Called with every step's index and gradients by name, before clipping.
        anchor_keys: Keys and values that the anchor had in the layers before the first adapted
            one; what a plan with `responses` needs, beside `anchor_hidden`.

    Raises:
        ValueError: If a plan with `responses` comes without them.
    """
    first = fast.placement.first_layer
    early_layers = _early_layers(lm, plan, inputs, first, anchor_hidden, anchor_keys)
    prefixes: dict[int, torch.Tensor] = {}
    if anchor_hidden is not None and plan.anchor is not None:
        prefixes[plan.anchor] = anchor_hidden.detach()

    def predict(state: int, supervision: Supervision) -> Prediction:
        if state not in prefixes:
            with torch.no_grad():
                prefixes[state] = early_layers(plan.states[state])
        return _predict(lm, prefixes[state], inputs, first, supervision)

    alive = torch.ones(fast.num_rows, dtype=torch.bool, device=inputs.position_embeddings[0].device)
    shares = across_processes.shares(plan.counts, config.normaliser)
    losses, updates = [], []
    with (
        preserved_rng(alive.device),
        fast.attached(lm.model),
        forward_goes_on(lm),
        torch.enable_grad(),
    ):
        for index, step in enumerate(plan.steps):
            for name, tensor in fast.tensors.items():
                fast.tensors[name] = tensor.detach().requires_grad_()
            total, weighted = _weighted_losses(
                step, predict, config, lm.config.vocab_size, plan.logits_budget
            )
            if shares is not None:
                total, weighted = total * shares[index], weighted * shares[index]
            values = torch.autograd.grad(total, list(fast.tensors.values()), materialize_grads=True)
            grads = dict(zip(fast.tensors, values, strict=True))
            losses.append(_per_memory(weighted, step.supervision, fast.num_rows))
            if shares is not None:
                across_processes.add_up([*grads.values(), losses[-1]])
            if observe is not None:
                observe(index, grads)
            fast.tensors, stats = sgd_step(
                fast.tensors,
                grads,
                learning_rate=config.learning_rate,
                clip_norm=config.clip_norm,
                clip_scope=config.clip_scope,
                alive=alive & losses[-1].isfinite(),
            )
            alive = alive & losses[-1].isfinite() & stats.is_finite
            updates.append(stats)
    fast.drop(alive)
    # Under autocast, weights cast here without gradient would be reused by the outer pass.
    torch.clear_autocast_cache()
    return InnerStats(torch.stack(losses), tuple(updates), alive, _count_matrices(fast))


def _early_layers(
    lm: DiffusionMaskedLM,
    plan: InnerPlan,
    inputs: LayerInputs,
    first_layer: int,
    anchor_hidden: torch.Tensor | None,
    anchor_keys: Recorded | None,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what takes token ids [B, L] to hidden states before `first_layer` [B, L, H]."""
    columns = plan.responses
    if columns is None:
        return lambda ids: lm.model.prefix(ids, inputs, first_layer)
    if anchor_hidden is None or anchor_keys is None:
        raise ValueError("a plan with responses needs the anchor's hidden states, keys and values")
    hidden = anchor_hidden.detach()
    return lambda ids: partial_prefix(
        lm.model, ids, inputs, first_layer, columns, anchor_keys, hidden
    )


def _weighted_losses(
    step: InnerStep,
    predict: Callable[[int, Supervision], Prediction],
    config: MemoryConfig,
    vocabulary: int,
    logits_budget: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of one step, and what each token adds to it [N], detached."""
    loss_fn = INNER_LOSSES[config.loss]
    teacher = None
    if loss_fn.needs_teacher:
        with torch.no_grad():
            teacher = predict(step.target, step.supervision)
    student = predict(step.source, step.supervision)
    labels, factors = step.supervision.labels, step.supervision.coefficients
    if not loss_fn.needs_logits:
        weighted = loss_fn.compute(student, teacher, labels, config) * factors
        return weighted.sum(), weighted.detach()

    def compute(normed: torch.Tensor, span: slice) -> torch.Tensor:
        ours = replace(student.part(span), normed=normed)
        theirs = None if teacher is None else teacher.part(span)
        return loss_fn.compute(ours, theirs, labels[span], config)

    total, losses = weighted_sum(compute, student.normed, factors, vocabulary, logits_budget)
    return total, losses * factors


def _count_matrices(fast: FastWeights) -> int:
    return sum(
        tensor[0].numel() // (tensor.shape[-1] * tensor.shape[-2])
        for tensor in fast.tensors.values()
    )


def _predict(
    lm: DiffusionMaskedLM,
    hidden: torch.Tensor,
    inputs: LayerInputs,
    first_layer: int,
    supervision: Supervision,
) -> Prediction:
    """Run the adapted layers on `hidden` [B, L, H], narrowed to the supervised positions."""
    hidden = lm.model.run_layers(
        hidden,
        inputs,
        first_layer,
        len(lm.model.layers),
        lm.source_positions(supervision.positions),
    )
    hidden = supervision.select(hidden)  # [N, H]
    return Prediction(hidden, lm.model.norm(hidden), lm.lm_head)


def _per_memory(weighted: torch.Tensor, supervision: Supervision, num_rows: int) -> torch.Tensor:
    """Sum token losses [N] into their memories [b]."""
    if num_rows == 1:
        return weighted.sum()[None]
    totals = weighted.new_zeros(num_rows)
    return totals.index_add_(0, supervision.rows, weighted)
