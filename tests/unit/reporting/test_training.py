"""Runs side by side: the settings that differ, the cells of the table, names of any kind."""

from typing import Any

from memdlm.reporting.runs import Run
from memdlm.reporting.training import differing_settings, result_rows, training_part


def run(name: str, settings: dict[str, Any], **logged: float) -> Run:
    return Run(name, settings, [{"step": 3, "loss": 1.0, **logged}], is_complete=False)


def test_only_settings_that_differ_are_shown_as_a_recipe_has_them() -> None:
    runs = [
        run("a", {"seed": 1, "memory": {"enabled": True, "rank": 4}, "model": None}),
        run("b", {"seed": 1, "memory": {"enabled": False, "rank": 4}, "model": "x"}),
        run("c", {"seed": 1, "memory": {"enabled": True, "rank": 4}, "model": None, "new": 0}),
    ]
    assert differing_settings(runs) == {
        "memory.enabled": ["true", "false", "true"],
        "model": ["null", "x", "null"],
        "new": ["–", "–", "0"],  # noqa: RUF001
    }


def test_the_table_has_a_dash_for_what_was_not_logged() -> None:
    header, (row,) = result_rows([run("a", {}, eval_nll=0.5)])
    cells = dict(zip(header, row, strict=True))
    assert (cells["train loss"], cells["eval NLL"]) == ("1.0000", "0.5000")
    assert cells["eval loss"] == cells["tokens/s"] == cells["s/step"] == "–"  # noqa: RUF001
    assert (cells["complete"], cells["steps"]) == ("no", "3")


def test_names_that_mean_something_to_matplotlib_and_values_that_are_none_are_drawn() -> None:
    runs = [
        run("_hidden", {}),
        run(r"$\no_formula{$", {}, nll=float("nan")),
        Run("long", {}, [{"step": s, "loss": float("inf")} for s in range(90)], is_complete=True),
    ]
    section = training_part(runs).section()
    assert list(section.figures) == ["training"]  # nothing was evaluated
    assert section.figures["training"].startswith(b"\x89PNG")
    assert "$\\no_formula{$" in section.body
