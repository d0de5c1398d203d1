"""Recipes: every key checked by name and type, nearest key named, round trip, and those we ship."""

from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from memdlm.cli.recipe import (
    SET_ELSEWHERE,
    Recipe,
    build_recipe,
    load_recipe,
    resolved,
)
from memdlm.cli.settings import apply_overrides, describe, read_yaml, to_yaml
from memdlm.errors import ConfigError, UsageError
from memdlm.plain import differences
from memdlm.training.config import MemDLMConfig

RECIPES = Path(__file__).parents[2] / "recipes"
# accelerate/ holds settings of the launcher.
SHIPPED = sorted(p for p in RECIPES.rglob("*.yaml") if p.parent.name != "accelerate")
MINIMAL = {"tiny": {}, "data": {"train": "rows.jsonl"}}


def minimal(**changes: object) -> Recipe:
    return build_recipe({**MINIMAL, **changes}, "r.yaml")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_recipe_we_ship_loads_and_states_only_differences(path) -> None:
    recipe = load_recipe(path)
    baseline = load_recipe(path, ["memory.enabled=false"])
    assert differences(resolved(recipe), resolved(baseline)) == ["memory.enabled: True -> False"]
    written, defaults = read_yaml(path), resolved(minimal())
    for section in ("adapter", "data", "objective", "memory", "training"):
        for key, value in written.get(section, {}).items():
            assert defaults[section].get(key) != value, f"{section}.{key} is the default"
    assert f"({path.relative_to(RECIPES)})" in (RECIPES / "README.md").read_text()


def test_the_defaults_are_the_papers() -> None:
    plain = resolved(minimal())
    assert plain["adapter"] == {
        "kind": "none",
        "rank": 32,
        "alpha": 64.0,
        "dropout": 0.05,
        "target_modules": "all-linear",
    }
    assert plain["training"]["num_train_epochs"] == 5
    assert plain["training"]["learning_rate"] == 2e-5
    assert plain["data"]["max_length"] == 4096


