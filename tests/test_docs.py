"""What the README and the documentation say is run: every snippet, every docstring's example, every link."""

import doctest
import importlib
import inspect
import io
import json
import pkgutil
import re
import runpy
from collections.abc import Iterator
from contextlib import redirect_stdout
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
from tests.pages import FENCE, NOT_RUN, ROOT, run_page, snippets
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


def test_every_snippet_in_python_is_run_here_or_by_a_test_that_asks_for_it() -> None:
    elsewhere = {page_name(page): len(SNIPPET.findall(page.read_text(encoding="utf-8"))) for page in PAGES}
    assert {name: count for name, count in elsewhere.items() if count} == {
        "docs/compiling.md": 2,
        "docs/tensor_parallel.md": 2,
    }


@pytest.fixture(autouse=True)
def _known_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the kinds of layers that an example registers."""
    monkeypatch.setattr(registry, "_layers", dict(registry._layers))


def models_of(page: Path, *, real: bool) -> list[str]:
    """Return the names of the Hub in the code of a page that there is a directory for."""
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
def test_the_blocks_for_real_models_run_with_small_ones_of_the_same_names(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)  # a CPU has it, too
    stand_ins.write(models_of(page, real=True), tmp_path)
    run_page(page, real=True)


@pytest.mark.parametrize("page", sorted((DOCS / "recipes").glob("*.md")), ids=page_name)
def test_a_recipe_names_a_model_of_the_hub(page: Path) -> None:
    assert [*models_of(page, real=True), *models_of(page, real=False)]


@pytest.mark.parametrize("name", ["README.md", "docs/index.md", "docs/quickstart.md"])
def test_the_pages_that_users_meet_first_have_snippets(name: str) -> None:
    assert snippets(ROOT / name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# Title\n\n```python\nx = 1\n\nx.missing\n```\n", r"page\.md:6: AttributeError"),
        ("```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n", r"page\.md:6: AssertionError"),
        ("```python\nx = = 1\n```\n", r"page\.md:2: SyntaxError"),
        ("```python\nprint(1)\n```\n```text\n2\n```\n", r"page\.md:2: prints"),
        ("```python\nprint(1)\n```\n\n```text\n2\n```\n", r"page\.md:2: prints"),
    ],
    ids=["raises", "second block", "syntax", "prints otherwise", "prints otherwise after a blank line"],
)
def test_a_wrong_snippet_is_reported_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    with pytest.raises(AssertionError, match=message):
        run_page(page)


def test_a_snippet_marked_not_run_is_not_run(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"```python {NOT_RUN}\nraise ValueError\n```\n", encoding="utf-8")
    run_page(page)


ELSEWHERE = ("axolotl", "swift")
"""Modules of `randlora.integrations` whose library is in an environment of its own; see `make test-trainers`."""


def package_examples() -> Iterator[doctest.DocTest]:
    """Find the examples in the package's docstrings."""
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


def test_the_examples_in_the_package_have_80_columns() -> None:
    lines = [line for path in PACKAGE.rglob("*.py") for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line for line in map(str.strip, lines) if line.startswith((">>> ", "... ")) and len(line) > 80] == []


def test_every_example_in_the_package_is_found() -> None:
    written = sum(path.read_text(encoding="utf-8").count(">>> ") for path in PACKAGE.rglob("*.py"))
    assert sum(len(example.examples) for example in package_examples()) == written > 0


def test_the_notebook_is_its_page() -> None:
    assert NOTEBOOK.read_text(encoding="utf-8") == notebook_of(PAGE), "python -m tests.notebook makes it anew"


def test_the_cells_of_the_notebook_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert len(cells) == len(snippets(PAGE)) > 0
    namespace: dict[str, Any] = {}
    for cell in cells:
        with redirect_stdout(io.StringIO()) as printed:
            exec("".join(cell["source"]), namespace)
        assert not cell["outputs"] or printed.getvalue() == "".join(cell["outputs"][0]["text"])


