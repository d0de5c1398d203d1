"""Makes transformers' Auto classes know our families, without importing either of them early.

`AutoModelForMaskedLM.from_pretrained` must find our families after `import memdlm`, whichever of
the two is imported first, and yet `import memdlm` must not take the seconds that importing
transformers takes: `memdlm --help` answers at once. So only the model types are entered into
transformers' registry; asking for one of them imports our backbones, which then register themselves
fully. This file leans on that registry's private dict of extra entries, and is the only one that
does.
"""

import importlib
import importlib.util
import sys
from collections.abc import ItemsView, Sequence, ValuesView
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODEL_TYPES = ("llada", "lladamoe", "llada2_moe", "llada2_moe_21", "llada21_moe", "Dream")
_REGISTRY = "transformers.models.auto.configuration_auto"


def register_with_transformers() -> None:
    """Enter our model types now if the registry is loaded, else as soon as it is."""
    if _REGISTRY in sys.modules:
        _enter(sys.modules[_REGISTRY])
    else:
        sys.meta_path.insert(0, _Finder())


class _Families(dict[str, Any]):
    """Extra registry entries, ours being resolved when first looked at."""

    def _resolve(self) -> None:
        if any(value is None for value in super().values()):
            # Entries are replaced while this runs; a failure surfaces as its own ImportError.
            importlib.import_module("memdlm.backbones")

    def __getitem__(self, key: str) -> Any:
        if super().__getitem__(key) is None:
            self._resolve()
        return super().__getitem__(key)

    def values(self) -> ValuesView[Any]:  # type: ignore[override]
        self._resolve()
        return super().values()

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        self._resolve()
        return super().items()


def _enter(registry: ModuleType) -> None:
    extra = registry.CONFIG_MAPPING._extra_content
    registry.CONFIG_MAPPING._extra_content = _Families(
        {**dict.fromkeys(MODEL_TYPES), **dict(extra)}
    )


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    def __init__(self, wrapped: Loader) -> None:
        self.wrapped = wrapped

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.wrapped.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.wrapped.exec_module(module)
        _enter(module)
