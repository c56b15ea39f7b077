"""The site builds without a warning, which a broken link, a missing anchor and an orphan page are; and it needs no network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    argv = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(argv, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_builds_strictly(site: Path) -> None:
    assert (site / "index.html").exists()


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    html = "\n".join(page.read_text(encoding="utf-8") for page in site.rglob("*.html"))
    loaded = re.findall(r"""<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=["']?(https?:)?//[^"' >]+""", html)
    assert not loaded


def test_links_lead_somewhere(site: Path) -> None:
    """Also those that mkdocs does not look at: in raw HTML, and what mkdocstrings makes."""
    anchors = {page: set(re.findall(r'\bid="?([^" >]+)', page.read_text(encoding="utf-8"))) for page in site.rglob("*.html")}
    broken = []
    for page in anchors:
        for link in re.findall(r'<a\b[^>]*?\bhref="([^"]*)"', page.read_text(encoding="utf-8")):
            path, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", link) or page.name == "404.html":
                continue
            target = (page.parent / path).resolve() if path else page
            if target.is_dir():
                target /= "index.html"
            if not target.exists() or (anchor and target in anchors and anchor not in anchors[target]):
                broken.append(f"{page.relative_to(site)}: {link}")
    assert not broken, "\n".join(broken)
