"""Loading in 4 bits: what is quantised and what not, what is said, and what is refused."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForMaskedLM, BitsAndBytesConfig

from memdlm.backbones.base import DiffusionMaskedLM
from memdlm.backbones.experts import Experts
from memdlm.backbones.loading import load_model
from memdlm.backbones.quantization import QuantizationConfig, is_quantized, report
from memdlm.backbones.quantization.experts import STACKS, QuantizedExperts
from memdlm.backbones.quantization.linear import dequantized_weight, linear_weight
from memdlm.errors import CheckpointError, ConfigError, UsageError


@pytest.fixture
def checkpoint(tmp_path: Path, family: str, build_model: Callable[..., DiffusionMaskedLM]) -> Path:
    """A bfloat16 checkpoint of each family in turn."""
    build_model(family).bfloat16().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def moe(tmp_path: Path, build_model: Callable[..., DiffusionMaskedLM]) -> Path:
    """A checkpoint with experts and a linear router."""
    build_model("llada_moe").bfloat16().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return every weight by its name in an unquantised model."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, QuantizedExperts):
            found |= {f"{path}.{name}": module.dequantized(name) for name in STACKS}
        elif isinstance(module, bitsandbytes.nn.Linear4bit):
            state = module.weight.quant_state
            found[f"{path}.weight"] = dequantized_weight(module.weight, state)
    quantized = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, QuantizedExperts)
        for parameter in module.parameters()
    }
    for name, parameter in model.named_parameters():
        if id(parameter) not in quantized:
            found.setdefault(name, parameter.detach())
    return found


@pytest.mark.parametrize("double", [True, False])
def test_every_linear_layer_and_every_expert_is_quantised_and_nothing_else(
    checkpoint: Path, double: bool
) -> None:
    plain = load_model(checkpoint)
    quantized = load_model(checkpoint, quantization=QuantizationConfig("nf4", double))
    got, expected = weights(quantized), weights(plain)
    assert got.keys() == expected.keys()
    kept = ("embed_tokens", "lm_head", "norm", "mlp.gate.", "bias")
    for name, weight in expected.items():
        error = (got[name].float() - weight.float()).norm() / weight.float().norm()
        if any(part in name for part in kept):
            assert torch.equal(got[name], weight), name
            assert got[name].dtype == weight.dtype
        else:
            assert 0.05 < error < 0.12, name
    experts = [module for module in plain.modules() if isinstance(module, Experts)]
    linear = [
        name
        for name, module in plain.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith(("lm_head", "mlp.gate"))
    ]
    told = report(quantized)
    assert (told.num_linear, told.num_stacks) == (len(linear), len(experts))
    assert told.total_weights == sum(p.numel() for p in plain.parameters())
    assert told.double == double
    assert is_quantized(quantized)
    assert not is_quantized(plain)


def test_it_is_said_what_was_quantised_and_what_not(
    moe: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "memdlm"):
        load_model(moe, quantization="nf4")
    assert [record.name for record in caplog.records] == ["memdlm"]
    assert caplog.messages[0].startswith(
        "memdlm: 4-bit NF4 (double): 16 linear layers and 4 stacks of experts, "
    )
    assert caplog.messages[0].count("\n") == 0
    assert "not quantised: embeddings, head, routers, norms (" in caplog.messages[0]


def test_without_quantisation_nothing_is_said(moe: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_model(moe)
    load_model(moe, quantization=QuantizationConfig())
    assert caplog.messages == []


def test_a_float32_checkpoint_ends_in_bfloat16_but_for_the_selection_bias(
    tmp_path: Path, build_model: Callable[..., DiffusionMaskedLM]
) -> None:
    build_model("llada2").save_pretrained(tmp_path)
    model = load_model(tmp_path, quantization="nf4")
    held = {name: p.dtype for name, p in [*model.named_parameters(), *model.named_buffers()]}
    float32 = {name.rpartition(".")[2] for name, d in held.items() if d == torch.float32}
    scales = {"outer", "code", "mean"}
    rotary = {"inv_freq", "original_inv_freq"}
    assert float32 - rotary == {"expert_bias"} | scales
    assert set(held.values()) == {torch.float32, torch.bfloat16, torch.uint8}


def test_shards_load_as_one_file(moe: Path, tmp_path: Path) -> None:
    load_model(moe).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    whole, shards = (
        weights(load_model(path, quantization="nf4")) for path in (moe, tmp_path / "shards")
    )
    for name, weight in whole.items():
        assert torch.equal(shards[name], weight), name


def test_a_matrix_is_stored_as_bitsandbytes_stores_it() -> None:
    weight = torch.randn(96, 128).bfloat16()
    layer = bitsandbytes.nn.Linear4bit(128, 96, bias=False, quant_type="nf4")
    layer.weight = linear_weight(weight, "nf4", True, layer)
    theirs = bitsandbytes.nn.Params4bit(weight, quant_type="nf4").to("cpu")
    assert torch.equal(layer.weight, theirs)
    inputs = torch.randn(3, 128).bfloat16()
    other = bitsandbytes.nn.Linear4bit(128, 96, bias=False, quant_type="nf4")
    other.weight = theirs
    assert torch.equal(layer(inputs), other(inputs))


def test_logits_and_gradients_are_those_of_the_dequantised_weights(checkpoint: Path) -> None:
    quantized = load_model(checkpoint, quantization="nf4")
    plain = load_model(checkpoint)
    with torch.no_grad():
        for name, weight in weights(quantized).items():
            plain.get_parameter(name).copy_(weight)
    ids = torch.randint(0, 58, (2, 10), generator=torch.Generator().manual_seed(0))
    results = []
    for model in (quantized, plain):
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model(inputs_embeds=embeddings).logits
        logits.float().square().sum().backward()
        results.append((logits.detach(), embeddings.grad))
    for got, expected in zip(*results, strict=True):
        error = (got.float() - expected.float()).norm() / expected.float().norm()
        assert error < 0.03  # rounding in bfloat16; quantising is some ten times that


@pytest.mark.parametrize("change", ["missing", "unexpected", "size", "expert", "expert size"])
def test_weights_that_do_not_fit_are_listed(moe: Path, change: str) -> None:
    file = moe / "model.safetensors"
    tensors = load_file(file)
    linear = "model.layers.1.self_attn.q_proj.weight"
    expert = "model.layers.2.mlp.experts.3.up_proj.weight"
    stack = "model.layers.2.mlp.experts.gate_up_proj"
    if change == "missing":
        del tensors[linear]
        expected = f"missing: {linear}"
    elif change == "unexpected":
        tensors["model.layers.1.extra.weight"] = torch.zeros(2)
        expected = "unexpected: model.layers.1.extra.weight"
    elif change == "size":
        tensors[linear] = torch.zeros(16, 32, dtype=torch.bfloat16)
        expected = f"of another size: {linear}"
    elif change == "expert":
        del tensors[expert]
        expected = f"of another size: {stack}"
    else:
        tensors[expert] = torch.zeros(20, 16, dtype=torch.bfloat16)
        expected = f"of another size: {stack}"
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as error:
        load_model(moe, quantization="nf4")
    assert expected in str(error.value)


def test_experts_that_are_all_missing_are_listed(moe: Path) -> None:
    file = moe / "model.safetensors"
    tensors = {k: v for k, v in load_file(file).items() if "layers.2.mlp.experts." not in k}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing: model.layers.2.mlp.experts"):
        load_model(moe, quantization="nf4")


@pytest.mark.parametrize("dtype", ["float32", "float16", torch.float16])
def test_another_type_excludes_four_bits(moe: Path, dtype: str | torch.dtype) -> None:
    with pytest.raises(ConfigError, match=r"dtype: float\d\d excludes quantization.kind nf4"):
        load_model(moe, dtype=dtype, quantization="nf4")


@pytest.mark.parametrize("dtype", [None, "auto", "bfloat16", torch.bfloat16])
def test_bfloat16_goes_with_four_bits(moe: Path, dtype: str | torch.dtype | None) -> None:
    assert load_model(moe, dtype=dtype, quantization="nf4").dtype == torch.bfloat16


def test_an_unknown_kind_is_refused(moe: Path) -> None:
    with pytest.raises(ConfigError, match=r"quantization.kind: 'int3' is not one of none, nf4"):
        load_model(moe, quantization="int3")


def test_without_bitsandbytes_four_bits_are_an_error(
    moe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"pip install 'memdlm\[quant\]'"):
        load_model(moe, quantization="nf4")
    load_model(moe)


def test_a_checkpoint_that_is_quantised_already_is_refused(moe: Path) -> None:
    config = moe / "config.json"
    field = '"quantization_config": {"quant_method": "gptq", "bits": 4},'
    config.write_text(config.read_text().replace("{", "{" + field, 1))
    with pytest.raises(CheckpointError, match="quantised already"):
        load_model(moe, quantization="nf4")


def test_a_four_bit_model_is_not_saved(moe: Path, tmp_path: Path) -> None:
    model = load_model(moe, quantization="nf4")
    with pytest.raises(UsageError, match="save the adapter alone"):
        model.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy" / "model.safetensors").exists()


def test_transformers_own_config_reaches_the_experts_and_spares_the_router(
    moe: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    with caplog.at_level(logging.WARNING, "memdlm"):
        model = AutoModelForMaskedLM.from_pretrained(
            moe, quantization_config=settings, dtype=torch.bfloat16
        )
        expected = weights(load_model(moe, quantization="nf4"))
    for name, weight in weights(model).items():
        assert torch.equal(weight, expected[name]), name
    assert caplog.messages[0] == caplog.messages[1]


def test_eight_bits_are_refused(moe: Path) -> None:
    with pytest.raises(ConfigError, match="would leave experts unquantised"):
        AutoModelForMaskedLM.from_pretrained(
            moe, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
        )


def test_an_adapter_made_on_four_bits_loads_on_either_base(moe: Path, tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj", "gate"], init_lora_weights=False)
    made = get_peft_model(load_model(moe, quantization="nf4"), lora)
    made.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all("lora_" in name for name in saved)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = made.eval()(input_ids=ids).logits
        again = load_model(tmp_path / "adapter", quantization="nf4")
        assert torch.equal(again(input_ids=ids).logits, expected)
        unquantized = load_model(tmp_path / "adapter")(input_ids=ids).logits
    assert not is_quantized(load_model(tmp_path / "adapter"))
    assert 0 < (unquantized - expected).std() < expected.std()


def test_a_model_moves_to_its_device_as_a_whole(moe: Path) -> None:
    model = load_model(moe, quantization="nf4", device="cpu")
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert model.to("cpu")(input_ids=torch.arange(9)[None]).logits.isfinite().all()
