"""Tracers and modes of torch: whatever sees a model first leaves it as good as it was."""

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.config
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import randlora
from randlora.bases.basis import constant_to_the_compiler
from randlora.errors import AdapterError
from tests.further import further
from tests.kit import fill, same_bits, untouched
from tests.laws import assert_close, needs_export

KINDS: tuple[dict[str, Any], ...] = ({"basis": "dense"}, {"basis": "block"}, {"basis": "sparse", "stream": "portable"})
every_basis = pytest.mark.parametrize(
    "options", [*KINDS[:2], further(KINDS[2])], ids=lambda options: "-".join(options.values())
)


def cold_model(options: dict[str, Any]) -> nn.Sequential:
    """Make a filled model whose bases nothing has written out yet."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))
    randlora.inject(model, r=4, targets="all-linear", **options)
    fill(model)
    return model


def compile_in_inference_mode(model: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        output: Tensor = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    return output.clone()


def compile_whole(model: nn.Module, x: Tensor) -> Tensor:
    output: Tensor = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    return output


def export(model: nn.Module, x: Tensor) -> Tensor:
    output: Tensor = torch.export.export(model, (x,)).module()(x)
    return output


def run_with_fake_tensors(model: nn.Module, x: Tensor) -> Tensor:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(mode.from_tensor(x))
    output: Tensor = model(x)
    return output


@pytest.mark.medium
@every_basis
@pytest.mark.parametrize(
    "see",
    [compile_whole, compile_in_inference_mode, pytest.param(export, marks=needs_export), run_with_fake_tensors],
)
def test_a_tracer_that_comes_first_sees_the_right_values_and_spoils_none(
    see: Callable[[nn.Module, Tensor], Tensor], options: dict[str, Any]
) -> None:
    expected = cold_model(options)(x := torch.randn(3, 8))
    model = cold_model(options)
    found = see(model, x)
    assert_close(found.detach(), expected.detach(), torch.float32)
    assert same_bits(model(x), expected)
    model(x).sum().backward()
    assert model.get_parameter("0.randlora_lambda.default").grad is not None


def wide_model(options: dict[str, Any]) -> nn.Sequential:
    """Make a filled model of a layer that is cheaper factored for few tokens and materialized for many."""
    model = nn.Sequential(nn.Linear(24, 32))
    randlora.inject(model, r=8, targets="all-linear", **options)
    fill(model)
    return model


@every_basis
def test_a_transform_that_comes_first_spoils_no_bases_for_the_next(options: dict[str, Any]) -> None:
    model = pickle.loads(pickle.dumps(cold_model(options)))  # a pickle holds no bases that a seed brings back
    lam, x = model.get_parameter("0.randlora_lambda.default").detach(), torch.randn(3, 8)

    def loss(lam: Tensor) -> Tensor:
        return torch.func.functional_call(model, {"0.randlora_lambda.default": lam}, (x,)).square().sum()  # type: ignore[no-any-return]

    second = torch.func.jacrev(torch.func.jacrev(loss))
    torch.testing.assert_close(second(lam), second(lam))
    assert model(x).requires_grad


@pytest.mark.medium
@every_basis
@pytest.mark.parametrize(("dynamic", "most"), [(None, 2), (True, 1)], ids=["automatic", "dynamic"])
def test_the_number_of_tokens_is_no_condition_of_a_graph(
    options: dict[str, Any], dynamic: bool | None, most: int
) -> None:
    """The first number is taken for a constant unless told otherwise; every other shares one graph."""
    torch._dynamo.reset()
    graphs = 0

    def count(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    model = wide_model(options)
    compiled = torch.compile(model, fullgraph=True, backend=count, dynamic=dynamic)
    for tokens in (3, 16, 64, 200, 1000, 5000):
        x = torch.randn(tokens, 24, requires_grad=True)
        found, expected = compiled(x), model(x)
        assert_close(found.detach(), expected.detach(), torch.float32)
        ours, theirs = (torch.autograd.grad(output.sum(), x)[0] for output in (found, expected))
        assert_close(ours, theirs, torch.float32)
    assert graphs == most


def test_adapters_of_different_bases_share_a_graph() -> None:
    """Every tensor of theirs is a constant with a name of its own."""
    model = cold_model({})
    randlora.inject(model, r=4, targets="all-linear", seed=9, name="other")
    fill(model)
    randlora.activate(model, ["default", "other"])
    x = torch.randn(3, 8)
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    assert_close(found.detach(), model(x).detach(), torch.float32)


def test_a_function_is_marked_as_torch_marks_it() -> None:
    """Ours does not import the compiler for it."""

    def theirs() -> int:
        return 0

    def ours() -> int:
        return 0

    torch.compiler.assume_constant_result(theirs)
    assert vars(constant_to_the_compiler(ours)) == vars(theirs) != {}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("masked", [False, True])
def test_torchs_fused_transformer_layers_do_not_pass_an_adapter_by(masked: bool) -> None:
    """In eval they read ``linear1.weight`` and never call ``linear1``, unless a module in them has a hook."""
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)
    x = torch.randn(2, 5, 16)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if masked else None
    plain = model.eval()(x, src_key_padding_mask=mask)
    randlora.inject(model, r=4, targets="all-linear")
    fill(model)
    trained = model.train()(x, src_key_padding_mask=mask)
    with torch.no_grad():
        found = model.eval()(x, src_key_padding_mask=mask)
    kept = slice(None) if mask is None else ~mask
    assert_close(found[kept], trained[kept], torch.float32)
    assert not torch.allclose(found[kept], plain[kept], atol=1e-2)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # what torch.compile imports
@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_a_wrapper_is_not_adapted_under_the_names_it_gives(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    wrapped = wrap(model)
    with untouched(model), pytest.raises(AdapterError, match=r"call this on the wrapped model\.(_orig_mod|module)"):
        randlora.inject(wrapped, r=4)
