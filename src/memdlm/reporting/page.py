"""One self-contained HTML page: text, tables, and figures as PNG inside it and beside it.

A page is a list of sections. Whoever has something to show (training curves, the quickstart's
comparison) makes a `Section`; this file knows how a page looks and how it is written.
"""

import base64
import html
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from memdlm.errors import CheckpointError, UsageError

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
h3 { font-size: 1.05rem; margin-top: 1.8rem; } p, li { max-width: 62rem; }
table { border-collapse: collapse; } th, td { padding: .3rem .8rem; text-align: right; }
th:first-child, td:first-child { text-align: left; white-space: nowrap; }
.wide + .wide { margin-top: 1.2rem; } table { font-size: .95rem; }
thead th { border-bottom: 2px solid #222; } tbody tr { border-bottom: 1px solid #ddd; }
.muted td { color: #777; font-style: italic; } img { max-width: 100%; }
.wide { overflow-x: auto; } .wide td { overflow-wrap: anywhere; }
.note { color: #555; } code { background: #f3f3f3; padding: .1rem .3rem; }
pre { background: #f3f3f3; padding: .8rem; overflow-x: auto; font-size: .85rem; }
td small { display: block; color: #666; font-size: .78rem; line-height: 1.35; white-space: nowrap; }
th { vertical-align: bottom; } td { vertical-align: top; }
.texts th, .texts td { text-align: left; font-size: .85rem; padding: .3rem .6rem; }
.texts td { min-width: 6.5rem; }
.tests th, .tests td { text-align: left; font-size: .85rem; padding: .3rem .6rem; }
.tests td { white-space: nowrap; }
.tests td:nth-child(2), .tests td:nth-child(3) { white-space: normal; }
.scores th, .scores td { padding: .3rem .45rem; }
.scores td:first-child { white-space: normal; min-width: 8rem; }
.warning { background: #fdecea; border-left: 5px solid #c0281c; padding: .2rem 1rem;
           margin-bottom: 1.2rem; }
.warning li { overflow-wrap: anywhere; }
details { margin: .8rem 0; } summary { cursor: pointer; color: #1d5fa8; }
"""


# A cell of a table is a text, or a main line with smaller ones under it.
Cell = str | tuple[str, ...]


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        title: Its heading; none if empty.
        body: HTML, made with `table`, `image` and the like; text in it is already escaped.
        figures: The PNGs that `body` shows, by the name of the file each is written to as well.
    """

    title: str
    body: str
    figures: Mapping[str, bytes] = field(default_factory=dict)


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    muted: Sequence[str] = (),
    kind: str = "",
) -> str:
    """Return a table.

    Args:
        header: Its columns.
        rows: Its cells; the first one of a row names it.
        muted: Rows, by their first cell, that are grey.
        kind: `texts` are set to the left and small, `tests` as well but on one line, `scores` close
            together; empty otherwise.
    """
    head = "".join(f"<th>{_breakable(cell)}</th>" for cell in header)
    lines = []
    for row in rows:
        grey = ' class="muted"' if row[0] in muted else ""
        lines.append(f"<tr{grey}>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>")
    look = f' class="{kind}"' if kind else ""
    return (
        f'<div class="wide"><table{look}><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _breakable(name: str) -> str:
    """Return a column's name, which may be wider than its numbers and break where it has parts."""
    return html.escape(name).replace("_", "_<wbr>").replace("@", "<wbr>@")


def _cell(cell: Cell) -> str:
    if isinstance(cell, str):
        return html.escape(cell)
    main, *small = (html.escape(line) for line in cell)
    return main + "".join(f"<small>{line}</small>" for line in small)


def image(png: bytes, alternative: str) -> str:
    """Return a figure that needs no file beside the page."""
    data = base64.b64encode(png).decode()
    return f'<img alt="{html.escape(alternative)}" src="data:image/png;base64,{data}">'


def render(title: str, sections: Sequence[Section]) -> str:
    """Return the page."""
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for section in sections:
        heading = f"<h2>{html.escape(section.title)}</h2>\n" if section.title else ""
        parts.append(heading + section.body)
    body = "\n".join(parts)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


@dataclass(frozen=True)
class Place:
    """Where a page and its figures go: `report.html` in a folder, or a page of a name."""

    page: Path

    @classmethod
    def of(cls, output: Path) -> "Place":
        """Read `output`: a name that ends in .html is the page, any other its folder."""
        return cls(output if output.suffix.lower() == ".html" else output / "report.html")

    def figure(self, name: str) -> Path:
        """Return the file of a figure, in the page's folder and named after a named page."""
        prefix = "" if self.page.name == "report.html" else f"{self.page.stem}_"
        return self.page.with_name(f"{prefix}{name}.png")

    @property
    def markdown(self) -> Path:
        """The Markdown page beside this one."""
        return self.page.with_suffix(".md")

    def check_free(
        self, figures: Sequence[str], overwrite: bool, with_markdown: bool = False
    ) -> None:
        """Refuse a place where the page cannot go, before time is spent on it.

        Args:
            figures: Names of every figure that the page may have.
            overwrite: Whether files of these names may be replaced.
            with_markdown: Whether a Markdown page goes beside it.

        Raises:
            UsageError: A file is there already and `overwrite` is off, or the page's name is a
                folder's, or its folder a file's.
        """
        folder = self.page.parent
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder} is no folder: choose another place with --output")
        files = [self.page, *map(self.figure, figures)]
        if with_markdown:
            files.append(self.markdown)
        taken = next((path for path in files if path.is_dir()), None)
        if taken is not None:
            raise UsageError(f"{taken} is a folder: choose another place with --output")
        taken = next((path for path in files if path.exists()), None)
        if taken is not None and not overwrite:
            raise UsageError(
                f"{taken} exists: replace it with --overwrite, or choose another place with "
                "--output"
            )

    def write(self, title: str, sections: Sequence[Section], markdown: str | None = None) -> Path:
        """Write the figures, then the page; return the page. Each file appears whole or not at all.

        Args:
            title: The page's heading.
            sections: Its parts.
            markdown: Text of the Markdown page beside it; None for none.

        Raises:
            CheckpointError: The place cannot be written to.
        """
        contents = {
            self.figure(name): png for section in sections for name, png in section.figures.items()
        }
        if markdown is not None:
            contents[self.markdown] = markdown.encode()
        contents[self.page] = render(title, sections).encode()
        partial = self.page.with_name(f".{self.page.name}.partial-{os.getpid()}")
        try:
            self.page.parent.mkdir(parents=True, exist_ok=True)
            for path, content in contents.items():
                partial.write_bytes(content)
                os.replace(partial, path)
        except OSError as error:
            if partial.parent.is_dir():
                partial.unlink(missing_ok=True)
            raise CheckpointError(
                f"cannot write {self.page} ({error.strerror}): free some space, or choose another "
                "place with --output"
            ) from error
        return self.page
