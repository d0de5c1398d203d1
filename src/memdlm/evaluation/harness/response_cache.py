"""Answers that outlive a killed process: one SQLite file per process, all of a folder are read.

A key says everything that decides an answer (`answer_key`), so a file of other settings, another
model or another seed can never answer. What `put` has returned from is on the disk; a process that
is killed in the middle of one leaves what was there before. The journal is SQLite's plain one, not
the write-ahead log, which network file systems do not share between machines.
"""

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from memdlm.errors import CheckpointError, DataError
from memdlm.evaluation.harness.sharding import Shard

_FORMAT = 1
_SUFFIX = ".sqlite"
# To be counted up when the same settings come to give other answers.
_SCHEME = b"memdlm-answer-3\n"
# Seconds to wait for another process that reads or writes the file at this moment.
_BUSY_SECONDS = 60.0
# Far below the number of parameters that any build of SQLite takes.
_KEYS_AT_ONCE = 500

Answer = dict[str, Any]


def answer_key(settings: str, kind: str, texts: Sequence[str], facts: Any) -> str:
    """Return the SHA-256 that an answer is stored under, in hex.

    Args:
        settings: Fingerprint of what is fixed for a run: model, adapter, memory, ...
        kind: What is asked, e.g. `generate_until`.
        texts: Hashes of the token ids of the prompt, or of context and continuation.
        facts: What else decides the answer: generation settings, seeds. JSON.
    """
    digest = hashlib.sha256(_SCHEME)
    for part in (settings, kind, list(texts), facts):
        digest.update(json.dumps(part, sort_keys=True).encode())
        digest.update(b"\n")
    return digest.hexdigest()


