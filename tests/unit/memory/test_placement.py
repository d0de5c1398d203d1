import pytest
import torch
from peft import LoraConfig, get_peft_model

from memdlm.backbones.wrapping import unwrap
from memdlm.errors import ConfigError, UsageError
from memdlm.memory.config import MemoryConfig
from memdlm.memory.parametric_memory import ParametricMemory
from memdlm.memory.placement import first_adapted_layer, place


def names(model, **settings):
    return [site.name for site in place(model.model, MemoryConfig(**settings)).sites]


def test_ffn_takes_the_mlp_of_the_last_fraction(build_model):
    assert names(build_model("llada")) == [
        "layers.3.mlp.gate_proj",
        "layers.3.mlp.up_proj",
        "layers.3.mlp.down_proj",
    ]
    assert names(build_model("llada_moe"), layer_fraction=0.5) == [
        f"layers.{layer}.mlp.experts.{projection}"
        for layer in (2, 3)
        for projection in ("gate_proj", "up_proj", "down_proj")
    ]


def test_shared_expert_and_dense_layers_of_a_mixed_model_are_adapted_too(build_model):
    model = build_model(
        "llada_moe", shared_expert_intermediate_size=16, moe_layer_freq=[1, 1, 0, 1]
    )
    found = names(model, layer_fraction=0.5)
    assert found[:3] == [f"layers.2.mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert "layers.3.mlp.experts.up_proj" in found
    assert "layers.3.shared_expert.up_proj" in found
    assert len(found) == 9


def test_ffn_attention_adds_the_attention_projections(family, traits, build_model):
    found = names(build_model(family), scope="ffn_attention")
    attention = [f"layers.3.self_attn.{name}" for name in traits.attention]
    assert found == attention + names(build_model(family))


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        (("down_proj",), ["layers.3.mlp.experts.down_proj"]),
        (("experts.up_proj",), ["layers.3.mlp.experts.up_proj"]),
        (("q_proj", "mlp.gate"), ["layers.3.self_attn.q_proj", "layers.3.mlp.gate"]),
        (("layers.3.self_attn.v_proj",), ["layers.3.self_attn.v_proj"]),
    ],
)
def test_named_modules_expert_projections_among_them(modules, expected, build_model):
    assert names(build_model("llada_moe"), scope="modules", modules=modules) == expected


def test_a_name_inside_an_earlier_layer_is_not_reached(build_model):
    with pytest.raises(ConfigError, match="selects no module in layers 3-3"):
        names(build_model("llada"), scope="modules", modules=("layers.0.mlp.up_proj",))


def test_a_scope_that_selects_nothing_lists_what_there_is(build_model):
    with pytest.raises(ConfigError, match=r"'ff_proj'.*self_attn\.q_proj") as caught:
        names(build_model("llada"), scope="modules", modules=("ff_proj",))
    assert "\n" not in str(caught.value)


def test_the_first_layer_is_the_first_that_has_a_site(build_model):
    model = build_model("llada_moe", moe_layer_freq=[1, 1, 1, 0])
    config = MemoryConfig(scope="modules", modules=("mlp.down_proj",), layer_fraction=1.0)
    assert place(model.model, config).first_layer == 3


@pytest.mark.parametrize("fraction", [0, -0.1, 1.5])
def test_a_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ConfigError, match="layer_fraction"):
        first_adapted_layer(16, fraction)


def test_a_tiny_fraction_still_adapts_the_last_layer(build_model):
    assert first_adapted_layer(4, 1e-20) == 3


def test_an_outer_lora_is_walked_around(build_model):
    model = build_model("llada")
    before = names(model, scope="ffn_attention")
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["up_proj", "q_proj"]))
    assert names(unwrap(wrapped), scope="ffn_attention") == before


def test_an_outer_lora_on_the_experts_themselves_is_walked_around(build_model):
    model = build_model("llada_moe")
    before = names(model)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    wrapped = get_peft_model(
        model, LoraConfig(r=2, target_parameters=targets, init_lora_weights=False)
    )
    assert names(unwrap(wrapped)) == before
    ids = torch.arange(20).view(2, 10)
    memory = ParametricMemory(wrapped, MemoryConfig(rank=3))
    losses = memory.write(ids).losses
    plain = wrapped(ids).logits
    with memory.attached():
        assert not torch.equal(wrapped(ids).logits, plain)
    merged = ParametricMemory(wrapped.merge_and_unload(), MemoryConfig(rank=3))
    torch.testing.assert_close(merged.write(ids).losses, losses, rtol=1e-5, atol=1e-6)


def test_a_model_without_our_backbone_is_refused():
    with pytest.raises(UsageError, match="Linear holds no memdlm backbone"):
        unwrap(torch.nn.Linear(2, 2))
