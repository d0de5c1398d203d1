"""What a checkpoint holds, and that a run continued from one is the run that was not stopped."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

from memdlm import MemoryConfig
from memdlm.backbones.adapters import with_adapter
from memdlm.backbones.loading import load_model
from memdlm.errors import CheckpointError, NonFiniteError
from memdlm.files import MARKER, defect, seal
from memdlm.training.checkpoints import CheckpointFolder

SMALL = {"rank": 3, "alpha": 6.0, "layer_fraction": 0.5}
LORA = LoraConfig(r=4, lora_dropout=0.2, target_modules=["q_proj", "gate_proj", "up_proj"])
VOLATILE = ("seconds", "runtime", "per_second", "flos")


def history(trainer):
    """Return the log without times."""
    return [
        {name: value for name, value in line.items() if not any(v in name for v in VOLATILE)}
        for line in trainer.state.log_history
        if "train_loss" not in line
    ]


def resume_and_compare(tmp_path, build, train, stop, last, **settings):
    """Train to `last`, keeping step `stop`; then continue a fresh model from there."""
    settings = {"save_strategy": "steps", "save_steps": stop, "max_steps": last, **settings}
    whole = train(build(), **settings)
    checkpoint = tmp_path / f"checkpoint-{stop}"
    shutil.copytree(Path(whole.args.output_dir) / checkpoint.name, checkpoint)
    torch.rand(7)  # another process has another past
    resumed = train(build(seed=1), resume=str(checkpoint), **settings)
    assert history(resumed) == history(whole)
    expected = whole.model.state_dict()
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    return whole


# Six batches per epoch: in the first epoch, in the second, and between the two.
@pytest.mark.parametrize("stop", [2, 6, 8])
@pytest.mark.parametrize("peft_config", [None, LORA])
def test_resume_equals_the_uninterrupted_run(stop, peft_config, tmp_path, build_model, train):
    def build(seed=0):
        # PEFT's base weights are not in its checkpoint, so they are the same in both runs.
        return build_model("llada", seed=0 if peft_config else seed, attention_dropout=0.1)

    resume_and_compare(tmp_path, build, train, stop, stop + 3, peft_config=peft_config)


@pytest.mark.parametrize("family", ["llada_moe", "llada2"])
def test_resume_with_a_memory_and_an_adapter_on_experts(family, tmp_path, build_model, train, rows):
    def build(seed=0):
        return build_model(family, attention_dropout=0.1)

    lora = LoraConfig(r=3, lora_dropout=0.2, target_modules="all-linear")
    whole = resume_and_compare(
        tmp_path,
        build,
        train,
        2,
        6,
        peft_config=lora,
        memory=MemoryConfig(**SMALL),
        gradient_checkpointing=True,
        eval_dataset=rows,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
    )
    best = with_adapter(build_model(family), whole.state.best_model_checkpoint).state_dict()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, best[name]), name
    last = with_adapter(build_model(family), Path(whole.args.output_dir) / "checkpoint-6")
    assert any(not torch.equal(value, best[name]) for name, value in last.state_dict().items()) == (
        not whole.state.best_model_checkpoint.endswith("-6")
    )


@pytest.mark.parametrize("strategy", ["random", "sequential"])
def test_resume_with_another_row_order(strategy, tmp_path, build_model, train):
    def build(seed=0):
        return build_model("llada_moe", seed=seed, attention_dropout=0.1)

    settings = {"train_sampling_strategy": strategy, "gradient_accumulation_steps": 2}
    resume_and_compare(tmp_path, build, train, 4, 6, **settings)


def test_resume_with_evaluation_and_the_best_model(tmp_path, build_model, train, rows):
    def build(seed=0):
        return build_model("llada", seed=seed)

    whole = resume_and_compare(
        tmp_path,
        build,
        train,
        2,
        6,
        eval_dataset=rows[:4],
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        learning_rate=0.3,  # so that the last model is not the best one
    )
    best = load_model(whole.state.best_model_checkpoint)
    for name, value in best.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name
    assert whole.state.best_global_step < 6


def test_every_epoch_has_its_own_order_and_every_row_once(build_model, train, rows):
    trainer = train(build_model("llada"), memory=MemoryConfig(enabled=False), max_steps=12)
    epochs = []
    for epoch in (0, 1):
        batches = trainer.batches[6 * epoch : 6 * epoch + 6]
        epochs.append(
            [
                tuple(row[~padding].tolist())
                for batch in batches
                for row, padding in zip(batch.clean, batch.padding, strict=True)
            ]
        )
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(tuple(r["input_ids"]) for r in rows)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_full_checkpoint_has_the_official_keys_and_no_memory(
    family, kind, tmp_path, build_model, train
):
    memory = MemoryConfig(kind=kind, **SMALL)
    trainer = train(build_model(family), memory=memory, save_strategy="steps", save_steps=4)
    checkpoint = Path(trainer.args.output_dir) / "checkpoint-4"
    build_model(family).save_pretrained(tmp_path / "plain")
    saved = load_file(checkpoint / "model.safetensors")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    assert saved.keys() == plain.keys()
    assert {n: v.shape for n, v in saved.items()} == {n: v.shape for n, v in plain.items()}
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert len(optimizer["state"]) == len(list(trainer.model.parameters()))
    loaded = load_model(checkpoint)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


def test_an_adapter_checkpoint_has_the_published_keys_and_no_memory(
    family, traits, build_model, build_lora, train, tmp_path
):
    settings = {"save_strategy": "steps", "save_steps": 4}
    trainer = train(build_model(family), peft_config=build_lora(), **settings)
    checkpoint = Path(trainer.args.output_dir) / "checkpoint-4"
    assert not (checkpoint / "model.safetensors").exists()
    saved = load_file(checkpoint / "adapter_model.safetensors")
    build_model(family).save_pretrained(tmp_path)
    others = ("model.transformer.wte.", "model.transformer.ff_out.", "lm_head.")
    others += ("model.embed_tokens.", "model.word_embeddings.")
    linear = {
        name.removesuffix(".weight")
        for name, tensor in load_file(tmp_path / "model.safetensors").items()
        if tensor.dim() == 2 and not name.startswith(others)
    }
    if not traits.router:  # LLaDA2's is no linear layer in the official code
        linear = {name for name in linear if not name.endswith(".mlp.gate")}
    factors = ("lora_A.weight", "lora_B.weight")
    assert saved.keys() == {f"base_model.model.{name}.{end}" for name in linear for end in factors}
    again = with_adapter(build_model(family), checkpoint).eval()
    ids = torch.arange(8)[None]
    assert torch.equal(again(ids).logits, trainer.model.eval()(ids).logits)


@pytest.mark.parametrize("how", ["path", "true"])
def test_weights_alone_cannot_be_resumed(how, build_model, train):
    settings = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True}
    first = train(build_model("llada"), **settings)
    folder = Path(first.args.output_dir) / "checkpoint-4"
    with pytest.raises(CheckpointError, match=r"checkpoint-4.*save_only_model"):
        train(build_model("llada"), resume=True if how == "true" else str(folder), **settings)


def test_there_must_be_a_checkpoint_to_resume(tmp_path, build_model, train):
    with pytest.raises(CheckpointError, match="no checkpoint to resume"):
        train(build_model("llada"), resume=True)
    with pytest.raises(CheckpointError, match="nowhere"):
        train(build_model("llada"), resume=str(tmp_path / "nowhere"))


def test_a_damaged_checkpoint_is_one_line(tmp_path, build_model, train):
    first = train(build_model("llada"), save_strategy="steps", save_steps=4)
    folder = Path(first.args.output_dir) / "checkpoint-4"
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError) as caught:
        train(build_model("llada"), resume=str(folder), max_steps=5)
    assert "\n" not in str(caught.value)


def test_resume_true_takes_the_last_checkpoint(build_model, train):
    settings = {"save_strategy": "steps", "save_steps": 2}
    train(build_model("llada"), max_steps=4, **settings)
    resumed = train(build_model("llada", seed=1), max_steps=6, resume=True, **settings)
    assert resumed.state.global_step == 6
    assert len(resumed.batches) <= 4  # batches 5 and 6, and what the loader fetched ahead
    state = json.loads(
        (Path(resumed.args.output_dir) / "checkpoint-6" / "trainer_state.json").read_text()
    )
    assert [line["step"] for line in state["log_history"]] == [1, 2, 3, 4, 5, 6]


def folders(trainer):
    """Return the names in a run's folder."""
    return sorted(path.name for path in Path(trainer.args.output_dir).iterdir())


