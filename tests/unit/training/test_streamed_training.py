"""Training on a stream: a resumed run is the run that was not stopped; rank slices fit steps."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from memdlm.data.config import DataConfig
from memdlm.data.dataset import load_dataset
from memdlm.data.streaming import StreamedDataset
from memdlm.data.tokenizer import build_word_tokenizer

WORDS = [f"w{n}" for n in range(40)]


@pytest.fixture
def make_stream(tmp_path):
    rows = tmp_path / "rows.jsonl"
    texts = [" ".join(WORDS[n % 40 : n % 40 + 3 + n % 5]) for n in range(23)]
    rows.write_text(
        "".join(json.dumps({"prompt": "w1 w2", "completion": text}) + "\n" for text in texts)
    )
    tokenizer = build_word_tokenizer(WORDS)
    config = DataConfig(train=str(rows), streaming=True, test_fraction=0, shuffle_buffer=8)

    def make() -> StreamedDataset:
        stream = load_dataset(config, tokenizer, echo=lambda line: None).train
        assert isinstance(stream, StreamedDataset)
        return stream

    return make


def seen(trainer) -> list[list[list[int]]]:
    return [batch.clean.tolist() for batch in trainer.batches]


@pytest.mark.parametrize("stop", [2, 6])  # within the first pass over the rows, and beyond it
def test_a_resumed_run_skips_to_its_place_and_goes_on(
    stop, tmp_path, build_model, train, make_stream
) -> None:
    settings = {
        "max_steps": stop + 3,
        "save_strategy": "steps",
        "save_steps": stop,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
    }
    whole = train(build_model("llada"), train_dataset=make_stream(), **settings)
    batches = seen(whole)
    checkpoint = tmp_path / f"checkpoint-{stop}"
    shutil.copytree(Path(whole.args.output_dir) / checkpoint.name, checkpoint)
    torch.rand(7)  # another process has another past
    resumed = train(
        build_model("llada", seed=1),
        train_dataset=make_stream(),
        resume=str(checkpoint),
        **settings,
    )
    assert seen(resumed)[-6:] == batches[-6:]
    expected = whole.model.state_dict()
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    losses = [
        [
            line["loss"]
            for line in t.state.log_history
            if line.get("step", 0) > stop and "loss" in line
        ]
        for t in (whole, resumed)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3


def test_the_trainer_arranges_the_stream_and_each_process_reads_for_itself(
    build_model, train, make_stream
) -> None:
    stream = make_stream()
    trainer = train(
        build_model("llada"),
        train_dataset=stream,
        max_steps=1,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=3,
        train_sampling_strategy="random",
        data_seed=5,
    )
    assert (stream.step_size, stream.seed, stream.order) == (6, 5, "random")
    assert trainer.accelerator.dispatch_batches is False
