"""RULER's score against values worked out by hand."""

from collections.abc import Callable
from typing import Any

import pytest

from memdlm.evaluation.tasks.ruler.scoring import string_match_all
from memdlm.evaluation.tasks.task import as_lm_eval_task


@pytest.mark.parametrize(
    ("response", "answers", "score"),
    [
        (" 1234567.", ["1234567"], 1.0),
        ("12345", ["1234567"], 0.0),
        ("", ["1234567"], 0.0),
        ("abcde, FGHIJ", ["ABCDE", "fghij", "KLMNO", "PQRST"], 0.5),
        ("1. cat 2. dog 3. concatenate", ["cat", "dog", "bird"], 2 / 3),
        ("white\x00space", ["white\nspace"], 1.0),
    ],
)
def test_the_score_is_the_share_of_answers_in_the_response(
    response: str, answers: list[str], score: float
) -> None:
    assert string_match_all(response, answers) == pytest.approx(score)


def test_lm_eval_scores_a_document_by_it(make: Callable[..., dict[str, Any]]) -> None:
    task = as_lm_eval_task(make("ruler_vt", 512, num_samples=1))
    (document,) = task.test_docs()
    names = document["outputs"]
    assert task.process_results(document, [" ".join(names)]) == {"score": 1.0}
    assert task.process_results(document, [f"{names[4]} and {names[0].lower()}"]) == {"score": 0.4}
    assert task.process_results(document, ["none"]) == {"score": 0.0}
    assert task.aggregation()["score"]([0.4, 1.0]) == pytest.approx(0.7)
    assert task.higher_is_better() == {"score": True}
