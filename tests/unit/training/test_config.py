import pytest

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


def test_the_defaults_are_the_papers(tmp_path):
    args = MemDLMConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    assert (args.learning_rate, args.num_train_epochs, args.warmup_steps) == (2e-5, 5.0, 0.1)
    assert args.lr_scheduler_type == "cosine" and args.per_device_train_batch_size == 2
    assert args.train_sampling_strategy == "group_by_length"
