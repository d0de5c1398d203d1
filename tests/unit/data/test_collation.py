"""The batch: shapes, labels on padding, and a part that stays on the CPU when the rest moves."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader

from memdlm.data.collation import Collator
from memdlm.diffusion.states import CleanBatch
from memdlm.errors import ConfigError, DataError

FEATURES = [
    {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, 9]},
    {"input_ids": [4, 3], "labels": [-100, 3]},
]


@pytest.mark.parametrize(
    ("padding", "label"), [("supervised", 0), ("excluded_inner", 0), ("excluded", -100)]
)
def test_batch_is_right_padded(padding: str, label: int) -> None:
    batch = Collator(0, padding)(FEATURES)
    assert list(batch) == ["input_ids", "labels", "attention_mask", "host"]
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [4, 3, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 8, 9], [-100, 3, label, label, label]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 0, 0, 0]]
    assert all(batch[k].dtype == torch.int64 for k in ("input_ids", "labels", "attention_mask"))
    host = batch["host"]
    assert torch.equal(host.clean, batch["input_ids"])
    assert torch.equal(host.maskable, batch["labels"] != -100)
    assert host.padding.dtype == torch.bool
    assert torch.equal(host.padding, batch["attention_mask"] == 0)


def test_pad_token_inside_a_text_is_no_padding() -> None:
    """LLaDA pads with its end-of-text token: what is padding is known by length, not by id."""
    batch = Collator(0)([{"input_ids": [0, 7, 0], "labels": [-100, 7, 0]}])
    assert batch["attention_mask"].tolist() == [[1, 1, 1]]
    assert not batch["host"].padding.any()


@pytest.mark.parametrize(("multiple", "length"), [(None, 5), (1, 5), (4, 8), (5, 5), (64, 64)])
def test_length_is_rounded_up(multiple: int | None, length: int) -> None:
    batch = Collator(0, pad_to_multiple_of=multiple)(FEATURES)
    for name in ("input_ids", "labels", "attention_mask"):
        assert batch[name].shape == (2, length)
    assert batch["host"].clean.shape == batch["host"].padding.shape == (2, length)


def test_writing_to_the_batch_leaves_the_host_part() -> None:
    batch = Collator(0)(FEATURES)
    before = batch["host"].clean.clone()
    batch["input_ids"].fill_(1)
    batch["attention_mask"].zero_()
    assert torch.equal(batch["host"].clean, before)
    assert batch["host"].padding.sum() == 3


def test_accelerate_moves_the_tensors_and_hands_on_the_host_part() -> None:
    batch = Collator(0)(FEATURES)
    # The meta device stands for an accelerator: tensors sent there lose their values.
    moved = send_to_device(batch, torch.device("meta"))
    assert moved["labels"].device.type == moved["input_ids"].device.type == "meta"
    assert moved["host"] is batch["host"]
    assert moved["host"].clean.device.type == moved["host"].padding.device.type == "cpu"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_host_part_comes_through_a_data_loader(num_workers: int) -> None:
    loader: DataLoader[Any] = DataLoader(
        FEATURES,  # type: ignore[arg-type]
        batch_size=2,
        collate_fn=Collator(0, pad_to_multiple_of=4),
        num_workers=num_workers,
    )
    [batch] = list(loader)
    assert isinstance(batch["host"], CleanBatch)
    assert torch.equal(batch["host"].clean, batch["input_ids"])
    assert batch["host"].padding.tolist() == [[False] * 5 + [True] * 3, [False] * 2 + [True] * 6]


def test_trainer_and_accelerate_leave_the_host_part_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way: the Trainer's loader, its column filter, and its preparation of inputs."""
    from transformers import Trainer, TrainingArguments

    class Model(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> None:
            """Only its signature matters: the Trainer keeps the columns named in it."""

    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=2, report_to=[]
    )
    trainer = Trainer(
        Model(),
        arguments,
        data_collator=Collator(0),
        train_dataset=FEATURES,  # type: ignore[arg-type]
    )
    [batch] = list(trainer.get_train_dataloader())
    monkeypatch.setattr(TrainingArguments, "device", torch.device("meta"))
    prepared = trainer._prepare_inputs(batch)
    assert prepared["labels"].device.type == "meta"
    assert isinstance(prepared["host"], CleanBatch)
    assert prepared["host"].clean.device.type == "cpu"


def test_collator_survives_pickling() -> None:
    collator = Collator(3, "excluded", 8)
    assert pickle.loads(pickle.dumps(collator)) == collator


def test_bad_settings() -> None:
    with pytest.raises(ConfigError, match="padding is 'none': choose one of supervised, excluded"):
        Collator(0, "none")
    with pytest.raises(ConfigError, match="pad_to_multiple_of is 0"):
        Collator(0, pad_to_multiple_of=0)


def test_bad_rows() -> None:
    with pytest.raises(DataError, match="a row has no labels, only 'input_ids'"):
        Collator(0)([{"input_ids": [1]}])
    with pytest.raises(DataError, match="a row has no input_ids, only 'text'"):
        Collator(0)([{"text": "a"}])
    with pytest.raises(DataError, match="2 input_ids and 1 labels"):
        Collator(0)([{"input_ids": [1, 2], "labels": [1]}])