def test_the_newest_whole_checkpoint_is_taken_and_others_are_named(build_model, train, caplog):
    caplog.set_level("WARNING", logger="memdlm")  # commands silence it
    settings = {"save_strategy": "steps", "save_steps": 1}
    first = train(build_model("llada"), **settings)
    folder = Path(first.args.output_dir)
    (folder / "checkpoint-4" / MARKER).unlink()
    (folder / "checkpoint-3" / "rng_state.pth").write_bytes(b"")
    resumed = train(build_model("llada", seed=1), max_steps=4, resume=True, **settings)
    assert [line for line in caplog.messages if line.startswith("skipped")] == [
        f"skipped {folder / 'checkpoint-4'} because it has no complete.json, so it was not written "
        "to its end",
        f"skipped {folder / 'checkpoint-3'} because its rng_state.pth has 0 of "
        f"{(folder / 'checkpoint-2' / 'rng_state.pth').stat().st_size:,} bytes",
    ]
    expected = first.model.state_dict()
    assert all(torch.equal(v, expected[n]) for n, v in resumed.model.state_dict().items())
    assert defect(folder / "checkpoint-4") is None  # written anew in place of the broken one
    with pytest.raises(CheckpointError, match="cannot be resumed because it has no complete"):
        (folder / "checkpoint-4" / MARKER).unlink()
        train(build_model("llada"), resume=str(folder / "checkpoint-4"))


