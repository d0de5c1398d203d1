"""Damaged, incomplete and pickled checkpoints: each is one line that names the file and the fix."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from memdlm.backbones.loading import load_model
from memdlm.errors import CheckpointError
from tests.bad_checkpoints import BAD_CHECKPOINTS, Payload, remove_weights


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    from tests.bad_checkpoints import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("sharded"))


@pytest.fixture
def copy(sharded, tmp_path) -> Path:
    """A copy of `sharded` to spoil."""
    return Path(shutil.copytree(sharded, tmp_path / "model"))


@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
def test_what_is_wrong_is_named_in_one_line(name, copy) -> None:
    case = BAD_CHECKPOINTS[name]
    case.spoil(copy)
    with pytest.raises(CheckpointError, match=case.message) as error:
        load_model(copy)
    assert "\n" not in str(error.value)
    assert str(copy) in str(error.value)


def test_a_pickle_is_never_opened(copy, tmp_path) -> None:
    mark = tmp_path / "executed"
    remove_weights(copy)
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(CheckpointError, match="pickle"):
        load_model(copy)
    assert not mark.exists()
    pickle.loads((copy / "pytorch_model.bin").read_bytes())
    assert mark.exists()  # it would have


def test_a_pickle_beside_safetensors_is_left_alone(copy, tmp_path) -> None:
    mark = tmp_path / "executed"
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (copy / name).write_bytes(pickle.dumps(Payload(mark)))
    load_model(copy)
    assert not mark.exists()


def test_the_named_conversion_works(copy) -> None:
    expected = load_model(copy).state_dict()
    tensors = {}
    for shard in copy.glob("*.safetensors"):
        tensors.update(load_file(shard))
    remove_weights(copy)
    torch.save(tensors, copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as error:
        load_model(copy)
    command = str(error.value).split("`")[1]
    names = {"path": copy / "pytorch_model.bin", "torch": torch}
    import safetensors.torch

    command = command.replace('"model.safetensors"', repr(str(copy / "model.safetensors")))
    eval(command, {**names, "safetensors": safetensors})
    for name, tensor in load_model(copy).state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_saved_shards_read_without_us_under_official_names(sharded) -> None:
    index = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 3
    for name, shard in index.items():
        assert name.startswith("model.transformer.")
        with safe_open(sharded / shard, framework="pt") as file:
            assert name in file.keys()  # noqa: SIM118 - it is no mapping
    loaded = load_model(sharded)
    blocks = "model.transformer.blocks.1"
    with safe_open(sharded / index[f"{blocks}.ff_proj.weight"], framework="pt") as file:
        gate = file.get_tensor(f"{blocks}.ff_proj.weight")
    assert torch.equal(gate, loaded.model.layers[1].mlp.gate_proj.weight)
