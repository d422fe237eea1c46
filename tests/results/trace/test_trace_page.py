"""Pages and JSON of traces: all is in them, nothing is loaded from elsewhere, and text from data stays text."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from tiny import chats, png
from tiny_run import typed, write_shards

from pipeline.__main__ import main
from pipeline.results.trace.figure import WIDEST, match_figure
from pipeline.results.trace.layers import LayerTrace, ModelTrace, Reading, Token
from pipeline.results.trace.matches import Matches, read_matches
from pipeline.results.trace.page import About, Traced, change, file_name, visible, write_page
from pipeline.results.trace.questions import Question

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> {{ 7 * 7 }}"


class Page(HTMLParser):
    """The tags of a page, its cells, and what they would load."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def all(self, tag: str) -> list[dict]:
        return [attributes for found, attributes in self.tags if found == tag]

    @property
    def cells(self) -> list[dict]:
        return [one for one in self.all("td") if "cell" in one.get("class", "").split()]


def found_in(text: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="found">(.*?)</script>', text, re.DOTALL)[1])


def reading(
    token: int, text: str, probability: float = 0.5, of_answer: float = 0.25, divergence: float = 0.0
) -> Reading:
    return Reading(token, text, probability, False, (), of_answer, divergence)


def traced_by(name: str, *of_answer: float) -> ModelTrace:
    """A model with a layer for each probability."""
    layers = [
        LayerTrace(n, (reading(5, "x", of_answer=p),), (reading(5, "x"),), "x") for n, p in enumerate(of_answer, 1)
    ]
    return ModelTrace(name, tuple(layers), (Token(5, "x", False),))


@pytest.fixture
def run(made, tmp_path):
    """A copy of the run, with the log of three updates of interaction."""
    run = tmp_path / "run"
    shutil.copytree(made.run, run)
    lines = [{"step": "verbalize", "update": 1}]
    lines += [
        {"step": "interact", "update": n, "layer/1": 1.0, "layer/2": 1.0, "last": 1.0, "match": match}
        for n, match in enumerate([[1, 2], [1, 3], [2, None]], 1)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_a_page_has_every_cell_of_every_model_and_loads_nothing(run, tmp_path, capsys):
    page, file = tmp_path / "t" / "trace.html", tmp_path / "t" / "trace.json"
    arguments = ["trace", "--run", str(run), "--sample", "s00003", "--max-new-tokens", "2"]
    assert main([*arguments, "--page", str(page), "--json", str(file)]) == 0
    assert "teacher (5 layers)" in capsys.readouterr().out, "the terminal has its tables all the same"
    text, (question,) = page.read_text(), json.loads(file.read_text())["questions"]
    parsed, found = Page(text), found_in(text)
    assert {one["data-at"] for one in parsed.cells} == set(found)
    for model in question["models"]:
        for row, layer in enumerate(model["layers"]):
            assert len(layer["along"]) == len(model["read"]) and layer["free"]
            for kind in ("along", "free"):
                for column, prediction in enumerate(layer[kind]):
                    shown = found[f"{kind}/{model['name']}/{row}/{column}"]["candidates"]
                    assert [
                        [visible(one["text"]), round(one["probability"], 4)] for one in prediction["candidates"]
                    ] == shown
                    assert len(shown) == 10
    links = [one.get("src") or one.get("href") for tag in ("img", "script", "link", "a") for one in parsed.all(tag)]
    assert all(link is None or link.startswith("data:") for link in links)
    assert not re.search(r"url\((?!#)", text), "url(#...) is the picture's own part"
    (picture,) = parsed.all("img")
    assert picture["src"].startswith("data:image/png;base64,")
    assert "default-src 'none'" in text


def test_the_runs_matches_are_in_the_page_as_often_as_they_were(run, tmp_path):
    matches = read_matches(run)
    assert matches == Matches({1: {1: 2 / 3, 2: 1 / 3}, 2: {2: 1 / 3, 3: 1 / 3}}, 3)
    page = tmp_path / "trace.html"
    assert main(["trace", "--run", str(run), "--sample", "s00003", "--max-new-tokens", "1", "--page", str(page)]) == 0
    text = page.read_text()
    assert "1: 67 %, 2: 33 %" in text and "student 2" in text and "teacher 3" in text
    widths = [float(width) for width in re.findall(r"stroke-width: ([0-9.]+)", match_figure(matches))]
    assert max(widths) == pytest.approx(WIDEST * 2 / 3, rel=1e-3)


def test_a_run_without_interaction_has_no_matches(made):
    assert read_matches(made.run) is None


def test_text_from_data_and_models_stays_text(tmp_path):
    question = Question(HOSTILE, [{"role": "user", "content": [{"type": "text", "text": HOSTILE}]}], [], HOSTILE)
    model = ModelTrace(
        HOSTILE,
        (LayerTrace(1, (reading(5, HOSTILE),), (reading(5, HOSTILE),), HOSTILE),),
        (Token(5, HOSTILE, False),),
    )
    write_page(tmp_path / "p.html", Traced(question, [model], True), About(True, [HOSTILE], None))
    text = (tmp_path / "p.html").read_text()
    parsed = Page(text)
    assert len(parsed.all("script")) == 2, "the page's own two"
    assert not parsed.all("img") and not any("onerror" in attributes for _, attributes in parsed.tags)
    assert "{{ 7 * 7 }}" in text and "49" not in re.sub("<style>.*?</style>", "", text, flags=re.DOTALL)
    assert found_in(text)[f"along/{HOSTILE}/0/0"]["title"].startswith(HOSTILE)


@pytest.mark.parametrize(
    ("text", "shown"), [(" star", " star"), (" ", "␣"), ("\n", "\\n"), ("", ""), ("\x1b[2J", "\\x1b[2J")]
)
def test_what_cannot_be_seen_is_made_visible(text, shown):
    assert visible(text) == shown


@pytest.mark.parametrize("key", ["../../etc/passwd", "a/b", "<b>", "é" * 300, ""])
def test_a_pages_name_stays_in_its_folder_whatever_the_key(key):
    assert re.fullmatch(r"00007_[A-Za-z0-9_-]{0,60}\.html", file_name(key, 7))


def test_change_is_the_mean_move_of_the_answers_probability():
    before, after = traced_by("untouched", 0.1, 0.5), traced_by("distilled", 0.4, 0.4)
    assert change([before, after]) == pytest.approx((0.3 + 0.1) / 2)
    assert change([before]) is None
    other = ModelTrace("distilled", after.layers, (Token(6, "y", False),))
    assert change([before, other]) is None, "read along different answers"


def naive_change(untouched: dict, distilled: dict) -> float:
    def probabilities(model: dict) -> np.ndarray:
        return np.array([[one["of_answer"] for one in layer["along"]] for layer in model["layers"]])

    return float(np.abs(probabilities(untouched) - probabilities(distilled)).mean())


def test_many_questions_get_an_index_with_what_changed_most_first(run, tmp_path):
    folder, file = tmp_path / "traces", tmp_path / "all.json"
    command = ["trace", "--run", str(run), "--limit", "4", "--max-new-tokens", "2", "--without-teacher"]
    assert main([*command, "--page", str(folder), "--json", str(file)]) == 0
    index = (folder / "index.html").read_text()
    pages = [one["href"] for one in Page(index).all("a")]
    assert len(pages) == 4 and sorted(pages) == sorted(one.name for one in folder.iterdir() if one.name != "index.html")
    questions = json.loads(file.read_text())["questions"]
    assert [one["key"] for one in questions] == ["s00000", "s00002", "s00005", "s00007"], "evenly spaced over all 10"
    moved = [naive_change(*one["models"]) for one in questions]
    order = sorted(range(4), key=lambda number: moved[number], reverse=True)
    assert [int(page[:5]) for page in pages] == order and len(set(moved)) == 4
    for one in questions:
        assert one["along_expected"]
        assert {tuple(token["id"] for token in model["read"]) for model in one["models"]} == {
            tuple(token["id"] for token in one["models"][0]["read"])
        }


def test_a_sample_that_cannot_be_traced_is_left_out_and_said(made, tmp_path, capsys):
    broken = [(key, record, [b"no picture"] if key == "s00001" else images) for key, record, images in chats(3, seed=2)]
    data = write_shards(tmp_path / "data", typed(broken))
    command = ["trace", "--run", str(made.run), "--limit", "3", "--data", str(data), "--without-teacher"]
    assert main([*command, "--max-new-tokens", "1", "--page", str(tmp_path / "t")]) == 0
    out = capsys.readouterr().out
    assert "s00001 is left out: image cannot be decoded" in out and "2 pages" in out
    assert len(Page((tmp_path / "t" / "index.html").read_text()).all("a")) == 2


def test_a_model_without_a_run_is_read_through_the_logit_lens(made, tmp_path, capsys):
    image = tmp_path / "i.png"
    image.write_bytes(png(seed=4))
    page = tmp_path / "lens.html"
    command = ["trace", "--model", f"one={made.root}/student", "--image", str(image), "--question", "what?"]
    assert main([*command, "--answer", "ab", "--max-new-tokens", "2", "--page", str(page)]) == 0
    text = page.read_text()
    assert "logit lens" in text and "one (3 layers)" in capsys.readouterr().out
    rows = {one["data-at"].split("/")[2] for one in Page(text).cells}
    assert rows == {"0", "1", "2"}, "every layer"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "give what to trace"),
        (["--run", "RUN", "--model", "x"], "give what to trace"),
        (["--run", "RUN", "--limit", "2"], "--page FOLDER"),
        (["--run", "RUN", "--limit", "2", "--sample", "s00001"], "give a question"),
        (["--run", "RUN", "--sample", "s00001", "--answer", "ab"], "give a question"),
        (["--model", "nowhere", "--limit", "2", "--page", "x"], "no model in nowhere"),
    ],
)
def test_command_lines_that_do_not_say_what_to_trace(made, capsys, more, message):
    assert main(["trace", *(str(made.run) if one == "RUN" else one for one in more)]) == 2
    assert message in capsys.readouterr().err
