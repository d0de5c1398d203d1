"""The model as lm-eval meets it: by name, as an object, and with everything it can ask."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from memdlm.backbones.tiny import TinySizes, build_tiny
from memdlm.errors import ConfigError, DataError, UsageError
from memdlm.evaluation.harness.likelihood import LikelihoodConfig
from memdlm.evaluation.harness.model import DiffusionLM
from memdlm.memory.config import MemoryConfig
from memdlm.sampling.config import SamplingConfig
from tests.unit.evaluation.harness.asking import (
    MEMORY,
    PROMPTS,
    QUESTIONS,
    TEXT,
    ask,
    build_lm,
    build_model,
    build_tokenizer,
    choose,
    text,
)

FEW = LikelihoodConfig(num_samples=8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    build_model().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def rows(documents: list[dict[str, Any]]) -> Any:
    return lambda **_: {"test": datasets.Dataset.from_list(documents)}


def generation_task(**arguments: Any) -> ConfigurableTask:
    return ConfigurableTask(
        config={
            "task": "say",
            "custom_dataset": rows([{"prompt": p, "answer": "ada"} for p in PROMPTS[:4]]),
            "output_type": "generate_until",
            "test_split": "test",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"max_gen_toks": 6, "until": [], **arguments},
            "metric_list": [{"metric": "exact_match"}],
        }
    )


def choice_task() -> ConfigurableTask:
    choices = [choice for _, choice in QUESTIONS]
    documents = [
        {"prompt": p, "choices": list(c), "answer": 0}
        for (p, _), c in zip(QUESTIONS, choices, strict=True)
    ]
    return ConfigurableTask(
        config={
            "task": "choose",
            "custom_dataset": rows(documents),
            "output_type": "multiple_choice",
            "test_split": "test",
            "doc_to_text": "{{prompt}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "answer",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}],
        }
    )


def evaluate(task: ConfigurableTask, lm: DiffusionLM) -> dict[str, Any]:
    return lm_eval.evaluate(lm=lm, task_dict={task.config.task: task}, bootstrap_iters=0)


def test_lm_eval_loads_the_model_by_name(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    # It asks for the versions of all that is installed, which takes seconds.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    arguments = (
        f"pretrained={checkpoint},memory=on,memory.layer_fraction=0.5,memory.learning_rate=5.0,"
        f"memory.rank=8,sampling.policy=margin,seed=3,cache={tmp_path / 'responses'}"
    )
    found = lm_eval.simple_evaluate(
        model="memdlm",
        model_args=arguments,
        tasks=[generation_task()],
        batch_size=2,
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
    )
    texts = [sample["resps"][0][0] for sample in found["samples"]["say"]]
    lm = build_lm(memory=MEMORY, sampling=SamplingConfig(policy="margin"), seed=3)
    assert texts == lm.generate_until(ask(PROMPTS[:4]))
    assert found["config"]["memdlm"]["memory"]["rank"] == 8
    assert json.loads(json.dumps(found["config"]["memdlm"])) == found["config"]["memdlm"]
    assert get_model("memdlm") is DiffusionLM


def test_lm_eval_takes_the_model_as_an_object_and_records_stay() -> None:
    lm = build_lm(memory=MEMORY)
    found = evaluate(generation_task(), lm)
    samples = found["samples"]["say"]
    for sample in samples:
        (record,) = lm.records["say", sample["doc_id"], 0]
        assert record.response == sample["resps"][0][0]
        assert record.memory == "written"
        assert record.num_prompt_tokens == len(PROMPTS[sample["doc_id"]].split())


def test_lm_eval_asks_for_choices_and_the_best_bound_wins() -> None:
    lm = build_lm(likelihood=FEW)
    found = evaluate(choice_task(), lm)
    bounds = [
        [lm.records["choose", document, place][0] for place in range(3)] for document in range(3)
    ]
    best = [max(range(3), key=lambda place: row[place].log_likelihood) for row in bounds]
    assert found["results"]["choose"]["acc,none"] == pytest.approx(best.count(0) / 3)
    errors = {(record.num_new_tokens, record.standard_error > 0) for r in bounds for record in r}
    assert errors == {(1, False), (2, False), (6, True)}


def scripted(answer: str) -> DiffusionLM:
    """Return a model that says `answer` and then the end of the text, whatever it is asked."""
    tokenizer = build_tokenizer()
    sizes = TinySizes(width=8, num_layers=1, num_heads=1, context_length=64)
    model = build_tiny("llada", tokenizer, sizes=sizes)
    ids = torch.tensor([*tokenizer(answer)["input_ids"], *[tokenizer.eos_token_id] * 20])

    def forward(input_ids, attention_mask=None, positions=None, valid=None, scored=None):
        # Prompts here end where the first mask stood: three words.
        wanted = ids[(positions - 3).clamp(min=0)]
        if scored is None:
            logits = torch.nn.functional.one_hot(wanted, len(tokenizer)) * 9.0
            return SimpleNamespace(logits=logits)
        is_right = wanted.flatten()[valid] == scored.labels
        return SimpleNamespace(nll=torch.where(is_right, 0.25, 2.0))

    model.forward = forward  # type: ignore[assignment]
    return DiffusionLM(model, tokenizer, likelihood=FEW)


def test_a_scripted_model_gives_the_known_answers() -> None:
    lm = scripted("red key in the box")
    prompt = "ada keeps the"
    cases = {(): "red key in the box", ("the",): "red key in ", (" in", "key"): "red "}
    for until, expected in cases.items():
        assert lm.generate_until(ask([prompt], until=list(until), max_gen_toks=8)) == [expected]
    (record,) = lm.answer(ask([prompt], max_gen_toks=3))
    assert (record.response, record.num_new_tokens, record.num_prompt_tokens) == (
        "red key in",
        3,
        3,
    )
    pairs = [(prompt, (" red key in", " red old in", " red key in the box there old mill"))]
    right, wrong, long = lm.answer(choose(pairs))
    assert right.log_likelihood == pytest.approx(-3 * 0.25)
    # (L / l) x the mean over masks: linear in the tokens' losses.
    assert wrong.log_likelihood == pytest.approx(-(2 * 0.25 + 2.0))
    assert (right.standard_error, wrong.standard_error) == (0.0, 0.0)
    assert abs(long.log_likelihood + 5 * 0.25 + 3 * 2.0) < 4 * long.standard_error
    assert [record.is_greedy for record in (right, wrong, long)] == [True, False, False]


def test_choices_of_one_length_share_the_greedy_decode(monkeypatch) -> None:
    from memdlm.evaluation.harness import scoring

    lm, calls = scripted("red key in the box"), []

    def watch(model, tokenizer, prompts, sampling, **settings):
        calls.append((len(prompts), sampling.max_new_tokens))
        return generate(model, tokenizer, prompts, sampling, **settings)

    generate = scoring.generate
    monkeypatch.setattr(scoring, "generate", watch)
    contexts = ("ada keeps the", "bo keeps a")
    choices = (" red key", " red red", " old", " red", " box")
    answers = lm.loglikelihood(choose([(context, choices) for context in contexts]))
    assert [is_greedy for _, is_greedy in answers] == [True, False, False, True, False] * 2
    assert sorted(calls) == [(2, 1), (2, 2)]


def test_whole_texts_are_scored_in_windows() -> None:
    lm = build_lm(likelihood=FEW, max_length=8)
    words = TEXT.split()
    request = Instance("loglikelihood_rolling", {}, (TEXT,), 0, ("task", 0, 1))
    (record,) = lm.answer([request])
    assert record.num_new_tokens == len(words)
    assert lm.loglikelihood_rolling([request]) == [record.log_likelihood]
    # The same windows by hand: seven words, each given the word before it.
    windows = [(words[i - 1], " ".join(words[i : i + 7])) for i in range(7, len(words), 7)]
    parts = lm.answer(choose([(before, (" " + after,)) for before, after in windows]))
    first = lm.answer(choose([("", (" ".join(words[:7]),))]))
    expected = sum(part.log_likelihood for part in [*first, *parts])
    assert record.log_likelihood == pytest.approx(expected, abs=1e-4)
    assert record.standard_error == pytest.approx(
        math.hypot(*(part.standard_error for part in [*first, *parts])), abs=1e-4
    )


def test_a_memory_needs_a_context() -> None:
    lm = build_lm(memory=MEMORY)
    with pytest.raises(UsageError, match=r"document 0 has no context, .* turn the memory off"):
        lm.answer(choose([("", (" red",))]))
    with pytest.raises(UsageError, match=r"scores whole texts, .* turn the memory off"):
        lm.answer([Instance("loglikelihood_rolling", {}, (TEXT,), 0, ("task", 0, 1))])


def test_prompts_that_do_not_fit_are_found_before_anything_is_computed(monkeypatch) -> None:
    monkeypatch.setattr("memdlm.evaluation.harness.generating.generate", None)
    lm = build_lm()
    requests = ask([*PROMPTS, text(36)])
    for method in (lm.plan, lm.answer):
        with pytest.raises(
            DataError, match=r"^task, document 10: the prompt of 36 tokens and 6 new"
        ):
            method(requests)
    with pytest.raises(DataError, match="continuation '' has no token"):
        lm.plan(choose([("ada keeps", ("",))]))


def test_truncation_keeps_both_ends_and_says_what_it_dropped() -> None:
    lm = build_lm(truncation="middle", memory=MEMORY)
    long = text(50)
    (record,) = lm.answer(ask([long]))
    words = long.split()
    kept = " ".join([*words[:17], *words[-17:]])
    (same,) = lm.answer(ask([kept]))
    assert (record.num_prompt_tokens, record.num_dropped_tokens) == (34, 16)
    assert (same.response, same.prompt_sha256) == (record.response, record.prompt_sha256)
    assert same.num_dropped_tokens == 0


def test_the_plan_counts_without_computing(tmp_path: Path) -> None:
    lm = build_lm(cache=tmp_path, likelihood=FEW)
    requests = [*ask(PROMPTS), *choose(QUESTIONS)]
    generation, choices = lm.plan(requests)
    assert (generation.kind, choices.kind) == ("generate_until", "loglikelihood")
    assert generation.num_own == len(PROMPTS)
    assert generation.prompt_tokens == sum(len(prompt.split()) for prompt in PROMPTS)
    assert (generation.new_tokens, choices.new_tokens) == (6 * len(PROMPTS), 3 * (1 + 2 + 6))
    lm.answer(ask(PROMPTS))
    generation, choices = lm.plan(requests)
    assert (generation.num_stored, generation.num_own, choices.num_stored) == (10, 0, 0)


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"memory": MemoryConfig(layer_fraction=0.5, learning_rate=4.0, rank=8)},
        {"memory": None},
        {"sampling": SamplingConfig(policy="entropy")},
        {"settings": "another model"},
    ],
)
def test_answers_of_other_settings_are_never_found(tmp_path: Path, other) -> None:
    settings = {"cache": tmp_path, "memory": MEMORY, "settings": {"model": "one"}}
    build_lm(**settings).answer(ask(PROMPTS[:2]))
    (same,) = build_lm(**{**settings, "batch_size": 3}).plan(ask(PROMPTS[:2]))
    (found,) = build_lm(**{**settings, **other}).plan(ask(PROMPTS[:2]))
    assert (same.num_stored, found.num_stored) == (2, 0)


def test_another_model_is_another_fingerprint(tmp_path: Path) -> None:
    requests = ask(PROMPTS[:2])
    build_lm(cache=tmp_path).answer(requests)
    changed = build_model()
    with torch.no_grad():
        changed.lm_head.weight[0, 0] += 1
    (other,) = DiffusionLM(changed, build_tokenizer(), cache=tmp_path).plan(requests)
    (same,) = build_lm(cache=tmp_path).plan(requests)
    assert (other.num_stored, same.num_stored) == (0, 2)


@pytest.mark.parametrize("memory", [None, MEMORY], ids=["off", "on"])
def test_stop_strings_end_a_decode_and_change_no_answer(memory) -> None:
    settings = {"memory": memory, "sampling.block_length": 1, "sampling.stop_at_eos": False}
    whole = build_lm(**settings).generate_until(ask(PROMPTS))
    words = whole[0].split()
    stop = words[2]
    needed = next(number for number in range(6) if stop in " ".join(words[:number]))
    lengths = []
    for batch_size in (1, 4):
        found = build_lm(batch_size=batch_size, **settings).answer(ask(PROMPTS, until=[stop]))
        assert [record.response for record in found] == [text.partition(stop)[0] for text in whole]
        lengths.append([record.num_new_tokens for record in found])
    assert lengths[0] == lengths[1]
    assert lengths[0][0] == needed < 6
    assert [length < 6 for length in lengths[0]] == [stop in text[: -len(stop)] for text in whole]


def test_requests_of_other_stop_strings_are_answered_apart() -> None:
    lm = build_lm(batch_size=4)
    prompts = sorted(PROMPTS, key=lambda prompt: len(lm.generate_until(ask([prompt]))[0]))[-2:]
    whole = lm.generate_until(ask(prompts))
    stop = whole[0].split()[1]
    mixed = [*ask(prompts, until=[stop]), *ask(prompts)]
    assert lm.generate_until(mixed) == [*(text.partition(stop)[0] for text in whole), *whole]


def test_other_stop_strings_cut_the_same_answer_where_they_should(tmp_path: Path) -> None:
    lm = build_lm(cache=tmp_path)
    whole = max(lm.generate_until(ask(PROMPTS)), key=len)
    prompt = PROMPTS[lm.generate_until(ask(PROMPTS)).index(whole)]
    stop = whole.split()[1]
    assert lm.generate_until(ask([prompt], until=[stop])) == [whole[: whole.index(stop)]]
    assert lm.generate_until(ask([prompt])) == [whole]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"truncation": "left"}, ConfigError, "truncation: 'left' is not one of error, middle"),
        ({"chat_template": "yes"}, ConfigError, "chat_template: 'yes'"),
        ({"gather": "none"}, ConfigError, "gather: 'none'"),
        ({"batch_size": "auto"}, UsageError, "batch_size: give a number"),
        ({"max_batch_size": 8}, UsageError, "no max_batch_size"),
        ({"max_length": 41}, ConfigError, "max_length: 41 .* context of 40"),
        ({"memory": "perhaps"}, UsageError, "memory=perhaps: use on or off"),
        ({"memory.rnk": 4}, UsageError, r"no argument memory.rnk; did you mean memory.rank\?"),
        ({"trust_remote_code": True}, UsageError, "no argument trust_remote_code"),
        ({"sampling.policy": "best"}, UsageError, "sampling.policy: 'best'"),
        ({"tokenizer": None}, UsageError, "needs its tokenizer"),
        ({"adapter": "folder"}, UsageError, "this one is loaded"),
        ({"dtype": "float16"}, UsageError, "this one is loaded"),
    ],
)
def test_bad_arguments_are_named(settings, error, message) -> None:
    with pytest.raises(error, match=message):
        DiffusionLM(build_model(), **{"tokenizer": build_tokenizer(), **settings})


def test_chat_templates_are_lm_evals_or_ours_and_never_both() -> None:
    template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    template += "{% if add_generation_prompt %}bo{% endif %}"
    tokenizer = build_tokenizer()
    turn = [{"role": "user", "content": "ada keeps"}]
    plain = DiffusionLM(build_model(), tokenizer)
    with pytest.raises(UsageError, match="no chat template"):
        plain.apply_chat_template(turn)
    tokenizer.chat_template = template
    assert plain.apply_chat_template(turn) == "ada keeps bo"
    assert plain.chat_template(True) == template
    assert plain.chat_template(False) is None
    ours = DiffusionLM(build_model(), tokenizer, chat_template="auto")
    (raw,), (templated,) = plain.answer(ask(["ada keeps bo"])), ours.answer(ask(["ada keeps"]))
    assert templated == raw
    (scored,) = ours.answer(choose([("ada keeps", (" red",))]))
    assert scored.num_prompt_tokens == 3
    with pytest.raises(UsageError, match="apply the template twice"):
        ours.apply_chat_template(turn)
