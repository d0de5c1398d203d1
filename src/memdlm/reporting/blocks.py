"""What a section of a page consists of, each part once, written as HTML and as Markdown.

Text in blocks is plain: both writers escape it, so that a name or a command can never become
markup.
"""

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from memdlm.reporting.page import Cell, Section, image, table


@dataclass(frozen=True)
class Heading:
    """A heading below the section's own."""

    text: str
    level: int = 3


@dataclass(frozen=True)
class Paragraph:
    """A paragraph; `kind` is empty or `note` (small print)."""

    text: str
    kind: str = ""


@dataclass(frozen=True)
class Warnings:
    """What has to be seen before all else: a lead and a list of texts."""

    lead: str
    items: Sequence[str]


@dataclass(frozen=True)
class Grid:
    """A table.

    Attributes:
        header: Its columns.
        rows: Cells; the first one of a row names it.
        muted: Rows, by the text of their first cell, that are grey.
        kind: `texts`, `tests`, `scores` or empty, as `page.table` has it.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    muted: Sequence[str] = ()
    kind: str = ""


@dataclass(frozen=True)
class Picture:
    """A figure: in the HTML page itself, and a file of this name beside both pages."""

    name: str
    png: bytes
    alternative: str


@dataclass(frozen=True)
class Fold:
    """Blocks that are shown when asked for."""

    summary: str
    blocks: Sequence["Block"]


Block = Heading | Paragraph | Warnings | Grid | Picture | Fold


@dataclass(frozen=True)
class Part:
    """A section of a page before it is written.

    Attributes:
        title: Its heading; none if empty.
        blocks: What it consists of.
    """

    title: str
    blocks: Sequence[Block] = field(default_factory=tuple)

    def section(self) -> Section:
        """Return the section of an HTML page."""
        body = "\n".join(_html(block) for block in self.blocks)
        return Section(self.title, body, {p.name: p.png for p in _pictures(self.blocks)})

    def markdown(self, files: Mapping[str, str]) -> str:
        """Return the section of a Markdown page.

        Args:
            files: Figure -> the name of its file beside the page.
        """
        heading = [f"## {_marked(self.title)}"] if self.title else []
        return "\n\n".join([*heading, *(_markdown(block, files) for block in self.blocks)])


def markdown_page(title: str, parts: Sequence[Part], files: Mapping[str, str]) -> str:
    """Return a whole Markdown page."""
    return "\n\n".join([f"# {_marked(title)}", *(part.markdown(files) for part in parts)]) + "\n"


def _pictures(blocks: Sequence[Block]) -> list[Picture]:
    found = []
    for block in blocks:
        if isinstance(block, Picture):
            found.append(block)
        elif isinstance(block, Fold):
            found += _pictures(block.blocks)
    return found


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Paragraph(text, kind):
            look = f' class="{kind}"' if kind else ""
            return f"<p{look}>{html.escape(text)}</p>"
        case Warnings(lead, items):
            lines = "".join(f"<li>{html.escape(item)}</li>" for item in items)
            lead = f"<p><strong>{html.escape(lead)}</strong></p>"
            return f'<div class="warning">{lead}<ul>{lines}</ul></div>'
        case Grid(header, rows, muted, kind):
            return table(header, rows, muted, kind)
        case Picture(_, png, alternative):
            return image(png, alternative)
        case Fold(summary, blocks):
            inner = "\n".join(_html(each) for each in blocks)
            return f"<details><summary>{html.escape(summary)}</summary>\n{inner}\n</details>"


def _markdown(block: Block, files: Mapping[str, str]) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_marked(text)}"
        case Paragraph(text, _):
            return _marked(text)
        case Warnings(lead, items):
            lines = [f"**{_marked(lead)}**", "", *(f"- {_marked(item)}" for item in items)]
            return "\n".join(f"> {line}".rstrip() for line in lines)
        case Grid(header, rows):
            lines = [_markdown_row(header), "|" + "---|" * len(header)]
            return "\n".join([*lines, *map(_markdown_row, rows)])
        case Picture(name, _, alternative):
            return f"![{_marked(alternative)}]({files[name]})"
        case Fold(summary, blocks):
            inner = "\n\n".join(_markdown(each, files) for each in blocks)
            name = html.escape(" ".join(summary.split()))
            return f"<details><summary>{name}</summary>\n\n{inner}\n\n</details>"


def _markdown_row(cells: Sequence[Cell]) -> str:
    texts = ["<br>".join(map(_marked, [c] if isinstance(c, str) else c)) for c in cells]
    return "| " + " | ".join(texts) + " |"


def _marked(text: str) -> str:
    """Return text in which nothing is Markdown or HTML, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$&])", r"\\\1", " ".join(text.split()))
