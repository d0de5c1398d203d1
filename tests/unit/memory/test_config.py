from dataclasses import fields

import pytest

from memdlm.errors import ConfigError
from memdlm.memory.config import MemoryConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank", 0),
        ("rank", -3),
        ("rank", 2.5),
        ("num_steps", 0),
        ("num_steps", 1.5),
        ("num_epochs", 0),
        ("alpha", 0.0),
        ("alpha", float("nan")),
        ("learning_rate", 0.0),
        ("learning_rate", float("inf")),
        ("layer_fraction", 0.0),
        ("layer_fraction", -0.1),
        ("layer_fraction", 1.01),
        ("layer_fraction", float("nan")),
        ("clip_norm", 0.0),
        ("clip_norm", -1.0),
        ("temperature", 0.0),
        ("pre_anchor_scale", 0.9),
        ("prompt_mask_ratio", 0.0),
        ("prompt_mask_ratio", 1.1),
        ("inconsistent_start_ratio", 0.0),
        ("kind", "dora"),
        ("scope", "mlp"),
        ("sharing", "row"),
        ("clip_scope", "all"),
        ("trajectory", "pmc"),
        ("supervision", "all"),
        ("loss", "ce"),
        ("hidden_comparison", "published"),
        ("pre_anchor_prefix", "shared"),
        ("weighting", "scheduler"),
        ("prompt_weighting", "none"),
        ("normaliser", "tokens"),
        ("modules", ("up_proj",)),
    ],
)
def test_a_bad_setting_is_named_in_one_line(field, value):
    with pytest.raises(ConfigError, match=rf"memory\.{field}") as caught:
        MemoryConfig(**{field: value})
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_modules_must_be_named_with_their_scope():
    with pytest.raises(ConfigError, match=r"memory\.modules"):
        MemoryConfig(scope="modules")
    assert MemoryConfig(scope="modules", modules=["up_proj"]).modules == ("up_proj",)


def test_an_inconsistent_trajectory_cannot_rise():
    settings = {"inconsistent_start_ratio": 0.1, "prompt_mask_ratio": 0.2}
    with pytest.raises(ConfigError, match=r"memory\.inconsistent_start_ratio"):
        MemoryConfig(trajectory="inconsistent", **settings)
    MemoryConfig(**settings)  # matters to that trajectory only


def test_the_defaults_are_the_papers():
    config = MemoryConfig()
    assert (config.rank, config.alpha, config.layer_fraction) == (32, 64.0, 0.1)
    assert (config.num_steps, config.num_epochs, config.learning_rate) == (2, 1, 0.1)
    assert (config.clip_norm, config.clip_scope, config.pre_anchor_scale) == (1.0, "local", 1.5)
    assert config.pre_anchor_prefix == "exact"
    assert (config.trajectory, config.loss, config.prompt_mask_ratio) == (
        "anchor_consistent",
        "cross_entropy",
        0.2,
    )


def test_every_field_has_a_help_text():
    assert all(field.metadata.get("help") for field in fields(MemoryConfig))
