"""The pages on trust name tests, each of which there is."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TRUST = "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("trust.md", "trust_figures.md"))
DEFINED = {
    name
    for path in (ROOT / "tests").rglob("test_*.py")
    for name in re.findall(r"^ *def (test_\w+)\(", path.read_text(encoding="utf-8"), re.MULTILINE)
}


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(test_\w+)`", TRUST))))
def test_every_test_that_the_pages_on_trust_name_exists(name: str) -> None:
    assert name in DEFINED


def test_every_promise_in_a_table_names_its_test() -> None:
    tables = re.findall(r"^\| promise \| test \|\n\|---\|---\|\n((?:\|.*\n)+)", TRUST, re.MULTILINE)
    rows = [row for table in tables for row in table.splitlines()]
    assert len(tables) == 9
    assert [row for row in rows if not re.search(r"\| `test_\w+`(, `test_\w+`)* \|$", row)] == []


def test_there_is_one_place_for_the_figures() -> None:
    assert TRUST.count("<!-- torture -->\n") == TRUST.count("<!-- /torture -->\n") == 1
