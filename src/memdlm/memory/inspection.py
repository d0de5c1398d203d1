"""What is in a memory: sizes, norms per layer, experts written. Plain data, ready for JSON."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from memdlm.memory.artefact import Artefact
from memdlm.memory.sparse import SiteDelta, site_delta


def describe(artefact: Artefact) -> dict[str, Any]:
    """Return a description of a memory; needs no model.

    `norm` is the Frobenius norm of what is added to the base weights, (alpha / rank) B A or the
    full delta, over a site, a layer or a whole memory. `written` lists the experts of a stack that
    some projection changes; the others saw no token.
    """
    return {
        "base": asdict(artefact.base),
        "bytes": artefact.num_bytes,
        "rows": [
            {**asdict(row), "num_tokens": row.num_tokens, **_row(artefact, index)}
            for index, row in enumerate(artefact.rows)
        ],
        "settings": {
            "memory": asdict(artefact.config),
            "objective": asdict(artefact.objective),
        },
        "versions": dict(artefact.versions),
    }


def _row(artefact: Artefact, row: int) -> dict[str, Any]:
    layers: dict[int, list[tuple[str, SiteDelta | None]]] = {}
    for site in artefact.sites:
        layer = int(site.name.split(".")[1])
        layers.setdefault(layer, []).append((site.name, site_delta(artefact.tensors, row, site)))
    described = [
        {"layer": layer, **_layer(dict(found), artefact)} for layer, found in layers.items()
    ]
    total = sum(layer["norm"] ** 2 for layer in described) ** 0.5
    return {"norm": total, "layers": described}


def _layer(found: Mapping[str, SiteDelta | None], artefact: Artefact) -> dict[str, Any]:
    norms = {
        name: 0.0 if delta is None else delta.norm(artefact.config.scale)
        for name, delta in found.items()
    }
    stacks: dict[str, dict[str, Any]] = {}
    for site in artefact.sites:
        if site.name in found and site.num_experts is not None:
            stack = stacks.setdefault(
                site.name.rsplit(".", 1)[0], {"num_experts": site.num_experts, "written": []}
            )
            delta = found[site.name]
            stack["written"] = sorted({*stack["written"], *((delta and delta.experts) or ())})
    return {
        "norm": sum(norm**2 for norm in norms.values()) ** 0.5,
        "sites": norms,
        "experts": stacks,
    }
