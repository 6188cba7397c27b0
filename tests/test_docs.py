"""What the README and the documentation say is run: every snippet, docstring, program and link; nothing is fetched."""

import copy
import doctest
import importlib
import inspect
import io
import pkgutil
import re
import runpy
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.torch_version import TorchVersion

import randlora
from randlora.bases import BasisBank
from randlora.layers import registry
from tests import models, pages, stand_ins
from tests.pages import DOCS, FENCE, ROOT, imported, run_page, snippets
from tests.peer import THEIR_WARNINGS, TRAINERS_WARNINGS
from tests.reference import delta_weight
from tests.torture.campaigns import CAMPAIGNS
from tests.torture.training import killed_training, plain_loop

pytestmark = [*THEIR_WARNINGS, *TRAINERS_WARNINGS]  # of pages that show them at work

PACKAGE = ROOT / "randlora"
DOCS_PAGES = sorted(page for page in DOCS.rglob("*.md") if "examples" not in page.parts)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS_PAGES]

LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^)\s]+)[^)]*\)")
FRONT_MATTER = re.compile(r"\A---\n.*?^---\n\n", re.DOTALL | re.MULTILINE)
RUNS = re.compile(r"^<!-- [\w, ]+ -->\n\n(\|.*\n)+", re.MULTILINE)
"""Tables that a program makes of kept runs: a page is as long as they are, and nobody reads them from end to end."""
API_ENTRY = re.compile(r"^::: randlora\.([\w.]+)", re.MULTILINE)


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(autouse=True)
def _known_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_layers", dict(registry._layers))
    monkeypatch.setattr(registry, "_readers", {name: dict(layers) for name, layers in registry._readers.items()})


def models_of(page: Path, *, real: bool) -> list[str]:
    return stand_ins.named("".join(snippet.code for snippet in snippets(page, real=real)))


TRAINING = ("continued.md", "diffusion.md")  # of which each takes over a second


def run_pages() -> Iterator[Any]:
    """Yield the pages with snippets; those that train a pretrained model take seconds, a language model more."""
    for page in PAGES:
        if snippets(page):
            names = models_of(page, real=False)
            takes = pytest.mark.slow if any("SmolLM2" in name for name in names) else pytest.mark.medium
            yield pytest.param(page, marks=[takes] if names or page.name in TRAINING else [])


@pytest.mark.parametrize("page", list(run_pages()), ids=page_name)
def test_the_snippets_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page.name == "compiling.md" and TorchVersion(torch.__version__) < "2.9":
        pytest.skip("torch.export of older versions loses tensors that a model computes with")
    if page == DOCS / "quantized.md":
        pytest.importorskip("torchao", reason="the oldest versions are tested without it")
    monkeypatch.chdir(tmp_path)
    stand_ins.write(models_of(page, real=False), tmp_path)
    run_page(page)


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore:learning rate .* is far below")  # which are for wider layers than these have
@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page, real=True)], ids=page_name)
def test_blocks_for_real_models_run_on_small_ones(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)  # a CPU has it, too
    stand_ins.write(models_of(page, real=True), tmp_path)
    run_page(page, real=True)


