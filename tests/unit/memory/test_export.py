"""An exported memory gives the memory's logits, through plain PEFT and through ours."""

import json

import pytest
import torch
from peft import PeftModel

from memdlm import MemoryConfig, ParametricMemory
from memdlm.backbones.adapters import with_adapter
from memdlm.errors import CheckpointError, ConfigError, UsageError
from tests.families import FAMILIES

SMALL = {"rank": 3, "alpha": 6.0, "layer_fraction": 0.5, "learning_rate": 2.0}
IDS = torch.randint(0, 59, (1, 12), generator=torch.Generator().manual_seed(3))


def written(model, **changes) -> ParametricMemory:
    memory = ParametricMemory(model, MemoryConfig(**{**SMALL, **changes}))
    memory.write(IDS[:, :7])
    return memory


def logits_with(memory, model):
    with memory.attached(), torch.no_grad():
        return model(IDS).logits


# Odd alpha: the scale is no whole number. One projection: half of a fused stack has no memory.
SCOPES = {
    "attention": {"scope": "ffn_attention", "alpha": 5.0},
    "up_proj": {"scope": "modules", "modules": ["up_proj"]},
}
READERS = ("plain PEFT", "load_model, published", "load_model, peft")


@pytest.mark.parametrize(
    ("family", "scope", "reader"),
    [(family, "attention", reader) for family in FAMILIES for reader in READERS]
    + [("llada_moe", "up_proj", reader) for reader in READERS],
)
def test_an_adapter_gives_the_logits_of_its_memory(
    family, scope, reader, build_model, tmp_path
) -> None:
    changes = SCOPES[scope]
    model = build_model(family)
    memory = written(model, **changes)
    expected, plain = logits_with(memory, model), model(IDS).logits
    assert (expected - plain).abs().max() > 1e-3
    layout = "published" if reader.endswith("published") else "peft"
    memory.export(tmp_path / "adapter", layout=layout)
    base = build_model(family)
    if reader == "plain PEFT":
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
    else:
        adapted = with_adapter(base, str(tmp_path / "adapter"))
    with torch.no_grad():
        given = adapted.eval()(IDS).logits
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)


def test_a_row_of_many_is_exported_alone(build_model, tmp_path) -> None:
    model = build_model("llada")
    memory = ParametricMemory(model, MemoryConfig(**SMALL))
    memory.write(torch.cat([IDS, IDS.flip(1)]))
    memory.export(tmp_path / "adapter", row=1)
    expected = logits_with(memory.row(1), model)
    adapted = PeftModel.from_pretrained(build_model("llada"), tmp_path / "adapter")
    torch.testing.assert_close(adapted(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(UsageError, match="row 2: the memory has 2 rows"):
        memory.export(tmp_path / "other", row=2)


def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(build_model, tmp_path) -> None:
    model = build_model("llada")
    memory = written(model)
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="there exists: choose another place"):
        memory.export(tmp_path / "there")
    with pytest.raises(ConfigError, match="layout: 'zip' is not one of peft, published"):
        memory.export(tmp_path / "new", layout="zip")
    with pytest.raises(UsageError, match="is no LoRA and cannot be exported"):
        written(model, kind="full").export(tmp_path / "new")
    nothing = ParametricMemory(model, MemoryConfig(**SMALL))
    nothing.write(IDS[:, :1])  # one token, not masked: there is nothing to learn
    with pytest.raises(UsageError, match="nothing to export"):
        nothing.export(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_the_config_names_the_base(build_model, tmp_path) -> None:
    model = build_model("llada_moe")
    model.save_pretrained(tmp_path / "base")
    model.config._name_or_path = str(tmp_path / "base")
    written(model).export(tmp_path / "adapter", layout="published")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert (config["r"], config["lora_alpha"], config["inference_mode"]) == (3, 6, True)
