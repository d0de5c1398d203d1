"""What the README shows works, and names nothing that is not there."""

import re
from pathlib import Path

import pytest

from memdlm.quickstart.start import CHECKPOINT

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    lines = [line for line in block.splitlines() if line]
    assert len(lines) == 6
    code = block.replace("runs/quickstart/memdlm", str(CHECKPOINT))
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"`?make (\w+)", README))
    assert {"quickstart", "test"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CONTRIBUTING.md",
        *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")),
    ],
)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target


def test_file_tree_names_what_is_there() -> None:
    tree = README.split("## What is where")[1].split("```")[1]
    names = re.findall(r"^ {0,2}([\w./]+)", tree, re.MULTILINE)
    assert len(names) > 10
    for name in names:
        assert (ROOT / name).exists() or (ROOT / "src" / "memdlm" / name).exists(), name
