"""A memory kept in a folder: exact, sparse, whole or absent, and refused on any other model."""

import gc
import json
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file

from memdlm import MemoryConfig, ObjectiveConfig, ParametricMemory
from memdlm.backbones.adapters import add_lora
from memdlm.backbones.loading import load_model
from memdlm.errors import CheckpointError, UsageError
from memdlm.memory.artefact import Artefact
from memdlm.memory.fingerprint import adapter_fingerprint, base_fingerprint

SMALL = {"rank": 3, "alpha": 6.0, "layer_fraction": 0.5}
IDS = torch.randint(0, 59, (2, 12), generator=torch.Generator().manual_seed(3))
MASK = torch.tensor([[1] * 12, [1] * 5 + [0] * 7])


def written(model, ids=IDS, mask=MASK, **changes) -> ParametricMemory:
    memory = ParametricMemory(model, MemoryConfig(**{**SMALL, **changes}))
    memory.write(ids, mask, seed=7)
    return memory


def logits_with(memory, model):
    with memory.attached(), torch.no_grad():
        return model(IDS, attention_mask=MASK).logits


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_kept_memory_gives_the_same_outputs_bit_for_bit(
    family, kind, build_model, tmp_path
) -> None:
    model = build_model(family)
    objective = ObjectiveConfig(schedule="cosine")
    memory = ParametricMemory(model, MemoryConfig(kind=kind, **SMALL), objective)
    memory.write(IDS, MASK, seed=[3, 7])
    expected = logits_with(memory, model)
    memory.save_pretrained(tmp_path / "memory")
    again = ParametricMemory.from_pretrained(tmp_path / "memory", build_model(family))
    assert torch.equal(logits_with(again, again.backbone), expected)
    assert (again.config, again.objective, again.rows) == (memory.config, objective, memory.rows)
    for name, tensor in memory.fast_weights.tensors.items():
        assert torch.equal(tensor, again.fast_weights.tensors[name]), name  # phi_0 is drawn again
    # and it can be written on, as the one that stayed in memory
    memory.write(IDS, MASK, extend=True)
    again.write(IDS, MASK, extend=True)
    assert torch.equal(logits_with(again, again.backbone), logits_with(memory, model))


def test_experts_that_saw_no_token_are_left_out(build_model, tmp_path) -> None:
    model = build_model("llada_moe")
    memory = written(model)
    memory.save_pretrained(tmp_path / "memory")
    stored = load_file(tmp_path / "memory" / "memory.safetensors")
    name = "layers.3.mlp.experts.up_proj"
    whole = memory.fast_weights.tensors[f"{name}.B"]
    for row in range(2):
        visited = whole[row].flatten(1).any(dim=1).nonzero()[:, 0]
        assert 0 < len(visited) < 6
        assert stored[f"{row}.{name}.experts"].tolist() == visited.tolist()
        assert torch.equal(stored[f"{row}.{name}.B"], whole[row, visited])
    assert sum(t.numel() * 4 for t in stored.values()) < memory.num_bytes
    size = (tmp_path / "memory" / "memory.safetensors").stat().st_size
    assert size < memory.num_bytes


def test_the_manifest_says_where_a_memory_comes_from(build_model, tmp_path) -> None:
    model = build_model("llada")
    model.config._name_or_path = "some/model"
    memory = written(model)
    memory.save_pretrained(tmp_path / "memory")
    manifest = json.loads((tmp_path / "memory" / "memory.json").read_text())
    assert manifest["base"]["name"] == "some/model"
    assert manifest["base"]["fingerprint"] == base_fingerprint(model)
    assert manifest["base"]["adapter"] is None
    assert [row["seed"] for row in manifest["rows"]] == [7, 7]
    assert [row["prompts"][0]["num_tokens"] for row in manifest["rows"]] == [12, 5]
    alone = written(model, IDS[1:, :5], None)
    assert manifest["rows"][1]["prompts"][0]["sha256"] == alone.rows[0].prompts[0].sha256
    assert manifest["rows"][0]["prompts"] != manifest["rows"][1]["prompts"]
    assert manifest["settings"]["memory"]["rank"] == 3
    assert manifest["versions"].keys() >= {"memdlm", "torch", "transformers", "python"}
    text = json.dumps(manifest)
    assert not any(str(ids) in text for ids in IDS.tolist())  # hashes, not the prompt


def test_one_memory_of_a_batch_keeps_all_its_prompts(build_model, tmp_path) -> None:
    model = build_model("llada")
    memory = written(model, sharing="batch")
    memory.save_pretrained(tmp_path / "memory")
    again = ParametricMemory.from_pretrained(tmp_path / "memory", model)
    assert [prompt.num_tokens for prompt in again.rows[0].prompts] == [12, 5]
    assert torch.equal(logits_with(again, model), logits_with(memory, model))


