"""Links in the README, the docs and the other top-level pages have a target."""

import re

import pytest
from snippets import ROOT

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")])


def anchors(path):
    """The anchors that GitHub and mkdocs make of a page's headings."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.M)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for link in LINK.findall(text):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"
        if page.parent == ROOT / "docs":  # mkdocs copies only docs/, so other links would break
            assert target.resolve().is_relative_to(ROOT / "docs"), f"{page.name}: {link}"


def test_pages_name_files_that_exist():
    """Checks paths in backticks, such as `tests/support/oracle.py`."""
    missing = []
    for page in PAGES:
        for path in re.findall(r"`((?:[\w.-]+/)+[\w.-]+\.\w+)`", page.read_text(encoding="utf-8")):
            roots = ROOT, ROOT / "fused_sft_loss"
            if not any((root / path).exists() for root in roots):
                missing.append(f"{page.name}: {path}")
    assert not missing
