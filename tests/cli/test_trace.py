"""`memdlm generate --trace`: the page holds every step of every prompt, and plays in a browser."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from memdlm.cli.trace import TraceRecorder, check_free, render_page
from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.errors import UsageError
from memdlm.inference import GenerationUpdate
from memdlm.sampling.masked_decoding import DecodeStep

from .conftest import write_rows

HOSTILE = 'ada "hid" </script><script>alert(1)</script> & <!-- <b>key</b>'
OPTIONS = ("-n", "6", "--memory", "off", "--set", "sampling.stop_at_eos=false")


class Page(HTMLParser):
    """Collects a page's tags and the text of its elements by id."""

    def __init__(self, text: str) -> None:
        """Read `text`."""
        super().__init__()
        self.tags: list[str] = []
        self.texts: dict[str, str] = {}
        self.resources: list[str] = []
        self._open: list[str | None] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        """Note the tag and what it would load."""
        self.tags.append(tag)
        given = dict(attrs)
        self.resources += [given[name] for name in ("src", "href") if name in given]
        if tag not in ("meta", "input"):
            self._open.append(given.get("id"))

    def handle_endtag(self, tag) -> None:
        """Leave the element."""
        self._open.pop()

    def handle_data(self, data) -> None:
        """Keep the text under the element's id."""
        if self._open and self._open[-1]:
            self.texts[self._open[-1]] = self.texts.get(self._open[-1], "") + data


@pytest.fixture
def page(memdlm, trained, tmp_path) -> Path:
    """The page of two prompts, the first of them hostile."""
    file = write_rows(tmp_path / "p.jsonl", [{"prompt": HOSTILE}, {"prompt": "bo hid the key"}])
    steps = (
        "--set",
        "sampling.num_unmasking_steps=3",
        "--set",
        "sampling.suppress_tokens=[0,1,2,3]",
    )
    place = tmp_path / "trace.html"
    result = memdlm(
        "generate", "--model", trained, *OPTIONS, *steps, "--file", file, "--trace", place
    )
    assert result.code == 0, result.err
    return place


def trace_of(page: Path) -> dict:
    return json.loads(Page(page.read_text()).texts["trace"])


def test_the_page_holds_every_step_and_no_text_becomes_markup(page) -> None:
    parsed = Page(page.read_text())
    assert parsed.tags.count("script") == 2
    assert "b" not in parsed.tags
    assert parsed.resources == []
    trace = json.loads(parsed.texts["trace"])
    assert [prompt["prompt"] for prompt in trace["prompts"]] == [HOSTILE, "bo hid the key"]
    for prompt in trace["prompts"]:
        assert prompt["num_steps"] == 3
        assert prompt["length"] == 6
        steps = [event[0] for slot in prompt["slots"] for event in slot]
        assert sorted(steps) == [1, 1, 2, 2, 3, 3]


def test_the_last_state_of_the_page_is_the_answer(memdlm, trained, tmp_path) -> None:
    place = tmp_path / "trace.html"
    options = ("generate", "--model", trained, *OPTIONS, "bo hid the key", "--trace", place)
    steps = ("--set", "sampling.suppress_tokens=[0,1,2,3]")
    answer = memdlm(*options, *steps).out.strip()
    slots = trace_of(place)["prompts"][0]["slots"]
    assert "".join(slot[-1][1] for slot in slots).strip() == answer
    before = place.read_text()
    line = memdlm(*options, *steps).error_line(2)
    assert f"{place} exists: choose another name, or add --overwrite" in line
    assert memdlm(*options, *steps, "--overwrite", "-n", "2").code == 0
    assert place.read_text() != before
    assert [file.name for file in tmp_path.iterdir()] == ["trace.html"]


