"""Settings of the generated tasks, and what one example holds."""

from dataclasses import dataclass, field
from typing import TypedDict

from memdlm.errors import ConfigError

SPLITS = ("train", "test")


class Example(TypedDict):
    """One generated example; text is words separated by single spaces.

    `candidates` holds every value in the context that could be mistaken for the answer, the right
    ones included: what a model that cannot retrieve has to choose among. `evidence` says which
    sentences of the prompt the answer follows from: their first and end character, in their order
    in the prompt. `question` is the end of the prompt, behind the document.
    """

    prompt: str
    completion: str
    task: str
    answers: list[str]
    candidates: list[str]
    evidence: list[tuple[int, int]]
    question: str


@dataclass(frozen=True)
class TaskConfig:
    """Describe a set of generated examples; the same settings give the same examples."""

    tasks: tuple[str, ...] = field(
        default=(
            "single_needle",
            "multi_value_needle",
            "variable_tracking",
            "common_words",
            "two_fact_story",
        ),
        metadata={"help": "Tasks to draw from, in turn, so that each has an equal share."},
    )
    length: int = field(
        default=96, metadata={"help": "Words of prompt and completion together, at most."}
    )
    shortest_length: int | None = field(
        default=None,
        metadata={"help": "Draw each example's length between this and `length`; unset: fixed."},
    )
    num_examples: int = field(default=1000, metadata={"help": "Examples to generate."})
    split: str = field(
        default="train",
        metadata={"help": "`train` or `test`; the two share no value and no random stream."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of every draw."})
    facts_per_100_words: float = field(
        default=10.0,
        metadata={"help": "Density of facts, those that answer nothing included."},
    )
    num_values: int = field(
        default=2, metadata={"help": "Values to find for one name in `multi_value_needle`."}
    )
    num_hops: int = field(
        default=3, metadata={"help": "Statements from the asked name to its value in a chain."}
    )
    num_repeats: int = field(
        default=4, metadata={"help": "Times the common word of `common_words` is noted."}
    )
    num_moves: int = field(
        default=1,
        metadata={"help": "Places each person of `two_fact_story` enters; the last one counts."},
    )

    def __post_init__(self) -> None:
        """Refuse settings out of range, naming the one to change."""
        if self.split not in SPLITS:
            raise ConfigError(f"tasks: split {self.split!r} is unknown; use one of {SPLITS}")
        if not self.tasks:
            raise ConfigError("tasks: no task is named; name at least one")
        least = {"length": 1, "num_examples": 1, "num_values": 1, "num_hops": 1, "num_moves": 1}
        for name, minimum in (least | {"num_repeats": 2}).items():
            if getattr(self, name) < minimum:
                raise ConfigError(f"tasks: {name} must be at least {minimum}")
        if self.facts_per_100_words <= 0:
            raise ConfigError("tasks: facts_per_100_words must be above 0")
        if self.shortest_length is not None and not 1 <= self.shortest_length <= self.length:
            raise ConfigError("tasks: shortest_length must lie between 1 and length")
