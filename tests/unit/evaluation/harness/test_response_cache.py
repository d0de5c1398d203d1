"""The response cache: what is stored stays, what is other is not found, what is torn is said."""

import json
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from memdlm.errors import CheckpointError, DataError
from memdlm.evaluation.harness.response_cache import ResponseCache, answer_key
from memdlm.evaluation.harness.sharding import Shard

ANSWER = {"text": "in the box\n\u00e9", "num_tokens": 3, "memory": "written"}


def test_answers_are_found_again_in_another_process(tmp_path: Path) -> None:
    with ResponseCache.open(tmp_path / "deep" / "responses") as cache:
        cache.put({"a": ANSWER, "b": {"value": -1.5}})
        assert cache.get(["b", "c", "a", "a"]) == {"a": ANSWER, "b": {"value": -1.5}}
        assert len(cache) == 2
    with ResponseCache(tmp_path / "deep" / "responses") as cache:
        assert cache.get(["a"]) == {"a": ANSWER}
        assert cache.path.name == "0-of-1.sqlite"


def test_every_process_writes_its_own_file_and_reads_all(tmp_path: Path) -> None:
    first, second = (ResponseCache(tmp_path, Shard(index, 2)) for index in (0, 1))
    second.put({"a": ANSWER})
    assert first.get(["a"]) == {"a": ANSWER}
    assert (len(first), len(second)) == (0, 1)
    assert sorted(path.name for path in tmp_path.glob("*.sqlite")) == [
        "0-of-2.sqlite",
        "1-of-2.sqlite",
    ]
    # A later run of one process has what both have answered.
    assert ResponseCache(tmp_path).get(["a"]) == {"a": ANSWER}


def test_more_keys_than_one_query_takes(tmp_path: Path) -> None:
    with ResponseCache(tmp_path) as cache:
        answers = {f"key{i}": {"value": i} for i in range(1203)}
        cache.put(answers)
        assert cache.get([*answers, "other"]) == answers


def test_whatever_decides_an_answer_changes_its_key() -> None:
    base = ("settings", "generate_until", ["abc"], {"max": 4})
    others = [
        ("other", *base[1:]),
        (base[0], "likelihood", *base[2:]),
        (*base[:2], ["a", "bc"], base[3]),
        (*base[:2], ["abd"], base[3]),
        (*base[:3], {"max": 5}),
    ]
    keys = [answer_key(*parts) for parts in (base, *others)]
    assert len(set(keys)) == len(keys)
    assert answer_key("settings", "generate_until", ("abc",), {"max": 4}) == keys[0]


def test_what_was_not_committed_is_gone_and_the_rest_is_kept(tmp_path: Path) -> None:
    with ResponseCache(tmp_path) as cache:
        cache.put({"a": ANSWER})
        with pytest.raises(TypeError):
            cache.put({"b": ANSWER, "c": {"value": object()}})
        assert cache.get(["a", "b", "c"]) == {"a": ANSWER}


DIES_WHILE_STORING = """
import os, signal, sys
from memdlm.evaluation.harness.response_cache import ResponseCache
cache = ResponseCache(sys.argv[1])
cache.put({"a": {"text": "kept"}})
cache._own.execute("PRAGMA cache_size = 4")  # so that pages reach the file before the commit
with cache._writing():
    for i in range(100):
        cache._own.execute("INSERT INTO answers VALUES (?, ?)", (str(i), "x" * 4000))
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("shard", [Shard(0, 1), Shard(1, 2)])
def test_a_process_that_is_killed_while_storing_leaves_what_was_there(
    tmp_path: Path, shard: Shard
) -> None:
    done = subprocess.run([sys.executable, "-c", DIES_WHILE_STORING, tmp_path], check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "0-of-1.sqlite-journal").exists()  # it died in the middle
    with ResponseCache(tmp_path, shard) as cache:
        assert cache.get(["a", "0", "99"]) == {"a": {"text": "kept"}}
    assert not (tmp_path / "0-of-1.sqlite-journal").exists()


def test_a_torn_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    with ResponseCache(tmp_path) as cache:
        cache.put({str(i): {"text": "x" * 500} for i in range(100)})
        path = cache.path
    whole = path.read_bytes()
    for torn in (whole[: len(whole) // 2], b"nonsense" * 512, whole[:5000] + b"\xff" * 9000):
        path.write_bytes(torn)
        for shard in (Shard(0, 1), Shard(1, 2)):
            with pytest.raises(DataError, match=r"0-of-1.sqlite: .* damaged .*: delete the file"):
                ResponseCache(tmp_path, shard)
    path.write_bytes(b"")  # killed before anything was written
    assert len(ResponseCache(tmp_path)) == 0


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "0-of-1.sqlite")
    connection.execute("PRAGMA user_version = 7")
    connection.execute("CREATE TABLE other (x)")
    connection.close()
    with pytest.raises(DataError, match="format 7, and this memdlm reads 1"):
        ResponseCache(tmp_path)


def test_a_full_disk_is_one_clear_error_and_loses_nothing(tmp_path: Path) -> None:
    with ResponseCache(tmp_path) as cache:
        cache.put({"a": ANSWER})
        (pages,) = cache._own.execute("PRAGMA page_count").fetchone()
        cache._own.execute(f"PRAGMA max_page_count = {pages + 2}")
        with pytest.raises(CheckpointError, match=r"disk is full .* stored before are kept"):
            cache.put({str(i): {"text": "x" * 4000} for i in range(50)})
        assert cache.get(["a", "0"]) == {"a": ANSWER}
        cache.put({"b": ANSWER})
    with ResponseCache(tmp_path) as cache:
        assert cache.get(["a", "b", "0"]) == {"a": ANSWER, "b": ANSWER}


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot make the folder"):
        ResponseCache(tmp_path / "file" / "responses")


def test_failures_of_others_are_told_until_they_start_again(tmp_path: Path) -> None:
    began = time.time()
    first, second = (ResponseCache(tmp_path, Shard(index, 2)) for index in (0, 1))
    second.mark_failed("no space")
    second.mark_failed("no space left")
    assert first.failures(began) == {"1-of-2.sqlite": "no space left"}
    assert second.failures(began) == {}
    assert first.failures(time.time() + 1) == {}
    second.close()
    ResponseCache(tmp_path, Shard(1, 2))
    assert first.failures(began) == {}


def test_values_are_plain_json_that_other_tools_can_read(tmp_path: Path) -> None:
    with ResponseCache(tmp_path) as cache:
        cache.put({"a": ANSWER})
        ((key, value),) = sqlite3.connect(cache.path).execute("SELECT * FROM answers").fetchall()
    assert (key, json.loads(value)) == ("a", ANSWER)
