"""Replay of `infer/<case>`: a memory written from a prompt alone, and decodes with and without it.

The golden states are handed to the library as a trajectory, as in `replay_inner`; supervision,
losses, gradients, clipping, SGD and both decodes are the library's.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from replay_inner import LOSSES, TRAJECTORIES, Case, relative
from torch import nn

from memdlm.backbones.base import DiffusionMaskedLM
from memdlm.backbones.loading import load_model
from memdlm.backbones.wrapping import unwrap
from memdlm.diffusion.objective import ObjectiveConfig
from memdlm.diffusion.states import CleanBatch, State
from memdlm.memory.config import MemoryConfig
from memdlm.memory.fast_weights import FastWeights
from memdlm.memory.inner_loop import InnerStats, plan_inner_loop, run_inner_loop
from memdlm.memory.placement import place
from memdlm.memory.trajectories import Trajectory, Transition
from memdlm.memory.trajectories.anchor_consistent import mask_counts
from memdlm.memory.trajectories.trajectory import realised_ratio
from memdlm.sampling.config import SamplingConfig
from memdlm.sampling.decoding import decode


def replay(folder: Path) -> dict[str, float]:
    """Return the largest deviation of every kind in one case."""
    case = Case.read(folder)
    # The model is named from the root of the fixtures.
    model = load_model(str(folder.parent.parent / case.meta["model"]))
    model.config.mask_token_id = case.meta["mask_token_id"]
    model.config.eos_token_id = case.meta["eos_token_id"]
    memory = memory_config(case.meta["memory_config"])
    worst = {"count": 0.0, "coefficient": 0.0}
    fast = _write(unwrap(model), case, memory, worst)
    for name, attached in (("with", True), ("without", False)):
        worst["count"] += _wrong_tokens(model, case, fast if attached else None, f"{name}_memory")
    return worst


def memory_config(old: dict[str, Any]) -> MemoryConfig:
    """Translate the published prompt-memory settings into ours."""
    return MemoryConfig(
        kind=old["inner_adapter_type"],
        rank=old["inner_rank"],
        alpha=old["inner_alpha"],
        scope="modules",
        modules=tuple(old["inner_target_modules"].split(",")),
        layer_fraction=old["inner_layer_fraction"],
        num_steps=old["num_inner_steps"],
        num_epochs=old["num_inner_epochs"],
        learning_rate=old["inner_lr"],
        clip_norm=old["inner_grad_clip"],
        trajectory=TRAJECTORIES[old["masking_strategy"]],
        pre_anchor_scale=old["progressive_consistent_start_scale"],
        loss=LOSSES[old["inner_loss_type"]],
        temperature=old["distill_temperature"],
        weighting="uniform",
        prompt_mask_ratio=old["prompt_mask_ratio"],
    )


def _write(
    lm: DiffusionMaskedLM, case: Case, memory: MemoryConfig, worst: dict[str, float]
) -> FastWeights:
    """Run the inner loop from the golden phi_0 and compare all of it; return phi_K."""
    batch, trajectory = _trajectory(case, memory, worst)
    plan = plan_inner_loop(trajectory, batch, memory, ObjectiveConfig())
    fast = FastWeights(
        place(lm.model, memory), memory, 1, torch.device("cpu"), torch.Generator().manual_seed(0)
    )
    zero = {name: torch.zeros_like(tensor) for name, tensor in fast.tensors.items()}
    fast.load(case.fast_weights("init", zero))
    gradients: list[dict[str, torch.Tensor]] = []
    with torch.no_grad():
        _, inputs = lm.model.embed(plan.states[0])
    stats: InnerStats = run_inner_loop(
        lm,
        fast,
        plan,
        memory,
        inputs,
        observe=lambda index, grads: gradients.append(dict(grads)),
    )
    golden = torch.stack([case.tensors[f"step{i}.loss"] for i in range(len(plan.steps))])
    worst["loss.inner"] = relative(stats.losses[:, 0], golden)
    worst["gradient.inner"] = case.compare_gradients(gradients)
    worst["fast_weights"] = case.compare("final", fast.tensors)
    return fast


def _trajectory(
    case: Case, memory: MemoryConfig, worst: dict[str, float]
) -> tuple[CleanBatch, Trajectory]:
    """Build the trajectory of the golden states; compare counts, supervision and times."""
    clean = case.tensors["prompt"][None]
    batch = CleanBatch(clean, torch.ones_like(clean).bool(), torch.zeros_like(clean).bool())
    golden = [
        State(case.tensors[f"step{i}.input_ids"], case.tensors[f"step{i}.masked"])
        for i in range(memory.num_steps)
    ]
    states = [batch.state(state.masked, case.meta["mask_token_id"]) for state in golden]
    targets = [*states[1:], batch.clean_state()]
    times = [realised_ratio(state.masked, batch.maskable) for state in states]
    transitions = tuple(Transition(*parts) for parts in zip(states, targets, times, strict=True))
    wrong = 0
    for index, (transition, state) in enumerate(zip(transitions, golden, strict=True)):
        supervised = transition.supervised(memory.supervision)
        wrong += int((supervised != case.tensors[f"step{index}.loss_mask"]).sum())
        wrong += int((transition.source.ids != state.ids).sum())
        drift = (transition.t - case.tensors[f"step{index}.t"]).abs().max().item()
        worst["coefficient"] = max(worst["coefficient"], drift)
    counts = torch.stack([state.masked.sum(dim=1) for state in golden], dim=1)
    ours = mask_counts(
        golden[-1].masked.sum(dim=1),
        batch.maskable.sum(dim=1),
        memory.num_steps,
        memory.pre_anchor_scale,
    )
    wrong += int((ours != counts).sum())
    wrong += int((counts[0] != torch.tensor(case.meta["masked_per_step"])).sum())
    worst["count"] += wrong
    return batch, Trajectory(transitions, states[-1])


def _wrong_tokens(model: nn.Module, case: Case, fast: FastWeights | None, suffix: str) -> int:
    """Decode as the case says; return how many tokens of output and history differ."""
    lm = unwrap(model)
    detach = None if fast is None else fast.attach(lm.model)
    try:
        output, history = _decode(model, case)
    finally:
        if detach is not None:
            detach()
    golden = case.tensors[f"history_{suffix}"]
    if golden.shape != history.shape:
        return golden.numel()
    wrong = int((history != golden).sum())
    return wrong + int((output != case.tensors[f"output_{suffix}"]).sum())


def _decode(model: nn.Module, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the last canvas [1, T] and the history [S+1, 1, T] of one decode."""
    num_new, prompt = case.meta["new_tokens"], case.tensors["prompt"]
    config = SamplingConfig(max_new_tokens=num_new, stop_at_eos=False)
    block = re.fullmatch(
        r"block diffusion, block (\d+), (\d+) steps per block, threshold ([\d.]+), no editing",
        case.meta["sampler"],
    )
    if block is not None:
        length, steps = int(block[1]), int(block[2])
        config = replace(
            config,
            decoder="block",
            block_length=length,
            num_unmasking_steps=steps * -(-num_new // length),
            threshold=float(block[3]),
        )
    canvases: list[torch.Tensor] = []
    output = decode(model, [prompt], config, on_step=lambda step: canvases.append(step.canvas))
    start = torch.full_like(canvases[0], case.meta["mask_token_id"])
    start[0, : len(prompt)] = prompt
    return output.canvas, torch.stack([start, *canvases])
