"""Replay of `peft_adapters/<backbone>`: published adapters on the backbone of the same name."""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from memdlm.backbones.adapters.files import WEIGHTS
from memdlm.backbones.loading import load_model


def replay(folder: Path) -> dict[str, float]:
    """Compare the logits, adapted and merged, and count the tensors that change on the way out."""
    base = folder.parent.parent / "backbones" / folder.name
    model = load_model(base, adapter=folder)
    # The fixtures hold what the official forward returns; aligning it is our addition.
    model.get_base_model().right_shift_logits = False
    golden = load_file(folder / "outputs.safetensors")
    arguments = {"attention_mask": golden.get("attention_mask")}
    with torch.no_grad():
        adapted = model(golden["input_ids"], **arguments).logits
        with tempfile.TemporaryDirectory() as place:
            model.save_pretrained(place)
            before, after = (load_file(Path(home) / WEIGHTS) for home in (folder, place))
        merged = model.merge_and_unload()(golden["input_ids"], **arguments).logits
    changed = before.keys() ^ after.keys()
    changed |= {name for name in before.keys() & after.keys() if not _same(before, after, name)}
    return {
        "logits": (adapted - golden["logits"]).abs().max().item(),
        "logits.merged": (merged - golden["logits"]).abs().max().item(),
        "count.saved": float(len(changed)),
    }


def _same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], name: str) -> bool:
    one, other = first[name], second[name]
    return one.dtype == other.dtype and torch.equal(one, other)
