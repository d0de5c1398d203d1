"""Blocks: the same content in HTML and in Markdown, and text that is never markup in either."""

from memdlm.reporting.blocks import (
    Fold,
    Grid,
    Heading,
    Paragraph,
    Part,
    Picture,
    Warnings,
    markdown_page,
)

HOSTILE = "<script>*x*</script> | `a` [b](c) _d_ & $e$\n# f"
PART = Part(
    HOSTILE,
    [
        Heading(HOSTILE),
        Paragraph(HOSTILE, "note"),
        Warnings(HOSTILE, [HOSTILE, "second"]),
        Grid([HOSTILE], [[HOSTILE], [(HOSTILE, "small")]], kind="scores"),
        Fold(HOSTILE, [Picture("f", b"png", HOSTILE)]),
    ],
)


def test_text_is_never_markup_in_html() -> None:
    section = PART.section()
    assert "<script>" not in section.body
    assert "&lt;script&gt;" in section.body
    assert section.figures == {"f": b"png"}
    assert '<div class="warning"><p><strong>' in section.body
    assert "<small>small</small>" in section.body
    assert "<details><summary>&lt;script&gt;" in section.body


def test_text_is_never_markup_in_markdown() -> None:
    text = markdown_page("a_b", [PART], {"f": "x_f.png"})
    assert text.startswith("# a\\_b\n\n## \\<script\\>")
    assert "<script>" not in text
    escaped = "\\<script\\>\\*x\\*\\</script\\> \\| \\`a\\` \\[b\\](c) \\_d\\_ \\& \\$e\\$ \\# f"
    assert f"| {escaped}<br>small |" in text
    assert "](x_f.png)" in text
    assert "> - second" in text
    # A line break in a text would end its table row or its heading.
    assert "\n# f" not in text


def test_a_table_has_as_many_cells_in_each_line() -> None:
    text = Part("", [Grid(["a", "b"], [["1", ("2", "3")]])]).markdown({})
    assert text.splitlines() == ["| a | b |", "|---|---|", "| 1 | 2<br>3 |"]
