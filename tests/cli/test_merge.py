"""`memdlm merge`: a plain model that answers as base and adapter do together."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from memdlm.backbones.adapters import add_lora
from memdlm.backbones.loading import load_model
from memdlm.backbones.tiny import TINY_FAMILIES, TinySizes, build_tiny
from memdlm.backbones.tokenizers import load_tokenizer
from memdlm.data.tokenizer import build_word_tokenizer

from .conftest import write_recipe

SIZES = TinySizes(width=16, num_layers=2, num_heads=2, mlp_width=16, num_experts=4, expert_width=8)
IDS = torch.tensor([[3, 1, 4, 1, 5, 2]])


@pytest.fixture
def pair(tmp_path):
    """Return a function that saves a base with its tokenizer, and an adapter that names it."""

    def save(family="llada_moe"):
        tokenizer = build_word_tokenizer(["the cat sat on the mat and slept"])
        model = build_tiny(family, tokenizer, sizes=SIZES)
        model.save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        adapted = add_lora(model, LoraConfig(target_modules="all-linear"))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5)
        adapted.peft_config["default"].base_model_name_or_path = "../base"
        adapted.save_pretrained(tmp_path / "adapter")
        return tmp_path / "base", tmp_path / "adapter"

    return save


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_the_merged_model_answers_as_the_adapted_one(family, memdlm, pair, tmp_path) -> None:
    base, adapter = pair(family)
    result = memdlm("merge", "--adapter", adapter, "--output", tmp_path / "out" / "merged")
    assert (result.code, result.out) == (0, f"saved {tmp_path / 'out' / 'merged'}\n"), result.err
    merged = load_model(tmp_path / "out" / "merged")
    expected = load_model(adapter)(IDS).logits
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(load_model(base)(IDS).logits, expected, atol=1e-2)
    before, after = (
        load_file(f / "model.safetensors") for f in (base, tmp_path / "out" / "merged")
    )
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    words = load_tokenizer(tmp_path / "out" / "merged")
    assert words.get_vocab() == load_tokenizer(base).get_vocab()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["merged"]


def test_a_run_merges_into_a_type_of_choice(memdlm, tmp_path, rows_file) -> None:
    settings = {"adapter": {"kind": "lora", "rank": 2}, "tiny": {"family": "llada_moe"}}
    run = tmp_path / "run"
    assert memdlm("train", write_recipe(tmp_path, rows_file, run, **settings), "-q").code == 0
    answer = memdlm("merge", "-a", run, "-o", tmp_path / "merged", "--dtype", "bfloat16")
    assert answer.code == 0, answer.err
    merged = load_model(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16
    expected = load_model(run / "adapter")(IDS).logits
    assert (merged(IDS).logits - expected).norm() < 0.05 * expected.norm()
    assert memdlm("generate", "-m", tmp_path / "merged", "-n", "4", "ada hid the key").code == 0


def test_another_base_can_be_named_and_may_lack_a_tokenizer(memdlm, pair, tmp_path) -> None:
    base, adapter = pair()
    shutil.copytree(base, tmp_path / "bare", ignore=shutil.ignore_patterns("*token*"))
    shutil.rmtree(base)
    options = ("--adapter", adapter, "--model", tmp_path / "bare", "--output", tmp_path / "out")
    result = memdlm("merge", *options)
    assert result.code == 0, result.err
    assert "no tokenizer lies beside" in result.err
    assert load_model(tmp_path / "out").config.num_experts == 4


def test_nothing_is_overwritten_and_nothing_left_behind(memdlm, pair, tmp_path) -> None:
    base, adapter = pair()
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious").write_text("kept")
    assert "exists" in memdlm("merge", "-a", adapter, "-o", output).error_line(1)
    assert [path.name for path in output.iterdir()] == ["precious"]
    assert "nothing to merge" in memdlm("merge", "-a", base, "-o", tmp_path / "new").error_line(1)
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if "experts.1.up_proj.lora_A" in key)
    save_file({**tensors, key: tensors[key] * torch.inf}, path)
    failed = memdlm("merge", "-a", adapter, "-o", tmp_path / "new")
    assert "merged, model.layers." in failed.error_line(1)
    fields = json.loads((adapter / "adapter_config.json").read_text())
    fields["base_model_name_or_path"] = None
    (adapter / "adapter_config.json").write_text(json.dumps(fields))
    failed = memdlm("merge", "-a", adapter, "-o", tmp_path / "new")
    assert "names no base model" in failed.error_line(1)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "out"}


def test_an_unfinished_run_and_a_full_one_have_nothing_to_merge(memdlm, trained, tmp_path) -> None:
    failed = memdlm("merge", "-a", trained, "-o", tmp_path / "out")
    assert "holds no adapter" in failed.error_line(1)
    shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("model"))
    failed = memdlm("merge", "-a", tmp_path / "run", "-o", tmp_path / "out")
    assert "has no final model yet" in failed.error_line(1)
