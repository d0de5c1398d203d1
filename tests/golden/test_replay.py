"""The golden fixtures hold, and a fixture that was tampered with does not."""

import json
import shutil
from pathlib import Path

import pytest
import replay
from safetensors.torch import load_file, save_file

from memdlm.backbones import first_attention

FIXTURES = Path(__file__).parent.parent / "fixtures"
CASES = [
    (kind, folder)
    for name in ("backbones", "inner", "infer", "peft_adapters", "sampler", "schedule", "tables")
    for kind, folder in replay.find_cases(FIXTURES / name)
]


@pytest.mark.parametrize(
    ("kind", "folder"), CASES, ids=[str(folder.relative_to(FIXTURES)) for _, folder in CASES]
)
def test_case_holds(kind: str, folder: Path) -> None:
    result = replay.replay_case(kind, folder)
    assert result["status"] == "ok", result


DECODES = [(kind, folder) for kind, folder in CASES if kind in ("infer", "sampler")]


@pytest.mark.parametrize(
    ("kind", "folder"), DECODES, ids=[str(folder.relative_to(FIXTURES)) for _, folder in DECODES]
)
def test_decodes_that_keep_the_first_layers_standing_part_hold(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_attention, "FEWEST_STANDING", 0)
    result = replay.replay_case(kind, folder)
    assert result["status"] == "ok", result


def test_all_kinds_are_present() -> None:
    kinds = [kind for kind, _ in CASES]
    assert kinds.count("inner") == 46
    assert kinds.count("infer") == 3
    assert kinds.count("sampler") >= 23
    assert kinds.count("backbones") == 6
    assert kinds.count("peft_adapters") == 4
    assert {"schedule", "tables"} < set(kinds)


@pytest.mark.parametrize(
    ("tensor", "deviation"),
    [
        ("final.model.layers.3.mlp.experts.1.up_proj.B", "fast_weights"),
        ("outer.grad.lm_head.weight", "gradient.outer"),
        ("outer.logits", "logits"),
        ("outer.loss", "loss.outer"),
        ("step0.loss_mask", "count"),
        ("step1.t", "coefficient"),
    ],
)
def test_a_changed_inner_case_fails(tmp_path: Path, tensor: str, deviation: str) -> None:
    source = FIXTURES / "inner" / "lladamoe"
    shutil.copytree(source / "model", tmp_path / "model")
    shutil.copytree(source / "pmc_distill_kl", tmp_path / "pmc_distill_kl")
    path = tmp_path / "pmc_distill_kl" / "tensors.safetensors"
    tensors = load_file(path)
    values = tensors[tensor]
    tensors[tensor] = ~values if values.dtype.is_floating_point is False else values * 1.01 + 0.01
    save_file(tensors, path)
    result = replay.replay_case("inner", tmp_path / "pmc_distill_kl")
    assert result["status"] == "failed"
    name = deviation.split(".")[0]
    assert float(str(result[deviation])) > replay.TOLERANCES[name]


@pytest.mark.parametrize(
    ("tensor", "deviation"),
    [
        ("final.model.layers.3.mlp.experts.1.up_proj.B", "fast_weights"),
        ("step1.grad.model.layers.3.mlp.experts.1.up_proj.B", "gradient.inner"),
        ("step0.loss", "loss.inner"),
        ("history_with_memory", "count"),
        ("output_without_memory", "count"),
    ],
)
def test_a_changed_infer_case_fails(tmp_path: Path, tensor: str, deviation: str) -> None:
    name = "lladamoe_ratio0p4_distill"
    shutil.copytree(FIXTURES / "inner" / "lladamoe" / "model", tmp_path / "inner/lladamoe/model")
    folder = Path(shutil.copytree(FIXTURES / "infer" / name, tmp_path / "infer" / name))
    tensors = load_file(folder / "tensors.safetensors")
    is_float = tensors[tensor].dtype.is_floating_point
    tensors[tensor] = tensors[tensor] * 1.01 + 0.01 if is_float else tensors[tensor] + 1
    save_file(tensors, folder / "tensors.safetensors")
    result = replay.replay_case("infer", folder)
    assert result["status"] == "failed"
    assert float(str(result[deviation])) > replay.TOLERANCES[deviation.split(".")[0]]


@pytest.mark.parametrize(
    ("tensor", "deviation"),
    [("output", "count.tokens"), ("unmask_step", "count.order"), ("history", "count.history")],
)
def test_a_changed_decode_fails(tmp_path: Path, tensor: str, deviation: str) -> None:
    case = tmp_path / "sampler" / "mdlm" / "infill"
    shutil.copytree(FIXTURES / "sampler" / "mdlm" / "infill", case)
    (tmp_path / "backbones").symlink_to(FIXTURES / "backbones")
    path = case / "tensors.safetensors"
    tensors = load_file(path)
    if tensor == "unmask_step":
        # Two slots that are filled in different steps change places.
        tensors[tensor][0, [2, 3]] = tensors[tensor][0, [3, 2]]
    else:
        tensors[tensor][..., -1, 2] += 1
    save_file(tensors, path)
    result = replay.replay_case("sampler", case)
    assert result["status"] == "failed"
    assert float(str(result[deviation])) > 0


@pytest.mark.parametrize("name", ["llada", "llada2"])
def test_a_changed_adapter_fails(name: str, tmp_path: Path) -> None:
    for kind in ("backbones", "peft_adapters"):
        shutil.copytree(FIXTURES / kind / name, tmp_path / kind / name)
    folder = tmp_path / "peft_adapters" / name
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in sorted(tensors, reverse=True) if "up_proj.lora_B" in key)
    save_file({**tensors, key: tensors[key] * 1.1}, path)
    result = replay.replay_case("peft_adapters", folder)
    assert result["status"] == "failed"
    assert float(str(result["logits"])) > replay.TOLERANCES["logits"]
    del tensors[key]
    save_file(tensors, path)
    assert replay.replay_case("peft_adapters", folder)["status"] == "refused"


def test_a_changed_schedule_fails(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "schedule", tmp_path / "schedule")
    path = tmp_path / "schedule" / "losses.safetensors"
    tensors = load_file(path)
    for key in ("inner_kl.uniform.token", "outer_grad.linear.scheduler.token.pad_none"):
        tensors[key] = tensors[key] * 1.001
    save_file(tensors, path)
    result = replay.replay_case("schedule", tmp_path / "schedule")
    assert result["status"] == "failed"
    assert float(str(result["loss"])) > 1e-5
    assert float(str(result["gradient"])) > 1e-5


def test_an_unsupported_checkpoint_is_a_refusal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "llada"
    shutil.copytree(FIXTURES / "backbones" / "llada", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "alibi": True}))
    assert replay.main([str(folder)]) == 1  # nothing held, so this is no success
    printed = capsys.readouterr().out
    assert '"status": "refused"' in printed
    assert "alibi=True is not supported" in printed


def test_usage_error_names_the_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert replay.main(["/no/such/folder"]) == 2
    assert "/no/such/folder" in capsys.readouterr().out
