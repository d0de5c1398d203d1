"""Where an adapter can sit: every linear layer, under the names of the official code and of ours.

Published adapters name modules as the official code does, where every expert is three linear layers
of its own. Here the experts of a layer are one stack, so a *place* is a linear layer, or one
projection of one expert. Knows names and shapes, not PEFT.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from torch import nn

from memdlm.backbones.base import DiffusionMaskedLM
from memdlm.backbones.checkpoint_layout import official_names
from memdlm.backbones.experts import Experts
from memdlm.errors import ConfigError

ALL_LINEAR = "all-linear"

Targets = str | Iterable[str]


@dataclass(frozen=True)
class Place:
    """One matrix that an adapter may change.

    Attributes:
        official: Path of its linear layer in the official code.
        module: Path of the linear layer or stack of experts in ours, below the model.
        out_features: Output width.
        in_features: Input width.
        expert: Index in the stack; None for a linear layer.
        projection: Name in the stack, e.g. `gate_proj`; None for a linear layer.
    """

    official: str
    module: str
    out_features: int
    in_features: int
    expert: int | None = None
    projection: str | None = None

    @property
    def native(self) -> str:
        """Path in our naming, with the expert's index where there is one."""
        return f"{self.module}.{self.expert}.{self.projection}" if self.projection else self.module

    @property
    def leaf(self) -> str:
        """Last part of the name of the adapter's tensor for this place, or for all its stack."""
        return self.projection or "weight"

    @property
    def names(self) -> tuple[str, ...]:
        """All names it goes by; those of a stack's projection stand for every expert."""
        named = [self.official, self.native]
        if self.projection is not None:
            named.append(f"{self.module}.{self.projection}")
        return tuple(dict.fromkeys(named))

    @property
    def layer(self) -> int | None:
        """Index of its layer; None outside the layers."""
        return next((int(part) for part in self.module.split(".") if part.isdigit()), None)


