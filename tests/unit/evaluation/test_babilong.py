"""BABILong: lm-eval's prompts, lengths kept, both metrics, and what a user can get wrong."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
import pytest
from lm_eval.tasks import TaskManager

from memdlm.data.encoding import encode_prompt
from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.errors import DataError
from memdlm.evaluation.tasks.babilong import BABILONG
from memdlm.evaluation.tasks.babilong.local import make_documents
from memdlm.evaluation.tasks.babilong.scoring import LABELS, only_label
from memdlm.evaluation.tasks.babilong.task import prompt_writer
from memdlm.evaluation.tasks.table import expand, find_task
from memdlm.evaluation.tasks.task import TaskRequest, TaskSources, as_lm_eval_task

QUESTIONS = {
    "qa1_single-supporting-fact": (
        "1 Mary moved to the bathroom.\n2 John went to the hallway.\n"
        "3 Where is Mary? \tbathroom\t1\n4 Daniel went back to the office.\n"
        "5 Where is Daniel? \toffice\t4\n1 Sandra went to the garden.\n"
        "2 Where is Sandra? \tgarden\t1\n"
    ),
    "qa2_two-supporting-facts": (
        "1 Mary got the milk there.\n2 Mary travelled to the hallway.\n"
        "3 Where is the milk? \thallway\t1 2\n"
    ),
    "qa3_three-supporting-facts": (
        "1 Mary got the milk.\n2 Mary went to the office.\n3 Mary went to the garden.\n"
        "4 Where was the milk before the garden? \toffice\t1 3 2\n"
    ),
    "qa4_two-arg-relations": (
        "1 The hallway is east of the bathroom.\n2 The bedroom is west of the bathroom.\n"
        "3 What is the bathroom east of?\tbedroom\t2\n"
    ),
    "qa5_three-arg-relations": (
        "1 Fred picked up the football there.\n2 Fred gave the football to Jeff.\n"
        "3 What did Fred give to Jeff? \tfootball\t2\n"
    ),
}
BOOK = [
    f"Page {page} says that the old clock number {page} in the tower had stopped long ago."
    for page in range(150)
]


HUB_ROWS = [
    {"input": f"Mary is in room {i}.", "question": "Where is Mary? ", "target": f"room {i}"}
    for i in range(5)
]


def word_tokenizer() -> Any:
    """One token per word, of all words that the prompts of these tests have."""
    folder = Path(lm_eval.tasks.__file__).parent / "babilong"
    instructions = [path.read_text() for path in folder.glob("babilong_qa[1-5].yaml")]
    # In YAML a line break is written as the two signs that would make "n" part of the next word.
    texts = [text.replace("\\n", " ") for text in instructions]
    rows = [" ".join(row.values()) for row in HUB_ROWS]
    return build_word_tokenizer([*BOOK, *QUESTIONS.values(), *texts, *rows])


def piece_tokenizer() -> Any:
    """Tokens of a few letters that reach over words, so that parts do not add up to the whole.

    Outer blanks are not counted either: sentences apart have fewer tokens than together.
    """
    from tokenizers import Tokenizer, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Strip()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        show_progress=False,
        max_token_length=3,
        initial_alphabet=[chr(code) for code in range(10, 127)],
    )
    tokenizer.train_from_iterator([" ".join(BOOK)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture
def sources(tmp_path: Path) -> TaskSources:
    for name, text in QUESTIONS.items():
        (tmp_path / f"{name}_test.txt").write_text(text)
        (tmp_path / f"{name}_train.txt").write_text(text.replace("Mary", "Trainee"))
    (tmp_path / "book.txt").write_text("\n".join(BOOK))
    return TaskSources(babi=str(tmp_path), background=str(tmp_path / "book.txt"))


def request(
    sources: TaskSources, task: str = "qa1", length: int | None = 512, **changes: Any
) -> TaskRequest:
    values = {"name": f"babilong_{task}@{length}", "num_samples": 100, "seed": 0} | changes
    return TaskRequest(
        **{"tokenizer": word_tokenizer(), "length": length, "sources": sources} | values
    )


def build(made: TaskRequest) -> Any:
    return as_lm_eval_task(BABILONG[made.name.partition("@")[0]].build(made))


def prompts(task: Any) -> list[str]:
    task.build_all_requests()
    return [instance.args[0] for instance in task.instances]


def fails(made: TaskRequest) -> str:
    with pytest.raises(DataError) as caught:
        build(made)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("task", sorted(LABELS))
def test_prompts_targets_and_generation_are_those_of_lm_evals_own_task(
    task: str, sources: TaskSources, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = build(request(sources, task))
    rows = list(ours.eval_docs)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    folder = Path(lm_eval.tasks.__file__).parent / "babilong"
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    theirs = manager.load(f"babilong_{task}")["tasks"][f"babilong_{task}"]
    assert prompts(ours) == prompts(theirs)
    assert ours.instances[0].args[1] == theirs.instances[0].args[1]
    assert [ours.doc_to_target(row) for row in rows] == [theirs.doc_to_target(row) for row in rows]
    assert rows[0]["target"] in LABELS[task]


def test_the_hub_is_asked_for_the_length_and_gives_its_first_documents(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def load_dataset(*arguments: Any, **options: Any) -> Any:
        asked.append((arguments, options))
        return datasets.Dataset.from_list(HUB_ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = build(request(TaskSources(), "qa2", 1024, num_samples=3))
    assert asked == [(("RMT-team/babilong-1k-samples", "1k"), {"split": "qa2"})]
    assert list(task.eval_docs) == HUB_ROWS[:3]
    assert prompts(task)[2].endswith("\n\nMary is in room 2.\nWhere is Mary?")


@pytest.mark.parametrize("length", [300, 512, 1024])
@pytest.mark.parametrize("make_tokenizer", [word_tokenizer, piece_tokenizer])
def test_prompt_and_answer_fill_the_length_and_never_exceed_it(
    make_tokenizer: Any, length: int, sources: TaskSources
) -> None:
    tokenizer = make_tokenizer()
    # In pieces the description and examples alone take about five hundred.
    length += 0 if make_tokenizer is word_tokenizer else 512
    task = build(request(sources, length=length, tokenizer=tokenizer))
    for prompt in prompts(task):
        size = len(encode_prompt(tokenizer, prompt, chat_template="never")) + 16
        assert length - 25 <= size <= length


def test_facts_keep_their_order_among_consecutive_sentences(sources: TaskSources) -> None:
    rows = {row["id"]: row for row in build(request(sources)).eval_docs}
    assert [rows[i]["question"] for i in range(3)] == [
        "Where is Mary?",
        "Where is Daniel?",
        "Where is Sandra?",
    ]
    facts = ["Mary moved to the bathroom.", "John went to the hallway.", "Daniel went back"]
    places = [rows[1]["input"].index(fact) for fact in facts]
    assert places == sorted(places)
    assert "Trainee" not in rows[0]["input"]
    words = rows[0]["input"].split()
    pages = [int(words[i + 1]) for i, word in enumerate(words) if word == "Page"]
    assert len(pages) > 10
    assert all((after - before) % len(BOOK) == 1 for before, after in pairwise(pages))


def test_rows_to_train_on_are_the_same_prompts_of_the_training_stories(
    sources: TaskSources,
) -> None:
    write_prompt = prompt_writer("qa1")
    asked = build(request(sources))
    assert prompts(asked) == [write_prompt(row) for row in asked.eval_docs]
    tokenizer = build_word_tokenizer([*map(write_prompt, asked.eval_docs), "Trainee"])
    made = request(sources, tokenizer=tokenizer)
    rows = make_documents(made, "qa1", 16, write_prompt, split="train")
    assert sorted(row["id"] for row in rows) == [0, 1, 2]
    assert any("Trainee moved to the bathroom." in row["input"] for row in rows)
    assert not any("Mary" in row["input"] for row in rows)
    assert make_documents(made, "qa1", 16, write_prompt) == list(asked.eval_docs)


def test_facts_fall_everywhere(sources: TaskSources) -> None:
    shares = []
    for seed in range(12):
        text = build(request(sources, seed=seed, num_samples=1)).eval_docs[0]["input"]
        shares.append(text.index(" to the ") / len(text))
    assert min(shares) < 0.3
    assert max(shares) > 0.6


def test_a_length_of_zero_is_the_facts_alone_and_needs_no_background(tmp_path: Path) -> None:
    (tmp_path / "qa5_x_test.txt").write_text(QUESTIONS["qa5_three-arg-relations"])
    task = build(request(TaskSources(babi=str(tmp_path)), "qa5", 0))
    assert list(task.eval_docs) == [
        {
            "id": 0,
            "input": "Fred picked up the football there. Fred gave the football to Jeff.",
            "question": "What did Fred give to Jeff?",
            "target": "football",
        }
    ]


def test_files_with_either_separator_give_the_same_documents(sources: TaskSources) -> None:
    with_tabs = list(build(request(sources)).eval_docs)
    assert sources.babi is not None
    path = Path(sources.babi) / "qa1_single-supporting-fact_test.txt"
    path.write_text(path.read_text().replace("\t", "|"))
    assert list(build(request(sources)).eval_docs) == with_tabs


def test_the_seed_decides_the_documents_and_lengths_share_questions(sources: TaskSources) -> None:
    first, again, other, longer = (
        list(build(request(sources, seed=seed, length=length)).eval_docs)
        for seed, length in ((0, 512), (0, 512), (1, 512), (0, 1024))
    )
    assert first == again
    assert first != other
    assert [row["id"] for row in first] == [row["id"] for row in longer]


def test_a_story_too_long_for_the_length_is_passed_over(sources: TaskSources) -> None:
    assert sources.babi is not None
    path = Path(sources.babi) / "qa1_single-supporting-fact_test.txt"
    long = "".join(f"{i} Mary moved to the bathroom.\n" for i in range(1, 100))
    path.write_text(f"{long}100 Where is Mary? \tbathroom\t99\n{path.read_text()}")
    assert sorted(row["id"] for row in build(request(sources)).eval_docs) == [1, 2, 3]


def test_project_gutenbergs_licence_is_no_background(sources: TaskSources) -> None:
    path = Path(str(sources.background))
    licence = "This licence text is of more than ten words and never part of a book itself."
    book = f"{licence}\n*** START OF THIS PROJECT GUTENBERG EBOOK X ***\n{path.read_text()}\n"
    path.write_text(f"{book}*** END OF THIS PROJECT GUTENBERG EBOOK X ***\n{licence * 200}")
    for seed in range(5):
        text = " ".join(row["input"] for row in build(request(sources, seed=seed)).eval_docs)
        assert "licence" not in text
        assert "clock" in text


@pytest.mark.parametrize(
    ("answer", "acc", "strict"),
    [
        ("The most recent location of Mary is bathroom.", 1.0, 1.0),
        (" BATHROOM", 1.0, 1.0),
        ("bathroom, hallway, kitchen", 1.0, 0.0),
        ("It is the hallway. No, the bathroom.", 1.0, 0.0),
        ("bathroom\n<example> Where is John? hallway", 1.0, 1.0),
        ("The hallway.", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_both_metrics_give_the_value_worked_out_by_hand(
    answer: str, acc: float, strict: float, sources: TaskSources
) -> None:
    task = build(request(sources, length=0))
    (row,) = [row for row in task.eval_docs if row["target"] == "bathroom"]
    assert task.process_results(row, [answer]) == {"acc": acc, "strict": strict}
    assert list(task.aggregation()) == ["acc", "strict"]


def test_a_label_of_the_question_is_no_part_of_the_answer() -> None:
    question = "Where was the milk before the garden?"
    answer = "Before the garden the milk was in the office."
    assert only_label("office", answer, question, LABELS["qa3"])
    assert not only_label("garden", answer, question, LABELS["qa3"])
    assert only_label("Fred", "fred", "Who gave the football to Jeff?", LABELS["qa5"])


def test_missing_data_is_one_line_that_names_the_fix(sources: TaskSources, tmp_path: Path) -> None:
    babi, book = sources.babi, Path(str(sources.background))
    assert "give sources.background" in fails(request(TaskSources(babi=babi)))
    assert "give sources.babi too" in fails(request(TaskSources(background=str(book))))
    empty = tmp_path / "empty"
    empty.mkdir()
    message = fails(request(TaskSources(babi=str(empty), background=str(book))))
    assert "no qa1_*_test.txt; give the folder" in message
    nowhere = TaskSources(babi=babi, background=str(tmp_path / "none.txt"))
    assert "none.txt cannot be read" in fails(request(nowhere))
    assert "give a longer text as sources.background" in fails(request(sources, length=8192))
    assert "use a longer length" in fails(request(sources, length=100))
    book.write_text("Short. Shorter!")
    assert "no sentence of 10 tokens" in fails(request(sources))
    (tmp_path / "qa1_single-supporting-fact_test.txt").write_text("no number\n")
    assert "line 1: not in bAbI's format" in fails(request(sources))


def test_a_tokenizer_that_cannot_encode_the_task_is_refused(sources: TaskSources) -> None:
    small = build_word_tokenizer([*BOOK, *QUESTIONS.values()])
    message = fails(request(sources, tokenizer=small))
    assert message.startswith("babilong_qa1@512: the tokenizer does not know")
    assert "('I', 'will', 'you', 'context', 'with', ...)" in message


def test_a_length_the_hub_lacks_and_a_hub_out_of_reach_name_the_fix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = fails(request(TaskSources(), length=1536))
    assert "the hub has 0k, 1k, 2k, 4k, 8k, 16k, 32k, 64k, 128k; use one" in message
    message = fails(request(TaskSources(), length=1024))
    assert "the hub cannot be reached" in message
    assert message.endswith("or give sources.babi and sources.background")


def test_the_table_knows_the_group_and_says_what_would_be_fetched() -> None:
    tasks, groups = expand(["babilong@0k"])
    assert tasks == [f"babilong_qa{number}@0k" for number in range(1, 6)]
    assert groups == {"babilong@0k": tasks}
    row, length = find_task("babilong_qa3@128k")
    assert length == 128 * 1024
    assert (row.max_new_tokens, row.num_samples, row.metrics[0]) == (16, 100, "acc")
    assert "RMT-team" in str(row.hub(TaskSources()))
    assert row.hub(TaskSources(babi="folder")) is None
