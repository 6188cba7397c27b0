"""What the repository tells its host: how it is cited, how it is released."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import randlora
from tests.pages import ROOT

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
RELEASE: dict[str, Any] = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8"))
CITATION: dict[str, Any] = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def test_the_citation_has_what_its_format_asks_for() -> None:
    for entry, keys in (
        (CITATION, {"cff-version", "message", "title", "authors"}),
        (CITATION["preferred-citation"], {"type", "title", "authors", "year"}),
    ):
        assert keys <= entry.keys()
        assert all("name" in author or {"family-names", "given-names"} <= author.keys() for author in entry["authors"])
    assert CITATION["cff-version"] == "1.2.0"


def test_the_citation_is_of_this_version_and_of_the_paper_that_the_readme_cites() -> None:
    paper, readme = CITATION["preferred-citation"], (ROOT / "README.md").read_text(encoding="utf-8")
    assert CITATION["version"] == randlora.__version__
    assert paper["title"] == re.sub(r"[{}]", "", str(re.search(r"title += {(.*)},", readme)[1]))  # type: ignore[index]
    assert all(author["family-names"] in readme for author in paper["authors"])
    assert paper["url"] in readme


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned(path: Path) -> None:
    used = re.findall(r"uses: (\S+)@(.*)", path.read_text(encoding="utf-8"))
    loose = [name for name, version in used if not re.fullmatch(r"[0-9a-f]{40} # v\d+\.\d+\.\d+", version)]
    assert used
    assert not loose


def test_scheduled_campaigns_are_targets_of_the_makefile() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/campaigns.yml").read_text(encoding="utf-8"))["jobs"]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert {*jobs["campaign"]["strategy"]["matrix"]["target"]} <= {*targets}


def test_a_workflow_may_do_nothing_that_a_job_does_not_ask_for() -> None:
    asked = {name: job["permissions"] for name, job in RELEASE["jobs"].items()}
    assert RELEASE["permissions"] == {}
    assert asked == {
        "build": {"contents": "read"},
        "publish": {"attestations": "write", "contents": "read", "id-token": "write"},
        "announce": {"contents": "write"},
    }


def test_only_a_protected_environment_publishes() -> None:
    assert {name: job.get("environment") for name, job in RELEASE["jobs"].items() if "environment" in job} == {
        "publish": "pypi"
    }


def test_the_templates_of_issues_have_a_name_and_a_purpose() -> None:
    templates = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.md"))
    assert [path.stem for path in templates] == ["bug", "feature"]
    for path in templates:
        _, head, text = path.read_text(encoding="utf-8").split("---\n", 2)
        assert {"name", "about"} <= yaml.safe_load(head).keys()
        assert text.strip()
