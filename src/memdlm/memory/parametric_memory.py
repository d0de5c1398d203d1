"""Parametric memory phi_K: write it from tokens, use it in a `with` block, erase it (MemDLM Eq. 9).

The public face of this package for inference. Each row of a batch gets a memory of its own, which
depends on that row's tokens and the seed alone, never on the other rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from memdlm.backbones.base import DiffusionMaskedLM
from memdlm.diffusion.corruption import corrupt
from memdlm.diffusion.objective import ObjectiveConfig
from memdlm.diffusion.schedule import get_schedule
from memdlm.diffusion.states import CleanBatch, State
from memdlm.errors import ConfigError, DataError, UsageError
from memdlm.memory.config import MemoryConfig
from memdlm.memory.fast_weights import FastWeights
from memdlm.memory.inner_loop import InnerStats, plan_inner_loop, run_inner_loop
from memdlm.memory.placement import place
from memdlm.memory.trajectories import (
    Trajectory,
    TrajectoryRequest,
    Transition,
    build_trajectory,
)
from memdlm.seeding import generator

# Backbones that answer with a memory at this moment. Linear layers would add a second one and
# experts would replace the first, so there is never more than one.
_IN_USE: "WeakSet[nn.Module]" = WeakSet()


def unwrap(model: nn.Module) -> DiffusionMaskedLM:
    """Return the backbone inside wrappers such as PEFT's and DDP's.

    Raises:
        UsageError: If there is none.
    """
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, DiffusionMaskedLM):
            return module
    raise UsageError(
        f"{type(model).__name__} holds no memdlm backbone; load the checkpoint with "
        "AutoModelForMaskedLM.from_pretrained after `import memdlm`"
    )


class ParametricMemory:
    """Fast weights written from tokens, kept until erased.

    Example:
        >>> memory = ParametricMemory(model, MemoryConfig())
        >>> memory.write(prompt_ids)
        >>> with memory.attached():
        ...     logits = model(canvas_ids).logits
        >>> memory.erase()
    """

    def __init__(
        self,
        model: nn.Module,
        config: MemoryConfig | None = None,
        objective: ObjectiveConfig | None = None,
    ) -> None:
        """Prepare a memory for `model`; nothing is allocated before `write`.

        Args:
            model: A backbone, possibly inside PEFT or DDP.
            config: Placement and inner loop; the paper's settings by default.
            objective: Noise schedule that draws the anchor.

        Raises:
            ConfigError: If memory is disabled or its scope selects no module.
            UsageError: If `model` holds no backbone.
        """
        self.config = config or MemoryConfig()
        if not self.config.enabled:
            raise ConfigError("memory.enabled is off; a ParametricMemory needs it on")
        self.objective = objective or ObjectiveConfig()
        self.backbone = unwrap(model)
        self.placement = place(self.backbone.model, self.config)
        self.fast_weights: FastWeights | None = None
        self.stats: InnerStats | None = None

    @property
    def is_written(self) -> bool:
        """Whether there is something to attach."""
        return self.fast_weights is not None

    @torch.inference_mode(False)  # a caller that decodes may be in it, and nothing could be learnt
    def write(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        seed: int = 0,
    ) -> InnerStats:
        """Run the inner loop on `input_ids` and keep the result, replacing what was there.

        All real tokens may be masked; the anchor's ratio is `config.prompt_mask_ratio`. The model
        runs in eval mode; weights, gradients, mode and random state are left as they were.

        Args:
            input_ids: Tokens to remember [B, L] int64.
            attention_mask: 1 on real tokens, 0 on padding [B, L]; None means no padding.
            seed: Decides masks and initial fast weights, the same way for every row.

        Raises:
            DataError: If a row is empty or the backbone has no mask token.
            UsageError: If a tensor is of another shape or type, or a memory is attached.
        """
        _check_tokens(input_ids, attention_mask)
        self._check_free("write")
        trajectory, batch = self._prompt_trajectory(input_ids.cpu(), attention_mask, seed)
        device = self.backbone.lm_head.weight.device
        num_rows = 1 if self.config.sharing == "batch" else input_ids.shape[0]
        fast = FastWeights(
            self.placement,
            self.config,
            num_rows,
            device,
            generator(seed, "fast_weights", device=device),
        )
        config = replace(self.config, weighting=self.config.prompt_weighting)
        plan = plan_inner_loop(trajectory, batch, config, self.objective).to(device)
        mask = None if attention_mask is None else attention_mask.to(device, copy=True)
        was_training = [module for module in self.backbone.modules() if module.training]
        self.backbone.eval()
        try:
            with torch.no_grad():
                _, inputs = self.backbone.model.embed(plan.states[0], mask)
            stats = run_inner_loop(self.backbone, fast, plan, config, inputs)
        finally:
            for module in was_training:
                module.training = True
        self.fast_weights, self.stats = fast, stats
        return stats

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Let every forward of the model within the block use the memory.

        Raises:
            UsageError: If nothing has been written or a memory is attached already; and, from a
                forward within the block, if its batch has not as many rows as the memory (any
                number will do for a shared one).
        """
        if self.fast_weights is None:
            raise UsageError("the memory is empty; call write(input_ids) before attached()")
        self._check_free("attach")
        num_rows = self.fast_weights.num_rows

        def check_rows(layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            if num_rows not in (1, args[0].shape[0]):
                raise UsageError(
                    f"the memory was written from {num_rows} rows, but the batch has "
                    f"{args[0].shape[0]}; write it from that batch, or set memory.sharing: batch"
                )

        # Deltas see flattened tokens and could not tell rows of another number apart.
        first = self.backbone.model.layers[self.placement.first_layer]
        handle = first.register_forward_pre_hook(check_rows)
        _IN_USE.add(self.backbone)
        try:
            with self.fast_weights.attached(self.backbone.model):
                yield
        finally:
            _IN_USE.discard(self.backbone)
            handle.remove()

    def erase(self) -> None:
        """Forget everything written."""
        self.fast_weights = self.stats = None

    def _check_free(self, action: str) -> None:
        if self.backbone in _IN_USE:
            raise UsageError(
                f"a memory is attached to this model; leave its `with` block before you {action}"
            )

    def _prompt_trajectory(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, seed: int
    ) -> tuple[Trajectory, CleanBatch]:
        """Draw every row's trajectory as if it were alone, then lay the rows side by side."""
        mask_token_id = self.backbone.config.mask_token_id
        if mask_token_id is None:
            raise DataError("the model's config has no mask_token_id; set config.mask_token_id")
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.cpu()
        real = real.bool()
        if not bool(real.any(dim=1).all()):
            raise DataError("cannot write a memory from an empty prompt; give at least one token")
        schedule = get_schedule(self.objective.schedule)
        rows = []
        for ids, is_real in zip(input_ids, real, strict=True):
            kept = ids[is_real][None]
            row = CleanBatch(
                kept, torch.ones_like(kept, dtype=torch.bool), torch.zeros_like(kept).bool()
            )
            t = torch.full((1,), self.config.prompt_mask_ratio)
            anchor = corrupt(row, t, schedule, mask_token_id, generator(seed, "prompt_anchor"))
            draws = generator(seed, "prompt_trajectory")
            rows.append(
                build_trajectory(
                    TrajectoryRequest(row, anchor, t, self.config, mask_token_id, draws)
                )
            )
        batch = CleanBatch(input_ids, real, ~real)
        return _side_by_side(rows, batch), batch


def _check_tokens(input_ids: Any, attention_mask: Any) -> None:
    given = f"a {type(input_ids).__name__}"
    if isinstance(input_ids, torch.Tensor):
        given = f"{str(input_ids.dtype).removeprefix('torch.')} {list(input_ids.shape)}"
        if input_ids.dtype == torch.int64 and input_ids.dim() == 2 and len(input_ids):
            if attention_mask is None or attention_mask.shape == input_ids.shape:
                return
            raise UsageError(
                f"attention_mask {list(attention_mask.shape)} differs from input_ids "
                f"{list(input_ids.shape)}; give one entry per token"
            )
    raise UsageError(
        f"input_ids is {given}; give int64 tokens [B, L] of one row or more, as a tokenizer "
        "returns with padding=True and return_tensors='pt'"
    )


def _side_by_side(rows: list[Trajectory], batch: CleanBatch) -> Trajectory:
    """Merge one-row trajectories into one of the batch, padding tokens staying visible."""
    merged: dict[int, State] = {}

    def merge(states: list[State]) -> State:
        key = id(states[0])
        if key not in merged:
            ids, masked = batch.clean.clone(), torch.zeros_like(batch.maskable)
            for index, state in enumerate(states):
                where = batch.maskable[index]
                ids[index, where], masked[index, where] = state.ids[0], state.masked[0]
            merged[key] = State(ids, masked)
        return merged[key]

    transitions = tuple(
        Transition(
            merge([step.source for step in steps]),
            merge([step.target for step in steps]),
            torch.cat([step.t for step in steps]),
        )
        for steps in zip(*(row.transitions for row in rows), strict=True)
    )
    return Trajectory(transitions, merge([row.anchor for row in rows]))
