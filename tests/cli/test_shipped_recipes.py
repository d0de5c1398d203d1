"""The recipes we ship: the values their comments name, their length, and that tiny ones run."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from memdlm.backbones import LLaDA2Config, LLaDA2ForMaskedLM
from memdlm.cli.presets import REFERENCE
from memdlm.cli.recipe import build_recipe, load_recipe, resolved
from memdlm.cli.recipe_parts import build_model
from memdlm.cli.settings import read_yaml
from memdlm.data.config import DataConfig
from memdlm.data.dataset import load_dataset
from memdlm.data.tasks import generate_examples
from memdlm.data.tasks.config import TaskConfig
from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.errors import ConfigError, UsageError
from memdlm.plain import differences
from tests.conftest import make_model

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
PAPERS = ["llada_moe/llada_moe_lora.yaml", "llada2_mini/llada2_mini_lora.yaml"]
OTHERS = ["llada/llada_8b_lora.yaml", "dream/dream_7b_lora.yaml"]
MINIMAL = {"tiny": {}, "data": {"train": "rows.jsonl"}}


def lookup(plain: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        plain = plain[part]
    return plain


@pytest.mark.parametrize("name", PAPERS + OTHERS)
def test_every_value_that_a_comment_gives_is_the_one_in_force(name) -> None:
    text = (RECIPES / name).read_text()
    plain = resolved(load_recipe(RECIPES / name))
    stated = re.findall(r"^#   ([\w.]+): (\S+) +# (\S.*)$", text, re.MULTILINE)
    assert len(stated) == 24
    assert len(stated) == text.count("\n#   "), "a line has no source, or another form"
    for key, value, _ in stated:
        wanted = lookup(plain, key)
        assert type(wanted)(value) == wanted, key


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_runs_are_four_lines_each_with_its_source(name) -> None:
    lines = [
        line
        for line in (RECIPES / name).read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert [line.partition(":")[0] for line in lines] == ["model", "adapter", "data", "training"]
    assert all("  # paper" in line for line in lines)


@pytest.mark.parametrize("name", PAPERS)
def test_the_reference_preset_changes_only_what_it_names(name) -> None:
    before = resolved(load_recipe(RECIPES / name))
    after = resolved(load_recipe(RECIPES / name, ["preset=reference"]))
    assert differences(before, after) == [
        "preset: None -> 'reference'",
        "attention: None -> 'full'",
        "data.overlong: 'filter' -> 'truncate_right'",
        "memory.sharing: 'sequence' -> 'batch'",
        "memory.hidden_comparison: 'corrected' -> 'reference'",
    ]
    for section, values in REFERENCE.items():
        if isinstance(values, dict):
            assert {key: after[section][key] for key in values} == values


def test_own_keys_override_the_preset_and_a_resolved_recipe_reads_back() -> None:
    own = {**MINIMAL, "preset": "reference", "memory": {"sharing": "sequence", "rank": 2}}
    recipe = build_recipe(own, "r.yaml")
    assert (recipe.memory.sharing, recipe.memory.rank) == ("sequence", 2)
    assert recipe.memory.hidden_comparison == "reference"
    assert resolved(recipe)["preset"] == "reference"
    assert resolved(build_recipe(resolved(recipe), "recipe.yaml")) == resolved(recipe)
    empty = build_recipe({**MINIMAL, "preset": "reference", "memory": None}, "r.yaml")
    assert empty.memory.sharing == "batch"


def test_an_unknown_preset_is_refused_with_its_nearest_name() -> None:
    with pytest.raises(UsageError, match=r"preset is 'referense'.*did you mean reference\?"):
        build_recipe({**MINIMAL, "preset": "referense"}, "r.yaml")
    with pytest.raises(UsageError, match="preset is 3"):
        build_recipe({**MINIMAL, "preset": 3}, "r.yaml")


def test_attention_reaches_the_model_and_is_refused_where_it_has_one_kind(tmp_path) -> None:
    tokenizer = build_word_tokenizer(["one two three four five"])
    sizes = {"vocab_size": len(tokenizer), "mask_token_id": 1, "pad_token_id": 0, "eos_token_id": 0}
    for family in ("llada2", "llada"):
        make_model(family, **sizes).save_pretrained(tmp_path / family)

    def build(family: str, **keys: str) -> Any:
        data = {"model": str(tmp_path / family), "data": {"train": "rows.jsonl"}, **keys}
        return build_model(build_recipe(data, "r.yaml"), tokenizer)

    assert isinstance(build("llada2"), LLaDA2ForMaskedLM)
    assert (
        LLaDA2Config().attention == build("llada2", preset="reference").config.attention == "full"
    )
    assert build("llada2", attention="block_causal").config.attention == "block_causal"
    build("llada", preset="reference")
    with pytest.raises(ConfigError, match="attention: 'block_causal'"):
        build("llada", attention="block_causal")
    with pytest.raises(ConfigError, match="attention"):
        build_recipe({**MINIMAL, "attention": "block_causal"}, "r.yaml")


def test_truncate_right_loses_rows_whose_prompt_fills_the_window(tmp_path) -> None:
    rows = [(2, 9), (12, 4), (3, 2)]
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(f'{{"prompt": "{"a " * p}", "completion": "{"b " * r}"}}\n' for p, r in rows)
    )
    words = build_word_tokenizer(["a b"])
    config = DataConfig(train=str(path), max_length=8, overlong="truncate_right", test_fraction=0)
    data = load_dataset(config, words, echo=lambda line: None).train
    assert [(len(e.input_ids), e.prompt_length) for e in data.examples] == [(8, 2), (6, 3)]
    assert (data.report.cut, data.report.overlong) == (1, 1)


@pytest.mark.parametrize("path", sorted((RECIPES / "tiny").glob("*.yaml")), ids=lambda p: p.name)
@pytest.mark.parametrize("preset", [None, "reference"])
def test_the_tiny_recipes_train(memdlm, tmp_path, path, preset) -> None:
    changes = {
        "output_dir": str(tmp_path / "run"),
        "training.max_steps": 2,
        "training.per_device_train_batch_size": 4,
        "data.num_rows": 16,
        "data.num_eval_rows": 4,
    }
    recipe = read_yaml(path)
    if preset is not None:
        changes["preset"] = preset
    if "model" in recipe:  # the start and the rows that its first lines say how to make
        changes["model"] = str(ROOT / "src/memdlm/quickstart/checkpoint")
        for key in ("train", "eval"):
            file = tmp_path / f"{key}.jsonl"
            rows = generate_examples(TaskConfig(num_examples=16, length=64))
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            changes[f"data.{key}"] = str(file)
    sets = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    result = memdlm("train", path, "--quiet", *sets)
    assert result.code == 0, result.err
    assert "2 steps; saved" in result.out
    recorded = read_yaml(tmp_path / "run" / "recipe.yaml")
    assert recorded["preset"] == preset
    assert recorded["memory"]["sharing"] == ("batch" if preset else "sequence")