def api_entries() -> list[str]:
    """Find what the pages of the API show."""
    return [entry for page in sorted(DOCS.glob("api/*.md")) for entry in API_ENTRY.findall(page.read_text("utf-8"))]


def api_object(entry: str) -> Any:
    """Return what an entry of these pages shows."""
    module, _, name = f"randlora.{entry}".rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_the_pages_of_the_api_show_every_public_name_once() -> None:
    objects = [api_object(entry) for entry in api_entries()]
    assert len({id(found) for found in objects}) == len(objects)
    public = [getattr(randlora, name) for name in randlora.__all__]
    for space in (randlora.files, randlora.serving):
        public += [getattr(space, name) for name in space.__all__ if name != "Progress"]
    raised = [found for found in vars(randlora.errors).values() if inspect.isclass(found)]
    public += [found for found in raised if found.__module__ == "randlora.errors"]
    shown = {id(found) for found in objects}
    missing = [found for found in public if not inspect.ismodule(found) and id(found) not in shown]
    assert missing == []


def test_the_pages_of_the_api_name_each_object_where_it_is_defined() -> None:
    entries = api_entries()
    found = [api_object(entry) for entry in entries]
    assert [f"{each.__module__}.{each.__qualname__}" for each in found] == [f"randlora.{entry}" for entry in entries]
    assert entries


def code_lines(page: Path) -> Iterator[str]:
    """Yield the lines of the code on a page: of screens the commands, and not what they print, which wraps."""
    for block in FENCE.finditer(page.read_text(encoding="utf-8")):
        for line in block["code"].splitlines() if block["language"] not in ("", "text", "math") else ():
            if block["language"] != "console" or line.startswith("$"):
                yield line


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_the_code_on_a_page_has_80_columns(page: Path) -> None:
    assert [line for line in code_lines(page) if len(line) > 80] == []


def links(page: Path) -> list[str]:
    """Find the targets of a page's links to files of the repository, outside of code."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    targets = (match["target"] for match in LINK.finditer(text))
    return [target for target in targets if "://" not in target and not target.startswith(("#", "mailto:"))]


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_the_files_that_a_page_links_to_exist(page: Path) -> None:
    missing = [target for target in links(page) if not (page.parent / target.split("#")[0]).exists()]
    assert missing == []


def test_the_pages_link_to_each_other() -> None:
    assert sum(len(links(page)) for page in PAGES) > len(PAGES)


def test_the_navigation_lists_every_page() -> None:
    listed = re.findall(r"([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS_PAGES)


def entry_counts(entries: list[dict[str, Any]]) -> Iterator[int]:
    """Yield how many entries each level of the navigation has, but for the page that the level's own name opens."""
    yield sum(not str(target).endswith("/index.md") for entry in entries for target in entry.values())
    for entry in entries:
        for target in entry.values():
            yield from entry_counts(target) if isinstance(target, list) else ()


def test_the_navigation_shows_at_most_eight_entries_of_a_level() -> None:
    written = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    nav = yaml.safe_load(written[written.index("nav:") : written.index("hooks:")])["nav"]
    counts = [*entry_counts(nav)]
    assert len(counts) > len(nav)
    assert max(counts) <= 8


def test_pages_are_short() -> None:
    texts = {page_name(page): FRONT_MATTER.sub("", page.read_text(encoding="utf-8")) for page in DOCS_PAGES}
    lengths = {name: len(text.splitlines()) for name, text in texts.items()}
    assert {name: length for name, length in lengths.items() if length > 200} == {}


def test_the_architecture_page_draws_every_room_of_the_package_and_lists_its_files() -> None:
    hook, page = (
        runpy.run_path(str(DOCS / "assets" / "rooms.py")),
        (DOCS / "architecture.md").read_text(encoding="utf-8"),
    )
    listed = [line.split("`")[1] for line in hook["table"](page) if "`" in line]
    own = [path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")]
    assert sorted(listed) == sorted(name for name in own if name != "__init__.py")
