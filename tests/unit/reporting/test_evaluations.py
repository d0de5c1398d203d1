"""The part of a page about an evaluation: its tables, its figures, and whatever names there are."""

import json
import re
from pathlib import Path

import pytest

from memdlm.errors import CheckpointError
from memdlm.reporting.blocks import Part
from memdlm.reporting.evaluation_folder import EvaluationResults, holds_results, read_results
from memdlm.reporting.evaluations import file_prefix, main_table
from memdlm.reporting.results import read_evaluation
from memdlm.reporting.score_figures import (
    BARS,
    LENGTHS,
    RATIOS,
    anchor_ratios,
    score_figures,
)
from memdlm.reporting.scores import columns
from tests.evaluation_folders import (
    arm,
    change,
    write_evaluation,
    write_exposure_bias,
    write_probe,
)


def part(folder: Path) -> Part:
    return read(folder).part()


def read(folder: Path) -> EvaluationResults:
    return read_results(folder, "a run", lambda line: None)


def figures_of(folder: Path) -> dict[str, bytes]:
    evaluation = read_evaluation(folder, "run", print)
    return score_figures(evaluation, columns(evaluation))


def half(name: str, task: str, seed: int) -> list[float]:
    return [1, 0, 1, 0]


def test_tables_tests_and_provenance_are_in_html_and_in_markdown(tmp_path: Path) -> None:
    write_evaluation(tmp_path, half, ["ruler_vt@4k"], preset="paper/table1", title="Table <1>")
    found = part(tmp_path)
    section = found.section()
    assert section.title == "Table <1>"
    assert list(section.figures) == ["a-run_scores"]
    page, text = section.body, found.markdown({"a-run_scores": "a-run_scores.png"})
    assert "50.0 ± 28.9<small>n 4</small><small>paper 99.4</small><small>diff -49.4</small>" in page
    assert "| Standard MDLM | 50.0 ± 28.9<br>n 4<br>paper 99.4<br>diff -49.4 |" in text
    for words in (
        "not corrected for the number of comparisons",
        "The paper measured on LLaDA-MoE-7B-A1B-Base",
        "arXiv 2603.22241",
        "Paired tests",
        "Settings in which the arms differ",
        "Where the numbers come from: 3 result files",
    ):
        assert words in page
        assert words in text.replace("\\", "")
    assert "<b>" not in page  # of the command
    assert "Before you compare" not in page


def test_a_warning_stands_before_the_first_number(tmp_path: Path) -> None:
    write_evaluation(tmp_path, half, ["ruler_vt@4k"])
    change(tmp_path / "results/standard/ruler_vt@4k/seed0.json", settings__dtype="float32")
    page = part(tmp_path).section().body
    assert 0 < page.index('<div class="warning">') < page.index("50.0 ±")
    assert page.index("dtype differs between arms") < page.index("50.0 ±")


def test_one_arm_and_one_sample_are_enough(tmp_path: Path) -> None:
    write_evaluation(tmp_path, lambda arm, task, seed: [1], ["ruler_vt@4k"], arms=[arm("standard")])
    page = part(tmp_path).section().body
    assert "100.0<small>n 1</small>" in page  # no standard error
    assert "Paired tests" not in page


def test_an_evaluation_of_which_nothing_was_run_is_a_table_of_that(tmp_path: Path) -> None:
    write_evaluation(tmp_path, lambda arm, task, seed: None, ["ruler_vt@4k", "ruler_vt@8k"])
    section = part(tmp_path).section()
    assert section.body.count("<td>not run</td>") == 3 * 2
    assert section.figures == {}


def test_the_longer_side_of_the_printed_table_goes_down(tmp_path: Path) -> None:
    tasks = [f"ruler_vt@{length}" for length in ("1k", "2k", "4k", "8k")]
    write_evaluation(tmp_path, half, tasks)
    header, rows = main_table(read_evaluation(tmp_path, "run", print))
    assert header[:2] == ["task", "Standard MDLM"]
    assert [row[0] for row in rows] == tasks


def test_many_columns_are_cut_into_tables_that_fit(tmp_path: Path) -> None:
    tasks = [f"longbench_{letter}" for letter in "abcdefghijkl"]
    write_evaluation(tmp_path, half, tasks)
    page = part(tmp_path).section().body
    tables = [
        t for t in re.findall(r"<table class=\"scores\">.*?</table>", page) if "longbench" in t
    ]
    assert [table.count("<th>") for table in tables] == [7, 7]


def test_a_groups_tasks_and_other_metrics_are_a_click_away(tmp_path: Path) -> None:
    groups = {"babilong@1k": ["babilong_qa1@1k", "babilong_qa2@1k"]}
    write_evaluation(tmp_path, lambda arm, task, seed: [1], groups["babilong@1k"], groups=groups)
    figure = {"value": 0.25, "stderr": None, "num_samples": 1}
    for path in tmp_path.glob("results/*/*/seed0.json"):
        change(
            path,
            metrics={"official": figure, "score": {**figure, "value": 1}},
            samples=[{"id": 0, "prompt_sha256": "x", "metrics": {"score": 1, "official": 0.25}}],
        )
    page = part(tmp_path).section().body
    assert "<summary>The tasks of babilong@1k</summary>" in page
    official = page[page.index("<summary>Scores in the metric official</summary>") :]
    assert "<td>25.0<small>n 2</small></td>" in official
    assert "<td>100.0<small>n 2</small></td>" in page


