"""Readers: real files of every kind, and the one line each defect gives."""

import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from memdlm.data.readers import read_records
from memdlm.errors import DataError

ROWS = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(5)]


def fails(source: object, limit: int | None = None) -> str:
    """Return the message of the DataError, which must be one line."""
    with pytest.raises(DataError) as caught:
        read_records(str(source), limit)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_jsonl_gives_rows_with_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    # A blank line, a BOM, CRLF, and U+2028 inside a string: none may shift the count of lines.
    path.write_bytes(
        b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": "x\xe2\x80\xa8y"}\n' + b'{"a": 3}'  # no last newline
    )
    records = read_records(str(path))
    assert [record.values["a"] for record in records] == [1, "x\u2028y", 3]
    assert [record.where for record in records] == [f"{path}:1", f"{path}:4", f"{path}:5"]


def test_json_and_parquet_give_the_same_rows(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for name in ("a.json", "a.parquet"):
        records = read_records(str(tmp_path / name))
        assert [record.values for record in records] == ROWS
        assert records[2].where == f"{tmp_path / name} row 3"


def test_parquet_reads_nested_messages(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "m.parquet")
    assert read_records(str(tmp_path / "m.parquet"))[0].values == rows[0]


def test_limit_stops_before_later_lines_are_parsed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\nbroken\n')
    assert len(read_records(str(path), 2)) == 2
    assert f"{path}:3" in fails(path)


@pytest.mark.parametrize("line", ['{"a": 1', "{'a': 1}", '{"a": 1} {"a": 2}', "nonsense"])
def test_malformed_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n' + line + '\n{"a": 2}\n')
    assert fails(path).startswith(f"{path}:3 is not valid JSON (")


@pytest.mark.parametrize(
    ("line", "kind"), [("[1]", "list"), ("3", "number"), ('"x"', "string"), ("null", "null")]
)
def test_line_that_is_no_object_is_named(tmp_path: Path, line: str, kind: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n' + line)
    assert fails(path) == f"{path}:2 is a {kind}: each row must be an object {{...}}"


def test_text_that_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": "\xe9"}\n')
    assert fails(path) == f"{path}:2 is not UTF-8 (byte 7): save the file in UTF-8"
    whole = tmp_path / "a.json"
    whole.write_bytes(b'[{"a": "\xe9"}]')
    assert fails(whole).startswith(f"{whole} is not UTF-8")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize("content", ["", " \n\n"])
def test_empty_file(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    assert fails(path) == f"{path} holds no rows: give a source with at least one"


def test_json_must_be_a_list_of_objects(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}')
    assert "holds one object" in fails(path)
    path.write_text('{"a": 1}\n{"a": 2}\n')
    assert fails(path).startswith(f"{path}:2 is not valid JSON (Extra data)")
    assert "rename it to .jsonl" in fails(path)
    path.write_text('[{"a": 1}, 2]')
    assert fails(path).startswith(f"{path} row 2 is a number")


def test_damaged_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"not parquet at all")
    assert f"cannot read {path} as Parquet" in fails(path)


def test_missing_folder_unknown_and_unreadable(tmp_path: Path) -> None:
    missing = tmp_path / "none.jsonl"
    assert fails(missing) == f"{missing} does not exist: check the path"
    # Looks like a file although no such path exists: must not be looked up on the hub.
    assert fails("data/none.csv") == "data/none.csv does not exist: check the path"
    assert "is a folder" in fails(tmp_path)
    csv = tmp_path / "a.csv"
    csv.write_text("a,b")
    assert re.search(r"unknown suffix '\.csv': use \.jsonl .*\.json .*\.parquet", fails(csv))
    loop = tmp_path / "loop.jsonl"
    loop.symlink_to(loop)
    assert "loop.jsonl" in fails(loop)


def test_file_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}')

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    # Tests may run as root, whom no file mode stops.
    monkeypatch.setattr(Path, "open", refuse)
    assert fails(path) == f"cannot read {path} (Permission denied): check the path and its rights"


def test_path_that_cannot_even_be_looked_up() -> None:
    name = "x" * 300 + ".jsonl"
    assert fails(name) == f"cannot read {name} (File name too long): check the path and its rights"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("org/name", ("org/name", None, "train")),
        ("org/name:test", ("org/name", None, "test")),
        ("org/name:en:test", ("org/name", "en", "test")),
        ("org/name:train[:10]", ("org/name", None, "train[:10]")),
        ("name", ("name", None, "train")),
    ],
)
def test_hub_id_names_config_and_split(
    source: str, expected: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    asked: list[tuple[object, ...]] = []

    def load(name: str, config: str | None, split: str) -> datasets.Dataset:
        asked.append((name, config, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    records = read_records(source, 3)
    assert asked == [expected]
    assert [record.values for record in records] == ROWS[:3]
    assert records[1].where == f"{source} row 2"


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = fails("nobody-at-all/no-such-set")
    assert message.startswith("the hub cannot be reached for 'nobody-at-all/no-such-set' (")
    assert "give the path of a .jsonl, .json or .parquet file" in message


def test_hub_errors_of_other_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unknown_split(*args: object, **kwargs: object) -> None:
        raise ValueError('Unknown split "tset".\nShould be one of [train].')

    monkeypatch.setattr(datasets, "load_dataset", unknown_split)
    message = fails("org/name:tset")
    assert 'Unknown split "tset". Should be one of [train].' in message

    def not_found(*args: object, **kwargs: object) -> None:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'org/name' doesn't exist")

    monkeypatch.setattr(datasets, "load_dataset", not_found)
    assert "no hub data set 'org/name' is visible from here" in fails("org/name")


@pytest.mark.parametrize("source", ["a:b:c:d", "a b/c", "a::b", "org/name:"])
def test_neither_file_nor_hub_id(source: str) -> None:
    message = fails(source)
    assert "neither a file nor a hub id" in message or "does not exist" in message
