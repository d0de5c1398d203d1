"""Checkpoints that must be refused: functions that spoil a good one, for library and commands."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from memdlm.backbones.tiny import TinySizes, build_tiny
from memdlm.data.tokenizer import build_word_tokenizer

INDEX = "model.safetensors.index.json"


def write_checkpoint(folder: Path) -> Path:
    """Write a good sharded checkpoint with its tokenizer."""
    tokenizer = build_word_tokenizer(["the cat sat on the mat"])
    sizes = TinySizes(width=16, num_layers=2, num_heads=2, mlp_width=16, context_length=64)
    build_tiny("llada", tokenizer, sizes=sizes).save_pretrained(folder, max_shard_size=3000)
    tokenizer.save_pretrained(folder)
    return folder


def first_shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def remove_weights(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()


def edit_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def _truncate(folder: Path) -> None:
    shard = first_shard(folder)
    shard.write_bytes(shard.read_bytes()[:-100])


def _empty(folder: Path) -> None:
    first_shard(folder).write_bytes(b"")


def _pointer(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"
    first_shard(folder).write_text(text)


def _lose_shards(folder: Path) -> None:
    for shard in sorted(folder.glob("*.safetensors"))[:4]:
        shard.unlink()


def _write(name: str, text: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_text(text)

    return spoil


def _config(**fields: object) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, **fields)


def _pickle(folder: Path) -> None:
    remove_weights(folder)
    torch.save({"weight": torch.zeros(2)}, folder / "pytorch_model.bin")


def _sharded_pickle(folder: Path) -> None:
    remove_weights(folder)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {}}))
    torch.save({"weight": torch.zeros(2)}, folder / "pytorch_model-00001-of-00002.bin")


@dataclass(frozen=True)
class BadCheckpoint:
    """How to spoil a folder, and a pattern of the line that says so."""

    spoil: Callable[[Path], None]
    message: str


BAD_CHECKPOINTS = {
    "truncated_shard": BadCheckpoint(
        _truncate, r"model-00001-of-\d+\.safetensors is truncated or damaged .*download it again"
    ),
    "empty_shard": BadCheckpoint(_empty, r"model-00001-of-\d+\.safetensors is truncated"),
    "pointer": BadCheckpoint(_pointer, "is a Git LFS pointer, .*git lfs pull"),
    "missing_shards": BadCheckpoint(
        _lose_shards, r"lacks 4 of its \d+ weight files \(model-00001.* and 1 more\): download"
    ),
    "corrupt_index": BadCheckpoint(_write(INDEX, '{"weight_map": {'), r"index\.json is damaged"),
    "index_without_map": BadCheckpoint(_write(INDEX, "[]"), r"index\.json is damaged"),
    "index_to_elsewhere": BadCheckpoint(
        _write(INDEX, '{"weight_map": {"a": "../model.safetensors"}}'), r"index\.json is damaged"
    ),
    "corrupt_config": BadCheckpoint(_write("config.json", '{"model_type": '), "not a valid JSON"),
    "config_is_a_list": BadCheckpoint(_write("config.json", "[1]"), "is no JSON object"),
    "no_weights": BadCheckpoint(remove_weights, r"holds no weights: there is neither model\.safe"),
    "pickle": BadCheckpoint(
        _pickle, r"as a pickle \(pytorch_model\.bin\), .* never read: use safetensors, or convert"
    ),
    "sharded_pickle": BadCheckpoint(
        _sharded_pickle, r"as a pickle \(pytorch_model-00001-of-00002\.bin\), .* convert"
    ),
    "other_architecture": BadCheckpoint(
        _config(architectures=["BertForMaskedLM"], model_type="bert"),
        "architecture BertForMaskedLM; supported are DreamModel, LLaDA2MoeModelLM, LLaDAMoEModelLM,"
        " LLaDAModelLM",
    ),
    "no_architecture": BadCheckpoint(
        _config(architectures=None), r"names the architecture nothing \(model_type 'llada'\)"
    ),
    "other_shape": BadCheckpoint(
        _config(mlp_hidden_size=32), r"of another size: model\.layers\.0\.mlp\.down_proj\.weight"
    ),
    "quantised": BadCheckpoint(
        _config(quantization_config={"quant_method": "gptq", "bits": 4}), "quantised already"
    ),
    "unknown_feature": BadCheckpoint(_config(alibi=True), "alibi=True is not supported"),
}
