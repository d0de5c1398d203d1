"""Running averages of what a step did, kept on the device until a log line needs them.

Logged names (explained for users in docs/training.md):

    nll                mean negative log-likelihood per masked token, unweighted
    inner_loss_i       inner loss of step i, averaged over memories that were not dropped
    fast_grad_norm_i   joint gradient norm of a memory before clipping at step i
    clipped_share      share of fast matrices whose gradient was clipped, over all inner steps
    fast_delta_norm    norm of the second factors (B, or full deltas) of phi_K
    dropped_memories   memories dropped since the last line because something was inf or nan
    tokens_per_second  real tokens of the batches, since the last line
"""

import time

import torch

from memdlm.training.outer_step import OuterResult


class StepMetrics:
    """Accumulates `OuterResult`s without ever reading the device; `pop` reads it once."""

    def __init__(self) -> None:
        """Start empty."""
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self._dropped: torch.Tensor | None = None
        self._num_tokens = 0
        self._since = time.perf_counter()

    def add(self, result: OuterResult, num_tokens: int) -> None:
        """Take in one step; `num_tokens` real tokens were in its batch."""
        self._num_tokens += num_tokens
        if result.nll.numel():
            self._add("nll", result.nll.mean())
        inner = result.inner
        if inner is None or result.fast_weights is None:
            return
        alive = inner.alive
        share = torch.zeros((), device=alive.device)
        for step, (loss, update) in enumerate(
            zip(inner.losses, inner.updates, strict=True), start=1
        ):
            self._add(f"inner_loss_{step}", _mean_where(loss, alive))
            self._add(f"fast_grad_norm_{step}", _mean_where(update.grad_norm, alive))
            share = share + _mean_where(update.num_clipped, alive) / inner.num_matrices
        self._add("clipped_share", share / len(inner.updates))
        self._add("fast_delta_norm", _mean_where(result.fast_weights.delta_norm(), alive))
        dropped = (~alive).sum()
        self._dropped = dropped if self._dropped is None else self._dropped + dropped

    def pop(self) -> dict[str, float]:
        """Return the averages since the last call, and start anew. Waits for the device."""
        elapsed = time.perf_counter() - self._since
        values = {name: (total / self._counts[name]).item() for name, total in self._sums.items()}
        if self._dropped is not None:
            values["dropped_memories"] = int(self._dropped.item())
        if self._num_tokens:
            values["tokens_per_second"] = self._num_tokens / elapsed
        self.__init__()  # type: ignore[misc]
        return values

    def _add(self, name: str, value: torch.Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._counts[name] = self._counts.get(name, 0) + 1


def _mean_where(values: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
    """Average `values` [b] over the memories that are `alive` [b] (0 if there is none)."""
    return torch.where(alive, values, 0.0).sum() / alive.sum().clamp(min=1)