@dataclass(frozen=True)
class PlaceTable:
    """All places of a model.

    Attributes:
        places: Linear layers, then experts, each in module order.
        head: Native path of the vocabulary head.
        others: Official paths of the modules that are no places.
    """

    places: tuple[Place, ...]
    head: str
    others: tuple[str, ...]
    by_name: dict[str, Place] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Index the places by their official names, then by ours."""
        index = {place.native: place for place in self.places}
        index.update({place.official: place for place in self.places})
        object.__setattr__(self, "by_name", index)

    def targeted(self, targets: Targets) -> tuple[Place, ...]:
        """Return the places that `targets` means.

        Args:
            targets: `all-linear` (all but the head); a regular expression for whole names; or
                names, each matching the end of a place's name or of a module's around it. Official
                names and ours both count.

        Raises:
            ConfigError: One matches nothing, or only some experts of a stack are meant.
        """
        if isinstance(targets, str):
            if targets.lower() == ALL_LINEAR:
                return tuple(place for place in self.places if place.module != self.head)
            found = tuple(filter(_whole_name(targets), self.places))
            if not found:
                raise ConfigError(self._nothing_matches([targets]))
        else:
            wanted = set(targets)
            hits = {place: wanted & _ends_around(place) for place in self.places}
            missed = sorted(wanted.difference(*hits.values()))
            if missed or not wanted:
                raise ConfigError(self._nothing_matches(missed))
            found = tuple(place for place, names in hits.items() if names)
        return self.whole_stacks(found)

    def without(self, places: tuple[Place, ...], excluded: Targets) -> tuple[Place, ...]:
        """Return `places` less those that `excluded`, written like targets, means."""
        if isinstance(excluded, str):
            is_meant = _whole_name(excluded)
            return self.whole_stacks(tuple(place for place in places if not is_meant(place)))
        names = set(excluded)
        return self.whole_stacks(tuple(p for p in places if not names & _ends_around(p)))

    def whole_stacks(self, places: tuple[Place, ...]) -> tuple[Place, ...]:
        """Refuse places that hold only some experts of a stack; the factors are stacked too."""
        chosen = set(places)
        for (module, projection), experts in _by_stack(self.places).items():
            kept = [place for place in experts if place in chosen]
            if kept and len(kept) < len(experts):
                raise ConfigError(
                    f"target_modules means expert {kept[0].expert} of {module} but not all "
                    f"{len(experts)} in {projection}: adapt every expert of a layer or none"
                )
        return places

    def suffixes(self, places: Iterable[Place]) -> list[str]:
        """Return the shortest official names that mean `places` to PEFT, and nothing else."""
        kept = set(places)
        avoided = [p.official for p in self.places if p not in kept]
        taken = {end for name in (*avoided, *self.others) for end in _ends(name)}
        return sorted(
            {next(end for end in _ends(place.official) if end not in taken) for place in kept}
        )

    def _nothing_matches(self, names: list[str]) -> str:
        kinds = dict.fromkeys(re.split(r"\.\d+\.", place.official)[-1] for place in self.places)
        if any(place.projection for place in self.places):
            kinds["experts"] = None
        shown = f"{', '.join(map(repr, names))} matches no linear layer" if names else "it is empty"
        return f"target_modules: {shown}; use {ALL_LINEAR}, or name any of {', '.join(kinds)}"


def find_places(model: DiffusionMaskedLM) -> PlaceTable:
    """List the places of `model`, through the layers of an adapter if it carries one."""
    linear, stacks, others = {}, {}, []
    for path, module in _leaves(model, ""):
        if isinstance(module, nn.Linear):
            linear[path] = module
        elif isinstance(module, Experts):
            stacks[path] = module
        else:
            others.append(path)
    official = official_names(model.config.model_type, [*linear, *stacks, *others])
    places = []
    for path in [*linear, *stacks]:
        if path in linear:
            layer = linear[path]
            places.append(Place(official[path], path, layer.out_features, layer.in_features))
            continue
        for expert in range(stacks[path].num_experts):
            for projection in Experts.projections:
                shape = stacks[path].projection_shape(projection)
                name = f"{official[path]}.{expert}.{projection}"
                places.append(Place(name, path, *shape, expert, projection))
    head = next(path for path, layer in linear.items() if layer is _head(model))
    return PlaceTable(tuple(places), head, tuple(official[path] for path in others))


def _head(model: DiffusionMaskedLM) -> nn.Module:
    head = model.get_output_embeddings()
    return getattr(head, "base_layer", head)


def _leaves(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield linear layers, stacks of experts and every other module, an adapter's own excepted."""
    base = getattr(module, "base_layer", module)
    yield path, base
    if isinstance(base, nn.Linear | Experts):
        return
    for name, child in base.named_children():
        yield from _leaves(child, f"{path}.{name}" if path else name)


def _by_stack(places: Iterable[Place]) -> dict[tuple[str, str], list[Place]]:
    stacks: dict[tuple[str, str], list[Place]] = {}
    for place in places:
        if place.projection is not None:
            stacks.setdefault((place.module, place.projection), []).append(place)
    return stacks


def _ends(name: str) -> Iterator[str]:
    """Yield the ends of a dotted name, shortest first."""
    parts = name.split(".")
    for start in range(len(parts) - 1, -1, -1):
        yield ".".join(parts[start:])


def _ends_around(place: Place) -> frozenset[str]:
    """Return every end of the names of a place and of the modules that hold it."""
    return frozenset().union(*(_ends_from(name) for name in place.names))


@lru_cache(maxsize=4096)  # places share the modules that hold them
def _ends_from(name: str) -> frozenset[str]:
    around = name.rpartition(".")[0]
    return frozenset(_ends(name)) | (_ends_from(around) if around else frozenset())


def _whole_name(pattern: str) -> Callable[[Place], bool]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"target_modules: {pattern!r} is no regular expression ({error}); write names as a list"
        ) from error
    return lambda place: any(expression.fullmatch(name) for name in place.names)
