"""The paper's tables and figures: Standard MDLM against MemDLM without and with prompt memory."""

from memdlm.evaluation.presets.preset import EXPOSURE_BIAS, Preset, Tiny, Variant
from memdlm.evaluation.presets.tiny import tiny_tasks
from memdlm.evaluation.tasks.task import split_name

STANDARD = Variant("standard", "Standard MDLM", {"memory": {"enabled": False}})
TRAIN_ONLY = Variant("train_only", "MemDLM (Train-Only)")
TRAIN_INFERENCE = Variant("train_inference", "MemDLM (Train & Inference)", memory=True)
THREE = (STANDARD, TRAIN_ONLY, TRAIN_INFERENCE)

# What the paper calls RULER-MV is niah_multivalue.
_NEEDLES = ("niah_multivalue", "ruler_vt", "ruler_cwe")
_TABLE1 = (
    *(f"{task}@{length}" for task in _NEEDLES for length in ("4k", "8k")),
    *(f"babilong@{length}" for length in ("2k", "4k", "8k")),
)
_TABLE2 = tuple(f"{task}@{length}" for task in (*_NEEDLES, "babilong") for length in ("16k", "32k"))
_TABLE3 = tuple(
    f"longbench_{name}"
    for name in (
        "triviaqa",
        "passage_retrieval_en",
        "passage_retrieval_zh",
        "multifieldqa_en",
        "multifieldqa_zh",
        "2wikimqa",
        "dureader",
        "multi_news",
        "trec",
        "samsum",
        "lcc",
        "repobench-p",
    )
)
_FIGURE8 = tuple(f"babilong@{length}" for length in ("1k", "2k", "4k", "8k", "16k"))
_RATIOS = (0.2, 0.3, 0.4, 0.5, 0.8)


def table1() -> Preset:
    """Return Table 1: needles in haystacks at 2k to 8k."""
    return Preset(
        name="paper/table1",
        title="Table 1: needle in a haystack",
        description="RULER (multi-value needles, variable tracking, common words) at 4k and 8k, "
        "BABILong (mean of qa1 to qa5) at 2k to 8k.",
        variants=THREE,
        tasks=_TABLE1,
        tiny=Tiny(tiny_tasks(_TABLE1), 100),
    )


def table2() -> Preset:
    """Return Table 2: the same tasks at 16k and 32k, beyond LLaDA-MoE's context."""
    return Preset(
        name="paper/table2",
        title="Table 2: length extrapolation",
        description="Table 1's tasks at 16k and 32k; LLaDA-MoE's own context is 8k.",
        variants=THREE,
        tasks=_TABLE2,
        tiny=Tiny(tiny_tasks(_TABLE2), 100),
        context_length=_longest(_TABLE2),
    )


def table3() -> Preset:
    """Return Table 3: LongBench."""
    return Preset(
        name="paper/table3",
        title="Table 3: LongBench",
        description="Twelve sets of LongBench, each with its own score. Prompts beyond the context "
        "are cut in the middle, as LongBench does; the paper's code does not cut.",
        variants=THREE,
        tasks=_TABLE3,
        tiny=Tiny(tiny_tasks(_TABLE3), 100),
    )


def figure3() -> Preset:
    """Return Figure 3: exposure bias over 48 denoising steps."""
    return Preset(
        name="paper/figure3",
        title="Figure 3: exposure bias over the denoising steps",
        description="Likelihood in the model's own context against that in clean context, at 48 "
        "denoising steps, on the same held-out rows of the training data and the same masks for "
        "all arms. How long the paper's responses are is not known here; they are cut to 512 "
        "tokens.",
        variants=THREE,
        tasks=(),
        tiny=Tiny(("generated_variable_tracking@96",), 96),
        kind=EXPOSURE_BIAS,
        num_samples=100,
        num_steps=48,
        response_length=512,
    )


def figure5() -> Preset:
    """Return scores over lengths, of Tables 1 and 2 together."""
    tasks = (*_TABLE1, *_TABLE2)
    return Preset(
        name="paper/figure5",
        title="Scores over context lengths, 2k to 32k",
        description="The columns of Tables 1 and 2 as curves over the length. The paper's own "
        "Figure 5 was not at hand when this was written: it may show something else.",
        variants=THREE,
        tasks=tasks,
        tiny=Tiny(tiny_tasks(tasks), 100),
        context_length=_longest(tasks),
    )


def figure8(name: str = "paper/figure8") -> Preset:
    """Return Figure 8: one training asked with memories written at several mask ratios."""
    ratios = tuple(
        Variant(
            str(ratio),
            f"anchor ratio {ratio}",
            memory=True,
            evaluate={"memory": {"prompt_mask_ratio": ratio}},
        )
        for ratio in _RATIOS
    )
    return Preset(
        name=name,
        title="Figure 8: anchor ratio at inference",
        description="BABILong (mean of qa1 to qa5) at 1k to 16k with memories written at several "
        "mask ratios of the prompt; beside them both settings without a memory.",
        variants=(STANDARD, TRAIN_ONLY, *ratios),
        tasks=_FIGURE8,
        tiny=Tiny(tiny_tasks(_FIGURE8), 100),
        context_length=_longest(_FIGURE8),
    )


def _longest(tasks: tuple[str, ...]) -> int:
    """Return the longest length; each counts prompt and answer together."""
    return max(split_name(name)[1] or 0 for name in tasks)
