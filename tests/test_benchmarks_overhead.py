"""The benchmark of the host's time: who takes part, what is counted, and that every target has its row."""

import pytest
import torch
from torch import Tensor, nn

from benchmarks import overhead
from benchmarks.command import Settings
from benchmarks.targets import TARGETS

OURS = [target for target in TARGETS if target.benchmark == "overhead"]


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # what torch.compile imports
@pytest.mark.parametrize("is_quick", [True, False])
def test_every_target_has_its_row_and_its_contestants(is_quick: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled or timed for long: a target is about a row of this name with these figures."""
    for name, value in {"CALLS": 1, "WINDOWS": 1, "WIDE": 32, "MODEL_WINDOWS": 1, "COMPILED_CALLS": 1}.items():
        monkeypatch.setattr(overhead, name, value)
    monkeypatch.setattr(overhead, "llama", lambda _, side: nn.Linear(side, side))
    monkeypatch.setattr(overhead, "adapt", lambda model, *_: model)
    monkeypatch.setattr(overhead, "model_step", lambda *_: lambda: None)
    monkeypatch.setattr(overhead, "start_compiler", lambda _: None)
    monkeypatch.setattr(overhead, "graphs", lambda *_, dynamic: 1 if dynamic else 2)
    found = {row.case.replace("32→32", "1024→1024"): row for row in overhead.run(Settings("cpu", is_quick=is_quick))}
    asked = [target for target in OURS if target.is_quick or not is_quick]
    assert {target.case for target in asked} <= set(found)
    assert all({target.first, target.second} <= set(found[target.case].figures) for target in asked)
    compiled = found[overhead.model_case("compiled step", overhead.COMPILED_LAYERS)]
    assert set(compiled.figures) == ({"LoRA", "PEFT", "block"} if is_quick else set(overhead.NAMES))


def test_operators_that_compute_are_those_that_touch_values() -> None:
    with overhead.Dispatched() as dispatched:
        nn.Linear(4, 8)(torch.ones(3, 4)).view(-1).add_(1)
    names = [operator.overloadpacket.__name__ for operator in dispatched.operators]
    assert names[-4:] == ["t", "addmm", "view", "add_"]
    assert [overhead.computes(operator) for operator in dispatched.operators[-4:]] == [False, True, False, True]


@pytest.mark.parametrize("tokens", [1, 40])
def test_a_frozen_layer_computes_once_and_each_contestant_more_often(tokens: int) -> None:
    computing, dispatched = overhead.operators_of_a_layer(tokens, "cpu")
    found = {name: figure.best for name, figure in computing.figures.items()}
    assert found["frozen"] == 1
    assert (found["6 operators"], found["12 operators"]) == (6, 12)
    assert all(1 < found[name] <= dispatched.figures[name].best for name in ("LoRA", "PEFT", "dense", "block"))


class Branching(nn.Linear):
    """A layer of as many graphs as it has widths of tokens on either side of a bound."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply in one of two ways."""
        return super().forward(x) if len(x) < 100 else super().forward(x.flip(0)).flip(0)


@pytest.mark.parametrize(
    ("layer", "dynamic", "count"), [(nn.Linear, None, 2), (nn.Linear, True, 1), (Branching, True, 2)]
)
def test_graphs_are_counted(layer: type[nn.Linear], dynamic: bool | None, count: int) -> None:
    assert overhead.graphs(layer(overhead.SIDE, 8), "cpu", dynamic=dynamic) == count


def test_a_contestant_that_does_not_compile_takes_no_part(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def graphs(layer: nn.Module, *_: object, dynamic: bool | None) -> int:
        if any("randlora" in name for name, _ in layer.named_parameters()):
            raise IndexError("list index out of range")
        return 3

    monkeypatch.setattr(overhead, "graphs", graphs)
    row = overhead.graphs_of_a_layer("cpu", dynamic=True)
    assert set(row.figures) == {"frozen", "LoRA"}
    assert "block does not compile with dynamic=True: IndexError" in capsys.readouterr().out
