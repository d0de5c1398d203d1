"""Read the bAbI question-answering tasks (Weston et al., arXiv 1502.05698) from their own files.

A line is `ID text` or `ID question<TAB>answer<TAB>supporting ids`; IDs restart at 1 per story. Some
copies have `|` in place of the tab. Texts come as the file has them, without outer blanks.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from memdlm.errors import DataError

_LINE = re.compile(r"(\d+) ([^\t|]+)(?:[\t|]([^\t|]+)[\t|]([\d ]*))?")


@dataclass(frozen=True)
class Question:
    """One question and the story up to it, earlier questions left out.

    `support` are the facts that the answer follows from, in the file's order; ids that name none
    are passed over.
    """

    facts: tuple[str, ...]
    text: str
    answer: str
    support: tuple[str, ...] = ()


def find_babi_file(folder: Path, task: str, split: str) -> Path:
    """Return a task's file in a folder: `qa1`, `test` is `qa1_single-supporting-fact_test.txt`.

    Raises:
        DataError: The folder has no such file.
    """
    files = sorted(folder.glob(f"{task}_*_{split}.txt"))
    if not files:
        raise DataError(
            f"{folder}: no {task}_*_{split}.txt; give the folder of bAbI's English task files"
        )
    return files[0]


def read_babi(path: Path) -> Iterator[Question]:
    """Yield every question of a file with the facts that precede it.

    Raises:
        DataError: The file cannot be read, or a line is not in bAbI's format.
    """
    facts: dict[str, str] = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise DataError(f"{path} line {number}: not in bAbI's format `ID text`; check the file")
        if match[1] == "1":
            facts = {}
        if match[3] is None:
            facts[match[1]] = match[2].strip()
        else:
            support = tuple(facts[line] for line in match[4].split() if line in facts)
            yield Question(tuple(facts.values()), match[2].strip(), match[3].strip(), support)


def read_text(path: Path) -> str:
    """Return a text file's content.

    Raises:
        DataError: It cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); check the path") from error