def test_another_base_is_refused(family, build_model, tmp_path) -> None:
    written(build_model(family)).save_pretrained(tmp_path / "memory")

    def read(model):
        return ParametricMemory.from_pretrained(tmp_path / "memory", model)

    with pytest.raises(CheckpointError, match="on other base weights"):
        read(build_model(family, seed=1))
    changed = build_model(family)
    with torch.no_grad():
        changed.lm_head.weight[2, 2] += 1e-3
    with pytest.raises(CheckpointError, match="on other base weights"):
        read(changed)
    with pytest.raises(CheckpointError, match="on other base weights"):
        read(build_model(family).to(torch.bfloat16))  # rounded: the gradients were others'
    read(build_model(family).double())  # the same values
    other = "dream" if family != "dream" else "llada"
    with pytest.raises(CheckpointError, match="load that model"):
        read(build_model(other))


def test_another_adapter_is_refused(family, build_model, build_lora, tmp_path) -> None:
    def adapted(seed):
        model = build_model(family)
        torch.manual_seed(seed)
        return add_lora(model, build_lora(init_lora_weights=False))

    written(adapted(0)).save_pretrained(tmp_path / "memory")
    ParametricMemory.from_pretrained(tmp_path / "memory", adapted(0))
    with pytest.raises(
        CheckpointError, match=r"was written with outer adapter .* the model is with"
    ):
        ParametricMemory.from_pretrained(tmp_path / "memory", adapted(1))
    with pytest.raises(CheckpointError, match="the model is without an outer adapter"):
        ParametricMemory.from_pretrained(tmp_path / "memory", build_model(family))
    written(build_model(family)).save_pretrained(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="was written without an outer adapter"):
        ParametricMemory.from_pretrained(tmp_path / "plain", adapted(0))


def test_a_fingerprint_sees_base_adapter_and_config(family, build_model, build_lora) -> None:
    plain = build_model(family)
    base = base_fingerprint(plain)
    assert base == base_fingerprint(build_model(family)) and adapter_fingerprint(plain) is None
    plain.config.mask_token_id, plain.config.initializer_range = 3, 0.5
    assert base_fingerprint(plain) == base  # these change nothing that is computed
    plain.config.rms_norm_eps = 1e-3
    assert base_fingerprint(plain) != base
    adapted = [
        add_lora(build_model(family), build_lora(init_lora_weights=False, lora_alpha=alpha))
        for alpha in (8, 9)
    ]
    for model in adapted:
        model.load_state_dict(adapted[0].state_dict())
        assert base_fingerprint(model.get_base_model()) == base
    first, second = (adapter_fingerprint(model.get_base_model()) for model in adapted)
    assert first != second  # the same weights at another scale


def test_a_damaged_folder_is_one_line(build_model, tmp_path) -> None:
    model = build_model("llada")
    written(model).save_pretrained(tmp_path / "whole")

    def damaged(name, change):
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", folder)
        change(folder / name)
        with pytest.raises(CheckpointError) as caught:
            ParametricMemory.from_pretrained(folder, model)
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
        return str(caught.value)

    def edit(old, new):
        return lambda path: path.write_bytes(path.read_bytes().replace(old, new, 1))

    weights, manifest = "memory.safetensors", "memory.json"
    assert "bytes instead of" in damaged(weights, lambda p: p.write_bytes(p.read_bytes()[:-9]))
    assert "its checksum differs" in damaged(
        weights, lambda p: p.write_bytes(p.read_bytes()[:-1] + b"\1")
    )
    assert "No such file" in damaged(weights, lambda p: p.unlink())
    assert "holds no memory" in damaged(manifest, lambda p: p.unlink())
    assert "it is not JSON" in damaged(manifest, lambda p: p.write_bytes(p.read_bytes()[:-40]))
    assert "it is not JSON" in damaged(manifest, lambda p: p.write_bytes(b"\xff\xfe"))
    assert "its checksum differs" in damaged(manifest, edit(b'"alpha": 6.0', b'"alpha": 7.0'))
    assert "has version 2, this memdlm reads 1" in damaged(
        manifest, edit(b'"version": 1', b'"version": 2')
    )
    assert "is no manifest of a memory" in damaged(manifest, lambda p: p.write_text("[]"))
    assert "is no manifest of a memory" in damaged(manifest, edit(b"memdlm-memory", b"else"))