def test_scores_over_lengths_ratios_and_variants_have_their_figures(tmp_path: Path) -> None:
    lengths = ["ruler_vt@4k", "ruler_vt@8k", "ruler_cwe@4k"]
    assert list(figures_of(write_evaluation(tmp_path / "a", half, lengths))) == [LENGTHS]
    ratios = [arm(str(ratio), prompt_mask_ratio=ratio) for ratio in (0.2, 0.5)]
    arms = [arm("standard"), *ratios]
    folder = write_evaluation(tmp_path / "b", half, ["babilong@16k"], arms, preset="paper/figure8")
    assert list(figures_of(folder)) == [RATIOS]
    evaluation = read_evaluation(folder, "run", print)
    assert anchor_ratios(evaluation) == {"0.2": 0.2, "0.5": 0.5}
    variants = [arm(name) for name in ("standard_mdlm", "2", "2__train_only", "3", "4")]

    def scores(name: str, task: str, seed: int) -> list[float] | None:
        return None if name == "4" else [1, 0]

    folder = write_evaluation(
        tmp_path / "c", scores, ["babilong@1k"], variants, preset="ablations/steps"
    )
    assert list(figures_of(folder)) == [BARS]
    # Whatever was not run, and a folder of two tables, draw as well.
    for name in "abc":
        for png in figures_of(tmp_path / name).values():
            assert png.startswith(b"\x89PNG")


def test_names_that_mean_something_to_matplotlib_or_html_are_drawn(tmp_path: Path) -> None:
    arms = [arm("standard", r"_$\no_formula{$ <b>"), arm("train_only", "$x$")]
    for number, tasks in enumerate((["t$a$"], ["t$@4k", "t$@8k"])):
        folder = write_evaluation(tmp_path / str(number), half, tasks, arms)
        section = part(folder).section()
        assert len(section.figures) == 1
        assert "<b>" not in section.body
        assert "$\\no_formula{$ &lt;b&gt;" in section.body


def test_labels_of_measurements_are_no_formulas(tmp_path: Path) -> None:
    for path in (write_exposure_bias(tmp_path), write_probe(tmp_path)):
        arms = json.loads(path.read_text())["arms"]
        arms[0]["label"] = r"$\no_formula{$"
        change(path, arms=arms)
    assert len(part(tmp_path).section().figures) == 3


def test_names_of_figures_fit_a_file() -> None:
    assert file_prefix("../a b/<c>") == "a-b-c_"
    assert file_prefix("run-1.2") == "run-1.2_"


def test_exposure_bias_and_probe_are_shown_with_their_origin(tmp_path: Path) -> None:
    bias, probe = write_exposure_bias(tmp_path), write_probe(tmp_path)
    found = read(tmp_path)
    assert (found.title, found.evaluation) == ("a run", None)
    section = found.part().section()
    assert sorted(section.figures) == [
        "a-run_exposure_bias_nll",
        "a-run_exposure_bias_ratio",
        "a-run_probe_recall",
    ]
    body = section.body
    assert "<td>4.000</td><td>3.500 to 4.500</td>" in body
    assert "<td>-1.000</td><td>-1.500 to -0.500</td>" in body
    assert "25.0 %" in body
    assert body.count("memdlm measure &#x27;runs/&lt;b&gt;&#x27;") == 2
    assert body.count("<td>versions.torch</td><td>2.13.0</td>") == 2
    assert "<td>memory.enabled</td><td>false</td><td>true</td>" in body
    assert [title for title, _, _ in found.main_tables()] == [
        "Exposure bias over the denoising steps",
        "In-weight retrieval",
    ]
    for path in (bias, probe):
        text = path.read_text()
        path.write_text(text[: len(text) // 2])
        with pytest.raises(CheckpointError, match=f"{path.name} is damaged or cut off"):
            read(tmp_path)
        path.write_text(text)
        change(path, arms=[{"label": "x"}])
        with pytest.raises(CheckpointError, match=rf"{path.name}: it lacks .*: delete it and meas"):
            read(tmp_path)
        path.unlink()
    assert not holds_results(tmp_path)


def test_an_evaluation_of_exposure_bias_shows_no_empty_scores(tmp_path: Path) -> None:
    write_evaluation(
        tmp_path,
        lambda arm, task, seed: None,
        ["ruler_vt@4k"],
        preset="paper/figure3",
        title="Figure 3",
    )
    assert "not run" in part(tmp_path).section().body
    write_exposure_bias(tmp_path)
    body = part(tmp_path).section().body
    assert "not run" not in body
    assert "Standard MDLM climbs past 15 at the end" in body
    assert [title for title, _, _ in read(tmp_path).main_tables()] == [
        "Exposure bias over the denoising steps"
    ]
