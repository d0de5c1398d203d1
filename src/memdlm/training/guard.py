"""Stops a run before a non-finite loss reaches the weights, without stalling the device.

The flags of every micro-batch are copied to the host asynchronously right after its forward. They
are read just before the optimizer step, when the device is still busy with the backward pass.
"""

from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor
from torch.linalg import vector_norm
from transformers import TrainerCallback

from memdlm.errors import NonFiniteError
from memdlm.training.outer_step import OuterResult

MAX_DROPPED_IN_A_ROW = 10


class NonFiniteGuard(TrainerCallback):
    """Watches outer losses and dropped memories; raises before the optimizer steps."""

    def __init__(self) -> None:
        """Start with nothing pending."""
        self._pending: list[tuple[torch.Tensor, torch.cuda.Event | None]] = []
        self._dropped_in_a_row = 0

    def watch(self, result: OuterResult) -> None:
        """Remember one micro-batch's flags."""
        alive = None if result.inner is None else result.inner.alive
        is_finite = result.loss.detach().isfinite()
        all_alive = torch.ones_like(is_finite) if alive is None else alive.all()
        flags = torch.stack([is_finite, all_alive])
        event = None
        if flags.device.type == "cuda":
            host = torch.empty_like(flags, device="cpu", pin_memory=True)
            flags = host.copy_(flags, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending.append((flags, event))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the micro-batches of this update.

        Raises:
            NonFiniteError: If an outer loss is inf or nan, or memories were dropped in ten
                micro-batches in a row.
        """
        pending, self._pending = self._pending, []
        for flags, event in pending:
            if event is not None:
                event.synchronize()
            is_finite, all_alive = flags.tolist()
            if not is_finite:
                raise NonFiniteError(
                    f"the training loss became inf or nan at step {state.global_step + 1}, whose "
                    "update was not made: lower learning_rate or max_grad_norm and start again, or "
                    "go on with them from the last checkpoint, whose weights are finite"
                )
            self._dropped_in_a_row = 0 if all_alive else self._dropped_in_a_row + 1
            if self._dropped_in_a_row >= MAX_DROPPED_IN_A_ROW:
                raise NonFiniteError(
                    f"the inner loop met inf or nan in {MAX_DROPPED_IN_A_ROW} batches in a row (up "
                    f"to step {state.global_step + 1}): lower memory.learning_rate or "
                    "memory.clip_norm, or set memory.enabled: false for Standard MDLM"
                )

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Check the weights once: no later loss would show what the last update did to them.

        Raises:
            NonFiniteError: If a trained weight is inf or nan.
        """
        if model is not None and not trained_weights_are_finite(model):
            raise NonFiniteError(
                f"training ended at step {state.global_step} with inf or nan in the weights: lower "
                "learning_rate or max_grad_norm and start again"
            )


def trained_weights_are_finite(model: nn.Module) -> bool:
    """Tell whether no trained weight is inf or nan; waits for the device, once.

    Of weights that are spread over processes each looks at its own part; then all agree.
    """
    trained = [p.detach() for p in model.parameters() if p.requires_grad]
    parts = [p.to_local() if isinstance(p, DTensor) else p for p in trained]
    norms = [vector_norm(part, ord=torch.inf).float() for part in parts if part.numel()]
    if not parts:
        return True
    # A process may hold no part of any.
    norms = norms or [torch.zeros((), device=parts[0].device)]
    finite = torch.stack(norms).isfinite().all()
    if distributed.is_available() and distributed.is_initialized():
        finite = finite.int()
        distributed.all_reduce(finite, distributed.ReduceOp.MIN)
    return bool(finite)
