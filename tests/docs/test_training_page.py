"""Every figure that a run logs has its row in docs/training.md; every key named there exists."""

import json
import re
from pathlib import Path

import yaml

from memdlm.cli import main
from memdlm.cli.recipe import Recipe
from memdlm.cli.settings import describe
from memdlm.training.config import MemDLMConfig

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")


def explained() -> set[str]:
    """Return the names in the first column of the table of logged metrics."""
    section = PAGE.split("## Logged metrics")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def test_the_table_explains_what_a_run_logs_and_nothing_else(tmp_path: Path) -> None:
    recipe = {
        "tiny": {"sizes": {"width": 16, "num_layers": 2, "num_heads": 2, "mlp_width": 16}},
        "data": {
            "tasks": {"tasks": ["single_needle"], "length": 60, "num_examples": 16},
            "max_length": 80,
            "num_eval_rows": 16,
        },
        "training": {"max_steps": 1, "logging_steps": 1},
        "output_dir": str(tmp_path / "run"),
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert main(["train", str(path), "--quiet"]) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert {name for line in lines for name in json.loads(line)} == explained()


def test_every_key_on_the_page_is_a_recipes() -> None:
    # Not modules, such as memdlm.training.signals.
    sections = "training|memory|data|objective|adapter|quantization"
    named = set(re.findall(rf"(?<![\w.])(?:{sections})\.\w+", PAGE))
    known = {key.key for key in describe(Recipe)}
    known |= {key.key for key in describe(MemDLMConfig, "training", depth=0)}
    assert len(named) > 15
    assert named - {"data.json", "quantization.md"} <= known
