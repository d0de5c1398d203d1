"""Settings of a run: the paper's defaults, nested configs, and what is refused at once."""

import copy
import dataclasses

import pytest
import torch
from transformers import HfArgumentParser

from memdlm import MemDLMConfig, MemoryConfig, ObjectiveConfig
from memdlm.errors import ConfigError


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_is_never_reentrant_under_either_name(name, make_args):
    assert make_args().activation_checkpointing is False
    args = make_args(**{name: True})  # and no warning, which would be an error here
    assert args.activation_checkpointing and args.gradient_checkpointing
    assert args.activation_checkpointing_kwargs == {"use_reentrant": False}
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": False}
    for kwargs in ({"use_reentrant": True}, '{"use_reentrant": true}'):
        with pytest.raises(ConfigError, match="use_reentrant"):
            make_args(**{name: True, f"{name}_kwargs": kwargs})
    kept = make_args(**{name: True, f"{name}_kwargs": {"preserve_rng_state": False}})
    expected = {"preserve_rng_state": False, "use_reentrant": False}
    assert kept.activation_checkpointing_kwargs == expected


def test_plain_dicts_become_configs_and_go_back(make_args):
    args = make_args(memory={"rank": 5}, objective={"padding": "excluded"})
    assert args.memory == MemoryConfig(rank=5)
    assert args.objective == ObjectiveConfig(padding="excluded")
    plain = args.to_dict()
    assert plain["memory"]["rank"] == 5 and plain["objective"]["padding"] == "excluded"
    assert MemDLMConfig(**{**plain, "memory": plain["memory"]}).memory == args.memory
    assert "rank" in args.to_json_string()


def test_a_bad_nested_value_is_named(make_args):
    with pytest.raises(ConfigError, match=r"memory\.rank"):
        make_args(memory={"rank": 0})
    with pytest.raises(ConfigError, match="label_smoothing"):
        make_args(label_smoothing_factor=0.1)
    with pytest.raises(ConfigError, match=r"memory\.rnk; did you mean memory\.rank\?"):
        make_args(memory={"rnk": 3})
    with pytest.raises(ConfigError, match="objective: 3 is neither a ObjectiveConfig nor a dict"):
        make_args(objective=3)


@pytest.mark.parametrize(
    "setting",
    [
        {"learning_rate": -1.0},
        {"learning_rate": float("nan")},
        {"per_device_train_batch_size": 0},
        {"per_device_eval_batch_size": 0},
        {"gradient_accumulation_steps": 0},
    ],
)
def test_a_value_that_torch_would_refuse_later_is_refused_now(setting, make_args):
    [name] = setting
    with pytest.raises(ConfigError, match=f"^{name}: .* is out of range"):
        make_args(**setting)


def test_settings_survive_the_ways_transformers_carries_them(make_args, tmp_path):
    memory = MemoryConfig(scope="modules", modules=("up_proj",))
    args = make_args(memory=memory, objective={"padding": "excluded"})
    file = tmp_path / "args.json"
    file.write_text(args.to_json_string(), encoding="utf-8")
    [parsed] = HfArgumentParser(MemDLMConfig).parse_json_file(str(file), allow_extra_keys=True)
    torch.save(args, tmp_path / "training_args.bin")
    loaded = torch.load(tmp_path / "training_args.bin", weights_only=False)
    for other in (parsed, loaded, copy.deepcopy(args), dataclasses.replace(args, seed=1)):
        assert other.memory == memory and other.objective == args.objective


def test_the_defaults_are_the_papers(tmp_path):
    args = MemDLMConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    assert (args.learning_rate, args.num_train_epochs, args.warmup_steps) == (2e-5, 5.0, 0.1)
    assert args.lr_scheduler_type == "cosine" and args.per_device_train_batch_size == 2
    assert args.train_sampling_strategy == "group_by_length"
