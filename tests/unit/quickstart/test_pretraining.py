"""The pretraining: its texts, its determinism, and that its first stage learns to look left."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from memdlm.backbones.llada import LLaDAForMaskedLM
from memdlm.backbones.tiny import TinySizes, build_tiny
from memdlm.data.tasks import vocabulary
from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.errors import ConfigError, DataError
from memdlm.quickstart.make_start import build_start, make_start
from memdlm.quickstart.pretraining import PretrainingConfig, num_steps, pretrain
from memdlm.quickstart.pretraining_texts import collect_words, notes, pairs, sentences

SIZES = TinySizes(width=32, num_layers=2, num_heads=2, mlp_width=32, init_std=0.08)
ONE_STEP_EACH = PretrainingConfig(
    num_pair_steps=1,
    num_gap_steps=3,
    num_sentence_steps=1,
    num_long_steps=2,
    batch_size=2,
    log_every=2,
    long_lengths=(48,),
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_word_tokenizer([" ".join(vocabulary())])


def test_texts_repeat_their_values(tokenizer: PreTrainedTokenizerFast) -> None:
    words = collect_words(tokenizer)
    for gap in (0, 1, 2):
        ids, is_value = pairs(random.Random(gap), words, 36, gap)
        assert len(ids) == len(is_value) == 36
        keys = [ids[i] for i in range(0, 36, 2 + gap)]
        facts = {key: set() for key in keys}
        for start in range(0, 36, 2 + gap):
            assert is_value[start + 1 + gap] and not is_value[start]
            facts[ids[start]].add(ids[start + 1 + gap])
        assert all(len(values) == 1 for values in facts.values())
        assert all(keys.count(key) == 3 for key in keys)
    for form in (sentences, notes):
        for length in (48, 384, 2000):
            ids, is_value = form(random.Random(0), words, length)
            assert len(ids) == len(is_value) == length
            assert {ids[i] for i in range(length) if is_value[i]} <= set(words.values)


def test_same_seed_same_weights_and_log(tokenizer: PreTrainedTokenizerFast) -> None:
    runs = []
    for seed in (0, 0, 1):
        model = build_tiny("llada", tokenizer, seed=0, sizes=SIZES)
        before = torch.random.get_rng_state()
        log = pretrain(model, tokenizer, replace(ONE_STEP_EACH, seed=seed))
        assert torch.equal(before, torch.random.get_rng_state())
        assert not model.model.layers[0]._forward_hooks
        figures = [{k: v for k, v in entry.items() if k != "seconds"} for entry in log]
        runs.append((torch.cat([p.flatten() for p in model.parameters()]), figures))
    assert [entry["step"] for entry in runs[0][1]] == [2, 4, 6, num_steps(ONE_STEP_EACH)]
    assert torch.equal(runs[0][0], runs[1][0]) and runs[0][1] == runs[1][1]
    assert not torch.equal(runs[0][0], runs[2][0])


def test_every_parameter_moves_and_mixture_of_experts_works(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    for family in ("llada", "llada_moe"):
        model = build_tiny(family, tokenizer, sizes=SIZES)
        pretrain(model, tokenizer, replace(ONE_STEP_EACH, num_gap_steps=0))
        start = {name: value.clone() for name, value in model.named_parameters()}
        pretrain_again = replace(ONE_STEP_EACH, num_gap_steps=0, seed=1)
        pretrain(model, tokenizer, pretrain_again)
        assert all(not torch.equal(start[n], p) for n, p in model.named_parameters())


def test_first_layer_learns_its_left_neighbour(tokenizer: PreTrainedTokenizerFast) -> None:
    config = PretrainingConfig(
        num_pair_steps=160,
        num_gap_steps=0,
        num_sentence_steps=0,
        num_long_steps=0,
        neighbour_offsets=(1,),
        log_every=20,
    )
    log = pretrain(
        build_tiny("llada", tokenizer, sizes=replace(SIZES, width=64)), tokenizer, config
    )
    assert log[0]["neighbour_loss"] > 4.0
    assert log[-1]["neighbour_loss"] < 2.5


def test_bad_settings_and_foreign_tokenizer_are_refused() -> None:
    with pytest.raises(ConfigError, match="lowest_mask_ratio"):
        PretrainingConfig(lowest_mask_ratio=0.7)
    with pytest.raises(ConfigError, match="24 tokens"):
        PretrainingConfig(long_lengths=(8,))
    with pytest.raises(ConfigError, match="batch_size"):
        PretrainingConfig(batch_size=0)
    with pytest.raises(ConfigError, match="neighbour_offsets"):
        PretrainingConfig(neighbour_offsets=())
    tokenizer = build_word_tokenizer(["other words"])
    with pytest.raises(DataError, match="lacks"):
        collect_words(tokenizer)


def test_start_is_written_and_loads_as_an_official_checkpoint(tmp_path: Path) -> None:
    make_start(tmp_path, ONE_STEP_EACH)
    model = LLaDAForMaskedLM.from_pretrained(tmp_path)
    fresh, tokenizer = build_start()
    assert model.config.rope_theta == fresh.config.rope_theta == 500_000.0
    assert torch.equal(model.model.rotary_emb.inv_freq, fresh.model.rotary_emb.inv_freq)
    assert model.config.mask_token_id == tokenizer.mask_token_id
    record = json.loads((tmp_path / "pretraining.json").read_text())
    assert record["log"][-1]["step"] == num_steps(ONE_STEP_EACH)
