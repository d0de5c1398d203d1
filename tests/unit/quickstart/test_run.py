"""The quickstart end to end at toy scale: what it writes, and that its comparison is fair."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from memdlm.backbones.loading import load_model
from memdlm.backbones.tokenizers import load_tokenizer
from memdlm.data.tasks import vocabulary
from memdlm.errors import ConfigError
from memdlm.memory.config import MemoryConfig
from memdlm.quickstart import run
from memdlm.quickstart.config import SETTINGS, QuickstartConfig
from memdlm.quickstart.report import table_rows, write_report
from memdlm.quickstart.start import load_start

SMALL = QuickstartConfig(
    tasks=("single_needle", "variable_tracking"),
    length_factors=(1, 2),
    num_train_examples=64,
    num_steps=4,
    batch_size=8,
    num_eval_examples=6,
    num_bias_examples=4,
)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Run the small quickstart once."""
    output = tmp_path_factory.mktemp("quickstart")
    results = run.run_quickstart(SMALL, output, announce=lambda line: None)
    write_report(results, output)
    return results, output


def test_results_hold_settings_versions_seed_and_figures(
    outcome: tuple[dict[str, Any], Path],
) -> None:
    results, output = outcome
    assert json.loads((output / "results.json").read_text()) == json.loads(json.dumps(results))
    assert results["config"]["seed"] == 0
    assert results["config"]["memory"] == asdict(QuickstartConfig().memory)
    assert {"python", "torch", "transformers", "memdlm"} <= results["versions"].keys()
    assert tuple(results["settings"]) == SETTINGS
    for figures in results["settings"].values():
        assert figures["accuracy"].keys() == {"1", "2"}
        assert 0 <= figures["accuracy"]["1"]["all"] <= 1
        bias = figures["exposure_bias"]
        assert bias["mask_ratio"][0] == 1.0
        assert bias["static_nll"][0] == pytest.approx(bias["sequential_nll"][0])


def test_both_models_are_saved_and_differ(outcome: tuple[dict[str, Any], Path]) -> None:
    _, output = outcome
    models = {name: load_model(str(output / name)) for name in ("mdlm", "memdlm")}
    assert load_tokenizer(str(output / "mdlm")).mask_token_id is not None
    weights = [model.state_dict()["lm_head.weight"] for model in models.values()]
    assert not torch.equal(*weights)
    assert models["mdlm"].state_dict().keys() == models["memdlm"].state_dict().keys()


def test_both_methods_see_the_same_tokens_and_start(outcome: tuple[dict[str, Any], Path]) -> None:
    results, _ = outcome
    mdlm, memdlm = results["curves"]["mdlm"], results["curves"]["memdlm"]
    assert [entry["step"] for entry in mdlm] == [entry["step"] for entry in memdlm]
    assert "inner_loss_1" in memdlm[0]
    assert "inner_loss_1" not in mdlm[0]


def test_the_page_is_self_contained_and_shows_every_figure(
    outcome: tuple[dict[str, Any], Path],
) -> None:
    results, output = outcome
    page = (output / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert page.count("data:image/png;base64,") == 3
    _, rows = table_rows(results)
    for row in rows:
        for cell in row:
            assert cell.replace("&", "&amp;") in page
    for name in ("accuracy", "exposure_bias", "training"):
        assert (output / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_seed_gives_the_same_figures(
    outcome: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    results, _ = outcome
    again = run.run_quickstart(SMALL, tmp_path, announce=lambda line: None)
    assert again["settings"] == results["settings"]


def test_starting_checkpoint_knows_the_tasks() -> None:
    model, tokenizer = load_start()
    # Any change of the tasks' words changes the ids: make the checkpoint anew.
    assert set(vocabulary()) <= tokenizer.get_vocab().keys()
    assert model.config.vocab_size == len(tokenizer)
    assert model.lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": 0}, "quickstart.num_steps"),
        ({"length_factors": ()}, "quickstart.length_factors"),
        ({"length_factors": (0,)}, "quickstart.length_factors"),
    ],
)
def test_settings_out_of_range_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuickstartConfig(**change)


@pytest.mark.slow
def test_standard_mdlm_retrieves_at_the_training_length(tmp_path: Path) -> None:
    config = QuickstartConfig(length_factors=(1,))
    _, tokenizer = load_start()
    rows = run.training_rows(config, tokenizer)
    model, _ = run.train(
        load_start()[0], tokenizer, rows, MemoryConfig(enabled=False), config, tmp_path, ()
    )
    accuracy = run.evaluate_accuracy(model, tokenizer, config, config.train_length, None)
    assert accuracy["all"] >= 0.7
    assert run.guessing_accuracy(config, config.train_length)["all"] < 0.3
