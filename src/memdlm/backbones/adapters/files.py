"""Adapters on disk: one pair of factors per linear layer of the official code, safetensors only.

    base_model.model.<official path>.lora_A.weight    [r, in]
    base_model.model.<official path>.lora_B.weight    [out, r]

In memory the factors of a stack of experts are one tensor
(`memdlm.backbones.adapters.expert_lora`). Every key is looked up in a `PlaceTable`; nothing is
guessed. Files of earlier versions of memdlm, which used our own names, are read too.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from memdlm.backbones.adapters.places import Place, PlaceTable
from memdlm.errors import CheckpointError

WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
CONFIG = "adapter_config.json"

_KEY = re.compile(r"base_model\.model\.(?P<name>.+)\.lora_(?P<factor>[AB])\.weight")

Factors = dict[tuple[Place, str], torch.Tensor]


def read_tensors(adapter: str, revision: str | None = None) -> dict[str, torch.Tensor]:
    """Read the tensors of an adapter folder or hub name, onto the CPU.

    Raises:
        CheckpointError: There is no safetensors file.
        OSError: The file or the hub cannot be read.
    """
    folder = Path(adapter)
    if folder.is_dir():
        path = folder / WEIGHTS
        if not path.is_file():
            pickled = (
                f" but {PICKLE}, a pickle, which is never opened" * (folder / PICKLE).is_file()
            )
            raise CheckpointError(
                f"{adapter} holds no {WEIGHTS}{pickled}: save the adapter as safetensors"
            )
        return load_file(path)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        return load_file(hf_hub_download(adapter, WEIGHTS, revision=revision))
    except RemoteEntryNotFoundError as error:
        raise CheckpointError(
            f"{adapter} holds no {WEIGHTS}: adapters are read from safetensors only"
        ) from error


def place_factors(
    tensors: Mapping[str, torch.Tensor], table: PlaceTable, rank: int, where: str
) -> Factors:
    """Find the place of every tensor of a file.

    Args:
        tensors: By the names in the file.
        table: Places of the model.
        rank: Of all factors.
        where: Names the adapter in messages.

    Raises:
        CheckpointError: A tensor has no place in the model or another shape, or its counterpart or
            those of other experts of its stack are missing; the first few are listed.
    """
    found: Factors = {}
    homeless, misshapen = [], []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        place = table.by_name.get(match["name"]) if match else None
        if match is None or place is None or (place, match["factor"]) in found:
            homeless.append(key)
        elif tuple(tensor.shape) != _shape(place, match["factor"], rank):
            misshapen.append(f"{key} {tuple(tensor.shape)}")
        else:
            found[place, match["factor"]] = tensor
    if homeless or misshapen:
        faults = {"without a place": homeless, "of another shape or rank": misshapen}
        shown = "; ".join(f"{kind}: {_few(names)}" for kind, names in faults.items() if names)
        raise CheckpointError(
            f"{where} does not fit the model (weights {shown}): it was made for another base or "
            "architecture, or its adapter_config.json is not its own"
        )
    check_complete(found, table.places, where, among=_touched(found, table))
    return found


def check_complete(
    found: Factors, places: Iterable[Place], where: str, among: set[tuple[str, str]] | None = None
) -> None:
    """Make sure that both factors of every place are there.

    Args:
        found: What the file gave.
        places: Where the adapter sits.
        where: Names the adapter in messages.
        among: Only check these modules and leaves.

    Raises:
        CheckpointError: Listing the first few that are missing.
    """
    missing = [
        f"{place.official}.lora_{factor}"
        for place in places
        if among is None or (place.module, place.leaf) in among
        for factor in "AB"
        if (place, factor) not in found
    ]
    if missing:
        raise CheckpointError(
            f"{where}: weights are missing ({_few(missing)}): the file is incomplete or was made "
            "for other target_modules; download or save it again"
        )


def to_native(found: Factors, adapter_name: str) -> dict[str, torch.Tensor]:
    """Return the tensors under the names of the adapted model, experts stacked."""
    stacks: dict[str, list[tuple[int, torch.Tensor]]] = {}
    state = {}
    for (place, factor), tensor in found.items():
        name = native_key(place, factor, adapter_name)
        if place.expert is None:
            state[name] = tensor
        else:
            stacks.setdefault(name, []).append((place.expert, tensor))
    for name, experts in stacks.items():
        ordered = sorted(experts, key=lambda item: item[0])
        state[name] = torch.stack([tensor for _, tensor in ordered])
    return state


def to_file(
    state: Mapping[str, torch.Tensor], places: Iterable[Place], adapter_name: str
) -> dict[str, torch.Tensor]:
    """Return an adapter's tensors as they are saved.

    Args:
        state: A state dict of the adapted model, whole or of the adapter alone.
        places: Where the adapter sits.
        adapter_name: Its name in `state`.
    """
    saved = {}
    for place in places:
        for factor in "AB":
            tensor = state[native_key(place, factor, adapter_name)]
            if place.expert is not None:
                tensor = tensor[place.expert]
            saved[f"base_model.model.{place.official}.lora_{factor}.weight"] = tensor.contiguous()
    return saved


def native_key(place: Place, factor: str, adapter_name: str) -> str:
    """Return the name of a place's factor, or of its stack's, in the adapted model."""
    return f"base_model.model.{place.module}.lora_{factor}.{adapter_name}.{place.leaf}"


def _shape(place: Place, factor: str, rank: int) -> tuple[int, int]:
    return (rank, place.in_features) if factor == "A" else (place.out_features, rank)


def _touched(found: Factors, table: PlaceTable) -> set[tuple[str, str]]:
    return {(place.module, place.leaf) for place, _ in found}


def _few(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
