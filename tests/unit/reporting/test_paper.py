"""The paper's figures: which cell of which table stands beside which of ours."""

import pytest

from memdlm.reporting.paper import (
    default_variant,
    exposure_bias_sentence,
    paper_figures,
    paper_table,
    paper_tables,
)

LLADA_MOE = "LLaDA-MoE-7B-A1B-Base"


@pytest.mark.parametrize(
    ("preset", "arm", "column", "model", "text", "backbone"),
    [
        ("paper/table1", "standard", "niah_multivalue@4k", None, "87.9", LLADA_MOE),
        ("paper/table1", "standard", "ruler_mv@4k", None, "87.9", LLADA_MOE),
        ("paper/table1", "train_inference", "babilong@8k", "runs/x", "47.0", LLADA_MOE),
        (
            "paper/table1",
            "train_only",
            "ruler_vt@8k",
            "inclusionAI/LLaDA2.1-mini",
            "59.15",
            "LLaDA2.1-mini",
        ),
        ("paper/table2", "train_only", "ruler_cwe@32k", None, "22.48", LLADA_MOE),
        ("paper/table3", "train_inference", "longbench_repobench-p", None, "55.23", ""),
        ("paper/table3", "standard", "2wikimqa", None, "21.85", ""),
        ("ablations/scope", "ffn_0.10", "babilong@1k", None, "68.4", LLADA_MOE),
        ("ablations/supervision", "kl", "babilong@1k", None, "66.0", LLADA_MOE),
        ("ablations/gradients", "local_no_clip", "babilong@1k", None, "68.2", LLADA_MOE),
        ("ablations/pre_anchor", "1.25", "babilong@1k", None, "62.4", LLADA_MOE),
        ("ablations/consistency", "inconsistent", "babilong@1k", None, "60.4", LLADA_MOE),
        ("ablations/stages", "anchor_to_target_only", "babilong@1k", None, "64.6", LLADA_MOE),
        ("ablations/steps", "4", "babilong@1k", None, "59.0", LLADA_MOE),
        ("ablations/steps", "standard_mdlm", "babilong@1k", None, "53.8", LLADA_MOE),
        ("ablations/steps", "default", "babilong@1k", None, "68.4", LLADA_MOE),
        ("paper/figure8", "0.3", "babilong@16k", None, "21.2 to 23.2", LLADA_MOE),
        ("ablations/anchor_ratio", "0.8", "babilong@16k", None, "21.2 to 23.2", LLADA_MOE),
    ],
)
def test_a_cell_finds_its_figure(preset, arm, column, model, text, backbone) -> None:
    figure = paper_figures(preset, arm, column, model)
    assert figure is not None
    assert (figure.text, figure.backbone) == (text, backbone)


@pytest.mark.parametrize(
    ("preset", "arm", "column"),
    [
        (None, "standard", "babilong@4k"),
        ("paper/table1", "standard", "babilong@16k"),
        ("paper/table1", "standard", "babilong_qa1@4k"),
        ("paper/table1", "columns", "babilong@4k"),
        ("ablations/scope", "ffn_0.10__train_only", "babilong@1k"),
        ("ablations/scope", "ffn_0.10", "generated@96"),
        ("ablations/scope", "kl", "babilong@1k"),
        ("paper/figure8", "standard", "babilong@16k"),
        ("paper/figure8", "0.3", "babilong@8k"),
        ("paper/figure3", "standard", "ruler_vt@4k"),
    ],
)
def test_what_the_paper_does_not_print_has_no_figure(preset, arm, column) -> None:
    assert paper_figures(preset, arm, column) is None


def test_the_difference_to_a_range_is_that_to_its_nearer_end() -> None:
    figure = paper_figures("paper/figure8", "0.2", "babilong@16k")
    assert figure is not None
    assert [round(figure.difference(x), 6) for x in (20, 22, 24)] == [-1.2, 0, 0.8]


def test_the_variant_that_the_paper_chose_is_known() -> None:
    assert default_variant("ablations/scope") == "ffn_0.10"
    assert default_variant("ablations/steps") == "2"
    assert default_variant("ablations/anchor_ratio") == default_variant("paper/figure8") == "0.2"
    assert default_variant("paper/table1") is default_variant(None) is None


def test_every_preset_finds_its_variants_in_the_tables() -> None:
    from memdlm.evaluation.presets import PRESETS

    for preset in PRESETS.values():
        if preset.name in ("paper/figure3", "paper/figure5"):  # no figures are printed
            continue
        found = {
            variant.name
            for variant in preset.variants
            for task in preset.tasks
            if paper_figures(preset.name, variant.name, task) is not None
        }
        expected = {
            variant.name for variant in preset.variants if not variant.name.endswith("_only")
        }
        if preset.name in ("paper/figure8", "ablations/anchor_ratio"):
            expected -= {"standard", "standard_mdlm"}
        assert expected <= found, preset.name


def test_the_papers_own_tables_are_whole() -> None:
    assert paper_tables()["source"].startswith("arXiv 2603.22241")
    header, rows = paper_table("paper/table1")
    assert (len(header), len(rows)) == (10, 6)
    assert rows[0][:2] == [f"{LLADA_MOE}: Standard MDLM", "87.9"]
    assert len(paper_table("paper/table3")[0]) == 13
    assert ["ffn_0.50", "57.4"] in paper_table("ablations/scope")[1]
    assert paper_table("paper/figure8") is paper_table(None) is None
    assert "48 denoising steps" in exposure_bias_sentence()
