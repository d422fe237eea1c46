"""The documentation site: every page in its nav, every field and command on its page, no broken link, no network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from docs.site import commands, pages, recipe_fields
from docs.site.__main__ import main
from pipeline.recipe.resolve import leaves, load_recipe
from pipeline.recipe.schema import Recipe

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("site")
    pages.write_pages(ROOT, output)
    return output


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("zensical", reason="needs the extra docs: pip install '.[docs]'")
    output = tmp_path_factory.mktemp("built")
    assert main(["--output", str(output)]) == 0
    return output / "site"


def entries(nav) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [entry for inner in (nav.values() if isinstance(nav, dict) else nav) for entry in entries(inner)]


def test_the_nav_has_every_page_once(written):
    nav = entries(yaml.safe_load((written / "mkdocs.yml").read_text())["nav"])
    found = {path.relative_to(written / "pages").as_posix() for path in (written / "pages").rglob("*.md")}
    assert len(nav) == len(set(nav)) and set(nav) == found


def test_each_page_of_the_repository_is_in_the_site_with_its_text(written, monkeypatch):
    assert "## The pairs" in (written / "pages" / "recipes.md").read_text()
    assert "## `recipes/wrong_answers.yaml`" in (written / "pages" / "shipped_recipes.md").read_text()
    monkeypatch.setitem(pages.MADE, "recipes", "recipes.md")
    with pytest.raises(ValueError, match=r"would both be recipes\.md"):
        pages.write_pages(ROOT, written / "other")


def test_every_field_of_a_recipe_has_its_type_default_and_meaning(tmp_path):
    page = recipe_fields.recipe_fields_page()
    keys = leaves(load_recipe(ROOT / "recipes" / "demo.yaml", [f"run={tmp_path}"]).recipe)  # not an older run of it
    anchors = re.findall(r'<a id="([^"]+)">', page)
    assert sorted(anchors) == sorted(keys)
    matching = page.split('<a id="interact.matching">')[1].split("###")[0]
    assert "one of `adaptive`, `uniform`" in matching and "default `adaptive`" in matching
    assert "* `earliest`, `latest`: a fixed match" in matching
    assert "integer, above 0; must be set" in page.split('<a id="interact.batch_size">')[1].split("###")[0]
    assert "list of integer, above 0; may be left out" in page.split('<a id="interact.teacher_layers">')[1]
    assert "number, 0 or more, below 1; default `0.0`" in page.split('<a id="reinforce.label_smoothing">')[1]


def test_no_field_is_without_a_meaning():
    for section in recipe_fields.sections():
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"
    assert Recipe in recipe_fields.sections()


def test_every_command_is_there_with_its_help(written):
    page = (written / "pages" / "commands.md").read_text()
    assert page.count("\n## ") == page.count("usage: ") == len(list(commands.commands())) >= 15
    assert "## python -m pipeline trace\n" in page and "--source llava:" in page


def test_links_are_those_of_the_site(written):
    start = (written / "pages" / "index.md").read_text()
    assert "](evidence.md)" in start and "](decisions/index.md)" in start and "](docs/" not in start
    assert "](figures/trace.png)" in start
    assert "[the fields of a recipe](recipe_fields.md)" in (written / "pages" / "first_distillation.md").read_text()
    evidence = (written / "pages" / "evidence.md").read_text()
    assert "](files/bench/results/ladder_cpu.json)" in evidence
    assert (written / "pages" / "files" / "bench" / "results" / "ladder_cpu.json").is_file()


def test_a_link_to_a_file_that_is_not_there_is_an_error_that_names_page_and_link(tmp_path):
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text("`[no](link.md)` [a](nowhere.json)")
    with pytest.raises(FileNotFoundError, match=r"docs/page.md: expected a file behind the link to docs/nowhere.json"):
        pages.relinked(page.read_text(), page, tmp_path, tmp_path / "pages")


def test_the_site_builds_and_a_broken_anchor_does_not(site):
    assert (site / "index.html").is_file() and (site / "decisions" / "0005-imports.html").is_file()
    glossary = site.parent / "pages" / "glossary.md"
    glossary.write_text(glossary.read_text() + "\n[nowhere](installation.md#not-there)\n")
    built = site.parent.parent / "broken"
    shutil.copytree(site.parent, built, ignore=shutil.ignore_patterns("site"))
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", str(built / "mkdocs.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "anchor does not exist" in done.stdout + done.stderr


def test_the_site_opens_from_disk_loads_nothing_and_can_be_searched(site):
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs Debian's chromium: tests/install_debian.sh")
    asked, errors = [], []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto((site / "recipe_fields.html").as_uri())
        page.keyboard.press("Control+k")
        page.keyboard.type("draw entropy")
        # Results come with each letter, and those of the whole words last.
        page.get_by_role("option").filter(has_text="draw").first.wait_for()
        browser.close()
    assert errors == [] and [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