def test_a_folder_is_written_whole_or_not_at_all(build_model, tmp_path, monkeypatch) -> None:
    memory = written(build_model("llada"))
    target = tmp_path / "deep" / "memory"
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_text", raise_disk_full)
        with pytest.raises(CheckpointError, match=r"cannot write the memory .*No space left"):
            memory.save_pretrained(target)
    assert list(tmp_path.iterdir()) == []
    memory.save_pretrained(target)
    before = (target / "memory.json").read_bytes()
    with pytest.raises(CheckpointError, match="memory exists: choose another place"):
        memory.save_pretrained(target)
    assert (target / "memory.json").read_bytes() == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="Not a directory"):
        memory.save_pretrained(tmp_path / "file" / "memory")
    with pytest.raises(UsageError, match="the memory is empty"):
        ParametricMemory(memory.backbone, MemoryConfig(**SMALL)).save_pretrained(tmp_path / "x")


def raise_disk_full(self, *args: object, **kwargs: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_deleted_memory_is_gone_from_the_object_and_from_disk(build_model, tmp_path) -> None:
    model = build_model("llada")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    memory = written(model)
    memory.save_pretrained(tmp_path / "memory")
    tensors = [weakref.ref(tensor) for tensor in memory.fast_weights.tensors.values()]
    memory.erase()
    gc.collect()
    assert not any(ref() is not None for ref in tensors)
    assert not memory.is_written and memory.rows == () and memory.num_bytes == 0
    ParametricMemory.delete(tmp_path / "memory")
    assert list(tmp_path.iterdir()) == []
    assert all(torch.equal(weights[name], t) for name, t in model.state_dict().items())


def test_only_a_memory_is_deleted(build_model, tmp_path) -> None:
    written(build_model("llada")).save_pretrained(tmp_path / "memory")
    (tmp_path / "memory" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds notes.txt besides .* nothing was deleted"):
        ParametricMemory.delete(tmp_path / "memory")
    assert len(list((tmp_path / "memory").iterdir())) == 3
    with pytest.raises(CheckpointError, match="holds no memory: nothing was deleted"):
        ParametricMemory.delete(tmp_path)
    (tmp_path / "memory" / "notes.txt").unlink()
    (tmp_path / "memory" / "memory.safetensors").write_bytes(b"")  # damaged ones can go, too
    ParametricMemory.delete(tmp_path / "memory")
    assert list(tmp_path.iterdir()) == []


def test_a_description_tells_norms_and_experts(build_model, tmp_path) -> None:
    model = build_model("llada_moe")
    memory = written(model)
    memory.save_pretrained(tmp_path / "memory")
    described = memory.describe()
    assert described["bytes"] == Artefact.load(tmp_path / "memory").num_bytes
    for row in range(2):
        told = described["rows"][row]
        total = 0.0
        for layer in told["layers"]:
            fast, square = memory.fast_weights, 0.0
            for name, norm in layer["sites"].items():
                delta = fast.tensors[f"{name}.B"][row] @ fast.tensors[f"{name}.A"][row]
                expected = float((fast.scale * delta).norm())
                assert norm == pytest.approx(expected, rel=1e-5)
                square += expected**2
            assert layer["norm"] == pytest.approx(square**0.5, rel=1e-5)
            total += square
            stack = layer["experts"][f"layers.{layer['layer']}.mlp.experts"]
            assert stack["num_experts"] == 6 and stack["written"]
        assert told["norm"] == pytest.approx(total**0.5, rel=1e-5)
    assert described["rows"][0]["num_tokens"] == 12
    json.dumps(described)


def test_a_memory_of_a_4_bit_base_fits_that_base_alone(build_model, tmp_path) -> None:
    build_model("llada_moe").bfloat16().save_pretrained(tmp_path / "model")
    plain = load_model(tmp_path / "model")
    quantized = load_model(tmp_path / "model", quantization="nf4")
    memory = written(quantized)
    memory.save_pretrained(tmp_path / "memory")
    again = load_model(tmp_path / "model", quantization="nf4")
    expected = logits_with(memory, quantized)
    kept = ParametricMemory.from_pretrained(tmp_path / "memory", again)
    assert torch.equal(logits_with(kept, again), expected)
    with pytest.raises(CheckpointError, match="on other base weights"):
        ParametricMemory.from_pretrained(tmp_path / "memory", plain)
    # Exported with a pair of factors per expert, it works on 4-bit experts, too.
    row = memory.row(0)
    row.export(tmp_path / "adapter", layout="published")
    adapted = load_model(tmp_path / "model", adapter=tmp_path / "adapter", quantization="nf4")
    with row.attached(), torch.no_grad():
        expected = quantized(IDS[:1]).logits
    with torch.no_grad():
        torch.testing.assert_close(adapted(IDS[:1]).logits, expected, rtol=2e-2, atol=2e-2)
        assert (quantized(IDS[:1]).logits - expected).abs().max() > 0.1
