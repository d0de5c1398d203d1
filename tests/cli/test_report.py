"""`memdlm report` on real runs: one page, its figures, and every way in which runs may be bad."""

import re
import shutil
from pathlib import Path

import pytest
import yaml

from .conftest import spawn


@pytest.fixture
def other(trained, tmp_path) -> Path:
    """The finished run again, with another rank in its recipe and its result taken away."""
    run = Path(shutil.copytree(trained, tmp_path / "other <run>"))
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["memory"]["rank"] = 7
    recipe["output_dir"] = "elsewhere"
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    shutil.rmtree(run / "model")
    return run


def rows(page: str) -> dict[str, list[str]]:
    """Return first cell -> other cells of every table row of a page."""
    found = re.findall(r"<tr>((?:<td>[^<]*</td>)+)</tr>", page)
    cells = [re.findall(r"<td>([^<]*)</td>", row) for row in found]
    return {first: rest for first, *rest in cells}


def test_runs_stand_side_by_side_on_one_page(memdlm, trained, other, tmp_path) -> None:
    result = memdlm("report", trained, other, "-o", tmp_path / "out")
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[-1] == f"open {tmp_path}/out/report.html"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "evaluation.png",
        "report.html",
        "training.png",
    ]
    page = (tmp_path / "out" / "report.html").read_text()
    # Nothing is fetched: every source is in the page.
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)
    assert page.count("data:image/png;base64,") == 2
    table = rows(page)
    complete, steps, *losses = table["run"]
    assert (complete, steps) == ("yes", "4")
    assert all(float(value.replace(",", "")) > 0 for value in losses)
    assert table["other &lt;run&gt;"][0] == "no"
    assert table["memory.rank"] == ["2", "7"]
    assert "output_dir" not in table


def test_one_run_is_enough_and_no_model_is_loaded(trained, tmp_path) -> None:
    code = (
        "import sys; from memdlm.cli import main; code = main()\n"
        "heavy = {'torch', 'transformers', 'datasets', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy\nsys.exit(code)"
    )
    result = spawn("report", trained, "-o", tmp_path / "one.html", code=code)
    assert (result.code, result.err) == (0, "")
    assert (tmp_path / "one_training.png").read_bytes().startswith(b"\x89PNG")
    assert "There is one run only." in (tmp_path / "one.html").read_text()


def test_runs_of_one_name_are_told_apart_by_their_folders(memdlm, trained, tmp_path) -> None:
    (tmp_path / "b").mkdir()
    again = Path(shutil.copytree(trained, tmp_path / "b" / "run"))
    assert memdlm("report", trained, again, "-o", tmp_path / "out").code == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert {"b/run", f"{trained.parent.name}/run"} <= rows(page).keys()
    assert "the runs were started with the same settings" in page


def test_a_page_is_replaced_only_when_told(memdlm, trained, tmp_path) -> None:
    page = tmp_path / "report.html"
    page.write_text("mine")
    line = memdlm("report", trained, "-o", tmp_path).error_line(2)
    assert "report.html exists: replace it with --overwrite" in line
    assert page.read_text() == "mine"
    assert memdlm("report", trained, "-o", tmp_path, "--overwrite").code == 0
    assert page.read_text().startswith("<!doctype html>")


def test_a_cut_off_line_is_left_out_with_a_word(memdlm, trained, other, tmp_path) -> None:
    with (other / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    result = memdlm("report", other, "-o", tmp_path / "out")
    assert result.code == 0
    assert result.err.count("\n") == 1
    assert "was cut off while being written" in result.err


@pytest.mark.parametrize(
    ("spoil", "code", "message"),
    [
        (lambda run: (run / "metrics.jsonl").unlink(), 1, "has no metrics.jsonl"),
        (lambda run: (run / "metrics.jsonl").write_text("{\n{}\n"), 1, "metrics.jsonl:1 is no log"),
        (lambda run: (run / "recipe.yaml").unlink(), 2, "is not a run folder"),
        (lambda run: (run / "recipe.yaml").write_text("a: [\n"), 2, "recipe.yaml"),
        (lambda run: (run / "data.json").write_text("{"), 1, "cannot read"),
        (lambda run: (run / "versions.json").write_text("[]"), 1, "cannot read"),
        (lambda run: shutil.rmtree(run), 2, "is not a run folder"),
    ],
)
def test_a_bad_run_is_one_line_and_leaves_nothing(
    memdlm, trained, other, tmp_path, spoil, code, message
) -> None:
    spoil(other)
    result = memdlm("report", trained, other, "-o", tmp_path / "out")
    assert message in result.error_line(code)
    assert not (tmp_path / "out").exists()


def test_a_run_given_twice_is_refused(memdlm, trained, tmp_path) -> None:
    line = memdlm("report", trained, f"{trained}/", "-o", tmp_path / "out").error_line(2)
    assert "is given twice" in line
