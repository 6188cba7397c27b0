"""What the README and the documentation say is run: every snippet, every docstring's example, every link."""

import doctest
import importlib
import inspect
import io
import pkgutil
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.torch_version import TorchVersion

import randlora
from randlora.layers import registry
from tests import stand_ins
from tests.examples import DOCS, SNIPPET
from tests.notebook import NOTEBOOK, PAGE, notebook_of
from tests.pages import FENCE, ROOT, run_page, snippets
from tests.peer import PEFT_STREAM, THEIR_WARNINGS, TRAINERS_WARNINGS

pytestmark = [*THEIR_WARNINGS, *TRAINERS_WARNINGS]  # of pages that show them at work

PACKAGE = ROOT / "randlora"
DOCS_PAGES = sorted(page for page in DOCS.rglob("*.md") if "examples" not in page.parts)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS_PAGES]

LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^)\s]+)[^)]*\)")
FRONT_MATTER = re.compile(r"\A---\n.*?^---\n\n", re.DOTALL | re.MULTILINE)
API_ENTRY = re.compile(r"^::: randlora\.([\w.]+)", re.MULTILINE)


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(autouse=True)
def _known_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the kinds of layers that an example registers."""
    monkeypatch.setattr(registry, "_layers", dict(registry._layers))


def models_of(page: Path, *, real: bool) -> list[str]:
    return stand_ins.named("".join(snippet.code for snippet in snippets(page, real=real)))


def run_pages() -> Iterator[Any]:
    """Yield the pages with snippets; those that train a pretrained model take seconds, a language model more."""
    for page in PAGES:
        if snippets(page):
            names = models_of(page, real=False)
            takes = pytest.mark.slow if any("SmolLM2" in name for name in names) else pytest.mark.medium
            yield pytest.param(page, marks=[takes] if names else [])


@pytest.mark.parametrize("page", list(run_pages()), ids=page_name)
def test_the_snippets_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page.name == "saving.md" and PEFT_STREAM != "torch":
        pytest.skip("PEFT draws other dense bases under torch 2.11 and older")
    if page.name == "compiling.md" and TorchVersion(torch.__version__) < "2.9":
        pytest.skip("torch.export of older versions loses tensors that a model computes with")
    if page.name == "quantized_others.md":
        pytest.importorskip("torchao", reason="the oldest versions are tested without it")
    monkeypatch.chdir(tmp_path)
    stand_ins.write(models_of(page, real=False), tmp_path)
    run_page(page)


@pytest.mark.medium
@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page, real=True)], ids=page_name)
def test_blocks_for_real_models_run_on_small_ones(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)  # a CPU has it, too
    stand_ins.write(models_of(page, real=True), tmp_path)
    run_page(page, real=True)


ELSEWHERE = ("axolotl", "swift")
"""Modules of `randlora.integrations` whose library is in an environment of its own; see `make test-trainers`."""


def package_examples() -> Iterator[doctest.DocTest]:
    found = [info.name for info in pkgutil.walk_packages(randlora.__path__, "randlora.")]
    names = [name for name in found if name.removeprefix("randlora.integrations.") not in ELSEWHERE]
    for module in map(importlib.import_module, ["randlora", *names]):
        extra = {"torch": torch, "nn": nn, "randlora": randlora}
        yield from (test for test in doctest.DocTestFinder().find(module, extraglobs=extra) if test.examples)


@pytest.mark.parametrize("example", list(package_examples()), ids=lambda example: example.name)
def test_the_example_of_a_docstring_runs(
    example: doctest.DocTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    report = io.StringIO()
    doctest.DocTestRunner().run(example, out=report.write)
    assert report.getvalue() == ""


def test_every_example_in_the_package_is_found_and_has_80_columns() -> None:
    texts = [path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")]
    found = sum(len(example.examples) for example in package_examples())
    assert found == sum(text.count(">>> ") for text in texts) > 0
    lines = [line.strip() for text in texts for line in text.splitlines()]
    assert [line for line in lines if line.startswith((">>> ", "... ")) and len(line) > 80] == []


def test_the_notebook_is_its_page() -> None:
    assert NOTEBOOK.read_text(encoding="utf-8") == notebook_of(PAGE), "python -m tests.notebook makes it anew"


def test_the_pages_of_the_api_show_every_public_name_once_where_it_is_defined() -> None:
    entries = [entry for page in DOCS.glob("api/*.md") for entry in API_ENTRY.findall(page.read_text("utf-8"))]
    objects = [pkgutil.resolve_name(f"randlora.{entry}") for entry in entries]
    assert len({id(found) for found in objects}) == len(objects) > 0
    assert [f"{each.__module__}.{each.__qualname__}" for each in objects] == [f"randlora.{entry}" for entry in entries]
    public = [getattr(randlora, name) for name in randlora.__all__]
    for space in (randlora.files, randlora.serving):
        public += [getattr(space, name) for name in space.__all__ if name != "Progress"]
    raised = [found for found in vars(randlora.errors).values() if inspect.isclass(found)]
    public += [found for found in raised if found.__module__ == "randlora.errors"]
    shown = {id(found) for found in objects}
    assert [found for found in public if not inspect.ismodule(found) and id(found) not in shown] == []


def code_lines(page: Path) -> Iterator[str]:
    """Yield the lines of the code on a page: of screens the commands, and not what they print, which wraps."""
    for block in FENCE.finditer(page.read_text(encoding="utf-8")):
        for line in block["code"].splitlines() if block["language"] not in ("", "text", "math") else ():
            if block["language"] != "console" or line.startswith("$"):
                yield line


def test_pages_are_short_their_code_has_80_columns_and_is_run_and_their_links_lead_to_files() -> None:
    elsewhere = {}  # snippets that a test runs which asks for them
    for page in PAGES:
        whole = page.read_text(encoding="utf-8")
        assert page not in DOCS_PAGES or len(FRONT_MATTER.sub("", whole).splitlines()) <= 200, page
        assert [line for line in code_lines(page) if len(line) > 80] == [], page
        targets = [match["target"] for match in LINK.finditer(FENCE.sub("", whole))]
        own = [target for target in targets if "://" not in target and not target.startswith(("#", "mailto:"))]
        assert [target for target in own if not (page.parent / target.split("#")[0]).exists()] == [], page
        if count := len(SNIPPET.findall(whole)):
            elsewhere[page_name(page)] = count
    assert elsewhere == {"docs/compiling.md": 2, "docs/tensor_parallel.md": 2}


def entry_counts(entries: list[dict[str, Any]]) -> Iterator[int]:
    """Yield how many entries each level of the navigation has, but for the page that the level's own name opens."""
    yield sum(not str(target).endswith("/index.md") for entry in entries for target in entry.values())
    for entry in entries:
        for target in entry.values():
            yield from entry_counts(target) if isinstance(target, list) else ()