class ResponseCache:
    """Answers by key: those of this process's file, and of the other files beside it.

    Raises, besides what methods say, a `DataError` wherever a file turns out to be damaged.
    """

    def __init__(self, folder: str | Path, shard: Shard | None = None) -> None:
        """Open `folder`, made if it is missing, to write as process `shard`.

        Raises:
            CheckpointError: The folder cannot be written.
            DataError: A file of it is damaged or of an unknown format.
        """
        shard = shard or Shard()
        self.folder = Path(folder)
        self.path = self.folder / f"{shard.name}{_SUFFIX}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"cannot make the folder {self.folder} ({error.strerror})"
            ) from error
        for path in self._files():
            if path != self.path:
                with _opened(path) as connection:
                    _check(connection, path)
        with _readable(self.path):
            self._own = _connect(self.path, "rwc")
            _check(self._own, self.path)
        with self._writing():
            self._own.execute(
                "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, value TEXT)"
            )
            self._own.execute("CREATE TABLE IF NOT EXISTS failures (time REAL, reason TEXT)")
            self._own.execute("DELETE FROM failures")
            self._own.execute(f"PRAGMA user_version = {_FORMAT}")

    @classmethod
    def open(cls, folder: str | Path, shard: Shard | None = None) -> "ResponseCache":
        """Return the cache of `folder`; arguments and errors as those of the class."""
        return cls(folder, shard)

    def __enter__(self) -> "ResponseCache":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close this process's file."""
        self._own.close()

    def get(self, keys: Iterable[str]) -> dict[str, Answer]:
        """Return the answers that some file of the folder has, by key."""
        missing = list(dict.fromkeys(keys))
        found: dict[str, Answer] = {}
        with _readable(self.path):
            found.update(_read(self._own, missing))
        for path in self._files():
            missing = [key for key in missing if key not in found]
            if not missing:
                break
            if path != self.path:
                with _opened(path) as connection:
                    found.update(_read(connection, missing))
        return found

    def put(self, answers: Mapping[str, Answer]) -> None:
        """Store answers, all of them or none.

        Raises:
            CheckpointError: The disk is full, or the file cannot be written.
        """
        # Sorted, so that a file's content does not depend on the order of a dict.
        rows = [(key, json.dumps(value, sort_keys=True)) for key, value in answers.items()]
        with self._writing():
            self._own.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", rows)

    def mark_failed(self, reason: str) -> None:
        """Tell the processes that wait for this one that nothing more will come."""
        with self._writing():
            self._own.execute("INSERT INTO failures VALUES (?, ?)", (time.time(), reason))

    def failures(self, since: float) -> dict[str, str]:
        """Return file name and reason of every other process that has failed after `since`.

        Args:
            since: Unix time; older failures are those of an earlier run.
        """
        reasons = {}
        for path in self._files():
            if path == self.path:
                continue
            with _opened(path) as connection:
                if _has_table(connection, "failures"):
                    query = "SELECT reason FROM failures WHERE time >= ?"
                    for (reason,) in connection.execute(query, (since,)):
                        reasons[path.name] = str(reason)
        return reasons

    def __len__(self) -> int:
        """Return how many answers this process's own file holds."""
        with _readable(self.path):
            (number,) = self._own.execute("SELECT COUNT(*) FROM answers").fetchone()
        return int(number)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob(f"*{_SUFFIX}"))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Run one transaction; undo it, and say why, if it fails."""
        try:
            self._own.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._own.execute("COMMIT")
            finally:
                if self._own.in_transaction:
                    self._own.execute("ROLLBACK")
        except sqlite3.OperationalError as error:
            raise CheckpointError(_cannot_write(self.path, error)) from error
        except sqlite3.DatabaseError as error:
            raise _damaged(self.path, error) from error


def _cannot_write(path: Path, error: sqlite3.Error) -> str:
    kept = "the answers stored before are kept"
    if (error.sqlite_errorcode & 0xFF) in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
        return (
            f"{path}: the disk is full or failing ({error}); {kept}: free some space and run the "
            "command again"
        )
    return f"{path}: the response cache cannot be written ({error}); {kept}: check the folder"


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    # By URI: a reader must not create a file. It may write, though, to finish or undo what a
    # killed process has left half done, which SQLite asks of the first who comes.
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    return sqlite3.connect(uri, uri=True, timeout=_BUSY_SECONDS, isolation_level=None)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn SQLite's errors while reading `path` into ours."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise CheckpointError(
            f"{path}: the response cache cannot be opened ({error}); check the folder"
        ) from error
    except sqlite3.DatabaseError as error:
        raise _damaged(path, error) from error


@contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    """Open the file of another process to read it."""
    with _readable(path):
        connection = _connect(path, "rw")
        try:
            yield connection
        finally:
            connection.close()


def _check(connection: sqlite3.Connection, path: Path) -> None:
    """Refuse a file that is torn or of another format; an empty one is new."""
    ((verdict, *_),) = connection.execute("PRAGMA quick_check(1)").fetchall()
    if verdict != "ok":
        raise _damaged(path, verdict)
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version not in (0, _FORMAT):
        raise DataError(
            f"{path}: the response cache has format {version}, and this memdlm reads {_FORMAT}: "
            "use the memdlm that wrote it, or another output folder"
        )


def _damaged(path: Path, why: object) -> DataError:
    return DataError(
        f"{path}: the response cache is damaged ({why}): delete the file; its answers are then "
        "computed again"
    )


def _has_table(connection: sqlite3.Connection, name: str) -> bool:
    query = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?"
    return connection.execute(query, (name,)).fetchone() is not None


def _read(connection: sqlite3.Connection, keys: Sequence[str]) -> dict[str, Answer]:
    if not _has_table(connection, "answers"):
        return {}  # another process has only just made the file
    found = {}
    for start in range(0, len(keys), _KEYS_AT_ONCE):
        part = keys[start : start + _KEYS_AT_ONCE]
        query = f"SELECT key, value FROM answers WHERE key IN ({','.join('?' * len(part))})"
        found.update({key: json.loads(value) for key, value in connection.execute(query, part)})
    return found
