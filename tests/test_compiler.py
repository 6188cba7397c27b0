"""Tracers, exporters and modes of torch: what sees a model first leaves it as good as it was, and computes the same."""

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import randlora
from randlora.errors import AdapterError
from tests.examples import snippet
from tests.kit import fill, same_bits, untouched
from tests.laws import assert_close, needs_export
from tests.test_compiled_switching import Compiled, compare

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script(_method)?. is deprecated"),  # what the compiler imports
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated"),  # of torch about itself
]
every_basis = pytest.mark.parametrize("basis", ["dense", "block"])


def cold_model(**options: Any) -> nn.Module:
    """Make a filled model whose bases nothing has written out yet."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))
    randlora.inject(model, r=4, targets="all-linear", **options)
    return fill(model, spread=0.3)


def compile_whole(model: nn.Module, x: Tensor) -> Tensor:
    output: Tensor = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    return output


def compile_in_inference_mode(model: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        output = compile_whole(model, x)
    return output.clone()


def export(model: nn.Module, x: Tensor) -> Tensor:
    output: Tensor = torch.export.export(model, (x,)).module()(x)
    return output


def run_with_fake_tensors(model: nn.Module, x: Tensor) -> Tensor:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(mode.from_tensor(x))
    output: Tensor = model(x)
    return output


def trace(model: nn.Module, x: Tensor) -> Tensor:
    """Check what torch checks, another trace without gradients that must have the same operators; and gradients."""
    traced: Any = torch.jit.trace(model, (x,))
    outputs, trained = (traced(x), model(x)), [*randlora.trainable_parameters(model)]
    found, expected = (torch.autograd.grad(out.square().sum(), trained, retain_graph=True) for out in outputs)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, torch.float32)
    output: Tensor = outputs[0]
    return output


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore:.torch.jit.trace(_method)?. is deprecated")
@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean might")  # sizes, which are constants of it
@pytest.mark.parametrize(
    ("see", "basis"),
    [
        (compile_whole, "dense"),
        (compile_in_inference_mode, "block"),
        pytest.param(export, "dense", marks=needs_export),
        (run_with_fake_tensors, "block"),
        (trace, "dense"),
        (trace, "block"),
    ],
)
def test_a_tracer_that_comes_first_sees_the_right_values_and_spoils_none(
    see: Callable[[nn.Module, Tensor], Tensor], basis: str
) -> None:
    expected = cold_model(basis=basis)(x := torch.randn(3, 8))
    model = cold_model(basis=basis)
    assert_close(see(model, x).detach(), expected.detach(), torch.float32)
    assert same_bits(model(x), expected)
    model(x).sum().backward()
    assert model.get_parameter("0.randlora_lambda.default").grad is not None


@every_basis
def test_a_transform_that_comes_first_spoils_no_bases_for_the_next(basis: str) -> None:
    model = pickle.loads(pickle.dumps(cold_model(basis=basis)))  # a pickle holds no bases that a seed brings back
    lam, x = model.get_parameter("0.randlora_lambda.default").detach(), torch.randn(3, 8)

    def loss(lam: Tensor) -> Tensor:
        return torch.func.functional_call(model, {"0.randlora_lambda.default": lam}, (x,)).square().sum()  # type: ignore[no-any-return]

    second = torch.func.jacrev(torch.func.jacrev(loss))
    torch.testing.assert_close(second(lam), second(lam))
    assert model(x).requires_grad


@pytest.mark.medium
@pytest.mark.parametrize(
    ("basis", "dynamic", "most"), [("dense", None, 2), ("block", True, 1)], ids=["automatic", "dynamic"]
)
def test_the_number_of_tokens_is_no_condition_of_a_graph(basis: Any, dynamic: bool | None, most: int) -> None:
    """The first number is taken for a constant unless told otherwise; every other shares one graph.

    So do adapters of other bases, of which every tensor is a constant with a name of its own.
    """
    model = nn.Sequential(nn.Linear(24, 32))  # cheaper factored for few tokens and materialized for many
    for seed, name in enumerate(("one", "other")):
        randlora.inject(model, r=8, targets="all-linear", basis=basis, seed=seed, name=name)
        fill(model, name)
    randlora.activate(model, ["one", "other"])
    run = Compiled(model, dynamic=dynamic)
    for tokens in (3, 16, 200, 5000):
        compare(run.compiled, model, torch.randn(tokens, 24, requires_grad=True))
    assert run.counter.frame_count == most


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_a_wrapper_is_not_adapted_under_the_names_it_gives(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    wrapped = wrap(model)
    with untouched(model), pytest.raises(AdapterError, match=r"call this on the wrapped model\.(_orig_mod|module)"):
        randlora.inject(wrapped, r=4)


# Programs exported from adapted models, run by other runtimes: packages of AOTInductor, and ONNX

DYNAMIC = ({0: torch.export.Dim("tokens", min=2, max=64)},)


@pytest.mark.medium
@needs_export
@pytest.mark.parametrize(
    ("options", "strict"), [({}, False), ({"basis": "block"}, True)], ids=["dense", "block, strict"]
)
def test_a_program_of_any_number_of_tokens_is_saved_loaded_and_trained(options: dict[str, Any], strict: bool) -> None:
    model, file = cold_model(**options), io.BytesIO()
    torch.export.save(torch.export.export(model, (torch.randn(3, 8),), dynamic_shapes=DYNAMIC, strict=strict), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for tokens in (2, 64):
        x = torch.randn(tokens, 8)
        assert_close(loaded(x), model(x), torch.float32)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert len(trained) == 4
    program = torch.export.export(model, (x,)).module()
    found = torch.autograd.grad(program(x).square().sum(), [program.get_parameter(name) for name in trained])
    expected = torch.autograd.grad(model(x).square().sum(), [*trained.values()])
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, torch.float32)


@pytest.mark.medium
@needs_export
def test_onnx_computes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    model, x = cold_model(basis="block"), torch.randn(3, 8)
    exec(snippet("compiling.md", "torch.onnx"), found := {"torch": torch, "model": model, "x": x})
    assert_close(torch.from_numpy(found["output"]), model(x), torch.float32)


@pytest.mark.slow
@needs_export
def test_a_package_of_aotinductor_computes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = cold_model(basis="block")
    exec(snippet("compiling.md", "aoti"), found := {"torch": torch, "model": model, "x": torch.randn(3, 8)})
    run: Any = found["run"]
    for tokens in (2, 7):
        x = torch.randn(tokens, 8)
        assert_close(run(x), model(x), torch.float32)
