"""The benchmark of compiled models: its rows and contestants, and how graphs are counted. Nothing is timed for long."""

import shutil

import pytest
from torch import Tensor, nn

from benchmarks import compiled
from benchmarks.command import Settings
from benchmarks.results import Results
from benchmarks.targets import TARGETS, verdicts
from tests.laws import needs_compiler

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # what torch.compile imports
OURS = [target for target in TARGETS if target.benchmark == "compiled"]


@pytest.mark.medium
@pytest.mark.parametrize("is_quick", [True, False])
def test_every_target_has_its_row_and_its_contestants(is_quick: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WINDOWS": 1, "CALLS": 1, "LLAMA_TOKENS": 4}.items():
        monkeypatch.setattr(compiled, name, value)
    monkeypatch.setattr(compiled, "backend", lambda _: "inductor")
    monkeypatch.setattr(compiled, "compiled", lambda model, _: model)
    monkeypatch.setattr(compiled, "graphs", lambda *_: 1)
    found = {row.case: row for row in compiled.run(Settings("cpu", is_quick=is_quick))}
    assert {target.case for target in OURS} <= set(found)
    assert all({target.first, target.second} <= set(found[target.case].figures) for target in OURS)
    timed = [tuple(row.figures) for case, row in found.items() if case != compiled.SWITCHING]
    assert timed == ([compiled.QUICK_NAMES] if is_quick else [compiled.NAMES] * 2)


@pytest.mark.parametrize(
    ("device", "compiler", "expected"),
    [("cpu", "/usr/bin/g++", "inductor"), ("cpu", None, "aot_eager"), ("cuda", None, "inductor")],
)
def test_without_a_compiler_models_are_only_traced(
    device: str, compiler: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: compiler)
    assert compiled.backend(device) == expected


@pytest.mark.medium
def test_adapters_of_ours_share_a_graph_and_those_of_peft_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "ADAPTERS", 3)
    row = compiled.switching()
    assert {name: figure.best for name, figure in row.figures.items()} == {"LoRA": 3, "dense": 1, "one graph": 1}
    gate = [target for target in OURS if target.case.startswith("graphs of 20")]
    for count, is_met in ((1, True), (2, False)):
        monkeypatch.setattr(compiled, "graphs", lambda *_, count=count: count)
        (verdict,) = verdicts(Results("compiled", {}, [compiled.switching()]), gate)
        assert verdict.is_met == is_met


class Counted(nn.Linear):
    """A layer whose every turn is a condition of its graph."""

    turn = 0

    def forward(self, x: Tensor) -> Tensor:
        """Add the number of the turn."""
        output: Tensor = super().forward(x) + float(self.turn)
        return output


@needs_compiler
@pytest.mark.medium
def test_graphs_are_counted_beyond_the_compilers_limit() -> None:
    model = Counted(compiled.SWITCHED_SIDE, 2)
    names = [str(index) for index in range(20)]
    assert compiled.graphs(model, names, lambda name: setattr(model, "turn", int(name))) == len(names)
