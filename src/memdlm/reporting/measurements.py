"""What a folder of results may hold besides scores: exposure bias, and the retrieval probe.

Each has a file of its own that knows its tables and figures; here they get their place on a page
with the words about where their numbers come from.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memdlm.reporting import exposure_bias, retrieval_probe
from memdlm.reporting.blocks import Block, Fold, Grid, Heading, Paragraph, Picture
from memdlm.reporting.page import Cell
from memdlm.reporting.paper import exposure_bias_sentence
from memdlm.reporting.records import Record, read_record
from memdlm.reporting.settings import as_text, differing, flatten

Rows = tuple[list[str], list[list[str]]]


@dataclass(frozen=True)
class Kind:
    """One kind of measurement.

    Attributes:
        title: Its heading.
        note: What its numbers are, in small print.
        tables: Makes its tables, the main one first.
        figures: Makes its figures.
        paper: Makes the sentence that says what the paper found.
    """

    title: str
    note: str
    tables: Callable[[Mapping[str, Any]], list[Rows]]
    figures: Callable[[Mapping[str, Any]], Mapping[str, bytes]]
    paper: Callable[[], str] | None = None

    def read(self, path: Path) -> "Measurement":
        """Return the measurement in a file.

        Raises:
            CheckpointError: It is damaged, or not of this kind.
        """
        record, digest = read_record(path, "delete it and measure again, or leave the folder out")
        try:
            tables = self.tables(record.values)
            record.parts("arms")
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise record.error(f"it lacks what its tables need ({error!r})") from error
        return Measurement(self, record, digest, [(h, rows) for h, rows in tables if rows])


@dataclass(frozen=True)
class Measurement:
    """A measurement that was read.

    Attributes:
        kind: What it is.
        record: What its file holds.
        digest: SHA-256 of the file.
        tables: Its tables, without empty ones.
    """

    kind: Kind
    record: Record
    digest: str
    tables: list[Rows]

    @property
    def title(self) -> str:
        """Its heading."""
        return self.kind.title

    def main_table(self) -> tuple[list[str], list[list[Cell]]]:
        """Return the table to print."""
        header, rows = self.tables[0]
        return header, [list(row) for row in rows]

    def blocks(self, prefix: str) -> list[Block]:
        """Return its part of a page, figures drawn; `prefix` begins their names."""
        tables = [Grid(header, rows) for header, rows in self.tables]
        stem = self.record.path.stem
        pictures = [
            Picture(f"{prefix}{stem}_{name}", content, f"{self.title}: {name}")
            for name, content in self.kind.figures(self.record.values).items()
        ]
        return [
            Heading(self.title),
            *tables[:1],
            Paragraph(self.kind.note, "note"),
            *([Paragraph(self.kind.paper(), "note")] if self.kind.paper else []),
            *pictures,
            *tables[1:],
            *self._provenance(),
        ]

    def _provenance(self) -> list[Block]:
        values = self.record.values
        facts = [
            [name, as_text(value)]
            for name, value in flatten({"file": self.record.path.name, **values}).items()
            if not isinstance(value, list | dict)
        ]
        facts.append(["SHA-256 of the file", self.digest])
        if "data" in values:
            facts.append(["data", as_text(values["data"])])
        arms = self.record.parts("arms")
        settings = differing([arm.values.get("settings") or {} for arm in arms])
        labels = [arm.text("label") or arm.text("name") or "" for arm in arms]
        models = [[label, *(arm.text(name) or "none" for name in ("model", "adapter"))]
                  for label, arm in zip(labels, arms, strict=True)]  # fmt: skip
        inner: list[Block] = [
            Grid(["", ""], facts, kind="texts"),
            Grid(["arm", "model", "adapter"], models, kind="texts"),
        ]
        if settings:
            rows = [[name, *texts] for name, texts in settings.items()]
            inner.append(Grid(["setting", *labels], rows, kind="texts"))
        return [Fold(f"Where the numbers come from: {self.record.path.name}", inner)]


_EXPOSURE_BIAS = Kind(
    title="Exposure bias over the denoising steps",
    note="Negative log-likelihood of the still masked tokens of the clean response, in the context "
    "that the model itself has decoded (sequential) over that in the clean one (static), at the "
    "same masks; 1 is no exposure bias. The overall ratio leaves the first step out, where nothing "
    "is decoded yet. Bands and intervals: bootstrap over samples, 95 %.",
    tables=lambda result: [exposure_bias.result_rows(result), exposure_bias.pair_rows(result)],
    figures=lambda result: exposure_bias.exposure_bias_section(result).figures,
    paper=exposure_bias_sentence,
)
_PROBE = Kind(
    title="In-weight retrieval",
    note="The same questions with the way to the needle cut, without a memory and with one that "
    "was written from the whole prompt. What is right although nothing can see the needle comes "
    "from the weights. Recall: answers found in the response; NLL: bound for the right answer, "
    "nats per token. Intervals: bootstrap over questions, 95 %.",
    tables=lambda result: [
        retrieval_probe.result_rows(result),
        retrieval_probe.effect_rows(result),
    ],
    figures=lambda result: retrieval_probe.retrieval_probe_section(result).figures,
)

# File -> its kind.
MEASUREMENTS: dict[str, Kind] = {"exposure_bias.json": _EXPOSURE_BIAS, "probe.json": _PROBE}
