"""Which weights a memory adapts: the last fraction of layers, and the modules in scope there.

A *site* is one weight matrix, or one projection of a stack of experts. Knows names and shapes, not
values.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from memdlm.backbones.base import DiffusionModel
from memdlm.backbones.experts import Experts
from memdlm.errors import ConfigError
from memdlm.memory.config import MemoryConfig

FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Site:
    """One adapted projection.

    Attributes:
        name: Path below the backbone, e.g. `layers.15.mlp.up_proj`; the projection of a stack of
            experts follows the stack's path, e.g. `layers.15.mlp.experts.up_proj`.
        module: Path of the module that computes it.
        projection: Name inside the stack of experts; None for a plain linear layer.
        num_experts: Experts in the stack; None for a plain linear layer.
        out_features: Output width.
        in_features: Input width.
    """

    name: str
    module: str
    projection: str | None
    num_experts: int | None
    out_features: int
    in_features: int

    @property
    def lead(self) -> tuple[int, ...]:
        """Dimensions that come before a single matrix."""
        return () if self.num_experts is None else (self.num_experts,)


@dataclass(frozen=True)
class Placement:
    """All sites of a memory, and the first layer that has one."""

    first_layer: int
    sites: tuple[Site, ...]


def first_adapted_layer(num_layers: int, fraction: float) -> int:
    """Return int(N * (1 - f)): with f = 0.1, layer 14 of 16 and 18 of 20.

    Raises:
        ConfigError: If the fraction is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ConfigError(
            f"memory.layer_fraction: {fraction} is out of range; it must be in (0, 1]"
        )
    # A fraction below the rounding of floats still means the last layer.
    return min(int(num_layers * (1 - fraction)), num_layers - 1)


def place(model: DiffusionModel, config: MemoryConfig) -> Placement:
    """Find the sites of `config` in `model`.

    Raises:
        ConfigError: If the scope selects no module.
    """
    start = first_adapted_layer(len(model.layers), config.layer_fraction)
    sites = tuple(
        site
        for index in range(start, len(model.layers))
        for site in _sites(model.layers[index], f"layers.{index}")
        if _is_in_scope(site, config)
    )
    if not sites:
        wanted = f"modules {list(config.modules)}" if config.modules else f"scope {config.scope!r}"
        found = sorted(
            {site.name.split(".", 2)[2] for site in _sites(model.layers[start], f"layers.{start}")}
        )
        raise ConfigError(
            f"memory.{wanted} selects no module in layers {start}-{len(model.layers) - 1}; "
            f"choose among {', '.join(found)}"
        )
    return Placement(min(int(site.name.split(".")[1]) for site in sites), sites)


def _is_in_scope(site: Site, config: MemoryConfig) -> bool:
    last = site.name.rsplit(".", 1)[-1]
    if config.scope == "modules":
        return any(
            last == wanted or site.name == wanted or site.name.endswith("." + wanted)
            for wanted in config.modules
        )
    if ".self_attn." in site.name:
        return config.scope == "ffn_attention"
    return last in FEED_FORWARD


def _sites(module: nn.Module, path: str) -> Iterator[Site]:
    """Yield every adaptable projection below `module`, in module order."""
    if isinstance(module, Experts):
        for projection in module.projections:
            out_features, in_features = module.projection_shape(projection)
            yield Site(
                f"{path.replace('.base_layer', '')}.{projection}",  # as if no adapter were around
                path,
                projection,
                module.num_experts,
                out_features,
                in_features,
            )
        return
    # An adapter library wraps the linear layer; the fast weights then go around the wrapper, so
    # that their delta adds beside the adapter's.
    linear = getattr(module, "base_layer", module)
    if isinstance(linear, nn.Linear):
        yield Site(path, path, None, None, linear.out_features, linear.in_features)
        return
    for name, child in module.named_children():
        yield from _sites(child, f"{path}.{name}")
