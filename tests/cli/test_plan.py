"""`memdlm plan`: what a recipe needs, from its settings and config.json alone."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from memdlm.backbones.llada import LLaDAConfig
from memdlm.backbones.llada_moe import LLaDAMoEConfig
from memdlm.backbones.tiny import TinySizes, build_tiny

RECIPES = Path(__file__).parents[2] / "recipes"
MIB = 2**20
HAS_BITSANDBYTES = find_spec("bitsandbytes") is not None


@pytest.fixture
def shape(tmp_path) -> Path:
    """A folder with nothing but the config.json of a small mixture of experts."""
    config = LLaDAMoEConfig(
        vocab_size=2000,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_experts=8,
        num_experts_per_tok=2,
        expert_intermediate_size=64,
        mask_token_id=1999,
        pad_token_id=1998,
        eos_token_id=1998,
        max_position_embeddings=512,
        architectures=["LLaDAMoEModelLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(tmp_path / "shape")
    return tmp_path / "shape"


@pytest.fixture
def recipe_of_shape(tmp_path, shape) -> Path:
    """A recipe for it, whose data do not exist."""
    recipe = {
        "model": str(shape),
        "data": {"train": "nowhere.jsonl", "max_length": 256},
        "memory": {"rank": 4},
        "training": {"bf16": True},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def planned(memdlm, *arguments, code: int = 0):
    result = memdlm("plan", *arguments, "--json")
    assert result.code == code, result.err
    return json.loads(result.out)


def test_a_config_json_suffices(memdlm, recipe_of_shape) -> None:
    figures = planned(memdlm, recipe_of_shape)
    assert figures["model"] == "LLaDAMoEModelLM"
    assert (figures["dtype"], figures["autocast"]) == ("bfloat16", "bfloat16")
    assert (figures["batch_size"], figures["length"], figures["response"]) == (2, 256, 255)
    parameters, memory = figures["parameters"], figures["memory"]
    assert parameters["active"] < parameters["total"] == parameters["trained"]
    assert parameters["memories"] == 2
    assert memory["parts_at_peak"]["weights"] == pytest.approx(2 * parameters["total"], rel=0.01)
    assert memory["peak"] == sum(memory["parts_at_peak"].values())
    assert figures["flops_per_optimizer_step"] > 6 * 512 * parameters["active_beyond_table"]
    assert "gpu" not in figures


def test_options_and_settings_change_the_plan(memdlm, recipe_of_shape) -> None:
    before = planned(memdlm, recipe_of_shape)
    figures = planned(memdlm, recipe_of_shape, "--length", 128, "--batch", 1, "--response", 12)
    assert (figures["batch_size"], figures["length"], figures["response"]) == (1, 128, 12)
    assert figures["memory"]["peak"] < before["memory"]["peak"]
    lora = planned(memdlm, recipe_of_shape, "--set", "adapter.kind=lora")
    assert lora["parameters"]["total"] == before["parameters"]["total"]
    assert lora["parameters"]["trained"] < before["parameters"]["trained"]
    assert lora["memory"]["parts_at_peak"]["adapter"] > 0
    plain = planned(memdlm, recipe_of_shape, "--set", "memory.enabled=false")
    assert plain["parameters"]["fast_per_memory"] == 0
    floats = ["--set", "training.fp16=true", "--set", "training.bf16=false"]
    assert planned(memdlm, recipe_of_shape, *floats)["autocast"] == "float16"


def test_the_table_names_every_part(memdlm, recipe_of_shape) -> None:
    result = memdlm("plan", recipe_of_shape, "--set", "adapter.kind=lora", "--gpu", "rtx3090")
    assert result.code == 0, result.err
    for name in (
        "weights",
        "adapter",
        "gradients",
        "optimizer",
        "activations",
        "logits",
        "fast weights",
        "reserve",
        "no sharding",
        "FLOPs",
        "rtx3090: fits in 24.0 GiB",
    ):
        assert name in result.out


def test_what_does_not_fit_ends_with_1_and_says_what_would(memdlm, recipe_of_shape) -> None:
    needed = planned(memdlm, recipe_of_shape, "--set", "training.gradient_checkpointing=true")
    total = needed["memory"]["peak"] + needed["memory"]["reserve"]
    size = f"{(total + MIB) / 2**30:.9f}"
    figures = planned(memdlm, recipe_of_shape, "--gpu", size, code=1)
    assert not figures["gpu"]["fits"]
    assert figures["gpu"]["margin"] < 0
    remedies = {tuple(remedy["set"]): remedy for remedy in figures["gpu"]["remedies"]}
    checkpointing = remedies["training.gradient_checkpointing=true",]
    assert checkpointing["fits"]
    assert checkpointing["peak"] == needed["memory"]["peak"]
    smaller = remedies[
        "training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=2"
    ]
    assert smaller["peak"] < figures["memory"]["peak"]
    assert ("adapter.kind=lora",) in remedies
    assert len(remedies) == 3 + HAS_BITSANDBYTES


def test_when_nothing_fits_alone_all_changes_are_tried_together(memdlm, recipe_of_shape) -> None:
    result = memdlm("plan", recipe_of_shape, "--gpu", "1.001")
    assert result.code == 1
    assert "1.001 GiB: does not fit in 1.0 GiB" in result.out
    *alone, together = result.out.splitlines()[-4 - HAS_BITSANDBYTES :]
    assert [line.count("--set") for line in alone] == [1, 2, 1, 2][: 3 + HAS_BITSANDBYTES]
    assert together.count("--set") == 4 + HAS_BITSANDBYTES
    assert all(line.startswith("  does not fit, peak 0.0") for line in (*alone, together))


@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="needs bitsandbytes")
def test_four_bits_shrink_the_weights_but_not_their_number(memdlm, recipe_of_shape) -> None:
    lora = ["--set", "adapter.kind=lora", "--set", "adapter.rank=2"]
    plain = planned(memdlm, recipe_of_shape, *lora)
    small = planned(memdlm, recipe_of_shape, *lora, "--set", "quantization.kind=nf4")
    assert (plain["quantization"], small["quantization"]) == ("none", "nf4")
    assert small["parameters"] == plain["parameters"]
    weights = [figures["memory"]["parts_at_peak"]["weights"] for figures in (small, plain)]
    tables = 2 * 2 * 2000 * 64  # embeddings and head stay bfloat16
    assert weights[0] - tables < 0.3 * (weights[1] - tables)


@pytest.mark.parametrize("name", ["llada/llada_8b_lora", "llada_moe/llada_moe_lora"])
def test_shipped_recipes_plan_with_the_shape_of_their_model(memdlm, tmp_path, name) -> None:
    config = (
        LLaDAConfig(mlp_hidden_size=12288, architectures=["LLaDAModelLM"], n_layers=3)
        if name.startswith("llada/")
        else LLaDAMoEConfig(architectures=["LLaDAMoEModelLM"], num_hidden_layers=3)
    )
    config.dtype = "bfloat16"  # as the published files say; the recipes keep the file's type
    config.save_pretrained(tmp_path)
    figures = planned(memdlm, RECIPES / f"{name}.yaml", "--set", f"model={tmp_path}")
    assert figures["length"] == 4096
    assert figures["gradient_checkpointing"]
    memory = figures["memory"]
    assert memory["peak"] > 2 * figures["parameters"]["total"]  # weights in bfloat16, and the rest
    # 2 x 4095 masked tokens: 4 GiB a copy, were it not for the budget of 0.25.
    assert 0.25 * 2**30 < memory["parts_largest"]["logits"] < 2**30


def test_a_tiny_recipe_takes_its_vocabulary_from_its_data(memdlm, recipe, rows_file) -> None:
    figures = planned(memdlm, recipe)
    words = {word for row in map(json.loads, rows_file.open()) for word in row["prompt"].split()}
    parameters = figures["parameters"]
    size, width = parameters["total"] - parameters["active_beyond_table"], 16
    assert size % width == 0
    assert len(words) < size // width < 2 * len(words)
    assert (figures["length"], figures["dtype"]) == (64, "float32")
    tasks = planned(memdlm, RECIPES / "tiny" / "memdlm.yaml", "--length", 128)
    assert tasks["memory"]["parts_at_peak"]["weights"] == pytest.approx(
        4 * tasks["parameters"]["total"], rel=0.01
    )


def test_a_plan_writes_nothing(memdlm, recipe, tmp_path) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert memdlm("plan", recipe).code == 0
    assert sorted(tmp_path.rglob("*")) == before


def test_weights_tell_their_type_where_config_json_does_not(
    memdlm, recipe_of_shape, shape, tokenizer
) -> None:
    sizes = TinySizes(width=16, num_heads=2, mlp_width=16, context_length=256)
    build_tiny("llada_moe", tokenizer, sizes=sizes).save_pretrained(shape)
    config = json.loads((shape / "config.json").read_text())
    del config["dtype"]
    (shape / "config.json").write_text(json.dumps(config))
    assert planned(memdlm, recipe_of_shape)["dtype"] == "float32"


@pytest.fixture
def tokenizer():
    """A few words."""
    from memdlm.data.tokenizer import build_word_tokenizer

    return build_word_tokenizer(["one two three"])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--gpu", "rtx1"], 2, "--gpu: 'rtx1' is neither a number of GiB nor one of t4, "),
        (["--response", 300], 2, "--response: 300 is out of range; use 1 to 256"),
        (["--length", 1024], 2, "data.max_length 1,024 exceeds the model's context of 512"),
        (["--batch", 0], 2, "per_device_train_batch_size: 0 is out of range"),
        (["--set", "training.deepspeed=zero3.json"], 2, "one device without sharding"),
        (["--set", "training.optim=adagrad"], 2, "training.optim: adagrad cannot be planned"),
        (["--set", "model=nowhere/at/all"], 1, "no model folder at nowhere/at/all"),
        (["--set", "adapter.kind=lora", "--set", "adapter.target_modules=[x]"], 2, "x"),
    ],
)
def test_bad_input_is_one_line(memdlm, recipe_of_shape, arguments, code, message) -> None:
    assert message in memdlm("plan", recipe_of_shape, *arguments).error_line(code)


def test_a_config_that_does_not_tell_its_type_asks_for_dtype(
    memdlm, recipe_of_shape, shape
) -> None:
    config = json.loads((shape / "config.json").read_text())
    del config["dtype"]
    (shape / "config.json").write_text(json.dumps(config))
    assert "set dtype" in memdlm("plan", recipe_of_shape).error_line(2)
    figures = planned(memdlm, recipe_of_shape, "--set", "dtype=float32")
    assert figures["dtype"] == "float32"