def test_a_resolved_recipe_reads_back_as_itself(tmp_path) -> None:
    recipe = minimal(
        memory={"scope": "modules", "modules": ["up_proj"], "clip_norm": None},
        data={"tasks": {"tasks": ["single_needle"]}},
        training={"learning_rate": "1e-3"},
    )
    path = tmp_path / "resolved.yaml"
    path.write_text(to_yaml(resolved(recipe)))
    again = load_recipe(path)
    assert resolved(again) == resolved(recipe)
    assert again.memory == recipe.memory
    assert again.memory.modules == ("up_proj",)
    assert again.training["learning_rate"] == 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory": {"rnak": 3}}, r"r.yaml: unknown key memory.rnak; did you mean memory.rank\?"),
        ({"memroy": {}}, r"unknown key memroy; did you mean memory\?"),
        ({"training": {"learning_rat": 1}}, "did you mean training.learning_rate"),
        ({"tiny": {"sizes": {"widht": 1}}}, r"tiny.sizes.widht; did you mean tiny.sizes.width\?"),
        ({"zzz": 1}, "unknown key zzz; valid keys: preset, model, dtype"),
        ({"rank": 3}, r"unknown key rank; did you mean adapter.rank or memory.rank\?"),
        ({"num_train_epochs": 3}, r"did you mean training.num_train_epochs\?"),
        ({"tiny": {"width": 3}}, r"unknown key tiny.width; did you mean tiny.sizes.width\?"),
        ({"training": {"zzzzz": 1}}, "unknown key training.zzzzz; see `memdlm recipe`"),
        ({"memory": {"rank": "many"}}, "memory.rank is 'many'; it must be a whole number"),
        ({"memory": {"rank": True}}, "memory.rank is True; it must be a whole number"),
        ({"memory": {"alpha": "x"}}, "memory.alpha is 'x'; it must be a number"),
        ({"memory": {"enabled": "no"}}, "memory.enabled is 'no'; it must be true or false"),
        ({"memory": {"clip_norm": []}}, "memory.clip_norm is .*; it must be a number or null"),
        ({"memory": {"modules": "up"}}, "memory.modules is 'up'; it must be a list"),
        ({"memory": 3}, "memory is a number; it must be a section of keys"),
        ({"data": {"columns": [1]}}, "data.columns is .*; it must be a mapping"),
        ({"training": {"eval_strategy": "often"}}, "must be one of no, steps, epoch"),
        ({"training": {"seed": 1}}, "training.seed is not set here; use the top-level key seed"),
        ({"training": {"memory": {}}}, "training.memory is not set here"),
    ],
)
def test_a_wrong_key_or_type_is_named_with_its_place(changes, message) -> None:
    with pytest.raises(UsageError, match=message):
        minimal(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory": {"rank": 0}}, "r.yaml: memory.rank: 0 is out of range"),
        ({"memory": {"layer_fraction": 1.5}}, "layer_fraction: 1.5 is out of range"),
        ({"memory": {"layer_fraction": 0}}, "layer_fraction: 0.0 is out of range"),
        ({"adapter": {"kind": "dora"}}, "adapter.kind: 'dora' is not one of none, lora"),
        ({"adapter": {"rank": 0}}, "adapter.rank: 0"),
        ({"adapter": {"alpha": 0}}, "adapter.alpha: 0"),
        ({"adapter": {"dropout": 1}}, "adapter.dropout: 1"),
        ({"adapter": {"target_modules": []}}, "adapter.target_modules"),
        ({"model": "x"}, "exactly one of model"),
        ({"tiny": None}, "exactly one of model"),
        ({"tiny": {"family": "gpt"}}, "tiny.family: 'gpt'"),
        ({"dtype": "int3"}, "dtype: 'int3'"),
        ({"data": {}}, "data.train is not set"),
        ({"data": {"train": "x", "tasks": {}}}, "data.tasks excludes data.train"),
        ({"data": {"tasks": {"split": "test"}}}, "data.tasks.split"),
        ({"seed": -1}, "seed: -1"),
    ],
)
def test_a_value_out_of_range_is_named(changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        minimal(**changes)


def test_a_bare_no_is_the_word_where_the_word_is_meant(tmp_path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("tiny: {}\ndata: {train: x}\ntraining: {save_strategy: no}\n")
    assert load_recipe(path).training["save_strategy"] == "no"
    with pytest.raises(UsageError, match=r"training\.optim is False"):
        load_recipe(path, ["training.optim=no"])


def test_bad_yaml_names_file_and_line(tmp_path) -> None:
    path = tmp_path / "bad.yaml"
    for text, message in (
        ("tiny: {}\nmemory: [1\nseed: 2\n", r"bad.yaml:3 is not valid YAML"),
        ("tiny: {}\nseed: 1\nseed: 2\n", r"bad.yaml:3 .*the key 'seed' is given twice"),
        ("- 1\n", "holds a list: a recipe is a mapping"),
        ("seed: \x01\n", "is not valid YAML"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=message) as error:
            read_yaml(path)
        assert "\n" not in str(error.value)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not UTF-8"):
        read_yaml(path)
    with pytest.raises(UsageError, match=r"cannot read .*No such file"):
        read_yaml(tmp_path / "absent.yaml")
    path.write_text("# nothing\n")
    assert read_yaml(path) == {}


def test_set_changes_a_copy_and_makes_sections() -> None:
    data = {"memory": {"rank": 3}}
    changed = apply_overrides(data, ["memory.rank=4", "a.b.c=[1, x]", "d=null", "e=a=b"])
    assert changed == {"memory": {"rank": 4}, "a": {"b": {"c": [1, "x"]}}, "d": None, "e": "a=b"}
    assert data == {"memory": {"rank": 3}}


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("memory.rank", "write --set key=value"),
        ("=3", "write --set key=value"),
        ("a..b=3", "write --set key=value"),
        ("a=[1", "not valid YAML"),
        ("seed.x=1", "seed is 3, not a section"),
    ],
)
def test_a_bad_assignment_is_refused(assignment, message) -> None:
    with pytest.raises(UsageError, match=message):
        apply_overrides({"seed": 3}, [assignment])


def test_every_key_has_help() -> None:
    keys = {key.key: key for key in describe(Recipe)}
    assert {"memory.rank", "data.tasks.length", "tiny.sizes.width", "adapter.kind"} <= keys.keys()
    assert [key for key, line in keys.items() if not line.help] == []
    assert keys["memory.clip_norm"].default == "1.0"
    assert keys["model"].type == "str | null"


def test_the_recipe_command_shows_them(memdlm) -> None:
    shown = memdlm("recipe", "memory.rank")
    assert shown.out.startswith("memory.rank = 32  (int)\n    Rank of the fast LoRA")
    training = memdlm("recipe", "--training").out
    assert (
        "training.learning_rate = 2e-05" in training
        or "training.learning_rate = 2.0e-05" in training
    )
    assert "training.seed" not in training


def test_sections_set_elsewhere_are_fields_of_the_config() -> None:
    assert set(SET_ELSEWHERE) <= {field.name for field in fields(MemDLMConfig)}


def test_a_recipe_is_plain_yaml(tmp_path) -> None:
    assert yaml.safe_load(to_yaml(resolved(minimal())))["tiny"]["family"] == "llada"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "set training.max_steps"),
        ({"training": {"max_steps": -1}}, "set training.max_steps"),
        ({"training": {"max_steps": 3, "dataloader_num_workers": 2}}, "use 0 or 1"),
    ],
)
def test_a_stream_without_an_end_or_with_several_workers_is_refused(changes, message) -> None:
    data = {"train": "rows.jsonl", "streaming": True, "test_fraction": 0}
    with pytest.raises(ConfigError, match=message):
        minimal(data=data, **changes)
    assert minimal(data=data, training={"max_steps": 3}).data.streaming
    with pytest.raises(ConfigError, match="generated tasks have no source"):
        minimal(data={"tasks": {}, "streaming": True, "test_fraction": 0})
