"""How likely a model finds a given answer: the any-order bound, in one random order per sample.

The answer's tokens are revealed in a random order, a few per step; a step adds the number of tokens
it reveals times the mean negative log-likelihood of those still masked. With one token per step the
expectation over orders is the bound of masked diffusion models on -log p (arXiv 2502.09992, in the
form that masks a number of tokens drawn uniformly). The same order in every condition keeps
differences between conditions free of most of its noise.

Shapes: B rows, T canvas, R tokens of the longest answer.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memdlm.sampling.evaluation_mode import evaluation_mode
from memdlm.sampling.unmasking import transfer_schedule
from memdlm.seeding import generator


@torch.no_grad()
def answer_nll(
    model: nn.Module,
    prompts: Sequence[Tensor],
    answers: Sequence[Tensor],
    seeds: Sequence[int],
    num_steps: int | None = None,
) -> list[float]:
    """Return the bound on -log p(answer | prompt) of every row, in nats.

    A row's bound depends on its own tokens and seed, not on the batch.

    Args:
        model: A backbone, possibly wrapped; runs in evaluation mode, which is then restored.
        prompts: Token ids [L_i] int64.
        answers: Token ids [R_i] int64, at least one each.
        seeds: Decide the orders, one per row.
        num_steps: Most steps; None for one per token.
    """
    device = next(model.parameters()).device
    ids: Any = model.config
    num_rows, width = len(prompts), max(len(answer) for answer in answers)
    lengths = [len(p) + len(a) for p, a in zip(prompts, answers, strict=True)]
    canvas = torch.full((num_rows, max(lengths)), ids.pad_token_id, dtype=torch.int64)
    positions = torch.zeros((num_rows, width), dtype=torch.int64)
    # The step in which a token is revealed; fillers are so from the start.
    turn = torch.full((num_rows, width), -1)
    counts: list[list[int]] = []
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        size = len(answer)
        canvas[row, : lengths[row]] = torch.cat([prompt, answer])
        # Fillers repeat the answer's last column; they are never scored.
        columns = len(prompt) + torch.arange(width).clamp(max=size - 1)
        positions[row] = columns
        counts.append(transfer_schedule(size, min(num_steps or size, size)))
        order = torch.randperm(size, generator=generator(seeds[row], "answer_order"))
        turn[row, order] = torch.repeat_interleave(torch.tensor(counts[-1]))
    real = torch.arange(canvas.shape[1]) < torch.tensor(lengths)[:, None]
    mask = None if bool(real.all()) else real.long().to(device)
    canvas, positions, turn = canvas.to(device), positions.to(device), turn.to(device)
    clean = canvas.gather(1, positions)
    total = torch.zeros(num_rows, dtype=torch.float64, device=device)
    with evaluation_mode(model):
        for step in range(max(len(row) for row in counts)):
            masked = turn >= step  # [B, R]
            # Added, not written: a filler stands in the column of a token.
            hidden = torch.zeros_like(canvas).scatter_add_(1, positions, masked.long())
            noisy = canvas.masked_fill(hidden > 0, ids.mask_token_id)
            logits = model(noisy, attention_mask=mask, positions=positions).logits.float()
            nll = F.cross_entropy(logits.flatten(0, 1), clean.flatten(), reduction="none")
            nll = (nll.view_as(masked) * masked).sum(dim=1, dtype=torch.float64)
            revealed = [row[step] if step < len(row) else 0 for row in counts]
            weight = torch.tensor(revealed, device=device) / masked.sum(dim=1).clamp(min=1)
            total += weight * nll
    found: list[float] = total.tolist()
    return found
