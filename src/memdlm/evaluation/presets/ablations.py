"""The paper's ablations: one change of the memory per variant, all on BABILong at 1k.

Every variant is a training of its own, asked with a memory written from each prompt (what the paper
prints) and without one (`<name>__train_only`). A change holds in training and at inference alike;
of the anchor ratio it holds at inference only, where alone it matters. One variant of each ablation
is the default, so all of them share its training.
"""

from collections.abc import Mapping
from typing import Any

from memdlm.evaluation.presets.paper import figure8
from memdlm.evaluation.presets.preset import TRAIN_ONLY_SUFFIX, Preset, Tiny, Variant

TASK = "babilong@1k"
BASELINE = Variant("standard_mdlm", "Standard MDLM", {"memory": {"enabled": False}})

Changes = Mapping[str, Mapping[str, Any]]

# What each variant changes of the memory; the names are the paper's rows.
SUPERVISION: Changes = {
    "cross_entropy": {"loss": "cross_entropy"},
    "kl": {"loss": "kl"},
    "reverse_kl": {"loss": "reverse_kl"},
    "hidden_cosine": {"loss": "hidden_cosine"},
    "hidden_mse": {"loss": "hidden_mse"},
}
SCOPE: Changes = {
    "ffn_0.05": {"layer_fraction": 0.05},
    "ffn_0.10": {"layer_fraction": 0.1},
    "ffn_0.25": {"layer_fraction": 0.25},
    "ffn_0.50": {"layer_fraction": 0.5},
    "ffn_attention_0.10": {"scope": "ffn_attention"},
    "full_parameter": {"kind": "full"},
}
GRADIENTS: Changes = {
    "local_clip_1.0": {"clip_norm": 1.0},
    "global": {"clip_scope": "global"},
    "local_clip_0.5": {"clip_norm": 0.5},
    "local_clip_2.0": {"clip_norm": 2.0},
    "local_no_clip": {"clip_norm": None},
}
PRE_ANCHOR: Changes = {
    "1.25": {"pre_anchor_scale": 1.25},
    "1.5": {"pre_anchor_scale": 1.5},
    "1.75": {"pre_anchor_scale": 1.75},
    "2.0": {"pre_anchor_scale": 2.0},
}
CONSISTENCY: Changes = {
    "consistent": {"trajectory": "anchor_consistent"},
    "inconsistent": {"trajectory": "inconsistent"},
}
STAGES: Changes = {
    "both_clean_target": {"trajectory": "anchor_consistent", "supervision": "masked"},
    "both_anchor_token_only": {"trajectory": "anchor_consistent", "supervision": "newly_revealed"},
    "anchor_to_target_only": {"trajectory": "anchor_to_target"},
    "pre_anchor_only_anchor_token": {
        "trajectory": "pre_anchor_only",
        "supervision": "newly_revealed",
    },
    "pre_anchor_only_clean_target": {"trajectory": "pre_anchor_only", "supervision": "masked"},
}
STEPS: Changes = {"2": {"num_steps": 2}, "3": {"num_steps": 3}, "4": {"num_steps": 4}}

_LABELS = {
    "ffn_0.05": "FFN, last 5 % of layers",
    "ffn_0.10": "FFN, last 10 %",
    "ffn_0.25": "FFN, last 25 %",
    "ffn_0.50": "FFN, last 50 %",
    "ffn_attention_0.10": "FFN and attention, last 10 %",
    "full_parameter": "FFN, last 10 %, full parameters",
}


def _preset(name: str, title: str, changes: Changes, prefix: str = "") -> Preset:
    variants = [BASELINE]
    for key, change in changes.items():
        label = _LABELS.get(key, f"{prefix}{key.replace('_', ' ')}")
        train = {"memory": dict(change)}
        variants.append(Variant(key, label, train, memory=True))
        variants.append(Variant(f"{key}{TRAIN_ONLY_SUFFIX}", f"{label}, train only", train))
    return Preset(
        name=f"ablations/{name}",
        title=title,
        description="One change of the memory per variant, in training and at inference, on "
        "BABILong (mean of qa1 to qa5) at 1k.",
        variants=tuple(variants),
        tasks=(TASK,),
        tiny=Tiny(("generated@96",), 100),
    )


def ablations() -> tuple[Preset, ...]:
    """Return all eight."""
    return (
        _preset("supervision", "Ablation: inner loss", SUPERVISION),
        _preset("scope", "Ablation: what is adapted", SCOPE),
        _preset("gradients", "Ablation: clipping", GRADIENTS),
        _preset("pre_anchor", "Ablation: pre-anchor scale", PRE_ANCHOR, "scale "),
        _preset("consistency", "Ablation: trajectory", CONSISTENCY),
        _preset("stages", "Ablation: stages of the trajectory", STAGES),
        _preset("steps", "Ablation: inner steps", STEPS, "inner steps: "),
        figure8("ablations/anchor_ratio"),
    )
