"""What docs/inference.md tells users to type exists: settings, commands, options."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from memdlm.cli import main
from memdlm.cli.chat_commands import HELP
from memdlm.memory.config import MemoryConfig
from memdlm.sampling.config import SamplingConfig

PAGE = (Path(__file__).parents[2] / "docs" / "inference.md").read_text(encoding="utf-8")
NAMES = {entry.name for config in (SamplingConfig, MemoryConfig) for entry in fields(config)}


def test_every_setting_on_the_page_can_be_set() -> None:
    table = PAGE.split("## Choosing a way of decoding")[1].split("### Measured")[0]
    given = dict(re.findall(r"`(\w+)=([\w.]+)`", table))
    given.pop("block_length", None)
    assert len(given) >= 8
    for name, value in given.items():
        changes = {name: _value(value)}
        if name == "confidence_source":
            changes["policy"] = "entropy"
        if name == "editing_threshold":
            changes["decoder"] = "block"
        SamplingConfig(**changes)
    assert set(re.findall(r"`(?:memory|sampling)\.(\w+)`", PAGE)) <= NAMES


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


@pytest.mark.parametrize("command", ["generate", "chat", "memory write", "memory export", "merge"])
def test_every_option_of_a_command_on_the_page_is_one_of_its_own(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shown = [line for line in re.findall(rf"memdlm {command}\b([^`#\n]*)", PAGE)]
    options = {option for line in shown for option in re.findall(r"(?<!\w)--?[a-z][\w-]*", line)}
    assert shown
    assert main([*command.split(), "--help"]) == 0
    helped = capsys.readouterr().out
    for option in options:
        assert option in helped, option


def test_every_command_of_a_chat_on_the_page_is_one() -> None:
    named = set(re.findall(r"`(/\w+)", PAGE))
    assert len(named) >= 7
    for name in named - {"/help"}:
        assert name in HELP
