"""A scripted model with known answers: the whole path gives every metric its hand-computed value.

The model is a stub: it reads which prompt it is given and writes the answer that the script has for
it. Prompts, decoding, cutting at stop strings, lm-eval's metrics and means are the real ones.
"""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from memdlm.backbones.llada import LLaDAForMaskedLM
from memdlm.backbones.tiny import TinySizes, tiny_config
from memdlm.evaluation.config import EvalConfig
from memdlm.evaluation.harness.model import DiffusionLM
from memdlm.evaluation.prepared import PreparedTask, prepare
from memdlm.evaluation.task_results import answer_task
from memdlm.evaluation.tasks.table import GROUPS, TASKS
from memdlm.evaluation.tasks.task import TaskSources
from tests.unit.evaluation.test_babilong import BOOK, QUESTIONS
from tests.unit.evaluation.test_longbench import SCORED, official_row

EOS, MASK, VOCABULARY, CONTEXT = 256, 257, 258, 16384


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, so that any script can be written."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE({sign: i for i, sign in enumerate(alphabet)}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=bytewise, eos_token="<eos>", pad_token="<eos>", mask_token="<mask>"
    )
    assert (made.eos_token_id, made.mask_token_id) == (EOS, MASK)
    return made


class ScriptedModel(LLaDAForMaskedLM):
    """Predicts, at every slot, the token that the script has there for this prompt."""

    def __init__(self, script: dict[tuple[int, ...], list[int]]) -> None:
        ids = {"mask_token_id": MASK, "pad_token_id": EOS, "eos_token_id": EOS}
        sizes = TinySizes(width=8, num_layers=1, num_heads=1, mlp_width=8, context_length=CONTEXT)
        super().__init__(tiny_config("llada", sizes, vocab_size=VOCABULARY, **ids))
        self.script = script

    def forward(self, input_ids, attention_mask=None, positions=None, **_: Any) -> Any:
        scores = torch.zeros(*positions.shape, VOCABULARY)
        for row, (ids, places) in enumerate(zip(input_ids.tolist(), positions, strict=True)):
            prompt = next(known for known in self.script if tuple(ids[: len(known)]) == known)
            answer = self.script[prompt]
            for slot, place in enumerate(places.tolist()):
                behind = place - len(prompt)
                token = answer[behind] if 0 <= behind < len(answer) else EOS
                scores[row, slot, token] = 9.0
        return SimpleNamespace(logits=scores)


def score(prepared: PreparedTask, answers: list[str], tokenizer: Any) -> dict[str, float]:
    """Return the metrics of a model that answers the documents of a task with `answers`."""
    script = {}
    for request, answer in zip(prepared.requests, answers, strict=True):
        prompt = tuple(tokenizer(request.args[0])["input_ids"])
        script[prompt] = tokenizer(answer)["input_ids"]
    lm = DiffusionLM(ScriptedModel(script), tokenizer, batch_size=2)
    cell = answer_task(lm, prepared)
    assert [sample["response"] for sample in cell["samples"]] == answers
    return {name: figure["value"] for name, figure in cell["metrics"].items()}


def prepared(name: str, tokenizer: Any, sources: TaskSources, number: int) -> PreparedTask:
    return prepare(name, tokenizer, EvalConfig(num_samples=number, sources=sources), seed=0)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> TaskSources:
    folder = tmp_path_factory.mktemp("sources")
    for name, text in QUESTIONS.items():
        (folder / f"{name}_test.txt").write_text(text)
    (folder / "book.txt").write_text(" ".join(BOOK))
    for name in SCORED:
        rows = [json.dumps(official_row(name, number)) for number in range(2)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    place = str(folder)
    return TaskSources(place, f"{place}/book.txt", f"{place}/book.txt", place, "simple")


@pytest.mark.parametrize("name", GROUPS["generated"])
def test_generated_tasks(name, tokenizer, sources) -> None:
    task = prepared(f"{name}@64", tokenizer, sources, 2)
    right = [str(request.doc["completion"]) for request in task.requests]
    metrics = score(task, [right[0], "no idea"], tokenizer)
    assert metrics == {"score": 0.5, "recall": 0.5}


@pytest.mark.parametrize("name", ["niah_single_1", "niah_multikey_2", "ruler_vt", "ruler_fwe"])
def test_ruler_counts_the_values_found(name, tokenizer, sources) -> None:
    task = prepared(f"{name}@4k", tokenizer, sources, 2)
    values = [request.doc["outputs"] for request in task.requests]
    # All of the first document's in another case, the first one only of the second's.
    answers = [", ".join(values[0]).upper()[: task.row.max_new_tokens], values[1][0]]
    found = sum(value.upper() in answers[0] for value in values[0]) / len(values[0])
    expected = (found + 1 / len(values[1])) / 2
    assert score(task, answers, tokenizer)["score"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "other"), [("qa1", "kitchen"), ("qa2", "garden"), ("qa5", "milk")]
)
def test_babilong_finds_a_place_and_strictly_no_other(name, other, tokenizer, sources) -> None:
    task = prepared(f"babilong_{name}@8k", tokenizer, sources, 1)
    target = task.requests[0].doc["target"]
    given = {
        target: {"acc": 1.0, "strict": 1.0},
        f"{target} {other}"[:16]: {"acc": 1.0, "strict": 0.0},
        other: {"acc": 0.0, "strict": 0.0},
    }
    for answer, expected in given.items():
        assert score(task, [answer], tokenizer) == expected, answer


@pytest.mark.parametrize("name", sorted(SCORED))
def test_longbench_gives_each_set_its_own_score(name, tokenizer, sources) -> None:
    _, answer, expected = SCORED[name]
    task = prepared(f"longbench_{name}", tokenizer, sources, 2)
    stops = task.requests[0].args[1]["until"]
    # Half of the documents get the answer scored by hand, the others nothing that counts.
    answers = [answer.strip(), "-"]
    metrics = score(task, answers, tokenizer)
    assert metrics["score"] == pytest.approx(expected / 2), stops


def test_every_task_of_the_table_is_scored_here_or_beside_its_builder() -> None:
    here = {*GROUPS["generated"], *(f"longbench_{name}" for name in SCORED), *GROUPS["babilong"]}
    assert set(TASKS) == here | set(GROUPS["ruler"])
