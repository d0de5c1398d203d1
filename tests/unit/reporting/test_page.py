"""The page: self-contained, safe against what is written on it, and never over another's file."""

from pathlib import Path

import pytest

from memdlm.errors import CheckpointError, UsageError
from memdlm.reporting.page import Place, Section, image, render, table


def test_text_is_never_markup() -> None:
    page = render("<b>&", [Section("<i>", table(["<th>"], [["<script>x</script>", "1"]]))])
    assert "<script>" not in page
    assert "&lt;script&gt;x&lt;/script&gt;" in page
    assert "<h1>&lt;b&gt;&amp;</h1>" in page
    assert "<h2>&lt;i&gt;</h2>" in page


def test_a_folder_gets_a_page_and_its_figures(tmp_path: Path) -> None:
    place = Place.of(tmp_path / "a" / "b")
    place.check_free(["x"], overwrite=False)
    page = place.write("t", [Section("s", image(b"png", "an x"), {"x": b"png"})])
    assert page == tmp_path / "a" / "b" / "report.html"
    assert sorted(path.name for path in page.parent.iterdir()) == ["report.html", "x.png"]
    assert (page.parent / "x.png").read_bytes() == b"png"
    assert 'src="data:image/png;base64,cG5n"' in page.read_text()


def test_a_named_page_names_its_figures(tmp_path: Path) -> None:
    place = Place.of(tmp_path / "mine.html")
    place.write("t", [Section("", "", {"x": b"png"})])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.html", "mine_x.png"]


@pytest.mark.parametrize("taken", ["report.html", "x.png"])
def test_what_is_there_stays_unless_told_otherwise(tmp_path: Path, taken: str) -> None:
    (tmp_path / taken).touch()
    place = Place.of(tmp_path)
    with pytest.raises(UsageError, match=f"{taken} exists: replace it with --overwrite"):
        place.check_free(["x"], overwrite=False)
    place.check_free(["x"], overwrite=True)


def test_a_place_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file is no folder"):
        Place.of(tmp_path / "file").check_free([], overwrite=True)
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(UsageError, match=r"folder\.html is a folder"):
        Place.of(tmp_path / "folder.html").check_free([], overwrite=True)
    with pytest.raises(CheckpointError, match="cannot write"):
        Place.of(tmp_path / "file" / "deeper").write("t", [])
