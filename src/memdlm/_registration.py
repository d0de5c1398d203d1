"""Registers our families with transformers' Auto classes at the moment those are first imported.

`AutoModelForMaskedLM.from_pretrained` must know our families after `import memdlm`, whichever of the
two is imported first, and yet `import memdlm` must not itself take the seconds that importing
transformers takes: `memdlm --help` answers at once. So if the Auto classes are not there yet, a
finder waits for them.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_CONFIGS = "transformers.models.auto.configuration_auto"
_MODELS = "transformers.models.auto.modeling_auto"


def register_with_transformers() -> None:
    """Register now if the Auto classes are loaded, else as soon as they are."""
    if _CONFIGS in sys.modules:
        importlib.import_module("memdlm.backbones")
    else:
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in (_CONFIGS, _MODELS):
            return None
        place = sys.meta_path.index(self)
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if fullname == _CONFIGS:
            sys.meta_path.insert(place, self)  # the models may still have to come
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
        if module.__name__ == _CONFIGS and _MODELS in sys.modules:
            return  # the models are just being imported, and our families need them complete
        importlib.import_module("memdlm.backbones")
