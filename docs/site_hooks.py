"""MkDocs hooks that let one set of links serve both the repository and the site.

Pages in docs/ link to everything by its place in the repository. For the site

- `OUTSIDE` says which files of the repository become pages and pictures of it, too;
- notebooks of examples/ become pages with what they show when they are run: `make docs` does so;
- links to all of these, and to README.md, are turned to where they are in the site;
- a link to any other file of the repository becomes its path as code;
- a pattern in the navigation stands for all pages that it matches, README.md first.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OUTSIDE = (
    "bench/results/**/*.md",
    "bench/results/**/*.png",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
)
NOTEBOOKS = ROOT / "build/notebook"
#: the HTML that transformers' Trainer shows, and what of it Markdown takes
SHOWN = {r"^ +(?=</?div>$)": "", r"^ *<table .*>$": "<table>", r"^</table><p>$": "</table>"}
FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")


def on_config(config: MkDocsConfig) -> None:
    """Replaces patterns in the navigation by the pages that they match."""
    config.nav = _expanded(config.nav)


def _expanded(entry: Any) -> Any:
    if isinstance(entry, list):
        return [_expanded(part) for part in entry]
    if isinstance(entry, dict):
        return {title: _expanded(part) for title, part in entry.items()}
    if "*" not in entry:
        return entry
    root = ROOT if any(ROOT.glob(entry)) else ROOT / "docs"
    pages = sorted(root.glob(entry), key=lambda path: (path.name != "README.md", path.name))
    return [path.relative_to(root).as_posix() for path in pages]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Adds the pages and pictures from outside docs/."""
    for path in sorted(path for pattern in OUTSIDE for path in ROOT.glob(pattern)):
        uri = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    for path in sorted([*NOTEBOOKS.glob("*.md"), *NOTEBOOKS.glob("*_files/*")]):
        uri = f"examples/{path.relative_to(NOTEBOOKS).as_posix()}"
        files.append(File.generated(config, uri, abs_src_path=str(path)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns a page's links, but for those inside fenced code. Wide tables get the whole width."""
    uri = page.file.src_uri
    if uri.startswith("bench/"):
        page.meta["hide"] = ["toc"]
    if uri.startswith("examples/"):
        for pattern, tag in SHOWN.items():
            markdown = re.sub(pattern, tag, markdown, flags=re.MULTILINE)
    here = posixpath.dirname(f"docs/{uri}" if (ROOT / "docs" / uri).exists() else uri)

    def turned(link: re.Match[str]) -> str:
        image, text, target = link.groups()
        path, mark, anchor = target.partition("#")
        if not path or ":" in path:  # an anchor of this page, or another site
            return link[0]
        place = posixpath.normpath(posixpath.join(here, path))
        there = "index.md" if place == "README.md" else place.removeprefix("docs/")
        there = re.sub(r"\.ipynb$", ".md", there)
        if files.get_file_from_path(there) is not None:
            there = posixpath.relpath(there, posixpath.dirname(uri) or ".")
            return f"{image}[{text}]({there}{mark}{anchor})"
        if not (ROOT / place).exists():  # mkdocs warns of it
            return link[0]
        return f"`{place}`" if text.strip("`/") in place else f"{text} (`{place}`)"

    parts = FENCED.split(markdown)
    return "".join(part if k % 2 else LINK.sub(turned, part) for k, part in enumerate(parts))
