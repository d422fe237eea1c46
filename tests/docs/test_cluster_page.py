"""docs/running_on_a_cluster.md: the site file that it shows is the shipped one, and has every field."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from launch.site_file import Container, Site, read_site

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "running_on_a_cluster.md").read_text(encoding="utf-8")


def test_its_site_file_is_the_shipped_one_and_what_that_leaves_out(tmp_path):
    shipped, others = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert (ROOT / "site.example.yaml").read_text(encoding="utf-8").partition("\n")[2] == shipped
    (tmp_path / "site.yaml").write_text(shipped + others)
    assert read_site(tmp_path / "site.yaml").container.runtime == "apptainer"
    shown = yaml.safe_load(shipped + others)
    assert set(shown) == set(Site.model_fields) and set(shown["container"]) == set(Container.model_fields)
