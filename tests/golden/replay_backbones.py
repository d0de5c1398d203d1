"""Replay of `backbones/<name>`: logits, hidden states and routing of the official model code."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from memdlm.backbones.loading import load_model


def replay(folder: Path) -> dict[str, float]:
    """Return the largest deviation of every kind over the folder's cases."""
    model = load_model(str(folder)).eval()
    inputs = load_file(folder / "inputs.safetensors")
    outputs = load_file(folder / "outputs.safetensors")
    deviations: dict[str, float] = {}

    def compare(kind: str, ours: torch.Tensor, golden: torch.Tensor) -> None:
        difference = (ours - golden).abs().max().item()
        deviations[kind] = max(deviations.get(kind, 0.0), difference)

    for case in sorted({key.split(".")[0] for key in inputs}):
        router_logits: list[torch.Tensor] = []
        hooks = [
            gate.register_forward_hook(lambda *args, seen=router_logits: seen.append(args[-1]))
            for gate in _routers(model)
        ]
        with torch.no_grad():
            result = model(
                inputs[f"{case}.input_ids"],
                attention_mask=inputs.get(f"{case}.attention_mask"),
                position_ids=inputs.get(f"{case}.position_ids"),
                output_hidden_states=True,
            )
        for hook in hooks:
            hook.remove()
        compare("logits", result.logits, outputs[f"{case}.logits"])
        compare("hidden", result.hidden_states[-1], outputs[f"{case}.last_hidden"])
        if f"{case}.hidden_states" in outputs:
            compare("hidden", torch.stack(result.hidden_states), outputs[f"{case}.hidden_states"])
        if f"{case}.router_logits" in outputs:
            golden = outputs[f"{case}.router_logits"]
            compare("routing", router_logits[0].view_as(golden), golden)
    return deviations


def _routers(model: nn.Module) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if name.endswith(".mlp.gate")]
