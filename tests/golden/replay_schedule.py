"""Replay of `schedule` (alpha, weights, losses) and `tables` (mask counts, layer selection)."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from memdlm.diffusion.objective import coefficients, row_weights
from memdlm.diffusion.schedule import SCHEDULES, get_schedule
from memdlm.diffusion.states import CleanBatch
from memdlm.errors import ConfigError
from memdlm.memory.config import MemoryConfig
from memdlm.memory.losses import INNER_LOSSES, Prediction
from memdlm.memory.placement import first_adapted_layer
from memdlm.memory.trajectories.anchor_consistent import mask_counts

_WEIGHTINGS = {"scheduler": "schedule", "uniform": "uniform"}
_INNER_NORMALISERS = {"token": "token", "sequence": "reference_sequence", "batch": "batch"}
_INNER_LOSSES = {"ce": "cross_entropy", "kl": "kl", "reverse": "reverse_kl"}


def replay_schedule(folder: Path) -> dict[str, float]:
    """Compare schedules on a grid, then every inner and outer loss on injected logits."""
    golden = load_file(folder / "alpha.safetensors")
    worst = {"coefficient": 0.0, "loss": 0.0, "gradient": 0.0}
    for name in SCHEDULES:
        schedule = get_schedule(name)
        pairs = schedule.reverse_mask_probability(golden["pairs_s"], golden["pairs_t"])
        for ours, theirs in (
            (schedule.alpha(golden["t"]), golden[f"{name}.alpha"]),
            (schedule.alpha_derivative(golden["t"]), golden[f"{name}.alpha_derivative"]),
            (schedule.weight(golden["t"]), golden[f"{name}.weight"]),
            (pairs, golden[f"{name}.reverse_mask_prob"]),
        ):
            error = ((ours - theirs).abs() / theirs.abs().clamp(min=1)).max().item()
            worst["coefficient"] = max(worst["coefficient"], error)
    data = load_file(folder / "losses.safetensors")
    for key, value in data.items():
        kind = key.split(".")[0]
        if key.count(".") == 2 and kind.startswith("inner_"):
            ours = _inner_loss(data, *key.split("."))
        elif kind == "outer":
            ours = _outer_loss(data, data["logits"], *key.split(".")[1:])
        elif kind == "outer_grad":
            logits = data["logits"].clone().requires_grad_()
            loss = _outer_loss(data, logits, *key.split(".")[1:])
            gradient = torch.autograd.grad(loss, logits)[0]
            error = ((gradient - value).norm() / value.norm()).item()
            worst["gradient"] = max(worst["gradient"], error)
            continue
        else:
            continue
        worst["loss"] = max(worst["loss"], abs(ours.item() / value.item() - 1))
    return worst


def _outer_loss(
    data: dict[str, torch.Tensor],
    logits: torch.Tensor,
    schedule: str,
    weighting: str,
    normaliser: str,
    padding: str,
) -> torch.Tensor:
    batch = CleanBatch.from_labels(
        data["input_ids"], data["labels"], data["input_ids"] == data["pad_token_id"]
    )
    if padding == "pad_both":
        batch = batch.without_padding()
    factors = coefficients(
        data["masked"] & batch.maskable,
        counted=batch.maskable,
        weights=row_weights(data["t"], _WEIGHTINGS[weighting], schedule),
        normaliser=normaliser,
    )
    nll = F.cross_entropy(logits.transpose(1, 2), data["input_ids"], reduction="none")
    return (nll * factors).sum()


def _inner_loss(
    data: dict[str, torch.Tensor], kind: str, weighting: str, normaliser: str
) -> torch.Tensor:
    masked = data["masked"]
    factors = coefficients(
        masked,
        counted=masked,
        weights=row_weights(data["inner_t"], _WEIGHTINGS[weighting], "linear"),
        normaliser=_INNER_NORMALISERS[normaliser],
    )
    student, teacher = (
        Prediction(data[name][masked], data[name][masked], head=lambda logits: logits)
        for name in ("logits", "teacher_logits")
    )
    compute = INNER_LOSSES[_INNER_LOSSES[kind.removeprefix("inner_")]].compute
    tokens = compute(student, teacher, data["input_ids"][masked], MemoryConfig())
    return (tokens * factors[masked]).sum()


def replay_tables(folder: Path) -> dict[str, float]:
    """Compare mask counts (exact) and the first adapted layer for every fraction in (0, 1]."""
    wrong = 0
    for file in sorted(folder.glob("mask_counts_*.safetensors")):
        golden = load_file(file)
        for key, counts in golden.items():
            if key.endswith(".counts"):
                steps, scale = key.removesuffix(".counts").split(".scale")
                ours = mask_counts(
                    golden["final_masked"].long(),
                    golden["total"].long(),
                    int(steps.removeprefix("k")),
                    float(scale),
                )
                wrong += int((ours != counts).sum())
    for row in json.loads((folder / "layer_selection.json").read_text()):
        # Outside (0, 1] the published code means something else or nothing; ours refuses.
        is_valid = 0 < row["fraction"] <= 1
        try:
            first = first_adapted_layer(row["num_layers"], row["fraction"])
            wrong += not is_valid or first != row["first_layer"]
        except ConfigError:
            wrong += is_valid
    return {"count": float(wrong)}
