"""Programs exported from adapted and merged models, run by other runtimes: packages of AOTInductor, and ONNX."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import randlora
from tests.examples import snippet
from tests.further import further
from tests.kit import fill
from tests.laws import assert_close, needs_export

pytestmark = [
    pytest.mark.medium,
    needs_export,
    pytest.mark.filterwarnings("ignore:.torch.jit.script(_method)?. is deprecated"),  # what inductor imports
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated"),  # of torch about itself
]
BASES: tuple[dict[str, Any], ...] = ({"basis": "dense"}, {"basis": "block"}, {"basis": "sparse", "stream": "portable"})
DYNAMIC = ({0: torch.export.Dim("tokens", min=2, max=64)},)
every_basis = pytest.mark.parametrize("options", BASES, ids=lambda options: options["basis"])


def adapted(options: dict[str, Any]) -> nn.Module:
    """Make a filled model."""
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))
    randlora.inject(model, r=4, targets="all-linear", **options)
    return fill(model, spread=0.3)


def merged(options: dict[str, Any]) -> nn.Module:
    """Make a filled model and merge its adapter for good."""
    model = adapted(options)
    randlora.merge(model)
    return model


every_state = pytest.mark.parametrize("make", [adapted, merged])


@every_basis
@every_state
@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_a_program_of_any_number_of_tokens_is_saved_and_loaded(
    make: Callable[[dict[str, Any]], nn.Module], options: dict[str, Any], strict: bool
) -> None:
    model, file = make(options), io.BytesIO()
    torch.export.save(torch.export.export(model, (torch.randn(3, 8),), dynamic_shapes=DYNAMIC, strict=strict), file)
    file.seek(0)
    program = torch.export.load(file).module()
    for tokens in (2, 7, 64):
        x = torch.randn(tokens, 8)
        assert_close(program(x), model(x), torch.float32)


@every_basis
def test_gradients_pass_through_a_program(options: dict[str, Any]) -> None:
    model, x = adapted(options), torch.randn(3, 8)
    program = torch.export.export(model, (x,)).module()
    program(x).square().sum().backward()
    model(x).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = dict(program.named_parameters())
    assert len(expected) == 4
    for name, grad in expected.items():
        ours = found[name].grad
        assert grad is not None
        assert ours is not None
        assert_close(ours, grad, torch.float32)


@pytest.mark.parametrize(
    ("make", "options"),
    [(adapted, BASES[0]), (adapted, BASES[1]), further(adapted, BASES[2]), (merged, BASES[0])],
    ids=["dense", "block", "sparse", "merged"],
)
def test_onnx_computes_the_same(
    make: Callable[[dict[str, Any]], nn.Module],
    options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    model, x = make(options), torch.randn(3, 8)
    exec(snippet("compiling.md", "torch.onnx"), found := {"torch": torch, "model": model, "x": x})
    assert_close(torch.from_numpy(found["output"]), model(x), torch.float32)


class Both(nn.Module):
    """An adapted model beside a merged one: one package of both, because compiling takes seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.models = nn.ModuleList([adapted({"basis": "block"}), merged({"basis": "dense"})])

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([model(x) for model in self.models])


@pytest.mark.slow
def test_a_package_of_aotinductor_computes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = Both()
    exec(snippet("compiling.md", "aoti"), found := {"torch": torch, "model": model, "x": torch.randn(3, 8)})
    run: Any = found["run"]
    for tokens in (2, 7):
        x = torch.randn(tokens, 8)
        assert_close(run(x), model(x), torch.float32)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace(_method)?. is deprecated")
@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean might")  # sizes, which are constants of it
@every_basis
def test_a_traced_model_computes_the_same_and_is_trained(options: dict[str, Any]) -> None:
    """The check that torch makes is another trace, without gradients, which must have the same operators."""
    model, x = adapted(options), torch.randn(3, 8)
    traced: Any = torch.jit.trace(model, (x,))
    outputs, trained = (traced(x), model(x)), [*randlora.trainable_parameters(model)]
    assert_close(outputs[0].detach(), outputs[1].detach(), torch.float32)
    found, expected = (torch.autograd.grad(out.square().sum(), trained) for out in outputs)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, torch.float32)
