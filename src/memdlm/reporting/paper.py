"""The paper's figures, beside which ours stand: looked up by preset, arm and column.

`paper_tables.json` holds the tables of arXiv 2603.22241 (v1) as they are printed; its `source` says
so. Of the sweep over inference anchor ratios the paper prints a range only.
"""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

# Arm -> its row in the paper's tables.
_ROWS = {
    "standard": "Standard MDLM",
    "train_only": "MemDLM (Train-Only)",
    "train_inference": "MemDLM (Train & Inference)",
}

# Ablation preset -> its entry; each gives one score per variant.
_ABLATIONS = {
    "ablations/supervision": "inner_loss",
    "ablations/scope": "scope",
    "ablations/gradients": "gradient_normalisation",
    "ablations/pre_anchor": "pre_anchor_scale",
    "ablations/consistency": "trajectory",
    "ablations/stages": "stages",
    "ablations/steps": "inner_steps",
    "ablations/anchor_ratio": None,
}
_ABLATION_COLUMN = "babilong@1k"
# Ends the name of an arm that leaves the memory out; the paper prints the one that has it.
TRAIN_ONLY_SUFFIX = "__train_only"
_RATIO_PRESETS = ("paper/figure8", "ablations/anchor_ratio")
_RATIO_COLUMN = "babilong@16k"

# What the paper calls a task -> what we call it.
_ALIASES = {"ruler_mv": "niah_multivalue"}


@dataclass(frozen=True)
class PaperFigure:
    """A score that the paper reports, in percent.

    Attributes:
        low: The score, or the lower end where a range is all that is printed.
        high: The same, or the upper end.
        backbone: The model it was measured on; empty where the caller did not say.
        place: Where in the paper.
    """

    low: float
    high: float
    backbone: str = ""
    place: str = ""

    @property
    def text(self) -> str:
        """The figure as it is printed."""
        low, high = _printed(self.low), _printed(self.high)
        return low if low == high else f"{low} to {high}"

    def difference(self, percent: float) -> float:
        """Return ours - theirs; of a range, the distance to its nearer end, 0 within it."""
        return percent - min(max(percent, self.low), self.high)


@cache
def paper_tables() -> dict[str, Any]:
    """Return the packaged tables, with their `source`."""
    text = (files("memdlm.reporting") / "paper_tables.json").read_text(encoding="utf-8")
    tables: dict[str, Any] = json.loads(text)
    return tables


def paper_figures(
    preset: str | None, arm: str, column: str, model: str | None = None
) -> PaperFigure | None:
    """Return the paper's figure for one cell of a preset's table; None where it has none.

    Args:
        preset: `paper/table1`, `ablations/scope`, ...
        arm: `standard`, `train_only`, `train_inference`, or a variant's name in an ablation.
        column: A task or a group with its length.
        model: The arm's model, by which Table 1's two backbones are told apart: a name with
            "llada2" is LLaDA2.1-mini, any other LLaDA-MoE.
    """
    tables = paper_tables()
    if preset == "paper/table1":
        table = tables["table1_niah"]
        is_second = "llada2" in (model or "").lower().replace("-", "").replace("_", "")
        backbone = "LLaDA2.1-mini" if is_second else "LLaDA-MoE-7B-A1B-Base"
        return _cell(table["columns"], table[backbone], arm, column, backbone, "Table 1")
    if preset == "paper/table2":
        table = tables["table2_length_extrapolation"]
        return _cell(table["columns"], table, arm, column, table["backbone"], "Table 2")
    if preset == "paper/table3":
        table = tables["table3_longbench"]
        return _cell(table["columns"], table, arm, column, "", "Table 3")
    ablations = tables["ablations_babilong_1k_fraction"]
    if preset in _RATIO_PRESETS and column == _RATIO_COLUMN and _is_number(arm):
        low, high = tables["figure8_inference_anchor_ratio"]["at_16k_range_fraction"]
        return PaperFigure(_percent(low), _percent(high), ablations["backbone"], "Figure 8")
    if preset in _ABLATIONS and column == _ABLATION_COLUMN:
        entry = _ABLATIONS[preset]
        variants = {} if entry is None else ablations[entry]
        fraction = variants.get(arm)
        if fraction is None and arm in ("default", "standard_mdlm"):
            fraction = ablations[arm]
        if fraction is not None:
            score = _percent(fraction)
            return PaperFigure(score, score, ablations["backbone"], "ablations")
    return None


def paper_table(preset: str | None) -> tuple[list[str], list[list[str]]] | None:
    """Return header and rows of the paper's own table behind a preset; None where it has none."""
    tables = paper_tables()
    if preset == "paper/table1":
        columns = tables["table1_niah"]["columns"]
        found = [
            [f"{backbone}: {name}", *scores]
            for backbone, rows in tables["table1_niah"].items()
            if backbone != "columns"
            for name, scores in rows.items()
        ]
    elif preset in ("paper/table2", "paper/table3"):
        key = "table2_length_extrapolation" if preset == "paper/table2" else "table3_longbench"
        columns = tables[key]["columns"]
        found = [[name, *tables[key][name]] for name in _ROWS.values()]
    elif preset in _ABLATIONS and _ABLATIONS[preset] is not None:
        ablations, columns = tables["ablations_babilong_1k_fraction"], [_ABLATION_COLUMN]
        names = {"standard_mdlm": ablations["standard_mdlm"], **ablations[_ABLATIONS[preset]]}
        found = [[name, _percent(fraction)] for name, fraction in names.items()]
    else:
        return None
    rows = [[name, *map(_printed, scores)] for name, *scores in found]
    return ["arm", *columns], rows


def exposure_bias_sentence() -> str:
    """Return what the paper's Figure 3 shows, of which it prints no numbers."""
    return f"The paper's Figure 3: {paper_tables()['figure3_exposure_bias']}."


def default_variant(preset: str | None) -> str | None:
    """Return the variant of an ablation that is the paper's default; None for other presets."""
    if preset in _RATIO_PRESETS:
        return f"{paper_tables()['hyperparameters']['inference']['anchor_ratio']:g}"
    ablations = paper_tables()["ablations_babilong_1k_fraction"]
    variants = ablations.get(_ABLATIONS.get(preset or ""), {})
    return next((name for name, score in variants.items() if score == ablations["default"]), None)


def _cell(
    columns: list[str], rows: dict[str, Any], arm: str, column: str, backbone: str, place: str
) -> PaperFigure | None:
    spellings = [_canonical(name) for name in columns]
    row = rows.get(_ROWS.get(arm, ""))
    if row is None or _canonical(column) not in spellings:
        return None
    score = row[spellings.index(_canonical(column))]
    return PaperFigure(score, score, backbone, place)


def _canonical(column: str) -> str:
    """Return one spelling of a column's name."""
    base, at, length = column.removeprefix("longbench_").partition("@")
    return f"{_ALIASES.get(base, base)}{at}{length}"


def _printed(score: float) -> str:
    """Return a score with one digit, or with two where the paper has two."""
    return f"{score:.2f}".removesuffix("0")


def _percent(fraction: float) -> float:
    return round(100 * fraction, 6)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
