"""Every family that the library knows has a row in the table, so that these tests reach it."""

from transformers import CONFIG_MAPPING

from memdlm import _registration
from memdlm.backbones.experts import Experts
from memdlm.backbones.loading import supported_architectures
from memdlm.backbones.tiny import TINY_FAMILIES
from tests.families import FAMILIES


def test_every_family_that_can_be_built_tiny_has_a_row() -> None:
    assert set(FAMILIES) == set(TINY_FAMILIES)


def test_every_architecture_that_can_be_loaded_has_a_row() -> None:
    classes = {TINY_FAMILIES[name].model_class.__name__ for name in FAMILIES}
    assert classes == set(supported_architectures())


def test_every_registered_model_type_has_a_row() -> None:
    configs = [TINY_FAMILIES[name].config_class for name in FAMILIES]
    assert {config.model_type for config in configs} <= set(_registration.MODEL_TYPES)
    for name in _registration.MODEL_TYPES:  # some are further names of one family
        assert issubclass(CONFIG_MAPPING[name], tuple(configs)), name


def test_every_recorded_checkpoint_belongs_to_one_family(fixtures) -> None:
    named = sorted(name for row in FAMILIES.values() for name in row.golden)
    assert named == sorted(folder.name for folder in (fixtures / "backbones").iterdir())


def test_a_row_says_what_its_model_is(family, traits, build_model) -> None:
    model = build_model(family)
    names = {name.split(".")[-1] for name, _ in model.named_modules()}
    assert set(traits.attention) | set(traits.router) <= names
    assert traits.has_experts == any(isinstance(module, Experts) for module in model.modules())
    assert all(any(name.endswith(end) for name, _ in model.named_buffers()) for end in traits.fixed)
