"""Teach a tiny network to look things up in its context, before any task.

Trained on the tasks alone, a tiny masked diffusion model from random weights does not even choose
among the values present: nothing tells a head to look at its left neighbours, so nothing can be
matched. Three measures together end that (what each gave, and what was not tried apart:
docs/log.md):

- an auxiliary loss: linear read-outs of the first layer's hidden states predict the tokens one, two
  and three places to the left of every position, through the model's own embedding;
- a start that suits copying: embeddings of unit scale, a head equal to the (scaled) embedding, and
  keys equal to queries above the first layer, so that like attends to like;
- a curriculum: repeated pairs of tokens, then pairs with words between, then repeated sentences of
  the tasks' form, then longer texts.

Knows the words of `memdlm.data.tasks` but none of its tasks: no question is ever asked here.
Objective of this stage: plain cross-entropy at masked positions. Shapes: B batch, L length,
V vocabulary, H width.
"""

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from memdlm.errors import ConfigError, NonFiniteError
from memdlm.quickstart.pretraining_texts import (
    GAP_TEXT,
    SHORTEST_TEXT,
    Text,
    Words,
    collect_words,
    notes,
    pairs,
    sentences,
)
from memdlm.seeding import derive_seed, generator, preserved_rng

_IGNORED = -100


@dataclass(frozen=True)
class PretrainingConfig:
    """Settings of the pretraining; the defaults make the quickstart's checkpoint."""

    num_pair_steps: int = field(
        default=500, metadata={"help": "Steps on repeated pairs of adjacent tokens."}
    )
    num_gap_steps: int = field(
        default=400, metadata={"help": "Steps on repeated pairs with up to two words between."}
    )
    num_sentence_steps: int = field(
        default=600, metadata={"help": "Steps on short texts of repeated sentences."}
    )
    num_long_steps: int = field(
        default=1000, metadata={"help": "Steps on longer texts; the learning rate falls here."}
    )
    sentence_length: int = field(
        default=48, metadata={"help": "Tokens of a short text of sentences."}
    )
    long_lengths: tuple[int, ...] = field(
        default=(64, 96, 128, 192, 384),
        metadata={"help": "Tokens of longer texts, drawn per step."},
    )
    batch_size: int = field(default=32, metadata={"help": "Most texts per step."})
    tokens_per_batch: int = field(
        default=3072, metadata={"help": "Most tokens per step: long texts come in smaller batches."}
    )
    learning_rate: float = field(default=3e-3, metadata={"help": "Peak learning rate of AdamW."})
    num_warmup_steps: int = field(default=20, metadata={"help": "Steps of linear warm-up."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Clip the gradient's norm here."})
    lowest_mask_ratio: float = field(
        default=0.1, metadata={"help": "Least share of values to mask in a text."}
    )
    highest_mask_ratio: float = field(
        default=0.6, metadata={"help": "Largest share of values to mask in a text."}
    )
    any_mask_ratio: float = field(
        default=0.1,
        metadata={"help": "Mean share of all tokens masked besides, in the longer texts."},
    )
    notes_share: float = field(
        default=0.15,
        metadata={"help": "Share of longer texts that note one value more often than the others."},
    )
    neighbour_offsets: tuple[int, ...] = field(
        default=(1, 2, 3), metadata={"help": "Places to the left that the first layer must know."}
    )
    neighbour_weight: float = field(
        default=1.0, metadata={"help": "Weight of the auxiliary loss; 0 turns it off."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the texts and masks."})
    log_every: int = field(default=50, metadata={"help": "Steps between two log entries."})

    def __post_init__(self) -> None:
        """Refuse settings out of range, naming the one to change."""
        if not 0.0 < self.lowest_mask_ratio <= self.highest_mask_ratio <= 1.0:
            raise ConfigError(
                "pretraining: need 0 < lowest_mask_ratio <= highest_mask_ratio <= 1, not "
                f"{self.lowest_mask_ratio} and {self.highest_mask_ratio}"
            )
        if not self.long_lengths or min(*self.long_lengths, self.sentence_length) < SHORTEST_TEXT:
            raise ConfigError(f"pretraining: lengths must be at least {SHORTEST_TEXT} tokens")
        for name in ("batch_size", "tokens_per_batch", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"pretraining: {name} must be at least 1")
        if not self.neighbour_offsets or min(self.neighbour_offsets) < 1:
            raise ConfigError("pretraining: neighbour_offsets must be positive")


def pretrain(
    model: Any,
    tokenizer: Any,
    config: PretrainingConfig | None = None,
    on_log: Callable[[dict[str, float]], None] | None = None,
) -> list[dict[str, float]]:
    """Train `model` in place to look up repeated sentences; return the log, one dict per entry.

    An entry holds `step`, `loss`, `accuracy` at masked positions (some have no other copy left to
    look at: about 0.8 is the most that pairs allow), `neighbour_loss` and `seconds`. The global
    random state is afterwards as before.

    Args:
        model: A freshly built tiny model in float32 (see `initialise_for_copying`).
        tokenizer: Must know every word of `memdlm.data.tasks.vocabulary()`.
        config: Settings; the defaults when None.
        on_log: Called with each entry as it is made.

    Raises:
        DataError: The tokenizer lacks a word.
        NonFiniteError: The loss became infinite or NaN.
    """
    config = config or PretrainingConfig()
    words = collect_words(tokenizer)
    with preserved_rng(torch.device("cpu")):
        torch.manual_seed(derive_seed(config.seed, "pretraining/weights"))
        initialise_for_copying(model)
        readouts = nn.ModuleList(
            nn.Linear(model.config.hidden_size, model.config.hidden_size)
            for _ in config.neighbour_offsets
        )
    parameters = [*model.parameters(), *readouts.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
    first_layer: list[torch.Tensor] = []
    hook = model.model.layers[0].register_forward_hook(
        lambda _module, _inputs, output: first_layer.append(output)
    )
    was_training = model.training
    model.train()
    log: list[dict[str, float]] = []
    window: list[torch.Tensor] = []
    start = time.perf_counter()
    try:
        for step in range(num_steps(config)):
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * _rate(config, step)
            batch = _make_batch(config, words, step, model.config.mask_token_id)
            first_layer.clear()
            figures = _take_step(config, model, readouts, optimizer, batch, first_layer)
            window.append(figures)
            if (step + 1) % config.log_every == 0 or step + 1 == num_steps(config):
                log.append(_summarise(window, step + 1, time.perf_counter() - start))
                window.clear()
                if on_log is not None:
                    on_log(log[-1])
    finally:
        hook.remove()
        model.train(was_training)
    return log


def num_steps(config: PretrainingConfig) -> int:
    """Return the steps of all stages together."""
    short = config.num_pair_steps + config.num_gap_steps + config.num_sentence_steps
    return short + config.num_long_steps


@torch.no_grad()
def initialise_for_copying(model: Any) -> None:
    """Give a fresh model a start from which copying is learned in seconds.

    Embeddings of unit scale keep tokens apart while the layers are still small; a head parallel to
    the embedding makes "copy this token" one linear map for all tokens; keys equal to queries make
    a position attend to its likes.
    """
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    embedding.normal_()
    head.copy_(embedding * model.config.initializer_range)
    for layer in model.model.layers[1:]:
        attention = layer.self_attn
        if attention.q_proj.weight.shape == attention.k_proj.weight.shape:
            attention.k_proj.weight.copy_(attention.q_proj.weight)


def _rate(config: PretrainingConfig, step: int) -> float:
    """Return the learning rate's factor: warm-up, constant, cosine to a tenth in the long texts."""
    warm = min(1.0, (step + 1) / max(1, config.num_warmup_steps))
    done = step - (num_steps(config) - config.num_long_steps)
    if done < 0:
        return warm
    return warm * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done / config.num_long_steps)))


def _make_batch(
    config: PretrainingConfig, words: Words, step: int, mask_token_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return noisy ids and labels, [B, L] int64 each; labels are -100 where nothing is asked."""
    rng = random.Random(derive_seed(config.seed, "pretraining/texts", step))
    draws = generator(config.seed, "pretraining/masks", step)
    rows, is_long = _draw_rows(config, words, step, rng)
    clean = torch.tensor([ids for ids, _ in rows])
    values = torch.tensor([is_value for _, is_value in rows])
    span = config.highest_mask_ratio - config.lowest_mask_ratio
    ratio = config.lowest_mask_ratio + span * torch.rand(len(rows), 1, generator=draws)
    masked = (torch.rand(clean.shape, generator=draws) < ratio) & values
    if is_long:
        other = 2 * config.any_mask_ratio * torch.rand(len(rows), 1, generator=draws)
        masked |= torch.rand(clean.shape, generator=draws) < other
    masked[0, int(values[0].long().argmax())] = True  # never a step without a question
    return clean.masked_fill(masked, mask_token_id), clean.masked_fill(~masked, _IGNORED)


def _draw_rows(
    config: PretrainingConfig, words: Words, step: int, rng: random.Random
) -> tuple[list[Text], bool]:
    """Return one batch of texts of the step's stage, and whether it is the stage of long texts."""
    gaps_end = config.num_pair_steps + config.num_gap_steps
    if step < gaps_end:
        gap = 0 if step < config.num_pair_steps else step % 3
        length = SHORTEST_TEXT if step < config.num_pair_steps else GAP_TEXT
        return [pairs(rng, words, length, gap) for _ in range(config.batch_size)], False
    is_long = step >= gaps_end + config.num_sentence_steps
    length = rng.choice(config.long_lengths) if is_long else config.sentence_length
    notes_share = config.notes_share if is_long else 0.0
    count = max(1, min(config.batch_size, config.tokens_per_batch // length))
    forms = [notes if rng.random() < notes_share else sentences for _ in range(count)]
    return [form(rng, words, length) for form in forms], is_long


def _take_step(
    config: PretrainingConfig,
    model: Any,
    readouts: nn.ModuleList,
    optimizer: torch.optim.Optimizer,
    batch: tuple[torch.Tensor, torch.Tensor],
    first_layer: list[torch.Tensor],
) -> torch.Tensor:
    """Update the model once; return (loss, accuracy, neighbour loss) as a detached [3] tensor."""
    noisy, labels = batch
    asked = (labels != _IGNORED).flatten().nonzero().squeeze(1)
    logits = model(input_ids=noisy, valid=asked).logits  # [N, V]
    targets = labels.flatten()[asked]
    loss = F.cross_entropy(logits, targets)
    neighbours = torch.zeros(())
    if config.neighbour_weight:
        embedding = model.model.embed_tokens.weight
        for offset, readout in zip(config.neighbour_offsets, readouts, strict=True):
            scores = readout(first_layer[0][:, offset:]) @ embedding.T  # [B, L - offset, V]
            neighbours = neighbours + F.cross_entropy(
                scores.flatten(0, 1), noisy[:, :-offset].flatten()
            )
    optimizer.zero_grad()
    (loss + config.neighbour_weight * neighbours).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    if not torch.isfinite(norm):
        raise NonFiniteError("pretraining: the gradient is not finite; lower learning_rate")
    optimizer.step()
    accuracy = (logits.argmax(-1) == targets).float().mean()
    return torch.stack([loss, accuracy, neighbours]).detach()


def _summarise(window: list[torch.Tensor], step: int, seconds: float) -> dict[str, float]:
    loss, accuracy, neighbours = torch.stack(window).mean(0).tolist()
    return {
        "step": step,
        "loss": round(loss, 4),
        "accuracy": round(accuracy, 4),
        "neighbour_loss": round(neighbours, 4),
        "seconds": round(seconds, 1),
    }
