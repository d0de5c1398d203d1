"""Presets name what the paper reports, and nothing that does not exist."""

import pytest

from memdlm.errors import ConfigError, UsageError
from memdlm.evaluation.presets import GROUPS, PRESETS, find_presets
from memdlm.evaluation.presets.preset import (
    EXPOSURE_BIAS,
    TRAIN_ONLY_SUFFIX,
    Preset,
    Tiny,
    Variant,
)
from memdlm.evaluation.tasks.table import expand
from memdlm.evaluation.tasks.task import split_name

# The rows of the paper's ablations (arXiv 2603.22241 v1), with the row that is the default.
ROWS = {
    "supervision": ("cross_entropy", "kl", "reverse_kl", "hidden_cosine", "hidden_mse"),
    "scope": (
        "ffn_0.10",
        "ffn_0.05",
        "ffn_0.25",
        "ffn_0.50",
        "ffn_attention_0.10",
        "full_parameter",
    ),
    "gradients": (
        "local_clip_1.0",
        "global",
        "local_clip_0.5",
        "local_clip_2.0",
        "local_no_clip",
    ),
    "pre_anchor": ("1.5", "1.25", "1.75", "2.0"),
    "consistency": ("consistent", "inconsistent"),
    "stages": (
        "both_clean_target",
        "both_anchor_token_only",
        "anchor_to_target_only",
        "pre_anchor_only_anchor_token",
        "pre_anchor_only_clean_target",
    ),
    "steps": ("2", "3", "4"),
}
SCORED = [preset for preset in PRESETS.values() if preset.kind != EXPOSURE_BIAS]


def test_tables_figures_and_ablations_are_presets() -> None:
    assert set(GROUPS["paper"]) == {
        f"paper/{name}" for name in ("table1", "table2", "table3", "figure3", "figure5", "figure8")
    }
    assert set(GROUPS["ablations"]) == {f"ablations/{name}" for name in (*ROWS, "anchor_ratio")}


@pytest.mark.parametrize("name", ROWS)
def test_every_row_of_an_ablation_is_asked_with_and_without_a_memory(name) -> None:
    variants = {variant.name: variant for variant in PRESETS[f"ablations/{name}"].variants}
    arms = {arm for row in ROWS[name] for arm in (row, f"{row}{TRAIN_ONLY_SUFFIX}")}
    assert set(variants) == {"standard_mdlm", *arms}
    for row in ROWS[name]:
        assert variants[row].memory
        assert not variants[f"{row}{TRAIN_ONLY_SUFFIX}"].memory
        assert variants[row].train == variants[f"{row}{TRAIN_ONLY_SUFFIX}"].train
    changes = [str(variants[row].train) for row in ROWS[name]]
    assert len(set(changes)) == len(changes)


@pytest.mark.parametrize("preset", SCORED, ids=lambda preset: preset.name)
def test_every_task_exists_and_lies_within_the_stated_context(preset) -> None:
    for names in (preset.tasks, preset.tiny.tasks):
        tasks, _ = expand(names)
        assert len(tasks) >= len(names)
    longest = max(split_name(name)[1] or 0 for name in preset.tasks)
    assert longest <= (preset.context_length or 8192)  # LLaDA-MoE's own


def test_table_2_and_figure_8_go_beyond_the_context_of_llada_moe() -> None:
    assert PRESETS["paper/table2"].context_length == 32768
    assert PRESETS["paper/figure8"].context_length == 16384
    assert PRESETS["paper/table1"].context_length is None


def test_the_ratios_of_figure_8_change_only_how_a_prompt_is_written() -> None:
    preset = PRESETS["ablations/anchor_ratio"]
    ratios = [variant for variant in preset.variants if variant.memory]
    assert [variant.name for variant in ratios] == ["0.2", "0.3", "0.4", "0.5", "0.8"]
    for variant in ratios:
        assert variant.train == {}
        assert variant.evaluate == {"memory": {"prompt_mask_ratio": float(variant.name)}}


def test_a_group_stands_for_its_presets_and_a_misspelt_name_for_none() -> None:
    assert [preset.name for preset in find_presets("ablations")] == list(GROUPS["ablations"])
    assert [preset.name for preset in find_presets("paper/table3")] == ["paper/table3"]
    with pytest.raises(UsageError, match="did you mean paper/table1"):
        find_presets("paper/tabel1")


def test_two_variants_of_one_name_and_unknown_sections_are_refused() -> None:
    twice = (Variant("a", "A"), Variant("a", "B"))
    with pytest.raises(ConfigError, match="two variants"):
        Preset("x", "X", "", twice, ("ruler_vt@4k",), Tiny((), 1))
    with pytest.raises(ConfigError, match=r"evaluate\.training"):
        Variant("a", "A", evaluate={"training": {}})
