"""Official checkpoints: they load, give the official numbers, and come out as they went in."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from memdlm.backbones.loading import load_model
from tests.families import FAMILIES


@pytest.fixture(params=[name for row in FAMILIES.values() for name in row.golden])
def official(request, fixtures):
    """The folder of each recorded checkpoint in turn."""
    return fixtures / "backbones" / request.param


def tensors_in(folder):
    tensors = {}
    for path in sorted(folder.glob("model*.safetensors")):
        tensors.update(load_file(path))
    return tensors


def test_logits_and_hidden_states_are_those_of_the_official_code(official):
    model = load_model(official)
    model.right_shift_logits = False  # aligning them is our addition
    inputs, golden = (load_file(official / f"{part}.safetensors") for part in ("inputs", "outputs"))
    cases = {name.split(".")[0] for name in inputs}
    assert {"nopad", "rightpad"} <= cases
    for case in cases:
        ids = inputs[f"{case}.input_ids"]
        with torch.no_grad():
            output = model(
                ids,
                attention_mask=inputs.get(f"{case}.attention_mask"),
                position_ids=inputs.get(f"{case}.position_ids"),
                output_hidden_states=True,
            )
        rows = inputs.get(f"{case}.valid", torch.ones_like(ids)).bool()
        for ours, theirs in (
            (output.logits, golden[f"{case}.logits"]),
            (output.hidden_states[-1], golden[f"{case}.last_hidden"]),
        ):
            torch.testing.assert_close(ours[rows], theirs[rows], rtol=0, atol=1e-4)


@pytest.mark.parametrize("shard_size", ["5GB", "60KB"])
def test_an_official_checkpoint_comes_out_as_it_went_in(official, shard_size, tmp_path):
    model = load_model(official)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    before, after = tensors_in(official), tensors_in(tmp_path)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == (shard_size == "60KB")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
    again = load_model(tmp_path)
    ids = torch.arange(12)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_config_comes_out_with_what_it_came_in_with(official, tmp_path):
    AutoConfig.from_pretrained(official).save_pretrained(tmp_path)
    before = json.loads((official / "config.json").read_text())
    after = json.loads((tmp_path / "config.json").read_text())
    # transformers writes its own version and keeps generation settings such as use_cache elsewhere.
    elsewhere = ("transformers_version", "dtype", "torch_dtype", "use_cache")
    for name, value in before.items():
        if value is not None and name not in elsewhere:
            assert after[name] == value, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_built_here_loads_by_path_with_every_bit(family, dtype, build_model, tmp_path):
    model = build_model(family).to(dtype).eval()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
        type(model).__name__
    ]
    loaded = load_model(tmp_path)
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        # What a family keeps in float32 is exact there, whatever the type around it.
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
    for (name, ours), (_, theirs) in zip(
        loaded.named_buffers(), model.named_buffers(), strict=True
    ):
        assert torch.equal(ours.float(), theirs.float()) or "inv_freq" in name, name
    ids = torch.arange(12)[None]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
