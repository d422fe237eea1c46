"""Pages as a person uses them, in a real Chromium, offline: hovered, tapped and typed at, on a desk and a phone."""

from __future__ import annotations

import os
import shutil

import pytest

from pipeline.results.report.facts import RunFacts
from pipeline.results.report.page import write_report
from pipeline.results.status import StepStatus
from pipeline.results.trace.layers import Candidate, LayerTrace, ModelTrace, Reading, Token, TokenPrediction
from pipeline.results.trace.matches import Matches
from pipeline.results.trace.page import About, Traced, write_index, write_page
from pipeline.results.trace.questions import Question

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium: tests/install_debian.sh"),
    pytest.mark.timeout(180),
]
DESK, PHONE = {"width": 1400, "height": 900}, {"width": 390, "height": 844}
SHOWN = ("begun", "ranks", "device", "host", "version", "commit", "python")
HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


def model(name: str, layers: int, tokens: int) -> ModelTrace:
    """Every cell has words of its own, its ten candidates in order."""

    def words(kind: str, layer: int, place: int) -> tuple[Candidate, ...]:
        return tuple(Candidate(f"{kind}{layer}.{place}.{rank}", 0.5 / (rank + 1)) for rank in range(10))

    def along(layer: int, place: int) -> Reading:
        candidates = words("a", layer, place)
        return Reading(place, candidates[0].text, 0.5, False, candidates, layer / layers, layers - layer)

    def free(layer: int, place: int) -> TokenPrediction:
        candidates = words("f", layer, place)
        return TokenPrediction(place, candidates[0].text, 0.5, place == tokens - 1, candidates)

    return ModelTrace(
        name,
        tuple(
            LayerTrace(n, tuple(along(n, t) for t in range(tokens)), tuple(free(n, t) for t in range(tokens)), "text")
            for n in range(1, layers + 1)
        ),
        tuple(Token(t, f"t{t}", False) for t in range(tokens)),
    )


def written(folder, layers: int, tokens: int, text: str = "what?"):
    question = Question("k", [{"role": "user", "content": [{"type": "text", "text": text}]}], [], text)
    traces = [model(name, layers, tokens) for name in ("teacher", "untouched", "distilled")]
    matches = Matches({1: {layer: 0.1 for layer in range(1, 11)}, 2: {4: 1.0}}, 10)
    traced, about = Traced(question, traces, True), About(False, [text], matches)
    write_page(folder / "page.html", traced, about)
    write_index(folder / "index.html", {"page.html": traced, "other.html": traced}, about)
    return folder / "page.html"


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    return written(tmp_path_factory.mktemp("page"), 4, 6, HOSTILE)


@pytest.fixture(params=[DESK, PHONE], ids=["desk", "phone"])
def page(browser, request, page_file):
    """The page, in a browser without a network; at the end nothing was complained of and nothing was asked for."""
    context = browser.new_context(viewport=request.param, offline=True, has_touch=request.param is PHONE)
    opened, problems, asked = context.new_page(), [], []
    opened.on("console", lambda message: problems.append(message.text))
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(page_file.as_uri())
    yield opened
    context.close()
    assert problems == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


def chosen(page) -> list[str]:
    return page.locator("#detail li code").all_inner_texts()


def cell(page, at: str):
    return page.locator(f'td[data-at="{at}"]')


def test_hover_and_tap_show_the_ten_likeliest_tokens(page):
    cell(page, "along/teacher/1/2").hover()
    assert chosen(page) == [f"a2.2.{rank}" for rank in range(10)]
    cell(page, "free/distilled/0/0").click()
    assert chosen(page) == [f"f1.0.{rank}" for rank in range(10)]
    assert "distilled, layer 1" in page.locator("#detail").inner_text()


def test_the_keyboard_reaches_every_table_and_every_cell(page):
    reached = set()
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.closest('table')?.getAttribute('aria-label')"))
    names = {f"{name}: each layer along the answer" for name in ("teacher", "untouched", "distilled")}
    assert names <= reached
    cell(page, "along/teacher/0/0").focus()
    for key, text in [
        ("ArrowDown", "a2.0.0"), ("ArrowRight", "a2.1.0"), ("End", "a2.5.0"), ("ArrowUp", "a1.5.0"), ("Home", "a1.0.0"),
    ]:  # fmt: skip
        page.keyboard.press(key)
        assert chosen(page)[0] == text
    page.keyboard.press("ArrowUp")
    assert chosen(page)[0] == "a1.0.0", "there is nothing above"


def test_hostile_text_is_shown_not_run(page):
    assert page.title().startswith("Trace: </script>")
    assert HOSTILE in page.locator("h1").inner_text()


@pytest.mark.parametrize("name", ["page.html", "index.html"])
def test_nothing_is_wider_than_the_screen(page, page_file, name):
    page.goto(page_file.with_name(name).as_uri())
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= page.viewport_size["width"], "tables scroll inside their own boxes"


def test_the_colours_follow_the_choice(page):
    def background() -> str:
        return cell(page, "along/teacher/3/0").evaluate("one => getComputedStyle(one).backgroundColor")

    found = [background()]
    for name in ("answer", "divergence"):
        page.locator(f"input[value={name}]").check()
        found.append(background())
    assert len(set(found)) == 3, "layer 4: its word has 0.5, the answer's 1, and it is 0 nat from itself"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_on_every_shade(browser, page_file, scheme):
    """A contrast of 4.5 (WCAG AA), for cells of all shades."""
    page = browser.new_page(color_scheme=scheme)
    page.goto(page_file.as_uri())
    ratios = page.evaluate(CONTRASTS)
    assert len(ratios) == 21 and min(ratios) >= 4.5, ratios
    page.close()