def test_a_prompt_that_is_filled_in_is_played_whole(memdlm, trained, tmp_path) -> None:
    place = tmp_path / "trace.html"
    infill = ("--set", "sampling.infill=true", "--set", "sampling.suppress_tokens=[0,1,2,3]")
    prompt = "ada hid <|mask|> key <|mask|>"
    options = ("--memory", "off", *infill, "--trace", place, prompt)
    result = memdlm("generate", "--model", trained, *options)
    assert (result.code, len(result.out.split())) == (0, 5), result.err
    slots = trace_of(place)["prompts"][0]["slots"]
    assert [slot[0][0] > 0 for slot in slots] == [False, False, True, False, True]
    assert "".join(slot[-1][1] for slot in slots) == result.out.strip()


def test_a_failed_answer_leaves_no_page(memdlm, trained, tmp_path) -> None:
    place = tmp_path / "trace.html"
    memdlm("generate", "--model", trained, "key " * 70, "--trace", place).error_line(1)
    assert list(tmp_path.iterdir()) == []


def test_edits_and_given_tokens_have_events_of_their_own() -> None:
    tokenizer = build_word_tokenizer(["red", "blue", "key"])
    red, blue, key = tokenizer.convert_tokens_to_ids(["red", "blue", "key"])
    mask = tokenizer.mask_token_id
    recorder = TraceRecorder(mask)
    canvases = [[key, red, mask], [key, blue, key]]
    committed = [[False, True, False], [False, False, True]]
    for index, (canvas, filled) in enumerate(zip(canvases, committed, strict=True)):
        step = DecodeStep(index, 2, torch.tensor([canvas]), torch.tensor([filled]))
        recorder.record(GenerationUpdate(range(1), (0,), step, [[]], [False]))
    assert recorder.slots(0, 3, tokenizer) == [
        [[0, "key", False, None]],
        [[1, " red", False, None], [2, " blue", False, None]],
        [[2, " key", False, None]],
    ]
    assert recorder.rows[0].num_steps == 2


def test_a_lone_surrogate_can_be_written() -> None:
    page = render_page({"about": "\ud800", "prompts": []}, [])
    assert json.loads(Page(page).texts["trace"])["about"] == "\ud800"
    page.encode("utf-8")


def test_a_folder_is_no_place_for_a_page(tmp_path) -> None:
    with pytest.raises(UsageError, match="is a folder: name a file"):
        check_free(tmp_path, overwrite=True)


# Presses keys on the opened page and notes what it shows after each; the play ends last.
KEYS = """
const log = [], note = () => log.push([at("state").textContent, at("prompt").textContent,
  document.querySelectorAll(".slot.mask").length, play.textContent]);
const press = (key) => document.dispatchEvent(new KeyboardEvent("keydown", {key}));
note();
for (const key of ["ArrowRight", "ArrowLeft", "Home", "]", "Home", " "]) { press(key); note(); }
setTimeout(() => {
  note();
  document.body.appendChild(document.createElement("pre")).textContent =
    "LOG" + JSON.stringify(log) + "END";
}, 3000);
"""


def test_a_browser_plays_the_page(page) -> None:
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("chromium is not installed")
    watched = page.with_name("watched.html")
    watched.write_text(page.read_text().replace("</body>", f"<script>{KEYS}</script></body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000"]
    profile = f"--user-data-dir={page.parent / 'profile'}"
    done = subprocess.run(
        [program, *flags, profile, "--dump-dom", f"{watched.as_uri()}#step=2"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = re.search("LOG(.*)END</pre>", done.stdout)
    assert found is not None, done.stdout[-2000:]
    log = json.loads(html.unescape(found[1]))
    steps = [(2, 4), (3, 6), (2, 4), (0, 0), (3, 6), (0, 0), (0, 0), (3, 6)]
    assert [entry[0] for entry in log] == [
        f"step {step} of 3 \u00b7 {filled} of 6 tokens" for step, filled in steps
    ]
    assert [entry[1] for entry in log] == [HOSTILE] * 4 + ["bo hid the key"] * 4
    assert [entry[2] for entry in log] == [6 - filled for _, filled in steps]
    assert [entry[3] for entry in log] == ["Play"] * 6 + ["Pause", "Play"]