def test_the_limit_never_takes_the_only_whole_checkpoint(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for step in (1, 2, 3):
        with folder.writing(step) as place:
            (place / f"checkpoint-{step}").mkdir()
            (place / f"checkpoint-{step}" / "weights").write_text("x")
    for step in (2, 3):
        (tmp_path / f"checkpoint-{step}" / MARKER).unlink()
    folder.rotate(1)
    assert folder.newest() == tmp_path / "checkpoint-1"
    with folder.writing(10) as place:
        (place / "checkpoint-10").mkdir()
    folder.rotate(None)
    folder.rotate(2)
    assert (tmp_path / "checkpoint-1").is_dir()
    folder.rotate(1, keep=[tmp_path / "checkpoint-1"])
    assert (tmp_path / "checkpoint-1").is_dir() and (tmp_path / "checkpoint-10").is_dir()
    folder.rotate(1)
    assert [path.name for path in folder.all()] == ["checkpoint-2", "checkpoint-3", "checkpoint-10"]


def test_a_run_that_goes_back_keeps_what_it_writes(build_model, train):
    settings = {"save_strategy": "steps", "save_steps": 1}
    first = train(build_model("llada"), **settings)
    back = str(Path(first.args.output_dir) / "checkpoint-1")
    again = train(build_model("llada"), resume=back, max_steps=2, save_total_limit=1, **settings)
    assert {"checkpoint-2", "checkpoint-4"} <= set(folders(again))


def write_sealed(folder, step, text):
    """Leave a checkpoint that is sealed but has not got its name."""
    place = folder.path / "_partial" / f"checkpoint-{step}"
    place.mkdir(parents=True)
    (place / "weights").write_text(text)
    seal(place)


def test_what_was_sealed_when_the_process_died_gets_its_name(tmp_path):
    folder = CheckpointFolder(tmp_path)
    write_sealed(folder, 3, "new")
    (tmp_path / "_partial" / "checkpoint-4").mkdir()  # that one was not
    (tmp_path / "checkpoint-3").mkdir()  # half removed to make room for the new one
    folder.tidy()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    assert (folder.newest() / "weights").read_text() == "new"
    write_sealed(folder, 3, "newer")
    folder.tidy()
    assert (folder.newest() / "weights").read_text() == "new"  # a whole one is never replaced


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for text in ("old", "new"):
        with folder.writing(1) as place:
            (place / "checkpoint-1").mkdir()
            (place / "checkpoint-1" / "weights").write_text(text)
    assert (folder.newest() / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_save_that_fails_leaves_the_one_before_alone(build_model, train, monkeypatch):
    save, times = torch.save, []

    def fill(value, path, *args, **kwargs):
        times.append(path)
        # The device that is always full gives torch a real error of a full disk.
        save(value, "/dev/full" if len(times) > 4 else path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", fill)
    settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    with pytest.raises(CheckpointError, match="disk is full, so step 2 could not be saved") as e:
        train(build_model("llada"), **settings)
    monkeypatch.undo()
    assert "\n" not in str(e.value)
    resumed = train(build_model("llada", seed=1), resume=True, **settings)
    assert folders(resumed) == ["checkpoint-4"]
    assert resumed.state.log_history[0]["step"] == 1  # from the checkpoint of step 1


class SpoilGradient(TrainerCallback):
    """Makes one gradient nan before the second step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            next(model.parameters()).grad[0] = torch.nan


def test_weights_that_a_nan_gradient_spoilt_are_not_saved(build_model, train):
    settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    with pytest.raises(NonFiniteError, match="by step 2, which is not saved"):
        train(build_model("llada"), callbacks=[SpoilGradient()], **settings)
    resumed = train(build_model("llada", seed=1), resume=True, **settings)
    assert resumed.state.global_step == 4
    assert all(value.isfinite().all() for value in resumed.model.state_dict().values())


def test_settings_given_at_resume_hold(build_model, train):
    train(build_model("llada"), save_strategy="steps", save_steps=2)
    resumed = train(
        build_model("llada", seed=1),
        resume=True,
        learning_rate=1e-3,
        weight_decay=0.25,
        lr_scheduler_type="constant",
        save_strategy="steps",
        save_steps=1,
        max_steps=6,
    )
    assert [line["learning_rate"] for line in resumed.state.log_history[4:6]] == [1e-3, 1e-3]
    assert resumed.optimizer.param_groups[0]["weight_decay"] == 0.25
    assert "checkpoint-5" in folders(resumed)


def test_a_checkpoint_of_another_model_is_one_line(build_model, train):
    first = train(build_model("llada"), save_strategy="steps", save_steps=4)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        train(build_model("llada", vocab_size=70), resume=True, output_dir=first.args.output_dir)


def test_the_hub_gets_a_checkpoint_from_where_it_stays(build_model, train, monkeypatch):
    pushed = []

    def push(self, folder):
        pushed.append((Path(folder).name, defect(Path(folder)), Path(folder).parent.name))

    monkeypatch.setattr(Trainer, "_push_from_checkpoint", push)
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self: None)
    train(build_model("llada"), save_strategy="steps", save_steps=2, push_to_hub=True)
    assert pushed == [("checkpoint-2", None, "run"), ("checkpoint-4", None, "run")]
