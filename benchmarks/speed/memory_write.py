"""What writing a memory from a prompt costs, in forward passes of that prompt.

    python -m benchmarks.speed.memory_write              # published shapes, FLOPs only, seconds
    python -m benchmarks.speed.memory_write --help

FLOPs are counted on the meta device at the published shapes, with the paper's settings (K = 2, rank
32, last tenth of the layers). One forward pass is that of the clean prompt with logits at every
position. Prints a table, then one JSON line.
"""

import argparse
import json
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.speed.flops import count_flops
from memdlm.backbones.base import DiffusionMaskedLM
from memdlm.backbones.dream import DreamConfig, DreamForMaskedLM
from memdlm.backbones.llada import LLaDAConfig, LLaDAForMaskedLM
from memdlm.backbones.llada2 import LLaDA2Config, LLaDA2ForMaskedLM
from memdlm.backbones.llada_moe import LLaDAMoEConfig, LLaDAMoEForMaskedLM
from memdlm.diffusion.objective import ObjectiveConfig
from memdlm.memory.budget import memory_bytes
from memdlm.memory.config import MemoryConfig
from memdlm.memory.fast_weights import FastWeights
from memdlm.memory.inner_loop import plan_inner_loop, run_inner_loop
from memdlm.memory.placement import place
from memdlm.memory.prompt import Round, prompt_trajectory

# What a write may cost, in forward passes of its prompt.
MOST_FORWARDS = 2.3

MODELS: dict[str, tuple[Any, Any]] = {
    "LLaDA-8B": (LLaDAForMaskedLM, partial(LLaDAConfig, mlp_hidden_size=12288)),
    "LLaDA-MoE-7B-A1B": (LLaDAMoEForMaskedLM, LLaDAMoEConfig),
    "LLaDA2.1-mini": (LLaDA2ForMaskedLM, LLaDA2Config),
    "Dream-7B": (DreamForMaskedLM, DreamConfig),
}
_META = torch.device("meta")


def build(name: str) -> DiffusionMaskedLM:
    """Return the model `name` at its published shape, bfloat16, without values."""
    model_class, config = MODELS[name]
    with _META:
        return model_class(config()).to(torch.bfloat16).eval()


def write_cost(model: DiffusionMaskedLM, length: int, memory: MemoryConfig) -> dict[str, int]:
    """Return the FLOPs of one forward pass of a prompt and of writing a memory from it."""
    ids = torch.zeros(1, length, dtype=torch.int64)
    on_meta = ids.to(_META)

    def forward() -> None:
        with torch.no_grad():
            model(on_meta)

    # As ParametricMemory.write does, which draws on the model's device and so cannot run here.
    config = replace(memory, weighting=memory.prompt_weighting)
    objective = ObjectiveConfig()
    mask: int = model.config.mask_token_id
    trajectory, batch = prompt_trajectory(Round((0,), ids, None), [0], [0], config, objective, mask)
    plan = plan_inner_loop(trajectory, batch, config, objective).to(_META)
    fast = FastWeights(place(model.model, config), config, 1, _META, torch.Generator())

    def write() -> None:
        with torch.no_grad():
            _, inputs = model.model.embed(plan.states[0])
        run_inner_loop(model, fast, plan, config, inputs)

    return {"forward": count_flops(forward), "write": count_flops(write)}


def main() -> None:
    """Print what every model's write costs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 2048, 8192])
    arguments = parser.parse_args()
    results = []
    print(
        f"{'model':<18}{'tokens':>8}{'forward TFLOPs':>16}{'write TFLOPs':>14}{'forwards':>10}"
        f"{'memory MiB':>12}"
    )
    for name in arguments.models:
        model = build(name)
        size = memory_bytes(place(model.model, MemoryConfig()), MemoryConfig())
        for length in arguments.lengths:
            flops = write_cost(model, length, MemoryConfig())
            ratio = flops["write"] / flops["forward"]
            forward, write = flops["forward"] / 1e12, flops["write"] / 1e12
            print(
                f"{name:<18}{length:>8}{forward:>16.3f}{write:>14.3f}{ratio:>10.2f}"
                f"{size / 2**20:>12.1f}"
            )
            results.append(
                {"model": name, "tokens": length, **flops, "forwards": ratio, "bytes": size}
            )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
