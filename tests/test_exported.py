"""Programs exported from adapted and merged models, run by other runtimes: packages of AOTInductor, and ONNX."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import randlora
from tests.examples import snippet
from tests.kit import fill
from tests.laws import assert_close, needs_export

pytestmark = [
    pytest.mark.medium,
    needs_export,
    pytest.mark.filterwarnings("ignore:.torch.jit.script(_method)?. is deprecated"),  # what inductor imports
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated"),  # of torch about itself
]
DYNAMIC = ({0: torch.export.Dim("tokens", min=2, max=64)},)
every_basis = pytest.mark.parametrize("basis", ["dense", "block"])


def adapted(**options: Any) -> nn.Module:
    """Make a filled model."""
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))
    randlora.inject(model, r=4, targets="all-linear", **options)
    return fill(model, spread=0.3)


@pytest.mark.parametrize(
    ("options", "strict"),
    [({}, False), ({"basis": "block"}, True), ({"basis": "sparse", "stream": "portable"}, False)],
    ids=["dense", "block, strict", "sparse"],
)
def test_a_program_of_any_number_of_tokens_is_saved_loaded_and_trained(options: dict[str, Any], strict: bool) -> None:
    model, file = adapted(**options), io.BytesIO()
    exported = torch.export.export(model, (torch.randn(3, 8),), dynamic_shapes=DYNAMIC, strict=strict)
    torch.export.save(exported, file)
    file.seek(0)
    program = torch.export.load(file).module()
    for tokens in (2, 64):
        x = torch.randn(tokens, 8)
        assert_close(program(x), model(x), torch.float32)
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


def test_onnx_computes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    model, x = adapted(basis="block"), torch.randn(3, 8)
    exec(snippet("compiling.md", "torch.onnx"), found := {"torch": torch, "model": model, "x": x})
    assert_close(torch.from_numpy(found["output"]), model(x), torch.float32)


@pytest.mark.slow
def test_a_package_of_aotinductor_computes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = adapted(basis="block")
    exec(snippet("compiling.md", "aoti"), found := {"torch": torch, "model": model, "x": torch.randn(3, 8)})
    run: Any = found["run"]
    for tokens in (2, 7):
        x = torch.randn(tokens, 8)
        assert_close(run(x), model(x), torch.float32)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace(_method)?. is deprecated")
@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean might")  # sizes, which are constants of it
@every_basis
def test_a_traced_model_computes_the_same_and_is_trained(basis: str) -> None:
    """The check that torch makes is another trace, without gradients, which must have the same operators."""
    model, x = adapted(basis=basis), torch.randn(3, 8)
    traced: Any = torch.jit.trace(model, (x,))
    outputs, trained = (traced(x), model(x)), [*randlora.trainable_parameters(model)]
    assert_close(outputs[0].detach(), outputs[1].detach(), torch.float32)
    found, expected = (torch.autograd.grad(out.square().sum(), trained) for out in outputs)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, torch.float32)