def modules_with_examples() -> list[str]:
    paths = [path for path in sorted(PACKAGE.rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]


@pytest.mark.parametrize("name", modules_with_examples())
def test_a_docstrings_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, report = importlib.import_module(name), io.StringIO()
    names = {"torch": torch, "nn": nn, "randlora": randlora}
    found = [test for test in doctest.DocTestFinder().find(module, extraglobs=names) if test.examples]
    for test in found:
        (tmp_path / test.name).mkdir()
        monkeypatch.chdir(tmp_path / test.name)
        doctest.DocTestRunner().run(test, out=report.write)
    assert report.getvalue() == ""
    assert sum(len(test.examples) for test in found) == inspect.getsource(module).count(">>> ") > 0


def test_examples_have_80_columns_and_the_notebook_is_its_page() -> None:
    texts = [path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")]
    lines = [line.strip() for text in texts for line in text.splitlines()]
    assert [line for line in lines if line.startswith((">>> ", "... ")) and len(line) > 80] == []
    assert pages.NOTEBOOK.read_text("utf-8") == pages.notebook_of(pages.QUICKSTART), "python -m tests.pages"


def test_the_pages_of_the_api_show_every_public_name_once_where_it_is_defined() -> None:
    entries = [entry for page in DOCS.glob("api/*.md") for entry in API_ENTRY.findall(page.read_text("utf-8"))]
    objects = [pkgutil.resolve_name(f"randlora.{entry}") for entry in entries]
    assert len({id(found) for found in objects}) == len(objects) > 0
    assert [f"{each.__module__}.{each.__qualname__}" for each in objects] == [f"randlora.{entry}" for entry in entries]
    public = [getattr(randlora, name) for name in vars(randlora.api) if not name.startswith("_")]
    for space in (randlora.files, randlora.serving):
        public += [getattr(space, name) for name in space.__all__ if name != "Progress"]
    raised = [found for found in vars(randlora.errors).values() if inspect.isclass(found)]
    public += [found for found in raised if found.__module__ == "randlora.errors"]
    shown = {id(found) for found in objects}
    assert [found for found in public if not inspect.ismodule(found) and id(found) not in shown] == []


def test_pages_are_short_their_code_has_80_columns_and_is_run_and_their_links_lead_to_files() -> None:
    elsewhere = {}  # snippets that a test runs which asks for them
    for page in PAGES:
        whole = page.read_text(encoding="utf-8")
        text = FRONT_MATTER.sub("", RUNS.sub("", whole))
        assert page not in DOCS_PAGES or len(text.splitlines()) <= 200, page
        for block in FENCE.finditer(whole):  # of screens only the commands count: what they print wraps
            begin = "$" if block["language"] == "console" else ""
            code = block["code"].splitlines() if block["language"] not in ("", "text", "math") else ()
            assert [line for line in code if line.startswith(begin) and len(line) > 80] == [], page
        targets = [match["target"] for match in LINK.finditer(FENCE.sub("", whole))]
        own = [target for target in targets if "://" not in target and not target.startswith(("#", "mailto:"))]
        assert [target for target in own if not (page.parent / target.split("#")[0]).exists()] == [], page
        if count := len(pages.SNIPPET.findall(whole)):
            elsewhere[page_name(page)] = count
    own_tests = {"docs/compiling.md": 2, "docs/long_runs.md": 4, "docs/rollouts.md": 4, "docs/tensor_parallel.md": 2}
    assert elsewhere == own_tests


def test_the_navigation_lists_every_page_and_the_architecture_every_file_and_true_names() -> None:
    written = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r"([\w/-]+\.md)$", written, re.MULTILINE)
    assert sorted(listed) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS_PAGES)
    hook = runpy.run_path(str(DOCS / "assets" / "rooms.py"))
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    listed = [line.split("`")[1] for line in hook["table"](page) if "`" in line]
    own = [path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")]
    assert sorted(listed) == sorted(name for name in own if name != "__init__.py")
    words = page[page.index("## Words") : page.index("## Sites")]
    code = "".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    files = re.findall(r"`([\w/]+\.py)`", words)
    names = re.findall(r"`(?:[\w/]+\.)?(\w+)`", words.replace(".py", ""))
    assert [file for file in files if file not in own] == [] != files
    assert [name for name in names if not re.search(rf"\b{name}\b", code)] == [] != names


@pytest.mark.parametrize(("in_features", "out_features", "r"), [(48, 32, 8), (20, 36, 6)])
def test_the_module_that_opens_the_architecture_computes_what_loops_and_the_library_compute(
    in_features: int, out_features: int, r: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = DOCS / "architecture.md"
    ((_, code, _),) = snippets(page)
    assert len(code.splitlines()) <= 60
    rows = re.findall(r"^\| `?\w+`? \| (`.*`) \| .* \|$", page.read_text(encoding="utf-8"), re.MULTILINE)
    parts = [name for row in rows for name in re.findall(r"`([\w/.]+)`", row)]
    assert [name for name in parts if not (PACKAGE / name).exists()] == [] != parts
    namespace: dict[str, Any] = {"__name__": "module"}
    exec(compile(code, str(page), "exec"), namespace)
    saved = load_file("layer.safetensors")
    assert {name: values.shape for name, values in saved.items()} == {"lam": (8, 4), "gamma": (4, 32)}

    linear = nn.Linear(in_features, out_features)
    model = nn.Sequential(copy.deepcopy(linear))
    randlora.inject(model, r=r, alpha=15, seed=3, targets="all")
    module = namespace["RandLoRALinear"](linear, r=r, alpha=15, seed=3)
    (info,) = randlora.adapters(model)
    max_dim, min_dim = max(linear.weight.shape), min(linear.weight.shape)
    bases = BasisBank().acquire(info.specs[0]).slices(max_dim, min_dim, device="cpu", dtype=torch.float32)
    assert torch.equal(module.A, bases.A.flatten(1))
    assert torch.equal(module.B, bases.B.flatten(1))
    for parameter, ours in zip((module.lam, module.gamma), randlora.trainable_parameters(model), strict=True):
        assert torch.equal(parameter, ours), "they start alike"
        nn.init.normal_(parameter)
        ours.data.copy_(parameter)
    scaling = info.options["0"].scaling
    expected = delta_weight(bases.A, bases.B, module.lam, module.gamma, scaling, in_features=in_features)
    assert_close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-4)
    assert_close(module.delta_weight().double(), expected)
    assert_close(module.delta_weight(), randlora.delta_weight(model, "0"))
    x = torch.randn(5, in_features)
    assert_close(module(x), model(x), atol=1e-3)
    randlora.merge(model)
    assert_close(module.merge().weight, model[0].weight)


def test_the_page_on_trust_names_a_test_for_each_promise_and_has_every_campaign() -> None:
    trust = (DOCS / "trust.md").read_text(encoding="utf-8")
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    defined = set(re.findall(r"^ *def (test_\w+)\(", tests, re.MULTILINE))
    assert set(re.findall(r"`(test_\w+)`", trust)) <= defined
    tables = re.findall(r"^\| promise \| test \|\n\|---\|---\|\n((?:\|.*\n)+)", trust, re.MULTILINE)
    rows = [row for table in tables for row in table.splitlines()]
    assert len(tables) == 9
    assert [row for row in rows if not re.search(r"\| `test_\w+`(, `test_\w+`)* \|$", row)] == []
    assert re.findall(r"^\| ([\w ]+) \| .* \| [\d,]+ \| 0 \|$", trust, re.MULTILINE) == [
        name.replace("-", " ") for name in CAMPAIGNS
    ]


def test_the_modelfile_for_ollama_writes_what_the_chat_template_of_a_tokenizer_does() -> None:
    (template,) = re.findall(
        r'^TEMPLATE """(.*?)"""', (DOCS / "converting.md").read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    loop = re.fullmatch(r"{{- range \.Messages }}(.*){{ end }}(.*)", template, re.DOTALL)
    assert loop
    said = [("system", "Be short."), ("user", "Who is it?"), ("assistant", "The miller."), ("user", "Why?")]
    written = [loop[1].replace("{{ .Role }}", role).replace("{{ .Content }}", words) for role, words in said]
    tokenizer = stand_ins.letters("<|im_start|>", "<|im_end|>", template=stand_ins.CHATML)
    messages = [{"role": role, "content": words} for role, words in said]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert "".join(written) + loop[2] == expected


def test_the_site_names_the_repository_that_it_is_built_from_and_how_large_blocks_are_tested(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hook = runpy.run_path(str(DOCS / "assets" / "front.py"))
    page = "".join((DOCS / name).read_text(encoding="utf-8") for name in ("index.md", "recipes/causal_lm.md"))
    monkeypatch.setitem(hook["PROJECT"], "urls", {"Repository": "https://example.org/an/owner"})
    shown = hook["on_page_markdown"](page)
    assert hook["PLACE"] in page
    assert "git clone https://example.org/an/owner randlora\n" in shown
    assert shown.count(hook["STAND_IN"]) == page.count(pages.REAL) == 1
    config = hook["on_config"]({"site_name": "randlora"})
    assert config["site_name"] == f"randlora {randlora.__version__}"
    assert (config["repo_url"], config["repo_name"]) == ("https://example.org/an/owner", "an/owner")


@pytest.mark.medium
def test_a_classifier_learns_and_its_reloading_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sentiment, encoder = imported("sentiment"), cast("Any", models.bert()).bert
    model = sentiment.SentimentClassifier(encoder, encoder.config.hidden_size)
    mask = (torch.arange(7) < torch.arange(24)[:, None] % 5 + 3).long()
    ids, labels = torch.randint(10, models.VOCABULARY, (24, 7)) * mask, torch.arange(24) % 2
    ids[:, 0] = 1 + labels
    texts, fresh = sentiment.Texts(ids, mask, labels.float()), copy.deepcopy(model)
    monkeypatch.setattr(sentiment, "load_classifier", lambda: copy.deepcopy(fresh))
    randlora.inject(model, r=8, alpha=16, targets=sentiment.TARGETS, train_also="head")
    losses = sentiment.train_with_progress(model, texts, epochs=20, lr=1e-2, seed=0)
    assert losses[-1] < 0.5 * losses[0]
    assert sentiment.accuracy(sentiment.predict(model, texts), texts) > 0.9
    randlora.save(model, tmp_path)
    rows, is_right = sentiment.check_reloading(model, tmp_path, texts)
    assert (is_right, [found[:26] for _, found in rows[:2]]) == (True, ["24 of 24 predictions equal"] * 2)
    model.get_submodule("encoder.encoder.layer.1.attention.self.value").randlora_lambda["default"].data.add_(0.1)
    assert not sentiment.check_reloading(model, tmp_path, texts)[1]


@pytest.mark.medium
def test_training_that_is_killed_has_the_losses_of_training_that_is_not() -> None:
    done, again, failures = killed_training(plain_loop(), 3, steps=60, life=0.4)
    assert failures == []
    assert (done, again > 0) == (3, True)


LEFT = {
    "plain_pytorch": ["step-000002", "step-000004"],
    "transformers_trainer": ["adapter", "checkpoint-2", "checkpoint-4"],
    "trl_sft": ["README.md", "adapter", "checkpoint-2", "checkpoint-4"],
    "lightning_module": ["adapter", "epoch=0.ckpt", "epoch=1.ckpt", "last.ckpt"],
}


@pytest.mark.medium
@pytest.mark.parametrize("name", LEFT)
def test_an_example_of_training_runs_and_goes_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    is_by_epochs = name == "lightning_module"
    lengths = ["--epochs"] if is_by_epochs else ["--every", "2", "--steps"]
    for arguments in (["1"], ["2", "--resume"]) if is_by_epochs else (["2"], ["4", "--resume"]):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--out", "run", *lengths, *arguments])
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(pages.EXAMPLES / f"{name}.py"), run_name="__main__")
        assert exit_.value.code == 0
    assert "RandLoRA adapter 'default'" in capsys.readouterr().out
    assert sorted(path.name for path in Path("run").iterdir()) == LEFT[name]
