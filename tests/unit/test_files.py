"""Sealing a folder, and telling a whole one from every kind of broken one."""

import json
import os

import pytest

from memdlm import files


@pytest.fixture
def sealed(tmp_path):
    """A sealed folder with a file in a folder of its own."""
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "weights").write_bytes(bytes(1000))
    (folder / "inner" / "state").write_text("one")
    files.seal(folder)
    return folder


def test_a_sealed_folder_is_whole_and_stays_so_when_files_are_added(sealed):
    assert files.defect(sealed) is None
    assert json.loads((sealed / files.MARKER).read_text())["files"].keys() == {
        "inner/state",
        "weights",
    }
    (sealed / "note").touch()
    assert files.defect(sealed) is None


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: (f / files.MARKER).unlink(), "has no complete.json"),
        (lambda f: (f / files.MARKER).write_text('{"files": {"a'), "complete.json cannot be read"),
        (lambda f: (f / files.MARKER).write_text("[]"), "complete.json cannot be read"),
        (lambda f: (f / "inner" / "state").unlink(), "inner/state is missing"),
        (lambda f: os.truncate(f / "weights", 999), "weights has 999 of 1,000 bytes"),
    ],
)
def test_damage_is_named_without_reading_the_files(sealed, damage, reason):
    damage(sealed)
    assert reason in files.defect(sealed, read=False)


def test_changed_bytes_are_found_by_reading(sealed):
    (sealed / "inner" / "state").write_text("two")
    assert files.defect(sealed, read=False) is None
    assert "bytes of its inner/state" in files.defect(sealed)


def test_a_folder_that_is_not_there_is_not_whole(tmp_path):
    assert files.defect(tmp_path / "nowhere") is not None


def test_a_text_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "recipe.yaml"
    files.write_text(path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", lambda path: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            files.write_text(path, "new")
    assert path.read_text() == "old"
    files.write_text(path, "new")
    assert path.read_text() == "new"


def test_every_file_and_folder_is_synced_before_the_marker_is_written(tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "state").touch()
    synced = []
    monkeypatch.setattr(
        files, "sync", lambda path: synced.append((path.name, (tmp_path / files.MARKER).exists()))
    )
    files.seal(tmp_path)
    assert synced == [
        ("state", False),
        ("inner", False),
        (tmp_path.name, False),
        (f".{files.MARKER}.partial", False),
        (tmp_path.name, True),
    ]


def test_a_real_full_device_is_recognised():
    with pytest.raises(OSError) as caught, open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")
    assert files.is_disk_full(caught.value)
