"""Loading: what fits loads whole, everything else is one line that says what to do."""

import json
import shutil
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from memdlm.backbones.loading import default_device, load_model, supported_architectures
from memdlm.backbones.tiny import TINY_FAMILIES, TinySizes, build_tiny
from memdlm.backbones.tokenizers import load_tokenizer, match_token_ids
from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.errors import CheckpointError, ConfigError, DataError

SIZES = TinySizes(width=16, num_layers=2, num_heads=2, mlp_width=16, num_experts=4, expert_width=8)


@pytest.fixture(scope="module")
def tokenizer():
    return build_word_tokenizer(["the cat sat on the mat"])


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory) -> Path:
    """A dense tiny model with its tokenizer."""
    folder = tmp_path_factory.mktemp("saved")
    build_tiny("llada", tokenizer, sizes=SIZES).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    """A copy of `saved` to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in fields.items() if value != "DROP"}))


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_saved_model_comes_back_whole_and_in_eval_mode(family, tokenizer, tmp_path) -> None:
    model = build_tiny(family, tokenizer, sizes=SIZES).eval()
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    ids = torch.tensor([[3, 1, 4, 1]])
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert not loaded.training


def test_dtype_and_device_are_honoured(saved) -> None:
    model = load_model(saved, dtype="bfloat16", device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for wrong in ("int3", torch.int8):
        with pytest.raises(ConfigError, match=r"int\d'? is not one of auto, float32"):
            load_model(saved, dtype=wrong)


def test_code_named_by_a_checkpoint_is_neither_run_nor_needed(copy) -> None:
    (copy / "modeling.py").write_text("raise SystemExit('executed')")
    edit_config(copy, auto_map={"AutoModelForMaskedLM": "modeling.Model"})
    assert type(load_model(copy)).__name__ == "LLaDAModelLM"


def test_missing_and_unexpected_weights_are_listed(copy) -> None:
    path = copy / "model.safetensors"
    tensors = load_file(path)
    tensors["surplus.weight"] = torch.zeros(2)
    del tensors["model.transformer.blocks.1.q_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as error:
        load_model(copy)
    text = str(error.value)
    assert "missing: model.layers.1.self_attn.q_proj.weight" in text
    assert "unexpected: surplus.weight" in text
    assert "\n" not in text


def test_weights_of_another_size_are_listed(copy) -> None:
    edit_config(copy, mlp_hidden_size=32)
    with pytest.raises(CheckpointError, match=r"of another size: .*mlp\.down_proj\.weight"):
        load_model(copy)


@pytest.mark.parametrize("renamed", ["llada2_moe_21", "llada21_moe"])
def test_model_types_others_made_users_write_are_llada2(renamed, tokenizer, tmp_path) -> None:
    model = build_tiny("llada2", tokenizer, sizes=SIZES).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    edit_config(tmp_path, model_type=renamed)
    loaded = load_model(tmp_path, tokenizer=load_tokenizer(tmp_path))
    ids = torch.tensor([[3, 1, 4, 1]])
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    loaded.save_pretrained(tmp_path / "again")
    assert (
        json.loads((tmp_path / "again" / "config.json").read_text())["model_type"] == "llada2_moe"
    )
    assert AutoConfig.from_pretrained(tmp_path).model_type == "llada2_moe"


def test_attention_is_chosen_at_load_where_there_is_a_choice(saved, tokenizer, tmp_path) -> None:
    build_tiny("llada2", tokenizer, sizes=SIZES).save_pretrained(tmp_path)
    edit_config(tmp_path, block_length=2)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    later = ids.clone()
    later[0, 4] = 6
    for attention, is_blind in ((None, False), ("full", False), ("block_causal", True)):
        model = load_model(tmp_path, attention=attention)
        assert model.config.attention == (attention or "full")
        same = torch.equal(model(ids).logits[:, :4], model(later).logits[:, :4])
        assert same == is_blind
    edit_config(tmp_path, attention="block_causal")
    assert load_model(tmp_path).config.attention == "block_causal"
    assert load_model(tmp_path, attention="full").config.attention == "full"
    with pytest.raises(ConfigError, match=r"'causal' is not what .* offers \(full, block_causal\)"):
        load_model(tmp_path, attention="causal")
    assert load_model(saved, attention="full") is not None
    with pytest.raises(ConfigError, match=r"LLaDAModelLM offers \(full\); leave it out"):
        load_model(saved, attention="block_causal")


def test_a_damaged_file_is_one_line(copy) -> None:
    (copy / "model.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(CheckpointError, match="is truncated or damaged") as error:
        load_model(copy)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "a/b/c"])
def test_a_missing_folder_is_not_looked_up_on_the_hub(name) -> None:
    for load in (load_model, load_tokenizer):
        with pytest.raises(CheckpointError, match=f"no model folder at {name}: check the path"):
            load(name)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_an_unreachable_hub_is_one_line(load, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"cannot load the .* from nobody/nothing") as error:
        load("nobody/nothing")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_hub_that_does_not_answer_is_asked_once(load, monkeypatch, capfd) -> None:
    # The hub's own client would try every file for half a minute.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=r"cannot load the .* from nobody/nothing"):
        load("nobody/nothing")
    assert time.monotonic() - start < 5
    assert "Retrying" not in capfd.readouterr().err
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False


def test_a_folder_without_a_model_is_named(tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match="cannot load the tokenizer from"):
        load_tokenizer(tmp_path)


def test_a_file_in_place_of_a_folder_is_named(tmp_path) -> None:
    path = tmp_path / "weights.bin"
    path.touch()
    with pytest.raises(CheckpointError, match="is a file: name the folder"):
        load_model(path)


def test_other_architectures_are_refused_with_the_supported_ones(copy) -> None:
    edit_config(copy, architectures=["BertForMaskedLM"], model_type="bert")
    with pytest.raises(CheckpointError, match="BertForMaskedLM; supported are") as error:
        load_model(copy)
    assert all(name in str(error.value) for name in supported_architectures())
    assert {"LLaDAModelLM", "LLaDAMoEModelLM"} <= set(supported_architectures())


def test_a_config_feature_that_is_not_implemented_is_refused(copy) -> None:
    edit_config(copy, alibi=True)
    with pytest.raises(CheckpointError, match="alibi=True is not supported"):
        load_model(copy)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # inside PEFT
def test_an_adapter_is_put_on_its_base_wherever_the_two_are_moved(saved, tmp_path) -> None:
    model = get_peft_model(load_model(saved), LoraConfig(r=2, target_modules="all-linear"))
    torch.nn.init.normal_(
        model.base_model.model.model.layers[0].self_attn.q_proj.lora_B.default.weight
    )
    model.eval()
    model.peft_config["default"].base_model_name_or_path = "../base"
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    shutil.copytree(saved, tmp_path / "base")
    ids = torch.tensor([[3, 1, 4]])
    expected = model(ids).logits
    assert not torch.equal(expected, load_model(saved)(ids).logits)
    assert torch.equal(load_model(tmp_path / "adapter")(ids).logits, expected)
    assert torch.equal(load_model(saved, adapter=tmp_path / "adapter")(ids).logits, expected)
    assert load_tokenizer(tmp_path / "adapter").mask_token_id == 1


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # inside PEFT
def test_an_adapter_that_lacks_weights_is_refused(saved, tmp_path) -> None:
    model = get_peft_model(load_model(saved), LoraConfig(r=2, target_modules="all-linear"))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[next(iter(tensors))]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"weights are missing \(model\.transformer"):
        load_model(saved, adapter=tmp_path)


def test_an_adapter_folder_without_adapter_is_refused(saved, tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no adapter_config\.json"):
        load_model(saved, adapter=tmp_path)


def test_ids_the_config_lacks_come_from_the_tokenizer(copy, tokenizer) -> None:
    edit_config(copy, mask_token_id=None, pad_token_id="DROP", eos_token_id="DROP")
    config = load_model(copy, tokenizer=tokenizer).config
    assert (config.mask_token_id, config.pad_token_id, config.eos_token_id) == (1, 0, 0)


def test_ids_that_disagree_are_refused(copy, tokenizer) -> None:
    edit_config(copy, mask_token_id=4)
    with pytest.raises(CheckpointError, match="mask_token_id 4, the tokenizer says 1"):
        load_model(copy, tokenizer=tokenizer)


def test_one_of_several_end_tokens_agrees(saved, tokenizer) -> None:
    config = load_model(saved).config
    config.eos_token_id = [5, 0]
    match_token_ids(config, tokenizer)
    assert config.eos_token_id == [5, 0]


def test_a_tokenizer_larger_than_the_embedding_is_refused(saved) -> None:
    large = build_word_tokenizer([" ".join(f"w{i}" for i in range(50))])
    with pytest.raises(CheckpointError, match="use the tokenizer that belongs to the model"):
        load_model(saved, tokenizer=large)


def test_the_published_mask_token_is_recognised(tokenizer, tmp_path) -> None:
    tokenizer.save_pretrained(tmp_path)
    edit_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path).mask_token == "<|mask|>"


def test_a_tokenizer_without_mask_token_names_the_fix(tmp_path) -> None:
    maskless = build_word_tokenizer(["a b"])
    vocabulary = json.loads(maskless.backend_tokenizer.to_str())
    vocabulary["model"]["vocab"]["other"] = vocabulary["model"]["vocab"].pop("<|mask|>")
    vocabulary["added_tokens"] = [
        token for token in vocabulary["added_tokens"] if token["content"] != "<|mask|>"
    ]
    maskless.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(vocabulary))
    edit_tokenizer(tmp_path)
    with pytest.raises(DataError, match=r'no mask token: set "mask_token" in its tokenizer_config'):
        load_tokenizer(tmp_path)


def edit_tokenizer(folder: Path) -> None:
    """Take the mask token out of a tokenizer's settings, as published checkpoints have it."""
    path = folder / "tokenizer_config.json"
    fields = json.loads(path.read_text())
    del fields["mask_token"]
    fields.pop("added_tokens_decoder", None)
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize(("local", "index"), [(None, None), ("1", 1), ("5", 1), ("x", None)])
def test_processes_of_one_machine_take_its_accelerators_in_turn(monkeypatch, local, index) -> None:
    found = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    if local is None:
        monkeypatch.delenv("LOCAL_RANK", raising=False)
    else:
        monkeypatch.setenv("LOCAL_RANK", local)
    assert default_device() == torch.device("cuda", index)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert default_device() == torch.device("cpu")
