"""Read rows from JSONL, JSON and Parquet files and from the hub, each with its place for messages.

A source is a path or a hub id: what exists, or ends in a data file's suffix, is a path; the rest is
`name`, `name:split` or `name:config:split` on the hub. This file knows nothing of columns or
tokens. `datasets` and `pyarrow` are imported only when a source needs them.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from memdlm.errors import DataError

SUFFIXES = (".jsonl", ".json", ".parquet")
# A missing path with one of these is reported as a file, not looked up on the hub.
_FILE_LIKE = re.compile(r"\.(jsonl?|ndjson|parquet|csv|tsv|txt|arrow|ya?ml|xml|gz|zst|zip|xz)$")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_KNOWN = "use .jsonl (one object per line), .json (a list of objects) or .parquet"


@dataclass(frozen=True, slots=True)
class Record:
    """One row and where it stands, e.g. `train.jsonl:12` or `train.parquet row 3` (from 1)."""

    values: dict[str, Any]
    where: str


def read_records(source: str, limit: int | None = None) -> list[Record]:
    """Read the first `limit` rows (None: all) of a file or hub data set.

    Raises:
        DataError: As `stream_records`.
    """
    return list(_stream(source, limit, whole=True))


def stream_records(source: str, limit: int | None = None) -> Iterator[Record]:
    """Yield the first `limit` rows (None: all) of a file or hub data set, few at a time in memory.

    Raises:
        DataError: The source is missing, unreadable, malformed, of an unknown kind, or empty; the
            message names the file and, where there is one, the line or row. A `.json` file, which
            is one value and cannot be read in parts.
    """
    if is_file_source(source) and source.lower().endswith(".json"):
        raise DataError(f"{source} is one list and cannot be streamed: use .jsonl or .parquet")
    yield from _stream(source, limit, whole=False)


def _stream(source: str, limit: int | None, *, whole: bool) -> Iterator[Record]:
    path = Path(source).expanduser()
    is_empty = True
    try:
        rows = _read_file(path) if _is_path(source, path) else _read_hub(source, whole=whole)
        for record in islice(rows, limit):
            is_empty = False
            yield record
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise DataError(
            f"cannot read {source} ({reason}): check the path and its rights"
        ) from error
    if is_empty:
        raise DataError(f"{source} holds no rows: give a source with at least one")


def is_file_source(source: str) -> bool:
    """Tell whether a source is a path, as against a hub id."""
    return _is_path(source, Path(source).expanduser())


def one_line(error: BaseException) -> str:
    """Return an error's text without line breaks, for messages of one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _is_path(source: str, path: Path) -> bool:
    if source.startswith((".", "/", "~")) or path.exists():
        return True
    return bool(_FILE_LIKE.search(source.lower())) or not _HUB_NAME.match(source)


def _read_file(path: Path) -> Iterator[Record]:
    if path.is_dir():
        raise DataError(f"{path} is a folder: name one file in it ({', '.join(SUFFIXES)})")
    if not path.exists():
        raise DataError(f"{path} does not exist: check the path")
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path} has the unknown suffix {path.suffix!r}: {_KNOWN}")
    yield from reader(path)


def _read_jsonl(path: Path) -> Iterator[Record]:
    # Bytes, so that a line is what an editor counts: str.splitlines also breaks at U+2028 and \f,
    # which are legal inside a JSON string.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            text = _decode(line, where).strip()
            if not text:
                continue
            try:
                values = json.loads(text)
            except (json.JSONDecodeError, RecursionError) as error:
                detail = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deep"
                raise DataError(
                    f"{where} is not valid JSON ({detail}): each line must be one whole object"
                ) from error
            yield Record(_checked_object(values, where), where)


def _read_json(path: Path) -> Iterator[Record]:
    text = _decode(path.read_bytes(), str(path))
    if not text.strip():
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno} is not valid JSON ({error.msg}): the file must be one list of "
            "objects; if each line is an object, rename it to .jsonl"
        ) from error
    if not isinstance(rows, list):
        raise DataError(
            f"{path} holds one {_json_type(rows)}: it must be a list of objects; if each line is "
            "an object, rename it to .jsonl"
        )
    for number, values in enumerate(rows, start=1):
        where = f"{path} row {number}"
        yield Record(_checked_object(values, where), where)


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = (batch.to_pylist() for batch in file.iter_batches(batch_size=256))
            yield from _numbered((row for rows in batches for row in rows), str(path))
    except pyarrow.ArrowException as error:
        raise DataError(
            f"cannot read {path} as Parquet ({one_line(error)}): write the file again"
        ) from error


def _read_hub(source: str, *, whole: bool) -> Iterator[Record]:
    yield from _numbered(load_hub(source, streaming=not whole), source)


def load_hub(source: str, *, streaming: bool = False) -> Any:
    """Return a hub data set: a `datasets.Dataset`, or an `IterableDataset` if streaming.

    Raises:
        DataError: `source` is no hub id, or the data set cannot be had.
    """
    # A colon inside brackets belongs to a slice: `name:train[:100]`.
    name, *rest = re.split(r":(?![^\[]*\])", source)
    if len(rest) > 2 or not all([name, *rest]) or not _HUB_NAME.fullmatch(name):
        raise DataError(
            f"{source!r} is neither a file nor a hub id: hub ids are name, name:split or "
            "name:config:split"
        )
    split = rest[-1] if rest else "train"
    config = rest[0] if len(rest) == 2 else None

    import datasets

    try:
        # Only where wanted: the arguments of an ordinary load stay the ordinary ones.
        extra = {"streaming": True} if streaming else {}
        return datasets.load_dataset(name, config, split=split, **extra)
    # Loading a hub data set can fail in any of its dependencies (HTTP, parsing, disk): all of it is
    # for the user one event, a data set that could not be had.
    except Exception as error:
        if isinstance(error, datasets.exceptions.DatasetNotFoundError):
            fix = "check the name, or log in if it is private; a local file needs its suffix"
            raise DataError(f"no hub data set {name!r} is visible from here: {fix}") from error
        if isinstance(error, ConnectionError):
            raise DataError(
                f"the hub cannot be reached for {name!r} ({one_line(error)}): check the network, "
                "or download the data and give the path of a .jsonl, .json or .parquet file"
            ) from error
        raise DataError(
            f"cannot load {source!r} from the hub ({one_line(error)}): hub ids are name, "
            "name:split or name:config:split"
        ) from error


def _numbered(rows: Iterable[dict[str, Any]], name: str) -> Iterator[Record]:
    for number, values in enumerate(rows, start=1):
        yield Record(values, f"{name} row {number}")


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} is not UTF-8 (byte {error.start}): save the file in UTF-8"
        ) from error


def _checked_object(values: object, where: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise DataError(f"{where} is a {_json_type(values)}: each row must be an object {{...}}")
    return values


def _json_type(value: object) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
