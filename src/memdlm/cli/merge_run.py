"""The work of `memdlm merge`: load base and adapter, add one to the other, write the result."""

from pathlib import Path

import torch

from memdlm.backbones.adapters import base_of_adapter
from memdlm.backbones.adapters.model import AdaptedModel
from memdlm.backbones.base import DiffusionMaskedLM
from memdlm.backbones.loading import load_model
from memdlm.backbones.reading import check_exists
from memdlm.backbones.tokenizers import load_tokenizer
from memdlm.cli.generation_run import trained_model
from memdlm.cli.run_folder import RunFolder
from memdlm.errors import CheckpointError
from memdlm.memory.new_folder import new_folder


def merge_adapter(adapter: str, base: str | None, output: Path, dtype: str) -> bool:
    """Write the base with the adapter in its weights to `output`.

    The weights are added in float32, one matrix at a time, and rounded once.

    Args:
        adapter: Run folder, adapter folder or hub name.
        base: Folder or hub name; None for the base that the adapter names.
        output: Folder that must not exist; it appears whole or not at all.
        dtype: As for `load_model`.

    Returns:
        Whether a tokenizer was found and written too.

    Raises:
        CheckpointError: Base or adapter cannot be read or do not fit each other, a merged weight is
            not finite, or `output` exists or cannot be written.
    """
    run = RunFolder(Path(adapter).expanduser())
    if run.is_run:
        adapter = str(trained_model(run))
    check_exists(adapter)
    if Path(adapter).is_dir() and not (Path(adapter) / "adapter_config.json").is_file():
        raise CheckpointError(f"{adapter} holds no adapter, so there is nothing to merge")
    source = base_of_adapter(Path(adapter)) if base is None else base
    with new_folder(output, "merged model") as place:
        adapted = load_model(source, dtype=dtype, adapter=adapter)
        if not isinstance(adapted, AdaptedModel):
            raise CheckpointError(
                f"{adapter} uses PEFT's target_parameters, which are not merged here: export the "
                "memory in the published layout"
            )
        merged = adapted.merge_and_unload()
        _check_finite(merged, adapter)
        merged.save_pretrained(place)
        return _save_tokenizer(adapter, source, place)


def _check_finite(model: DiffusionMaskedLM, adapter: str) -> None:
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise CheckpointError(
                f"{adapter}: merged, {name} is not finite: the adapter is damaged, or dtype "
                f"{parameter.dtype} is too narrow"
            )


def _save_tokenizer(adapter: str, base: str, place: Path) -> bool:
    for source in (adapter, base):
        is_local = Path(source).is_dir()
        if any(Path(source).glob("tokenizer*")) if is_local else source == base:
            load_tokenizer(source).save_pretrained(place)
            return True
    return False
