"""`memdlm report` on folders of results: one page and its Markdown, mixed with runs, bad input."""

import re
from pathlib import Path

import pytest

from tests.evaluation_folders import (
    arm,
    cell_path,
    change,
    write_evaluation,
    write_exposure_bias,
    write_probe,
)

from .conftest import spawn

TASKS = ["ruler_vt@4k", "ruler_vt@8k", "babilong_qa1@4k", "babilong_qa2@4k"]
GROUPS = {"babilong@4k": TASKS[2:]}


def scores(name: str, task: str, seed: int) -> list[float] | None:
    if (name, task) == ("train_inference", "ruler_vt@8k"):
        return None
    return [1, 0, 1, 1, int(name != "standard")]


@pytest.fixture
def table1(tmp_path) -> Path:
    return write_evaluation(
        tmp_path / "table1",
        scores,
        TASKS,
        preset="paper/table1",
        title="Table 1: <needle>",
        groups=GROUPS,
        num_samples=dict.fromkeys(TASKS, 5),
    )


@pytest.fixture
def ablation(tmp_path) -> Path:
    arms = [arm(name) for name in ("standard_mdlm", "2", "2__train_only", "3", "4")]
    folder = write_evaluation(
        tmp_path / "steps",
        lambda name, task, seed: [1, 0, 1],
        ["babilong@1k"],
        arms,
        preset="ablations/steps",
        title="Ablation: inner steps",
    )
    write_exposure_bias(folder)
    write_probe(folder)
    return folder


def test_evaluations_and_runs_are_one_page_with_its_markdown(
    memdlm, trained, table1, ablation, tmp_path
) -> None:
    result = memdlm("report", table1, trained, ablation, "-o", tmp_path / "out")
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[-1] == f"open {tmp_path}/out/report.html"
    # The main tables are printed, too.
    assert "partly" not in result.out
    assert "not run" in result.out
    assert "paper 99.4" in result.out
    assert "80.0 ± 20.0" in result.out
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == [
        "evaluation.png",
        "report.html",
        "report.md",
        "steps_exposure_bias_nll.png",
        "steps_exposure_bias_ratio.png",
        "steps_probe_recall.png",
        "steps_scores.png",
        "table1_scores_by_length.png",
        "training.png",
    ]
    page = (tmp_path / "out" / "report.html").read_text()
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)
    assert page.count("data:image/png;base64,") == 7
    titles = re.findall(r"<h[12]>([^<]*)</h[12]>", page)
    assert titles == [
        "Report: 2 evaluations, 1 training run",
        "Table 1: &lt;needle&gt;",
        "Ablation: inner steps",
        "Training",
    ]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| Standard MDLM | 60.0 ± 24.5<br>n 5<br>paper 99.4<br>diff -39.4 |" in text
    assert "| run | yes | 4 |" in text
    for name in re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text):
        assert (tmp_path / "out" / name).is_file()
    assert len(re.findall(r"!\[", text)) == 7


def test_every_number_of_the_page_is_in_the_markdown(memdlm, table1, tmp_path) -> None:
    assert memdlm("report", table1, "-o", tmp_path / "mine.html").code == 0
    page, text = ((tmp_path / f"mine.{kind}").read_text() for kind in ("html", "md"))
    cells = re.findall(r"<td>(.*?)</td>", page)
    assert len(cells) > 100
    plain = text.replace("\\", "")
    for cell in cells:
        for line in re.split(r"</?small>", cell):
            assert line.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&").replace(
                "&#x27;", "'"
            ) in plain  # fmt: skip


def test_no_model_and_no_torch_is_loaded(table1, tmp_path) -> None:
    code = (
        "import sys; from memdlm.cli import main; code = main()\n"
        "heavy = {'torch', 'transformers', 'datasets', 'peft', 'lm_eval'} & set(sys.modules)\n"
        "assert not heavy, heavy\nsys.exit(code)"
    )
    result = spawn("report", table1, "-o", tmp_path / "out", code=code)
    assert (result.code, result.err) == (0, "")


def test_the_same_folder_gives_the_same_page(memdlm, table1, tmp_path) -> None:
    pages = []
    for name in ("a", "b"):
        assert memdlm("report", table1, "-o", tmp_path / name).code == 0
        pages.append((tmp_path / name / "report.md").read_bytes())
    assert pages[0] == pages[1]


def test_folders_of_one_name_keep_their_figures_apart(memdlm, table1, tmp_path) -> None:
    again = write_evaluation(tmp_path / "b" / "table1", scores, TASKS[:2])
    assert memdlm("report", table1, again, "-o", tmp_path / "out").code == 0
    figures = [path.name for path in (tmp_path / "out").glob("*.png")]
    assert len(figures) == 2
    assert "b-table1_scores_by_length.png" in figures


@pytest.mark.parametrize("taken", ["report.html", "report.md", "table1_scores_by_length.png"])
def test_what_is_there_is_replaced_only_when_told(memdlm, table1, tmp_path, taken) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / taken).write_text("mine")
    line = memdlm("report", table1, "-o", tmp_path / "out").error_line(2)
    assert f"{taken} exists: replace it with --overwrite" in line
    assert [path.name for path in (tmp_path / "out").iterdir()] == [taken]
    assert memdlm("report", table1, "-o", tmp_path / "out", "--overwrite").code == 0


@pytest.mark.parametrize(
    ("spoil", "code", "message"),
    [
        (
            lambda folder: cell_path(folder, "standard", "ruler_vt@4k").write_text("{"),
            1,
            "seed0.json is damaged or cut off, no whole JSON: delete it and evaluate again",
        ),
        (
            lambda folder: (folder / "evaluation.json").write_text("{"),
            1,
            "evaluation.json is damaged or cut off, no whole JSON: evaluate anew",
        ),
        (lambda folder: (folder / "evaluation.json").unlink(), 2, "has no evaluation.json"),
    ],
)
def test_a_damaged_folder_is_one_line_and_leaves_nothing(
    memdlm, table1, tmp_path, spoil, code, message
) -> None:
    spoil(table1)
    assert message in memdlm("report", table1, "-o", tmp_path / "out").error_line(code)
    assert not (tmp_path / "out").exists()


def test_a_stranger_is_left_out_with_a_word_and_on_the_page(memdlm, table1, tmp_path) -> None:
    path = cell_path(table1, "other", "ruler_vt@4k")
    path.parent.mkdir(parents=True)
    path.write_bytes(cell_path(table1, "standard", "ruler_vt@4k").read_bytes())
    change(path, arm="other")
    result = memdlm("report", table1, "-o", tmp_path / "out")
    assert result.code == 0
    assert result.err.count("\n") == 1
    assert "is no part of" in result.err
    page = (tmp_path / "out" / "report.html").read_text()
    assert "left out, for evaluation.json knows nothing of them" in page
