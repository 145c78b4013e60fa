"""Pages that `make docs` takes from outside docs/: a hook of mkdocs."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]

PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Files of the repository's root, and what they are called on the site."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, their links to docs/ and to each other as they are on the site."""
    for name, page in PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        for other, target in PAGES.items():
            text = text.replace(f"]({other}", f"]({target}")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Links to sources and to directories become their names: the site has neither."""
    link = r"\[[^\]]*\]\((?:\.\./)?(src/[^)]*|[\w/]+/)\)"
    return re.sub(link, r"`\1`", markdown)
