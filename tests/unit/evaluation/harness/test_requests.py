"""What a task's generation arguments mean, and what becomes of prompts that are too long."""

import pytest

from memdlm.errors import DataError, UsageError
from memdlm.evaluation.harness.requests import (
    encode,
    fit_prompt,
    ids_hash,
    read_generation,
    request_seed,
)
from memdlm.memory.provenance import PromptRecord
from memdlm.sampling.config import SamplingConfig

SAMPLING = SamplingConfig(max_new_tokens=32)
SAMPLED = SamplingConfig(max_new_tokens=32, temperature=0.7)


@pytest.mark.parametrize(
    ("arguments", "sampling", "expected"),
    [
        ({}, SAMPLING, {"max_new_tokens": 32, "temperature": 0.0}),
        ({"max_gen_toks": 64}, SAMPLING, {"max_new_tokens": 64}),
        ({"max_new_tokens": 16}, SAMPLING, {"max_new_tokens": 16}),
        ({"max_gen_toks": 8, "max_tokens": 9}, SAMPLING, {"max_new_tokens": 8}),
        ({"do_sample": False, "temperature": 1.0}, SAMPLING, {"temperature": 0.0}),
        ({"temperature": 0.0, "top_p": 0.9}, SAMPLING, {"temperature": 0.0, "top_p": None}),
        ({"temperature": 0.5, "top_p": 0.9}, SAMPLING, {"temperature": 0.5, "top_p": 0.9}),
        ({"do_sample": True}, SAMPLING, {"temperature": 1.0}),
        ({"do_sample": True}, SAMPLED, {"temperature": 0.7}),
        ({"do_sample": True, "temperature": 0.2}, SAMPLED, {"temperature": 0.2}),
        ({}, SAMPLED, {"temperature": 0.7}),
        ({"num_beams": 1, "policy": "margin"}, SAMPLING, {"policy": "margin"}),
        ({"num_unmasking_steps": 4}, SAMPLING, {"num_unmasking_steps": 4}),
    ],
)
def test_generation_arguments_become_sampling_settings(arguments, sampling, expected) -> None:
    found = read_generation(arguments, sampling).sampling
    assert {name: getattr(found, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("arguments", "sampling", "message"),
    [
        ({"max_gen_tokens": 4}, SAMPLING, "max_gen_tokens is not known .* mean max_gen_toks"),
        ({"stop": ["x"]}, SAMPLING, "stop is not known"),
        ({"num_beams": 4}, SAMPLING, "no beams"),
        ({"do_sample": "yes"}, SAMPLING, "do_sample='yes': use true or false"),
        ({"do_sample": False}, SAMPLED, "asks for greedy decoding"),
        ({"temperature": 0.0}, SAMPLED, "asks for greedy decoding"),
        ({"max_gen_toks": 0}, SAMPLING, "sampling.max_new_tokens: 0"),
        ({"until": [3]}, SAMPLING, "give strings"),
        ({"infill": True}, SAMPLING, "infill is not known"),
    ],
)
def test_an_argument_that_would_do_nothing_is_an_error(arguments, sampling, message) -> None:
    with pytest.raises(UsageError, match=message):
        read_generation(arguments, sampling)


@pytest.mark.parametrize(
    ("until", "expected"),
    [
        ([], ()),
        (None, ()),
        ([""], ()),
        ("\n", ("\n",)),
        (["three", ". "], ("three", ". ")),
    ],
)
def test_stop_strings_are_a_string_or_a_list(until, expected) -> None:
    assert read_generation({"until": until}, SAMPLING).until == expected


def test_a_prompt_is_cut_in_its_middle_as_longbench_does() -> None:
    ids = list(range(100))
    fitting = fit_prompt(ids, 10, 110, "error", "request 1")
    assert (fitting.ids.tolist(), fitting.num_dropped) == (ids, 0)
    assert fitting.tensor().tolist() == ids
    for max_length, first, last in ((60, 25, 25), (61, 25, 26)):
        cut = fit_prompt(ids, 10, max_length, "middle", "request 1")
        assert cut.ids.tolist() == [*ids[:first], *ids[-last:]]
        assert len(cut) + 10 == max_length
        assert cut.num_dropped == 100 - len(cut)
    with pytest.raises(
        DataError, match=r"^task, document 3: the prompt of 100 tokens and 10 new ones exceed"
    ):
        fit_prompt(ids, 10, 109, "error", "task, document 3")
    with pytest.raises(DataError, match="exceed the context of 11 tokens"):
        fit_prompt(ids, 10, 11, "middle", "request 1")
    with pytest.raises(DataError, match="request 1 is an empty prompt"):
        fit_prompt([], 10, 109, "error", "request 1")


def test_a_raw_prompt_opens_as_the_tokenizer_opens_texts_and_never_twice(tokenizer) -> None:
    from tokenizers.processors import TemplateProcessing

    from tests.unit.evaluation.harness.asking import build_tokenizer

    assert encode(tokenizer, "ada keeps") == tokenizer("ada keeps")["input_ids"]
    opening = build_tokenizer()
    opening.add_special_tokens({"bos_token": "<|bos|>"})
    bos = opening.bos_token_id
    opening.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", bos)]
    )
    plain = tokenizer("ada keeps")["input_ids"]
    assert encode(opening, "ada keeps") == [bos, *plain]
    assert encode(opening, "<|bos|> ada keeps") == [bos, *plain]


def test_hashes_are_those_of_memories_and_seeds_depend_on_every_part() -> None:
    import torch

    assert ids_hash([3, 5, 70000]) == PromptRecord.of(torch.tensor([3, 5, 70000])).sha256
    sha = ids_hash([3])
    seeds = [
        request_seed(0, "memory", sha, 0),
        request_seed(1, "memory", sha, 0),
        request_seed(0, "sampling", sha, 0),
        request_seed(0, "memory", ids_hash([4]), 0),
        request_seed(0, "memory", sha, 1),
    ]
    assert len(set(seeds)) == len(seeds)
