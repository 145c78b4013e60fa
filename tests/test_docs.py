"""Documents: every link leads somewhere, every page is on the site, all of `td.*` is described."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def prose(page: Path) -> str:
    """A page without its blocks of code, in which nothing is a link."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """The names that GitHub and mkdocs give to headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {
        re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose(page)):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links to {link}, which is not there"
        if anchor:
            assert anchor in anchors(target), f"{page.name} links to {link}: no such heading"


def test_every_page_is_on_the_site():
    on_site = {
        name
        for page in yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
        for name in page.values()
    }
    from_root = {"index.md", "contributing.md", "changelog.md"}  # docs/site_pages.py
    assert on_site == from_root | {page.name for page in ROOT.glob("docs/*.md")}


def test_the_table_of_families_has_what_is_tested():
    from traced_models import ARCHITECTURES

    page = (ROOT / "docs/families.md").read_text(encoding="utf-8")
    table = page.partition("| `model_type` |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| (\w+) \|", table, re.M) == sorted(ARCHITECTURES)


def test_the_reference_names_everything_public_and_nothing_else():
    import truedepth as td

    names = re.findall(r"^::: truedepth\.(\S+)", (ROOT / "docs/api.md").read_text(), re.M)
    assert {*td.__all__} - {"__version__"} <= {*names}
    for name in names:
        module, _, last = f"truedepth.{name}".rpartition(".")
        assert hasattr(import_module(module), last), f"docs/api.md names truedepth.{name}"
