"""Adapters: what targets mean, what files hold, what PEFT's switches do, what is refused."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from memdlm.backbones.adapters import add_lora, with_adapter
from memdlm.backbones.adapters.expert_lora import ExpertLora
from memdlm.backbones.adapters.places import find_places
from memdlm.backbones.experts import Experts
from memdlm.backbones.llada2 import LLaDA2Config, LLaDA2ForMaskedLM
from memdlm.backbones.loading import load_model
from memdlm.errors import CheckpointError, ConfigError, UsageError

PUBLISHED = ["llada", "lladamoe", "llada2", "dream"]
IDS = torch.arange(12)[None]


def lora(targets="all-linear", **settings):
    return LoraConfig(**{"r": 2, "lora_alpha": 8, "target_modules": targets, **settings})


def drawn(model, seed=0, **settings):
    """Return `model` with an adapter that changes it, in evaluation mode."""
    adapted = add_lora(model, lora(**settings)).eval()
    draw(adapted, seed)
    return adapted


def draw(adapted, seed, name="default"):
    draws = torch.Generator().manual_seed(seed)
    for key, parameter in adapted.named_parameters():
        if f".{name}." in key:
            parameter.data.normal_(0, 0.2, generator=draws)


def official(places):
    return {place.official for place in places}


@pytest.fixture
def published(fixtures):
    return lambda name: (fixtures / "backbones" / name, fixtures / "peft_adapters" / name)


# --- what targets mean ---


@pytest.mark.parametrize(
    ("family", "targets", "expected"),
    [
        ("llada", ["q_proj"], r"model\.transformer\.blocks\.\d\.q_proj"),
        ("llada", ["gate_proj"], r".*\.\d\.ff_proj"),
        ("llada", ["ff_proj"], r".*\.\d\.ff_proj"),
        ("llada", ["self_attn"], r".*\.\d\.([qkv]_proj|attn_out)"),
        ("llada", ["0.ff_out"], r".*\.blocks\.0\.ff_out"),
        ("llada", ["ff_out"], r"model\.transformer\.(blocks\.\d\.)?ff_out"),  # the head as well
        ("llada", "all-linear", r".*\.\d\..*"),
        ("llada_moe", ["gate"], r".*\.mlp\.gate"),
        ("llada_moe", ["experts"], r".*\.experts\.\d\.(gate|up|down)_proj"),
        ("llada_moe", ["experts.gate_proj", "v_proj"], r".*(\.experts\.\d\.gate|v)_proj"),
        ("llada_moe", r".*\.experts\.\d+\.(up|down)_proj", r".*\.experts\.\d\.(up|down)_proj"),
        ("llada_moe", "all-linear", r".*layers\..*"),
        ("llada2", ["shared_experts"], r".*\.shared_experts\.\w+_proj"),
        ("llada2", ["attention"], r".*\.attention\.(query_key_value|dense)"),
        ("llada2", ["up_proj"], r".*\.up_proj"),
        ("llada2", "all-linear", r".*layers\..*"),
        ("dream", ["k_proj", "o_proj"], r".*[ko]_proj"),
    ],
)
def test_targets_take_official_names_and_ours(family, targets, expected, build_model):
    table = find_places(build_model(family))
    found = official(table.targeted(targets))
    assert found and found == {n for n in official(table.places) if re.fullmatch(expected, n)}


@pytest.mark.parametrize(
    ("family", "targets", "message"),
    [
        (
            "llada",
            ["q_proj", "w1"],
            r"'w1' matches no linear layer; use all-linear, or name any of",
        ),
        ("llada", ["embed_tokens"], "'embed_tokens' matches no linear layer"),
        ("llada", "q_proj", "'q_proj' matches no linear layer"),  # PEFT: text is a whole pattern
        ("llada", "(", "no regular expression"),
        ("llada", None, "target_modules is not set"),
        ("llada", [], "it is empty"),
        ("llada2", ["gate"], "'gate' matches no linear layer.*shared_experts.gate_proj"),
        ("llada_moe", ["experts.1"], "expert 1 of model.layers.0.mlp.experts but not all 6"),
        ("llada_moe", r".*experts\.[12]\.up_proj", "expert 1 of .* in up_proj: adapt every"),
    ],
)
def test_targets_that_mean_nothing_or_half_a_stack_are_refused(
    family, targets, message, build_model
):
    with pytest.raises(ConfigError, match=message) as caught:
        add_lora(build_model(family), lora(targets))
    assert "\n" not in str(caught.value)


def test_modules_and_layers_can_be_left_out(build_model):
    config = lora(["q_proj", "experts"], exclude_modules=["up_proj"], layers_to_transform=[1, 3])
    adapted = add_lora(build_model("llada_moe"), config)
    found = {
        re.sub(r"\.experts\.\d", ".experts", n) for n in official(adapted.adapted_places("default"))
    }
    layers = [f"model.layers.{index}" for index in (1, 3)]
    ends = ("self_attn.q_proj", "mlp.experts.gate_proj", "mlp.experts.down_proj")
    assert found == {f"{layer}.{end}" for layer in layers for end in ends}
    with pytest.raises(ConfigError, match="leave nothing to adapt"):
        add_lora(build_model("llada"), lora(["q_proj"], layers_to_transform=[9]))
    assert config.target_modules == {"q_proj", "experts"}  # the caller's stays as it was


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"bias": "lora_only"}, "bias='lora_only' is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern="),
        ({"alpha_pattern": {"experts": 4}}, "alpha_pattern="),
        ({"target_parameters": ["gate_up_proj"]}, "target_parameters="),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not supported"),
    ],
)
def test_what_cannot_be_honoured_is_refused(settings, message, build_model):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        add_lora(build_model("llada_moe"), lora(**settings))
    assert "\n" not in str(caught.value)


def test_only_a_bare_backbone_and_a_lora_are_taken(build_model):
    with pytest.raises(ConfigError, match=r"type IA3 are not supported: use a peft\.LoraConfig"):
        add_lora(build_model("llada"), IA3Config(target_modules=["q_proj"]))
    with pytest.raises(UsageError, match="a AdaptedModel takes no new adapter"):
        add_lora(add_lora(build_model("llada"), lora()), lora())


# --- what files hold ---


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_adapter_comes_out_as_it_went_in(name, published, tmp_path):
    base, adapter = published(name)
    load_model(base, adapter=adapter).save_pretrained(tmp_path)
    before, after = (folder / "adapter_model.safetensors" for folder in (adapter, tmp_path))
    assert before.read_bytes() == after.read_bytes()
    one, other = (json.loads((f / "adapter_config.json").read_text()) for f in (adapter, tmp_path))
    for field, value in one.items():
        if field == "target_modules":
            assert set(value) == set(other[field])
        elif field != "auto_mapping":
            assert value == other[field], field
    assert one["auto_mapping"]["base_model_class"] == other["auto_mapping"]["base_model_class"]
    assert (tmp_path / "README.md").is_file()


class Skeleton(nn.Module):
    """Modules named as in the official code, each linear layer a real one."""

    def __init__(self, model):
        super().__init__()
        table = find_places(model)
        for place in table.places:
            layer = nn.Linear(place.in_features, place.out_features, bias=False)
            self.put(place.official, layer)
        for name in table.others:
            if name and not name.endswith("act_fn"):
                self.put(name, nn.Module())

    def put(self, path, module):
        parent, parts = self, path.split(".")
        for part in parts[:-1]:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent._modules[part]
        if parts[-1] not in parent._modules:
            parent.add_module(parts[-1], module)


@pytest.mark.parametrize("targets", ["all-linear", ["down_proj"], ["q_proj", "query_key_value"]])
def test_plain_peft_reads_a_saved_adapter_on_the_official_modules(
    family, targets, build_model, tmp_path
):
    if isinstance(targets, list):
        targets = [t for t in targets if (t == "query_key_value") == (family == "llada2")] or [
            "down_proj"
        ]
    adapted = drawn(build_model(family), targets=targets)
    adapted.save_pretrained(tmp_path)
    # A missing weight is a warning of PEFT's, and warnings are errors here.
    loaded = PeftModel.from_pretrained(Skeleton(build_model(family)), tmp_path)
    expected = load_file(tmp_path / "adapter_model.safetensors")
    state = loaded.state_dict()
    found = {k.replace(".default", ""): state[k] for k in state if ".lora_" in k}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_an_adapter_of_plain_peft_under_our_names_loads(fixtures, tmp_path):
    base = fixtures / "backbones" / "llada2"
    old = get_peft_model(load_model(base), lora()).eval()  # its experts are no linear layers
    draw(old, 0)
    old.save_pretrained(tmp_path, save_embedding_layers=False)
    assert (
        "gate_proj" in json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    )
    loaded = load_model(base, adapter=tmp_path)
    assert torch.equal(loaded(IDS).logits, old(IDS).logits)
    assert not any(isinstance(module, ExpertLora) for module in loaded.modules())


@pytest.fixture
def spoil(published, tmp_path):
    """Copy a published adapter, let `change` edit its tensors, and return base and copy."""

    def copy(name, change=lambda tensors: None, **config):
        base, adapter = published(name)
        folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        fields = json.loads((folder / "adapter_config.json").read_text()) | config
        (folder / "adapter_config.json").write_text(json.dumps(fields))
        return base, folder

    return copy


def refusal(base, adapter):
    with pytest.raises(CheckpointError) as caught:
        load_model(base, adapter=adapter)
    assert "\n" not in str(caught.value) and str(adapter) in str(caught.value)
    return str(caught.value)


def test_an_adapter_for_another_base_is_refused(published, spoil, build_model, tmp_path):
    base, _ = published("llada")
    assert re.search(
        r"does not fit the model \(weights without a place: base_model\S+ \S+ \S+ and 197 more\)",
        refusal(base, published("lladamoe")[1]),
    )
    build_model("llada2").save_pretrained(tmp_path / "wider")
    assert "of another shape or rank" in refusal(tmp_path / "wider", published("llada2")[1])
    build_model("dream", num_hidden_layers=6).save_pretrained(tmp_path / "deeper")
    drawn(build_model("dream")).save_pretrained(tmp_path / "four")
    assert "weights are missing (model.layers.4" in refusal(tmp_path / "deeper", tmp_path / "four")


def test_a_weight_that_is_missing_surplus_or_of_another_shape_is_listed(spoil):
    key = "base_model.model.model.layers.2.mlp.experts.5.up_proj.lora_B.weight"
    surplus = "base_model.model.x.lora_A.weight"
    base, adapter = spoil("lladamoe", lambda tensors: tensors.pop(key))
    assert "weights are missing (model.layers.2.mlp.experts.5.up_proj.lora_B)" in refusal(
        base, adapter
    )
    shutil.rmtree(adapter)
    base, adapter = spoil("lladamoe", lambda tensors: tensors.update({surplus: torch.ones(2)}))
    assert f"without a place: {surplus}" in refusal(base, adapter)
    shutil.rmtree(adapter)
    base, adapter = spoil("lladamoe", r=8)
    assert "of another shape or rank: base_model.model.model.layers.0" in refusal(base, adapter)


def test_whole_experts_or_layers_that_are_missing_are_listed(spoil):
    def drop(part):
        def change(tensors):
            for key in [key for key in tensors if part in key]:
                del tensors[key]

        return change

    base, adapter = spoil("llada2", drop(".experts.3."))
    assert "experts.3.gate_proj.lora_A" in refusal(base, adapter)
    shutil.rmtree(adapter)
    base, adapter = spoil("llada2", drop(".layers.2."))
    assert "weights are missing (model.layers.2." in refusal(base, adapter)


def test_pickles_and_unsupported_settings_are_refused_on_loading(spoil):
    base, adapter = spoil("llada", use_dora=True)
    assert "use_dora=True is not supported" in refusal(base, adapter)
    shutil.rmtree(adapter)
    base, adapter = spoil("llada")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert "adapter_model.bin, a pickle, which is never opened" in refusal(base, adapter)
    (adapter / "adapter_model.safetensors").write_bytes(b"no tensors")
    assert "cannot load the adapter" in refusal(base, adapter)
    (adapter / "adapter_config.json").unlink()
    assert "holds no adapter_config.json" in refusal(base, adapter)


def test_saving_writes_safetensors_of_known_adapters_only(build_model, tmp_path):
    adapted = add_lora(build_model("llada"), lora())
    for settings, message in (
        ({"safe_serialization": False}, "without pickles"),
        ({"save_embedding_layers": True}, "without save_embedding_layers"),
        ({"selected_adapters": ["other"]}, "other not among default"),
        ({"path_initial_model_for_weight_conversion": "x"}, "path_initial_model"),
    ):
        with pytest.raises(ConfigError, match=message):
            adapted.save_pretrained(tmp_path, **settings)
    adapted.save_pretrained(tmp_path / "nothing", is_main_process=False)
    assert not list(tmp_path.iterdir())


# --- what PEFT's switches do ---


def test_an_adapter_can_be_off_merged_unmerged_and_deleted(family, build_model):
    model = build_model(family).double().eval()
    plain = model(IDS).logits
    adapted = drawn(model).double()
    expected = adapted(IDS).logits
    assert not torch.allclose(expected, plain, atol=1e-2)
    with adapted.disable_adapter():
        assert torch.equal(adapted(IDS).logits, plain)
    assert torch.equal(adapted(IDS).logits, expected)
    adapted.merge_adapter(safe_merge=True)
    torch.testing.assert_close(adapted(IDS).logits, expected)
    with adapted.disable_adapter():  # unmerges, as PEFT's layers do
        torch.testing.assert_close(adapted(IDS).logits, plain)
    torch.testing.assert_close(adapted(IDS).logits, expected)
    adapted.merge_adapter()
    adapted.unmerge_adapter()
    torch.testing.assert_close(adapted(IDS).logits, expected)
    merged = adapted.merge_and_unload()
    assert type(merged) is type(build_model(family))
    torch.testing.assert_close(merged(IDS).logits, expected)


def test_merging_into_four_bits_is_refused_and_changes_nothing(build_model, tmp_path):
    pytest.importorskip("bitsandbytes")
    build_model("llada_moe").save_pretrained(tmp_path)
    adapted = drawn(load_model(tmp_path, quantization="nf4"))
    expected = adapted(IDS).logits
    for merge in (adapted.merge_and_unload, adapted.merge_adapter):
        with pytest.raises(ConfigError, match="the base weights are quantised"):
            merge()
    stack = next(module for module in adapted.modules() if isinstance(module, ExpertLora))
    with pytest.raises(ConfigError, match="the experts are quantised"):
        stack.merge()
    assert torch.equal(adapted(IDS).logits, expected)


def test_two_adapters_live_side_by_side(build_model, tmp_path):
    adapted = drawn(build_model("llada_moe"), targets=["experts.up_proj", "q_proj"])
    first = adapted(IDS).logits
    adapted.add_adapter("second", lora(["experts"], r=3, use_rslora=True))
    draw(adapted, 1, "second")
    adapted.set_adapter("second")
    second = adapted(IDS).logits
    assert not torch.allclose(first, second, atol=1e-2)
    trained = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all(".second." in name for name in trained)
    adapted.save_pretrained(tmp_path)
    base = build_model("llada_moe").eval()
    again = with_adapter(base, str(tmp_path))
    assert torch.equal(again(IDS).logits, first)
    again.load_adapter(tmp_path / "second", "other")
    again.set_adapter("other")
    assert torch.equal(again(IDS).logits, second)
    with pytest.raises(ConfigError, match="add_weighted_adapter does not know routed experts"):
        adapted.add_weighted_adapter(["default", "second"], [1.0, 1.0], "mixed")
    adapted.base_model.set_adapter(["default", "second"])
    both = adapted(IDS).logits
    adapted.delete_adapter("second")
    adapted.set_adapter("default")
    torch.testing.assert_close(adapted(IDS).logits, first)
    assert not torch.allclose(both, first, atol=1e-2)
    assert not any("second" in name for name in adapted.state_dict())


def test_loading_over_an_adapter_keeps_it_trainable_and_wants_the_same_places(
    build_model, tmp_path
):
    source = drawn(build_model("llada_moe"), seed=3)
    source.save_pretrained(tmp_path)
    target = add_lora(build_model("llada_moe"), lora())
    parameters = dict(target.named_parameters())
    target.load_adapter(tmp_path, "default", is_trainable=True)
    for name, parameter in target.named_parameters():
        assert parameter is parameters[name]  # an optimiser holds them
        assert torch.equal(parameter, source.get_parameter(name)), name
        assert parameter.requires_grad == (".lora_" in name)
    fewer = add_lora(build_model("llada_moe"), lora(["q_proj"]))
    with pytest.raises(CheckpointError, match=r"also adapts .*which this run does not"):
        fewer.load_adapter(tmp_path, "default")
    fewer.save_pretrained(tmp_path / "fewer")
    with pytest.raises(CheckpointError, match="weights are missing"):
        target.load_adapter(tmp_path / "fewer", "default")


def test_mixed_rows_are_refused_by_routed_experts(build_model):
    adapted = drawn(build_model("llada_moe"), targets=["experts"])
    with pytest.raises(UsageError, match="adapter_names: routed experts cannot mix adapters"):
        adapted(IDS, adapter_names=["default"])


@pytest.mark.parametrize("autocast", [False, True])
def test_factors_stay_float32_beside_half_precision_weights(autocast, family, build_model):
    reference = drawn(build_model(family))
    adapted = drawn(build_model(family).to(torch.float32 if autocast else torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = adapted.train()(IDS).logits
    logits.float().square().mean().backward()
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            assert parameter.dtype == torch.float32
            assert parameter.grad.any(), name
    expected = reference(IDS).logits
    assert logits.dtype == torch.bfloat16
    assert ((logits - expected).norm() / expected.norm()) < 0.1


def test_a_model_without_data_is_adapted_without_any(build_model):
    with torch.device("meta"):
        model = build_model("llada_moe")
    adapted = add_lora(model, lora())
    assert {parameter.device.type for parameter in adapted.parameters()} == {"meta"}
    assert any(isinstance(module, ExpertLora) for module in adapted.modules())


def test_a_stack_is_a_few_tensors_and_never_a_changed_weight(build_model):
    adapted = add_lora(build_model("llada_moe"), lora())
    stacks = [module for module in adapted.modules() if isinstance(module, ExpertLora)]
    assert len(stacks) == 4
    for stack in stacks:
        shapes = {n: tuple(p.shape) for n, p in stack.named_parameters() if "lora_" in n}
        assert shapes["lora_A.default.gate_proj"] == (6, 2, 32)
        assert shapes["lora_B.default.down_proj"] == (6, 32, 2)
        assert len(shapes) == 2 * len(Experts.projections)
    assert len(adapted.state_dict()) < 150


def test_the_published_shape_of_llada2_mini_stays_a_few_hundred_tensors():
    with torch.device("meta"):
        model = LLaDA2ForMaskedLM(LLaDA2Config())
    adapted = add_lora(model, lora(r=32))
    assert len(adapted.adapted_places("default")) == 14_692
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert len(trained) == 314
    assert 1.20e9 < sum(parameter.numel() for parameter in trained) < 1.21e9


@pytest.mark.slow
def test_an_adapted_model_compiles_into_one_graph(build_model):
    adapted = drawn(build_model("llada_moe").to(torch.bfloat16))
    expected = adapted(IDS).logits
    compiled = torch.compile(adapted.get_base_model(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS).logits, expected)


def test_reading_models_does_not_import_peft():
    code = (
        "import sys, memdlm.backbones.loading, memdlm.backbones.adapters\n"
        "assert 'peft' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
