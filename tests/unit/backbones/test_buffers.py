"""Rotary frequencies are in no file: they are those of the config, in fp32, whatever is done."""

import pytest
import torch
from torch import nn

from memdlm.backbones.buffers import check_buffers, rotary_frequencies
from memdlm.backbones.loading import AutoModelForMaskedLM, load_model
from memdlm.errors import CheckpointError

DTYPES = ["float32", "bfloat16", "float16"]


@pytest.fixture
def model(family, build_model) -> nn.Module:
    return build_model(family)


def angles(model: nn.Module) -> torch.Tensor:
    """The cosines of far positions, where a rounded frequency is furthest off."""
    states = torch.zeros(1, 3, 4, dtype=torch.float32)
    return model.model.rotary_emb(states, torch.tensor([[5, 4_097, 131_071]]))[0]


def test_frequencies_are_powers_of_theta(build_model) -> None:
    config = build_model("llada").config  # 4 heads of 8 dimensions
    expected = torch.tensor([500_000.0 ** (-i / 8) for i in (0, 2, 4, 6)])
    torch.testing.assert_close(rotary_frequencies(config), expected)
    assert rotary_frequencies(build_model("llada2").config).shape == (2,)  # half of a head


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_load_in_any_precision_leaves_them_exact(model, dtype, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, dtype=dtype)
    assert loaded.lm_head.weight.dtype == getattr(torch, dtype)
    assert torch.equal(loaded.model.rotary_emb.inv_freq, rotary_frequencies(model.config))
    assert torch.equal(angles(loaded), angles(model))


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.bfloat16(),
        lambda m: m.half().float(),
        lambda m: nn.ModuleList([m]).to("cpu", torch.bfloat16)[0],
        lambda m: m.double().float(),
    ],
    ids=["to", "bfloat16", "half_and_back", "inside_another", "double_and_back"],
)
def test_a_cast_leaves_them_exact(model, cast) -> None:
    before = angles(model)
    bias = {name: b.clone() for name, b in model.named_buffers() if "expert_bias" in name}
    moved = cast(model)
    assert torch.equal(angles(moved), before)
    for name, tensor in bias.items():
        assert torch.equal(moved.get_buffer(name).float(), tensor)
    check_buffers(moved, "the model")


def round_frequencies(model) -> None:
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.bfloat16().float()


def forget_frequencies(model) -> None:
    model.model.rotary_emb.inv_freq = torch.zeros_like(model.model.rotary_emb.inv_freq)


def leave_on_meta(model) -> None:
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.to("meta")


def take_another_theta(model) -> None:
    model.config.rope_parameters["rope_theta"] *= 2


def scale_attention(model) -> None:
    model.model.rotary_emb.attention_scaling = 0.5


def add_a_table(model) -> None:
    model.model.norm.register_buffer("table", torch.ones(2), persistent=False)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (round_frequencies, "rotary_emb.inv_freq"),
        (forget_frequencies, "rotary_emb.inv_freq"),
        (leave_on_meta, "rotary_emb.inv_freq"),
        (take_another_theta, "rotary_emb.inv_freq"),
        (scale_attention, "rotary_emb.attention_scaling"),
        (add_a_table, "model.norm.table"),
    ],
)
def test_a_load_that_gets_them_wrong_is_an_error(
    spoil, named, build_model, tmp_path, monkeypatch
) -> None:
    build_model("dream").save_pretrained(tmp_path)
    load = AutoModelForMaskedLM.from_pretrained

    def spoiled(*args: object, **kwargs: object) -> object:
        model, report = load(*args, **kwargs)
        spoil(model)
        return model, report

    assert load_model(tmp_path) is not None
    monkeypatch.setattr(AutoModelForMaskedLM, "from_pretrained", spoiled)
    with pytest.raises(
        CheckpointError, match=rf"{named}.* is not what config\.json gives"
    ) as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)
