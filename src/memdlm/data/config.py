"""The data section of a recipe: where rows come from and what happens to those that do not fit.

It knows no file and no tokenizer. How padding is supervised is not a property of the data but of
the objective (`memdlm.diffusion.objective.ObjectiveConfig.padding`).
"""

from dataclasses import dataclass, field

from memdlm.errors import ConfigError

FORMATS = ("auto", "prompt_completion", "conversational", "alpaca")
OVERLONG = ("filter", "truncate", "truncate_right")
ON_EMPTY = ("error", "drop")
CHAT_TEMPLATE = ("auto", "never")
STANDARD_COLUMNS = ("prompt", "completion", "messages", "instruction", "input", "output")


@dataclass(frozen=True)
class DataConfig:
    """Name the training and evaluation rows, their form, and the window they must fit.

    Raises:
        ConfigError: A value is out of range or not among the choices.
    """

    train: str | None = field(
        default=None,
        metadata={
            "help": "Training rows: a .jsonl, .json or .parquet file, or a hub id as `name`, "
            "`name:split` or `name:config:split` (split `train` if not named)."
        },
    )
    eval: str | None = field(
        default=None,
        metadata={
            "help": "Evaluation rows, named like `train`. If not given, `test_fraction` of the "
            "training rows is held out."
        },
    )
    format: str = field(
        default="auto",
        metadata={
            "help": "Form of a row: prompt_completion (`prompt`, `completion`), conversational "
            "(`messages`, or prompt and completion as message lists), alpaca (`instruction`, "
            "`input`, `output`), or auto: told by the columns.",
            "choices": FORMATS,
        },
    )
    columns: dict[str, str] = field(
        default_factory=dict,
        metadata={
            "help": "Your column for a standard one, e.g. {prompt: question, completion: answer}. "
            f"Standard columns: {', '.join(STANDARD_COLUMNS)}."
        },
    )
    chat_template: str = field(
        default="auto",
        metadata={
            "help": "auto: use the tokenizer's chat template where it has one (a prompt string is "
            "then one user turn), as the paper trains; never: encode the bare texts.",
            "choices": CHAT_TEMPLATE,
        },
    )
    max_length: int = field(
        default=4096,
        metadata={"help": "Longest row in tokens, prompt and response together (paper: 4096)."},
    )
    overlong: str = field(
        default="filter",
        metadata={
            "help": "Rows longer than `max_length`: filter drops them (the paper's text), truncate "
            "cuts the response on the right, then the prompt on the left; at least one response "
            "token stays. truncate_right only cuts on the right (the paper's scripts), and drops "
            "rows whose prompt fills the window: nothing of them is left to learn.",
            "choices": OVERLONG,
        },
    )
    on_empty: str = field(
        default="error",
        metadata={
            "help": "Rows whose response is empty: error names the first one, drop counts them.",
            "choices": ON_EMPTY,
        },
    )
    test_fraction: float = field(
        default=0.05,
        metadata={
            "help": "Share of the training rows held out when `eval` is not given; 0 holds out "
            "nothing (paper, LongAlpaca: 0.05)."
        },
    )
    split_seed: int = field(
        default=42,
        metadata={
            "help": "Seed of that split, apart from the run's seed so that runs with several seeds "
            "share one test set (paper: 42; same rows as `datasets.train_test_split`)."
        },
    )
    cache: bool = field(
        default=True,
        metadata={
            "help": "Keep encoded rows in a cache folder (MEMDLM_CACHE, or memdlm in the user's), "
            "under a hash of the data's bytes, the tokenizer and these settings."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read and encode training rows as they are needed, for more than memory holds; "
            "needs training.max_steps, and `eval` or `test_fraction: 0`."
        },
    )
    shuffle_buffer: int = field(
        default=2048,
        metadata={"help": "Rows held, shuffled and grouped by length at a time while streaming."},
    )
    num_rows: int | None = field(
        default=None,
        metadata={"help": "Use only the first so many rows of the training source; null: all."},
    )
    num_eval_rows: int | None = field(
        default=None,
        metadata={"help": "Use only the first so many rows of `eval`; null: all."},
    )

    def __post_init__(self) -> None:
        """Check every value that can be checked without opening a file."""
        for name, choices in (
            ("format", FORMATS),
            ("overlong", OVERLONG),
            ("on_empty", ON_EMPTY),
            ("chat_template", CHAT_TEMPLATE),
        ):
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"data.{name} is {getattr(self, name)!r}: choose one of {', '.join(choices)}"
                )
        if self.max_length < 2:
            raise ConfigError(
                f"data.max_length is {self.max_length}: a prompt and a response token need 2"
            )
        if not 0 <= self.test_fraction < 1:
            raise ConfigError(
                f"data.test_fraction is {self.test_fraction}: choose 0 (none) to below 1"
            )
        if self.shuffle_buffer < 1:
            raise ConfigError(f"data.shuffle_buffer is {self.shuffle_buffer}: use 1 or more")
        if self.streaming and self.eval is None and self.test_fraction > 0:
            raise ConfigError(
                "data.streaming does not know how many rows there are to hold out a share of: name "
                "data.eval, or set data.test_fraction to 0"
            )
        for name in ("num_rows", "num_eval_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"data.{name} is {value}: use 1 or more, or null for all rows")
        for standard in self.columns:
            if standard not in STANDARD_COLUMNS:
                raise ConfigError(
                    f"data.columns names {standard!r}: the standard columns are "
                    f"{', '.join(STANDARD_COLUMNS)}"
                )
