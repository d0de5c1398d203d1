"""Prompts and answers are those of lm-eval's own RULER, sample by sample, for the same seeds."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from memdlm.evaluation.tasks.ruler.haystack import split_simply
from memdlm.evaluation.tasks.ruler.task import RULER
from memdlm.evaluation.tasks.task import as_lm_eval_task
from tests.unit.evaluation.ruler.conftest import filler_text

SAMPLES = 3

# What lm-eval's task functions give the generator of needles.
NEEDLES: dict[str, dict[str, Any]] = {
    "niah_single_1": {"type_haystack": "repeat"},
    "niah_single_2": {"type_haystack": "essay"},
    "niah_single_3": {"type_haystack": "essay", "type_needle_v": "uuids"},
    "niah_multikey_1": {"type_haystack": "essay", "num_needle_k": 4},
    "niah_multikey_2": {"type_haystack": "needle"},
    "niah_multikey_3": {
        "type_haystack": "needle",
        "type_needle_k": "uuids",
        "type_needle_v": "uuids",
    },
    "niah_multivalue": {"type_haystack": "essay", "num_needle_v": 4},
    "niah_multiquery": {"type_haystack": "essay", "num_needle_q": 4},
}
YAML = {"ruler_vt": "vt", "ruler_cwe": "cwe", "ruler_fwe": "fwe"}


def lm_eval_documents(
    load: Callable[..., ModuleType], tokenizer: Any, name: str, length: int, seed: int = 0
) -> list[dict[str, Any]]:
    """Let lm-eval's own functions make a few documents."""
    if name in NEEDLES:
        needles = load("prepare_niah", seed)
        needles.cached_sent_tokenize = split_simply
        options = {"type_needle_k": "words", "type_needle_v": "numbers", **NEEDLES[name]}
        essays = options["type_haystack"] == "essay"
        return list(
            needles.generate_samples(
                TEXT.split(" ") if essays else needles.get_haystack(options["type_haystack"]),
                tokenizer,
                max_seq_length=length,
                template=load("niah_utils", seed).TEMPLATE,
                num_samples=SAMPLES,
                **options,
            )
        )
    if name == "ruler_vt":
        chains = load("vt_utils", seed)
        example = chains.sys_vartrack_w_noise_random(tokenizer, 1, 500, incremental=5)[0]
        make = chains.sys_vartrack_w_noise_random
        return list(make(tokenizer, SAMPLES, length, icl_example=example))
    if name == "ruler_cwe":
        return list(load("cwe_utils", seed).sys_word_pair_random(SAMPLES, length, tokenizer))
    return list(load("fwe_utils", seed).sys_kwext(tokenizer, length, SAMPLES))


TEXT = filler_text(9000)


def prompts(config: dict[str, Any]) -> tuple[Any, list[str]]:
    """Return lm-eval's task object of a config, and the prompts of its requests."""
    task = as_lm_eval_task(config)
    task.build_all_requests()
    return task, [request.args[0] for request in task.instances]


@pytest.fixture
def theirs(
    lm_eval_module: Callable[..., ModuleType], tokenizer: Any
) -> Callable[..., tuple[Any, list[str]]]:
    """Return a function that gives lm-eval's own task and prompts, its YAML file included."""
    import datasets
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent / "ruler"

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: lambda *args: {})

    def build(name: str, length: int, seed: int = 0) -> tuple[Any, list[str]]:
        config: dict[str, Any] = {}
        for file in ("niah_single_1", YAML.get(name, name)):
            config |= yaml.load((folder / f"{file}.yaml").read_text(), Loader)
        documents = lm_eval_documents(lm_eval_module, tokenizer, name, length, seed)
        split = datasets.Dataset.from_list(documents)
        config["custom_dataset"] = lambda **_: {"test": split}
        for key in ("include", "dataset_path", "dataset_name", "tag"):
            config.pop(key, None)
        return prompts(config)

    return build


@pytest.fixture
def essays(tmp_path: Path) -> dict[str, str]:
    """Sources of the essays: the same text as lm-eval is given, and the same splitter."""
    path = tmp_path / "essays.txt"
    path.write_text(TEXT.replace(". ", ".\n\n"), encoding="utf-8")
    return {"essays": str(path), "sentences": "simple"}


@pytest.mark.parametrize("length", [2048, 4096])
@pytest.mark.parametrize("name", list(RULER))
def test_prompts_and_answers_are_lm_evals(
    name: str,
    length: int,
    theirs: Callable[..., tuple[Any, list[str]]],
    make: Callable[..., dict[str, Any]],
    essays: dict[str, str],
) -> None:
    their_task, their_prompts = theirs(name, length)
    our_task, our_prompts = prompts(make(name, length, **essays))
    assert len(our_prompts) == SAMPLES
    assert our_prompts == their_prompts
    assert len(set(our_prompts)) == SAMPLES
    for ours, wanted in zip(our_task.test_docs(), their_task.test_docs(), strict=True):
        assert {key: wanted[key] for key in ours} == ours
    generation = our_task.config.generation_kwargs
    assert generation["max_gen_toks"] == their_task.config.generation_kwargs["max_gen_toks"]
    assert generation["until"] == their_task.config.generation_kwargs["until"]


@pytest.mark.parametrize("name", ["niah_multikey_2", "ruler_vt", "ruler_cwe", "ruler_fwe"])
def test_another_seed_is_the_seeds_that_its_docstring_says(
    name: str, theirs: Callable[..., tuple[Any, list[str]]], make: Callable[..., dict[str, Any]]
) -> None:
    assert prompts(make(name, 1500, seed=3))[1] == theirs(name, 1500, 3)[1]