def test_the_navigation_lists_every_page_and_at_most_eight_entries_of_a_level() -> None:
    written = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r"([\w/-]+\.md)$", written, re.MULTILINE)
    assert sorted(listed) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS_PAGES)
    nav = yaml.safe_load(written[written.index("nav:") : written.index("hooks:")])["nav"]
    assert max(entry_counts(nav)) <= 8


def test_the_architecture_page_draws_every_room_of_the_package_and_lists_its_files() -> None:
    hook = runpy.run_path(str(DOCS / "assets" / "rooms.py"))
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    listed = [line.split("`")[1] for line in hook["table"](page) if "`" in line]
    own = [path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")]
    assert sorted(listed) == sorted(name for name in own if name != "__init__.py")


def test_the_pages_on_trust_name_a_test_for_each_promise_and_have_one_place_for_the_figures() -> None:
    trust = "".join((DOCS / name).read_text(encoding="utf-8") for name in ("trust.md", "trust_figures.md"))
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    defined = set(re.findall(r"^ *def (test_\w+)\(", tests, re.MULTILINE))
    assert set(re.findall(r"`(test_\w+)`", trust)) <= defined
    tables = re.findall(r"^\| promise \| test \|\n\|---\|---\|\n((?:\|.*\n)+)", trust, re.MULTILINE)
    rows = [row for table in tables for row in table.splitlines()]
    assert len(tables) == 9
    assert [row for row in rows if not re.search(r"\| `test_\w+`(, `test_\w+`)* \|$", row)] == []
    assert trust.count("<!-- torture -->\n") == trust.count("<!-- /torture -->\n") == 1
