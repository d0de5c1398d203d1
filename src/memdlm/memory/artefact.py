"""A memory in a folder: two files, made whole or not at all, and refused on any other model.

    memory.json         the manifest: base, outer adapter, settings, rows, versions, checksums
    memory.safetensors  what was written (memdlm.memory.sparse)

Holds hashes of the prompts, not the prompts; what a memory learnt may still be read out of it, so
treat the folder as you treat the text. Every byte of both files is covered by a checksum.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch

from memdlm.backbones.base import DiffusionMaskedLM
from memdlm.diffusion.objective import ObjectiveConfig
from memdlm.errors import CheckpointError, MemDLMError
from memdlm.memory.config import MemoryConfig
from memdlm.memory.fast_weights import FastWeights
from memdlm.memory.fingerprint import adapter_fingerprint, base_fingerprint
from memdlm.memory.new_folder import new_folder
from memdlm.memory.placement import Placement, Site
from memdlm.memory.provenance import MemoryRow, PromptRecord
from memdlm.memory.sparse import compress, expand
from memdlm.seeding import generator
from memdlm.versions import collect_versions

FORMAT = "memdlm-memory"
VERSION = 1
MANIFEST = "memory.json"
WEIGHTS = "memory.safetensors"

T = TypeVar("T")


@dataclass(frozen=True)
class Base:
    """The network a memory was written on.

    Attributes:
        name: Folder or hub name it was loaded from.
        architecture: Class, as in `architectures` of config.json.
        model_type: Family, as in config.json of a native checkpoint.
        fingerprint: See `memdlm.memory.fingerprint`.
        adapter: Fingerprint of the outer adapter; None if there was none.
    """

    name: str
    architecture: str
    model_type: str
    fingerprint: str
    adapter: str | None

    @classmethod
    def of(cls, lm: DiffusionMaskedLM) -> "Base":
        """Describe a backbone, reading a sample of its weights."""
        return cls(
            str(lm.config._name_or_path or ""),
            type(lm).__name__,
            lm.config.model_type,
            base_fingerprint(lm),
            adapter_fingerprint(lm),
        )


@dataclass(frozen=True)
class Artefact:
    """Everything a memory folder holds.

    Attributes:
        base: Where the memory fits.
        config: Its settings.
        objective: Noise schedule that drew its anchors.
        rows: What was written, row by row.
        sites: What it adapts.
        tensors: The stored tensors (`memdlm.memory.sparse`).
        versions: Of Python and the packages that wrote it.
        device: Kind of device that drew phi_0, e.g. `cpu`.
    """

    base: Base
    config: MemoryConfig
    objective: ObjectiveConfig
    rows: tuple[MemoryRow, ...]
    sites: tuple[Site, ...]
    tensors: Mapping[str, torch.Tensor]
    versions: Mapping[str, str]
    device: str

    @classmethod
    def of(
        cls,
        lm: DiffusionMaskedLM,
        config: MemoryConfig,
        objective: ObjectiveConfig,
        rows: tuple[MemoryRow, ...],
        fast: FastWeights,
    ) -> "Artefact":
        """Describe the memory `fast` of the backbone `lm`."""
        return cls(
            base=Base.of(lm),
            config=config,
            objective=objective,
            rows=rows,
            sites=fast.placement.sites,
            tensors=compress(fast),
            versions=collect_versions(),
            device=next(iter(fast.tensors.values())).device.type,
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def save(self, folder: Path) -> None:
        """Write the folder, which must not exist; on failure nothing is left.

        Raises:
            CheckpointError: The folder exists or cannot be written.
        """
        weights = safetensors.torch.save(dict(self.tensors), {"format": FORMAT})
        manifest = self._manifest(weights)
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        with new_folder(folder, "memory") as staging:
            (staging / WEIGHTS).write_bytes(weights)
            (staging / MANIFEST).write_text(text, encoding="utf-8")

    def _manifest(self, weights: bytes) -> dict[str, Any]:
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "base": asdict(self.base),
            "settings": {"memory": asdict(self.config), "objective": asdict(self.objective)},
            "rows": [asdict(row) for row in self.rows],
            "sites": [asdict(site) for site in self.sites],
            "versions": dict(self.versions),
            "device": self.device,
            "weights": {"bytes": len(weights), "sha256": hashlib.sha256(weights).hexdigest()},
        }
        return {**manifest, "checksum": _checksum(manifest)}

    @classmethod
    def load(cls, folder: Path) -> "Artefact":
        """Read and check a memory folder; needs no model.

        Raises:
            CheckpointError: It holds no memory, is damaged, or is of an unknown version.
        """
        manifest = _read_manifest(folder)
        tensors = _read_weights(folder / WEIGHTS, manifest["weights"])
        try:
            settings = manifest["settings"]
            return cls(
                base=_build(Base, manifest["base"]),
                config=_build(MemoryConfig, settings["memory"]),
                objective=_build(ObjectiveConfig, settings["objective"]),
                rows=tuple(_row(row) for row in manifest["rows"]),
                sites=tuple(_build(Site, site) for site in manifest["sites"]),
                tensors=tensors,
                versions=manifest["versions"],
                device=manifest["device"],
            )
        except (KeyError, TypeError, MemDLMError) as error:
            # The checksum holds, so this is no damage: another version of memdlm wrote it.
            raise CheckpointError(
                f"{folder / MANIFEST} says what this memdlm does not know ({error}): use the "
                "version named there under `versions`"
            ) from error

    def check_fits(self, lm: DiffusionMaskedLM) -> None:
        """Refuse any network but the one the memory was written on.

        Raises:
            CheckpointError: Base or outer adapter differ; says which.
        """
        given = Base.of(lm)
        if given.architecture != self.base.architecture:
            raise CheckpointError(
                f"the memory was written on a {self.base.architecture} ({self.base.name}), not on "
                f"a {given.architecture}: load that model"
            )
        if given.fingerprint != self.base.fingerprint:
            raise CheckpointError(
                f"the memory was written on other base weights ({self.base.name or 'unnamed'}, "
                f"{self.base.fingerprint[:12]}) than these ({given.name or 'unnamed'}, "
                f"{given.fingerprint[:12]}): load that model in the same precision, or write the "
                "memory again"
            )
        if given.adapter != self.base.adapter:
            raise CheckpointError(
                f"the memory was written {_with(self.base.adapter)}, the model is "
                f"{_with(given.adapter)}: load the adapter it was written with, or write the "
                "memory again"
            )

    def fast_weights(self, placement: Placement, device: torch.device) -> FastWeights:
        """Return the memory on `device`; what was never written is phi_0 again.

        Raises:
            CheckpointError: The tensors do not fit `placement`.
        """
        # phi_0 has no effect; its values matter where the memory is extended.
        draws = [generator(row.seed, "fast_weights", device=device) for row in self.rows]
        fast = FastWeights(placement, self.config, len(self.rows), device, draws)
        try:
            expand(self.tensors, fast)
        except ValueError as error:
            raise CheckpointError(
                f"the memory's tensors do not fit the model ({error}): it was written by another "
                "version of memdlm; write it again"
            ) from error
        return fast


def is_memory(folder: Path) -> bool:
    """Tell whether `folder` holds a memory, whole or damaged."""
    return (folder / MANIFEST).is_file()


def delete_memory(folder: Path) -> None:
    """Remove a memory folder, whole or damaged.

    Raises:
        CheckpointError: It holds no memory, or other files besides, or cannot be removed.
    """
    if not is_memory(folder):
        raise CheckpointError(f"{folder} holds no memory: nothing was deleted; check the path")
    others = sorted({path.name for path in folder.iterdir()} - {MANIFEST, WEIGHTS})
    if others:
        raise CheckpointError(
            f"{folder} holds {others[0]} besides a memory: nothing was deleted; move it away first"
        )
    for name in (WEIGHTS, MANIFEST):  # the manifest last: what is left can be deleted again
        (folder / name).unlink(missing_ok=True)
    folder.rmdir()


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} holds no memory ({MANIFEST} is missing): name a folder that "
            "`memdlm memory write` or save_pretrained made"
        ) from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path} ({error.strerror}): check the path") from error
    except ValueError as error:
        raise _damaged(path, "it is not JSON") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no manifest of a memory: check the path")
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has version {manifest.get('version')!r}, this memdlm reads {VERSION}: use the "
            "memdlm that wrote it, or write the memory again"
        )
    checksum = manifest.pop("checksum", None)
    if checksum != _checksum(manifest):
        raise _damaged(path, "its checksum differs")
    return manifest


def _read_weights(path: Path, expected: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _damaged(path, error.strerror or "it cannot be read") from error
    if len(data) != expected["bytes"]:
        raise _damaged(path, f"{len(data):,} bytes instead of {expected['bytes']:,}")
    if hashlib.sha256(data).hexdigest() != expected["sha256"]:
        raise _damaged(path, "its checksum differs")
    return dict(safetensors.torch.load(data))


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged ({reason}): copy or write the memory again")


def _checksum(manifest: Mapping[str, Any]) -> str:
    text = json.dumps(manifest, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _build(kind: type[T], values: Mapping[str, Any]) -> T:
    """Build a dataclass of exactly the fields it has."""
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type] # always a dataclass
    missing, extra = sorted(known - set(values)), sorted(set(values) - known)
    # A setting that came later has the value it had before there was one: its default.
    if extra or (missing and kind not in (MemoryConfig, ObjectiveConfig)):
        raise KeyError(f"{kind.__name__}.{(extra or missing)[0]}")
    return kind(**values)


def _row(values: Mapping[str, Any]) -> MemoryRow:
    prompts = tuple(_build(PromptRecord, prompt) for prompt in values["prompts"])
    return _build(MemoryRow, {**values, "prompts": prompts})


def _with(adapter: str | None) -> str:
    return "without an outer adapter" if adapter is None else f"with outer adapter {adapter[:12]}"
