"""Losses of single tokens on the head's logits, in chunks that keep to a budget.

A vocabulary is so much wider than a network that the logits of a few thousand tokens, with what the
loss copies of them, outweigh all else that a step holds. Here they exist for some hundred tokens at
a time. A chunk's gradient is taken in the forward pass, right after its loss, as in fused linear
cross-entropy (Liger Kernel, arXiv 2410.10989): no product is computed twice, no logits wait for the
backward pass, and that only multiplies by what comes from above.

Shapes: N scored tokens, n those of a chunk, H width, V vocabulary.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# From normed hidden states [n, H] and their place among all N to the losses [n] float32.
ChunkLoss = Callable[[torch.Tensor, slice], torch.Tensor]


@dataclass(frozen=True)
class Scored:
    """What a forward is to score in place of returning logits.

    Attributes:
        labels: Clean token of every scored position [N] int64.
        coefficients: Factor of its loss [N] float32.
        budget: Bytes that the logits of one chunk may take in float32.
        keep_logits: Return all logits as well, beyond any budget.
    """

    labels: torch.Tensor
    coefficients: torch.Tensor
    budget: int
    keep_logits: bool = False


def weighted_nll(
    hidden: torch.Tensor, head: nn.Module, vocabulary: int, scored: Scored
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return the weighted sum of -log p(label), each token's [N] without its weight, and logits.

    The logits [N, V] are None unless they are to be kept; they and the values [N] are detached.

    Args:
        hidden: Normed hidden states of the scored positions [N, H].
        head: Maps them to logits [N, V]; its trained parameters get gradients.
        vocabulary: V.
        scored: Labels, weights and budget.
    """
    kept: list[torch.Tensor] = []

    def nll(part: torch.Tensor, span: slice) -> torch.Tensor:
        logits = head(part)
        if scored.keep_logits:
            kept.append(logits.detach())
        return F.cross_entropy(logits.float(), scored.labels[span], reduction="none")

    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    total, losses = weighted_sum(
        nll, hidden, scored.coefficients, vocabulary, scored.budget, trained
    )
    return total, losses, torch.cat(kept) if kept else None


def chunk_spans(num_tokens: int, vocabulary: int, budget: int) -> list[slice]:
    """Return the fewest chunks whose float32 logits keep to `budget` bytes, of about one size.

    A chunk has at least one token, however small the budget; no tokens make one empty chunk.
    """
    at_most = max(1, budget // (4 * vocabulary))
    number = max(1, -(-num_tokens // at_most))
    size = max(1, -(-num_tokens // number))
    starts = range(0, max(1, num_tokens), size)
    return [slice(start, min(start + size, num_tokens)) for start in starts]


@torch.compiler.disable
def weighted_sum(
    loss: ChunkLoss,
    hidden: torch.Tensor,
    coefficients: torch.Tensor,
    vocabulary: int,
    budget: int,
    trained: Iterable[torch.Tensor] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sum(coefficient * loss) over all tokens, and the losses [N] float32, detached.

    The sum is differentiable once, with respect to `hidden` and `trained`; a second backward pass
    through it is an error.

    Args:
        loss: Token losses of one chunk; depends on no other chunk.
        hidden: Normed hidden states [N, H]; N may be 0.
        coefficients: Factor of every token's loss [N] float32, a constant.
        vocabulary: V.
        budget: Bytes that one chunk's logits [n, V] may take in float32; a chunk has at least one
            token.
        trained: Leaves that `loss` uses and that want a gradient.
    """
    spans = chunk_spans(hidden.shape[0], vocabulary, budget)
    leaves = [hidden, *trained]
    if not (torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves)):
        losses = torch.cat([loss(hidden[span], span) for span in spans]).detach()
        return (losses * coefficients).sum(), losses
    total, losses = _WeightedSum.apply(loss, spans, coefficients, *leaves)
    return total, losses


class _WeightedSum(torch.autograd.Function):
    """The sum whose gradient is ready before it is asked for."""

    @staticmethod
    def forward(
        ctx: Any,
        loss: ChunkLoss,
        spans: list[slice],
        coefficients: torch.Tensor,
        hidden: torch.Tensor,
        *trained: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wants_hidden = ctx.needs_input_grad[3]
        scale = _scale_of(coefficients)
        scaled = coefficients / scale
        losses, parts = [], []
        sums: list[torch.Tensor | None] = [None] * len(trained)
        for span in spans:
            part = hidden[span].detach().requires_grad_(wants_hidden)
            with torch.enable_grad():
                # Hooks on a module's inputs (FlopCounterMode has some) do not take leaves here.
                values = loss(part.view_as(part), span)
                total = (values * scaled[span]).sum()
            leaves = [part, *trained] if wants_hidden else list(trained)
            grads = list(torch.autograd.grad(total, leaves, allow_unused=True))
            if wants_hidden:
                parts.append(grads.pop(0))
            for index, grad in enumerate(grads):
                sums[index] = _add(sums[index], grad)
            losses.append(values.detach())
            del values, total, grads  # a graph and logits that the next chunk would sit beside
        ctx.scale = scale
        ctx.grads = [torch.cat(parts) if wants_hidden else None, *sums]
        everything = torch.cat(losses)
        ctx.mark_non_differentiable(everything)
        return (everything * coefficients).sum(), everything

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("a chunked loss gives its gradient once; run the forward again")
        grads, ctx.grads = ctx.grads, None
        factor = grad * ctx.scale
        # In place: the head's gradient may be as large as the head.
        return None, None, None, *(None if g is None else g.mul_(factor) for g in grads)


def _scale_of(coefficients: torch.Tensor) -> torch.Tensor:
    """Return a power of two near the largest coefficient, a scalar on its device.

    Gradients of a chunk are kept in the network's precision before a loss scaler has raised them:
    coefficients of 1 / N would take them below what float16 can hold. A power of two changes no
    other bit.
    """
    if coefficients.numel() == 0:
        return coefficients.new_ones(())
    exponent = torch.frexp(coefficients.abs().amax()).exponent
    return torch.ldexp(coefficients.new_ones(()), exponent)


def _add(total: torch.Tensor | None, grad: torch.Tensor | None) -> torch.Tensor | None:
    if total is None or grad is None:
        return grad if total is None else total
    return total.add_(grad)
