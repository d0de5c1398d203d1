"""Official checkpoints go in and come out unchanged, and bring no code along."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM

from memdlm.backbones.dream import DreamConfig
from memdlm.backbones.llada import LLaDAConfig, LLaDAForMaskedLM
from memdlm.backbones.llada2 import LLaDA2Config
from memdlm.backbones.llada_moe import LLaDAMoEConfig, LLaDAMoEForMaskedLM
from memdlm.errors import CheckpointError

OFFICIAL = ["llada", "lladamoe", "lladamoe_variant", "llada2", "llada2_variant", "dream"]


def edit(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.fixture
def copy_of(fixtures, tmp_path):
    def copy(name: str) -> Path:
        shutil.copytree(fixtures / "backbones" / name, tmp_path / name)
        return tmp_path / name

    return copy


def test_architectures_decide_since_both_families_say_llada(copy_of, tmp_path):
    folder = copy_of("lladamoe")
    edit(folder, model_type="llada")
    model = AutoModelForMaskedLM.from_pretrained(folder)
    assert type(model) is LLaDAMoEForMaskedLM
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "again")
    assert type(again) is LLaDAMoEForMaskedLM
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert saved["architectures"] == ["LLaDAMoEModelLM"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_dense_llada_is_dense(fixtures):
    model = AutoModelForMaskedLM.from_pretrained(fixtures / "backbones" / "llada")
    assert type(model) is LLaDAForMaskedLM


@pytest.mark.parametrize("name", ["llada", "lladamoe"])
def test_code_in_the_folder_is_not_run_and_not_passed_on(name, copy_of, tmp_path):
    folder = copy_of(name)
    for file in ("configuration_x.py", "modeling_x.py"):
        (folder / file).write_text("raise SystemExit('executed')\n")
    edit(
        folder,
        model_type="llada",
        auto_map={
            "AutoConfig": "configuration_x.Config",
            "AutoModel": "modeling_x.Model",
            "AutoModelForCausalLM": "modeling_x.Model",
            "AutoModelForMaskedLM": "modeling_x.Model",
        },
    )
    model = AutoModelForMaskedLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())
    assert not list((tmp_path / "again").glob("*.py"))


NULLS = {
    "llada": ("n_kv_heads", "embedding_size", "multi_query_attention", "block_group_size"),
    "lladamoe": (
        "num_key_value_heads",
        "moe_layer_freq",
        "partial_rotary_factor",
        "shared_expert_intermediate_size",
        "norm_topk_prob",
        "attention_bias",
        "routed_scaling_factor",
    ),
    "llada2": ("use_bias", "use_qkv_bias", "score_function", "use_qk_norm", "attention_dropout"),
    "llada2_variant": ("first_k_dense_replace", "num_key_value_heads", "partial_rotary_factor"),
    "dream": ("attention_dropout", "use_sliding_window", "sliding_window", "max_window_layers"),
}


@pytest.mark.parametrize("name", NULLS)
def test_nulls_mean_the_usual(name, copy_of, fixtures):
    folder = copy_of(name)
    edit(folder, **dict.fromkeys(NULLS[name]))
    expected = AutoModelForMaskedLM.from_pretrained(fixtures / "backbones" / name)
    model = AutoModelForMaskedLM.from_pretrained(folder)
    ids = torch.arange(12)[None]
    assert torch.equal(model(ids).logits, expected(ids).logits)


def test_published_mask_tokens_are_known_though_configs_lack_them():
    assert LLaDAConfig(n_layers=1).mask_token_id == 126336
    assert LLaDAMoEConfig(num_hidden_layers=1).mask_token_id == 156895
    assert LLaDA2Config(num_hidden_layers=1).mask_token_id == 156895
    assert DreamConfig(num_hidden_layers=1).mask_token_id == 151666
    assert DreamConfig(num_hidden_layers=1, vocab_size=100).mask_token_id is None
    assert LLaDAConfig(n_layers=1, vocab_size=100).mask_token_id is None
    assert LLaDAConfig(n_layers=1, vocab_size=100, mask_token_id=7).mask_token_id == 7


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("llada", "alibi", True),
        ("llada", "rope", False),
        ("llada", "include_bias", True),
        ("llada", "include_qkv_bias", True),
        ("llada", "attention_layer_norm", True),
        ("llada", "layer_norm_type", "default"),
        ("llada", "activation_type", "swiglu"),
        ("llada", "block_type", "sequential"),
        ("llada", "block_group_size", 2),
        ("llada", "weight_tying", True),
        ("llada", "scale_logits", True),
        ("llada", "input_emb_norm", True),
        ("llada", "multi_query_attention", True),
        ("lladamoe", "attention_bias", True),
        ("lladamoe", "clip_qkv", 8.0),
        ("lladamoe", "qk_layernorm", False),
        ("lladamoe", "norm_topk_prob", True),
        ("lladamoe", "tie_word_embeddings", True),
        ("lladamoe", "rope_scaling", {"rope_type": "linear", "factor": 2.0}),
        ("llada2", "score_function", "softmax"),
        ("llada2", "use_qk_norm", False),
        ("llada2", "norm_topk_prob", False),
        ("llada2", "norm_head", True),
        ("llada2", "embedding_dropout", 0.1),
        ("llada2", "output_dropout", 0.1),
        ("llada2", "use_sliding_window", True),
        ("llada2", "tie_word_embeddings", True),
        ("llada2", "rope_scaling", {"rope_type": "linear", "factor": 2.0}),
        ("dream", "use_sliding_window", True),
        ("dream", "use_mrope", True),
        ("dream", "tie_word_embeddings", True),
        ("dream", "rope_scaling", {"rope_type": "linear", "factor": 2.0}),
    ],
)
def test_a_feature_that_is_not_implemented_is_refused_by_name(name, field, value, copy_of):
    folder = copy_of(name)
    edit(folder, **{field: value})
    with pytest.raises(CheckpointError, match=rf"{field}=.* is not supported") as caught:
        AutoModelForMaskedLM.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "imports",
    [
        "import memdlm; from transformers import AutoModelForMaskedLM",
        "from transformers import AutoModelForMaskedLM; import memdlm",
    ],
)
def test_auto_classes_know_the_families_in_either_import_order(imports, fixtures):
    run(
        f"{imports}\n"
        f"for name in {OFFICIAL!r}:\n"
        f"    path = {str(fixtures / 'backbones')!r} + '/' + name\n"
        "    model = AutoModelForMaskedLM.from_pretrained(path)\n"
        "    assert type(model).__module__.startswith('memdlm.'), type(model)\n"
    )


def test_importing_memdlm_is_light():
    run(
        "import memdlm, sys\n"
        "heavy = {'torch', 'transformers', 'peft', 'numpy', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert 'MemDLMTrainer' in memdlm.__all__\n"
    )


def test_only_public_names_are_found():
    import memdlm

    for name in memdlm.__all__:
        assert getattr(memdlm, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = memdlm.Nothing
