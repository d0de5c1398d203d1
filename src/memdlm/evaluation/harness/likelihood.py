"""How likely a masked diffusion model finds a continuation: a bound, by drawing masks.

    -log p(y | x)  <=  E over l = 1..L, E over masks of l tokens of  L / l * sum of -log p(masked)

with L tokens in y, l uniform and the mask uniform among those of l tokens; the context x is never
masked (LLaDA, arXiv 2502.09992, equation 6; its evaluation draws 128 masks). Where all 2^L - 1
masks are no more than the draws, each is scored once and the bound is exact. Otherwise the draws
are spread over l in strata, two independent ones in each: the mean stays unbiased, for the two have
the distribution of l within their stratum, and their difference estimates its variance without
bias. Knows no text and no benchmark.

Shapes: B rows of a forward, T the longest row, P the most masked tokens of a row, L a continuation.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from memdlm.backbones.token_losses import Scored
from memdlm.errors import ConfigError, DataError, NonFiniteError, UsageError
from memdlm.memory.parametric_memory import ParametricMemory
from memdlm.sampling.evaluation_mode import evaluation_mode
from memdlm.seeding import generator

# Bytes of float32 logits that exist at once; a choice of speed, no result depends on it.
_LOGITS_BUDGET = 256 * 2**20


@dataclass(frozen=True)
class LikelihoodConfig:
    """How the bound is estimated.

    Raises:
        ConfigError: A value is out of range.
    """

    num_samples: int = field(
        default=128,
        metadata={
            "help": "Masks drawn for each continuation, an even number. All masks are scored, and "
            "the bound is exact, where there are no more of them (LLaDA draws 128)."
        },
    )
    batch_size: int = field(
        default=32, metadata={"help": "Masked continuations scored together; changes no mask."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the masks."})

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.num_samples < 2 or self.num_samples % 2:
            raise ConfigError(
                f"likelihood.num_samples: {self.num_samples} is out of range; use an even number "
                "of 2 or more (two draws of each stratum tell the standard error)"
            )
        if self.batch_size < 1:
            raise ConfigError(
                f"likelihood.batch_size: {self.batch_size} is out of range; use 1 or more"
            )
        if self.seed < 0:
            raise ConfigError(f"likelihood.seed: {self.seed} is out of range; use 0 or more")


@dataclass(frozen=True)
class LikelihoodBound:
    """A lower bound on the log-likelihood of one continuation, in nats.

    Attributes:
        value: The bound, or its estimate.
        standard_error: Of the estimate; 0 where it is exact.
        num_masks: Masks that were scored.
    """

    value: float
    standard_error: float
    num_masks: int


@dataclass(frozen=True)
class _Masks:
    """The masks of one continuation [N, L] bool; whether they are all there are."""

    masks: Tensor
    is_exact: bool

    def bound(self, nll: Tensor) -> LikelihoodBound:
        """Return the bound from the summed losses of the masked tokens of every mask, [N]."""
        length = self.masks.shape[1]
        counts = self.masks.sum(dim=1)
        losses = nll.double() * length / counts
        if self.is_exact:
            # Each l has weight 1 / L, shared by its masks.
            alike = torch.tensor([math.comb(length, int(count)) for count in counts])
            value = (losses / (length * alike)).sum().item()
            return LikelihoodBound(-value, 0.0, len(losses))
        # Mean of N/2 strata with a pair each: the variance of a pair's mean is (a - b)^2 / 4.
        pairs = losses.view(-1, 2)
        variance = (pairs[:, 0] - pairs[:, 1]).square().sum().item() / 4
        error = math.sqrt(variance) / len(pairs)
        return LikelihoodBound(-losses.mean().item(), error, len(losses))


def draw_masks(length: int, num_samples: int, seed: int) -> _Masks:
    """Return the masks of a continuation of `length` tokens, at least one masked token in each.

    All of them where that is no more than `num_samples`; otherwise so many draws, of which each
    pair in a row shares a stratum of the number of masked tokens.
    """
    if 2**length - 1 <= num_samples:
        every = list(itertools.product([False, True], repeat=length))[1:]
        return _Masks(torch.tensor(every), True)
    source = generator(seed, "likelihood_masks")
    stratum = torch.arange(num_samples) // 2
    draws = torch.rand(num_samples, generator=source, dtype=torch.float64)
    counts = ((stratum + draws) / (num_samples // 2) * length).long() + 1
    order = torch.rand(num_samples, length, generator=source, dtype=torch.float64).argsort(dim=1)
    # A random order of the tokens: those that come before the count are masked.
    return _Masks(order < counts.clamp(max=length)[:, None], False)


@torch.no_grad()
def likelihood_bounds(
    model: nn.Module,
    contexts: Sequence[Tensor],
    continuations: Sequence[Tensor],
    config: LikelihoodConfig | None = None,
    *,
    seeds: Sequence[int] | None = None,
    memories: Sequence[ParametricMemory | None] | None = None,
    batch_size: int | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> list[LikelihoodBound]:
    """Bound the log-likelihood of every continuation given its context.

    A bound depends neither on the other continuations nor on the batch size. The model runs in
    evaluation mode, as it is called in training (its own `config.attention`).

    Args:
        model: A backbone, possibly wrapped.
        contexts: Token ids [C] int64 of each context; may be empty.
        continuations: Token ids [L] int64 of each continuation, at least one.
        config: Number of draws; None for the defaults.
        seeds: Seed of the masks of each continuation; None for `config.seed` for all.
        memories: Memory of a single row to attach while a continuation is scored, or None. One
            that several share may be given several times.
        batch_size: In place of `config.batch_size`.
        on_batch: Called after every forward with the number of tokens it read, padding included.

    Raises:
        DataError: A continuation is empty or does not fit the context together with its own.
        NonFiniteError: The model's losses are nan or inf.
        UsageError: The arguments are not as many as the continuations.
    """
    config = config or LikelihoodConfig()
    seeds = [config.seed] * len(continuations) if seeds is None else seeds
    memories = [None] * len(continuations) if memories is None else memories
    _check(model, contexts, continuations, seeds, memories)
    drawn = [
        draw_masks(len(ids), config.num_samples, seed)
        for ids, seed in zip(continuations, seeds, strict=True)
    ]
    rows = [(item, mask) for item, masks in enumerate(drawn) for mask in masks.masks]
    sums = torch.empty(len(rows), dtype=torch.float64)
    lengths = [len(x) + len(y) for x, y in zip(contexts, continuations, strict=True)]
    # Rows of one item stay together: they share a length, and often the one memory.
    order = sorted(range(len(rows)), key=lambda row: -lengths[rows[row][0]])
    size = config.batch_size if batch_size is None else batch_size
    with evaluation_mode(model):
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            chosen = [rows[row] for row in batch]
            with _attached([memories[item] for item, _ in chosen]):
                sums[batch] = _score(model, contexts, continuations, chosen)
            if on_batch is not None:
                on_batch(len(batch) * lengths[chosen[0][0]])
    if not bool(sums.isfinite().all()):
        raise NonFiniteError(
            "the model's losses are nan or inf while scoring continuations; check the checkpoint, "
            "or load it in float32"
        )
    parts = sums.split([len(masks.masks) for masks in drawn]) if drawn else ()
    return [masks.bound(part) for masks, part in zip(drawn, parts, strict=True)]


def _check(
    model: nn.Module,
    contexts: Sequence[Tensor],
    continuations: Sequence[Tensor],
    seeds: Sequence[int],
    memories: Sequence[ParametricMemory | None],
) -> None:
    number = len(continuations)
    for name, given in (("contexts", contexts), ("seeds", seeds), ("memories", memories)):
        if len(given) != number:
            raise UsageError(f"{name}: {len(given)} for {number} continuations; give one each")
    own: Any = model.config
    for place, (x, y) in enumerate(zip(contexts, continuations, strict=True), start=1):
        if len(y) == 0:
            raise DataError(f"continuation {place} is empty: give it at least one token")
        if len(x) + len(y) > own.max_position_embeddings:
            raise DataError(
                f"continuation {place} has {len(y):,} tokens, with its context {len(x) + len(y):,}"
                f", and the model's context is {own.max_position_embeddings:,} tokens: shorten it"
            )


def _attached(memories: Sequence[ParametricMemory | None]) -> AbstractContextManager[None]:
    """Attach one memory per row; nothing where there is none."""
    first = memories[0]
    if all(memory is first for memory in memories):
        # A memory of one row serves a batch of any size.
        return nullcontext() if first is None else first.attached()
    return ParametricMemory.stack(memories).attached()


def _score(
    model: nn.Module,
    contexts: Sequence[Tensor],
    continuations: Sequence[Tensor],
    rows: Sequence[tuple[int, Tensor]],
) -> Tensor:
    """Return the summed -log p of the masked tokens of every row [B], float64 on the CPU."""
    own: Any = model.config
    device = next(model.parameters()).device
    texts = [torch.cat([contexts[item], continuations[item]]) for item, _ in rows]
    places = [len(contexts[item]) + mask.nonzero()[:, 0] for item, mask in rows]
    tokens = torch.full((len(rows), max(map(len, texts))), own.pad_token_id, dtype=torch.int64)
    positions = torch.zeros(len(rows), max(map(len, places)), dtype=torch.int64)
    is_scored = torch.zeros_like(positions, dtype=torch.bool)
    is_real = torch.zeros_like(tokens)
    for row, (text, place) in enumerate(zip(texts, places, strict=True)):
        tokens[row, : len(text)] = text
        tokens[row, place] = own.mask_token_id
        is_real[row, : len(text)] = 1
        positions[row, : len(place)] = place
        is_scored[row, : len(place)] = True
    labels = torch.cat([text[place] for text, place in zip(texts, places, strict=True)])
    scored = Scored(labels.to(device), torch.ones(len(labels), device=device), _LOGITS_BUDGET)
    output = model(
        tokens.to(device),
        attention_mask=None if bool(is_real.all()) else is_real.to(device),
        positions=positions.to(device),
        valid=is_scored.flatten().nonzero()[:, 0].to(device),
        scored=scored,
    )
    losses = output.nll.double().cpu()
    owner = is_scored.nonzero()[:, 0]
    return torch.zeros(len(rows), dtype=torch.float64).index_add_(0, owner, losses)
