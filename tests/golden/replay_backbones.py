"""Replay of `backbones/<name>`: logits, hidden states and routing of the official model code."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from memdlm.backbones.loading import load_model


def replay(folder: Path) -> dict[str, float]:
    """Return the largest deviation of every kind over the folder's cases."""
    model = load_model(str(folder)).eval()
    # The fixtures hold what the official forward returns; aligning it is our addition.
    model.right_shift_logits = False
    inputs = load_file(folder / "inputs.safetensors")
    outputs = load_file(folder / "outputs.safetensors")
    deviations: dict[str, float] = {}

    def compare(kind: str, ours: torch.Tensor, golden: torch.Tensor, rows: torch.Tensor) -> None:
        difference = (ours - golden)[rows].abs().max().item()
        deviations[kind] = max(deviations.get(kind, 0.0), difference)

    for case in sorted({key.split(".")[0] for key in inputs}):
        router_logits: list[torch.Tensor] = []
        routing: list[tuple[torch.Tensor, ...]] = []
        hooks = [
            gate.register_forward_hook(lambda *args, seen=router_logits: seen.append(args[-1]))
            for gate in _ending(model, ".mlp.gate")
        ] + [
            experts.register_forward_pre_hook(lambda *args, seen=routing: seen.append(args[-1][1:]))
            for experts in _ending(model, ".mlp.experts")
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
        rows = torch.ones_like(inputs[f"{case}.input_ids"], dtype=torch.bool)
        if model.config.model_type == "Dream" and f"{case}.valid" in inputs:
            rows = inputs[f"{case}.valid"].bool()  # the official code hides padded queries too
        compare("logits", result.logits, outputs[f"{case}.logits"], rows)
        compare("hidden", result.hidden_states[-1], outputs[f"{case}.last_hidden"], rows)
        if f"{case}.hidden_states" in outputs:
            golden = outputs[f"{case}.hidden_states"]
            for ours, theirs in zip(result.hidden_states, golden, strict=True):
                compare("hidden", ours, theirs, rows)
        if f"{case}.router_logits" in outputs:
            golden = outputs[f"{case}.router_logits"]
            compare("routing", router_logits[0].view_as(golden), golden, rows)
            chosen, weights = (outputs[f"{case}.topk_{name}"] for name in ("idx", "weight"))
            chosen_here, weights_here = (part.view_as(chosen) for part in routing[0])
            empty = torch.zeros_like(golden)  # order inside the top k means nothing
            compare(
                "routing",
                empty.scatter(-1, chosen_here, weights_here),
                empty.scatter(-1, chosen, weights),
                rows,
            )
    return deviations


def _ending(model: nn.Module, end: str) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if name.endswith(end)]
