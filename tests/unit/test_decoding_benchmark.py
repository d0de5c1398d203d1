"""The benchmark of decoding: what it runs, what it counts, and when it says MISSED."""

import json
import re

import pytest
import torch

from benchmarks.speed import generate as cli
from benchmarks.speed.decoding import MODES, REFERENCES, DecodeCase, DecodeWorkload

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """The record and the text of a run in miniature."""
    path = tmp_path_factory.mktemp("out") / "new" / "generate.json"
    options = "--prompt 24 --new-tokens 8 --repeats 2 --json-out"
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *values, **_: lines.append(str(values[0])))
        cli.main([*options.split(), str(path)])
    assert lines[-1] + "\n" == path.read_text()
    return json.loads(lines[-1]), "\n".join(lines[:-1])


def test_every_mode_runs_alone_and_in_a_batch_with_and_without_memory(printed) -> None:
    record, _ = printed
    assert record["benchmark"] == "speed/generate" and record["versions"]["torch"]
    seen = set()
    for result in record["results"]:
        case = DecodeCase(**result["case"])
        assert ("write" in result) == case.memory
        for name, mode in result["modes"].items():
            seen.add((case.family, name, case.batch_size, case.memory))
            assert len(mode["seconds_all"]) == 2
            assert mode["tokens_per_second"] > 0
            assert ("speedup" in mode) == (name in REFERENCES)
            if case.batch_size == 1:
                assert mode["batch_gain"] == 1
    both = (False, True)
    assert seen == {(*mode, size, memory) for mode in MODES for size in (1, 8) for memory in both}


def test_forwards_are_counted_and_the_exact_cache_changes_no_token(printed) -> None:
    record, text = printed
    for result in record["results"]:
        modes = result["modes"]
        if result["case"]["family"] == "llada":
            assert modes["one token a step"]["forwards_per_token"] == 1
            assert modes["four tokens a step"]["forwards_per_token"] == 0.25
            assert modes["confidence threshold"]["forwards_per_token"] < 1
        else:
            assert modes["block decoding, exact cache"]["same_tokens"] == 1
    # The prompts are far below those for which time and speed-up must hold.
    assert "\nexact cache" not in text
    assert text.count("in FLOPs): holds") == 4


def test_the_memory_is_what_the_modes_decode_with() -> None:
    without = dict(DecodeWorkload(DecodeCase("llada", 24, False, 2), 8, CPU).modes())
    within = dict(DecodeWorkload(DecodeCase("llada", 24, True, 2), 8, CPU).modes())
    name = "one token a step"
    tokens = [torch.cat(runs[name]().tokens) for runs in (without, within, within)]
    assert not torch.equal(tokens[0], tokens[1])
    assert torch.equal(tokens[1], tokens[2])


def test_runs_take_turns_and_the_first_of_several_is_a_warm_up() -> None:
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = cli.take_turns(runs, 2, 60.0, CPU)
    assert "".join(order) == "ababab"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}
    assert {len(values) for values in cli.take_turns(runs, 5, 0.0, CPU).values()} == {1}


def test_what_does_not_hold_is_said_so() -> None:
    modes = {
        "block decoding, exact cache": {"speedup": 9.0, "same_tokens": 0.99, "batch_gain": 2.4}
    }
    write = {"seconds_in_forwards": 2.4, "flops_in_forwards": 1.6}
    case = {"family": "llada2", "prompt": 2048, "memory": True, "batch_size": 8}
    result = {"case": case, "modes": modes, "write": write}
    assert [line.rpartition(": ")[2] for line in cli.verdicts([result])] == ["MISSED"] * 3
    modes["block decoding, exact cache"] |= {"same_tokens": 1.0, "batch_gain": 2.5}
    write["seconds_in_forwards"] = 2.3
    assert [line.rpartition(": ")[2] for line in cli.verdicts([result])] == ["holds"] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "0"], "--prompt: must be at least 1"),
        (["--new-tokens", "12"], "--new-tokens: 12 is no multiple of the blocks of 8"),
        (["--family", "dream"], "invalid choice"),
    ],
)
def test_bad_options_end_in_one_line(arguments, message, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.parse(arguments)
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)