CONTRASTS = """() => {
  const cell = document.querySelector("td.cell"), canvas = document.createElement("canvas").getContext("2d");
  const luminance = (colour) => {
    canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    const linear = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((byte) => byte / 255)
      .map((one) => one <= .04045 ? one / 12.92 : ((one + .055) / 1.055) ** 2.4);
    return .2126 * linear[0] + .7152 * linear[1] + .0722 * linear[2];
  };
  return Array.from({ length: 21 }, (_, step) => {
    cell.style.setProperty("--p", step / 20);
    const style = getComputedStyle(cell), two = [luminance(style.color), luminance(style.backgroundColor)];
    return (Math.max(...two) + .05) / (Math.min(...two) + .05);
  });
}"""


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_a_report_shows_its_figures_and_fits_the_screen(browser, tmp_path, size):
    lines = [
        {"step": "interact", "update": n, "last": 1.0, "match": [n % 3 + 1] * 12, "update_s": 1.0,
         "kl": [[1, 1, 0.1], [1, 2, 0.2], [1, 3, 0.3]], "draw_entropy": [1.0] * 12, "tokens_per_s": 5.0}
        | {f"layer/{one}": one / n for one in range(1, 13)}
        for n in range(1, 9)
    ]  # fmt: skip
    steps = [StepStatus("interact", "begun", "update 8 of 90", {}, 0)]
    facts = RunFacts(
        "run", tmp_path, f"run: {HOSTILE}\n", steps, HOSTILE, "", HOSTILE,
        {"cache": {name: HOSTILE for name in SHOWN} | {"packages": {HOSTILE: HOSTILE}}},
        {"verbalize": [], "interact": lines, "reinforce": []}, None, {}, [(HOSTILE, 1, HOSTILE)],
    )  # fmt: skip
    write_report(tmp_path / "report.html", [facts])
    context = browser.new_context(viewport=size, offline=True)
    page, problems = context.new_page(), []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto((tmp_path / "report.html").as_uri())
    assert page.title() == "Report: run" and HOSTILE in page.locator("main").inner_text()
    for figure in page.locator("figure svg:visible").all():
        box = figure.bounding_box()
        assert box["width"] > 300 and box["x"] + box["width"] <= size["width"]
    assert page.evaluate(SMALLEST) >= 9
    before = page.locator(".linear svg").first.bounding_box()["width"]
    page.get_by_label("large").first.focus()
    page.keyboard.press("Space")
    page.get_by_label("log scale").first.check()
    assert not page.locator(".linear").first.is_visible() and page.locator(".linear").nth(1).is_visible()
    assert page.locator(".logarithmic svg").first.bounding_box()["width"] > 2 * before
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    context.close()
    assert problems == []


SMALLEST = """() => Math.min(...[...document.querySelectorAll("figure svg text")]
  .filter((one) => one.getClientRects().length)
  .map((one) => parseFloat(getComputedStyle(one).fontSize) * one.ownerSVGElement.getScreenCTM().a))"""
"""Font size of the smallest text of a figure, in pixels of the page."""


def test_a_watched_report_reloads_itself_until_the_last_page(browser, tmp_path):
    def write(progress: str, reload_s: int | None) -> None:
        steps = [StepStatus("interact", "begun", progress, {}, 0)]
        lines: dict = {"verbalize": [], "interact": [], "reinforce": []}
        facts = RunFacts("run", tmp_path, "run: x\n", steps, "", "", None, {}, lines, None, {}, [])
        write_report(tmp_path / "report.html", [facts], reload_s)

    page = browser.new_page()
    write("update 8 of 9", 1)
    page.goto((tmp_path / "report.html").as_uri())
    assert "update 8 of 9" in page.inner_text("main")
    write("update 9 of 9", None)
    page.get_by_text("update 9 of 9").wait_for(timeout=60_000)
    assert page.locator("meta[http-equiv=refresh]").count() == 0
    page.close()


def test_a_page_of_300_tokens_and_30_layers_answers_at_once(browser, tmp_path):
    """Three models, 54,000 cells: all there, and choosing one redraws that one alone."""
    page = browser.new_page(viewport=DESK)
    page.goto(written(tmp_path, 30, 300).as_uri())
    assert page.locator("td.cell").count() == 3 * 2 * 30 * 300
    changed = page.evaluate(
        """async () => {
          let touched = 0;
          const watch = new MutationObserver((all) => { touched += new Set(all.map((one) => one.target)).size; });
          document.querySelectorAll("table").forEach((one) => watch.observe(one, { attributes: true, subtree: true }));
          const cells = document.querySelectorAll("td.cell");
          for (const at of [10, 5000, 20000]) cells[at].dispatchEvent(new Event("focusin", { bubbles: true }));
          await new Promise(requestAnimationFrame);
          return touched;
        }"""
    )
    assert 0 < changed <= 8, "the cells that were chosen, and those that no longer are"
    assert page.locator("#detail li").count() == 10
    page.close()
