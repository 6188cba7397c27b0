"""What is particular to `nn.MultiheadAttention`: its ways to compute, and several adapted weights of one module."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import randlora
from randlora.layers.in_place import adapter_layers_of
from randlora.layers.scopes import forward_of
from randlora.readers.read_weight import ReadWeight
from tests import kit
from tests.attention_kinds import ATTENTION_KINDS, AttentionKind, changed, every_attention
from tests.further import further
from tests.kit import fill, same_bits
from tests.laws import adapted_names, assert_close, needs_export

PACKED_KIND, SPLIT_KIND = ATTENTION_KINDS[:2]


def read(model: nn.Module, fqn: str) -> Tensor:
    """Read a weight as attention does."""
    return kit.read(model, fqn if fqn.endswith("_weight") else f"{fqn}.weight")


@every_attention
def test_every_projection_is_a_target_and_counted(kind: AttentionKind) -> None:
    model = kind.plain()
    before = sum(parameter.numel() for parameter in model.parameters())
    plan = randlora.plan(model, r=3, in_proj=kind.in_proj)
    report = randlora.inject(model, r=3, in_proj=kind.in_proj)
    assert report.targets == plan.targets == kind.sites
    assert adapted_names(model) == {*kind.sites}
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert report.trainable_parameters == plan.trainable_parameters == trained
    assert report.total_parameters == before + trained


def test_a_split_projection_has_three_lambdas_and_gammas() -> None:
    shapes = []
    for kind in (PACKED_KIND, SPLIT_KIND):
        attention = kind.adapted().attn
        layer = adapter_layers_of(attention)["in_proj_weight"]
        shapes.append([tuple(part.shape) for part in layer.diagonals_of(attention, "default")])
    assert shapes == [[(3, 4), (4, 12)], [(3, 3, 4), (3, 4, 12)]]


MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "padding": {"key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2])},
    "mask": {"attn_mask": torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)},
    "causal": {"attn_mask": torch.triu(torch.ones(5, 5, dtype=torch.bool), 1), "is_causal": True},
    "weights": {"need_weights": True},
    "weights-by-head": {"need_weights": True, "average_attn_weights": False},
}


@every_attention
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
def test_attention_computes_as_one_whose_weights_were_changed(
    kind: AttentionKind, options: dict[str, Any], training: bool, grad: bool
) -> None:
    if kind.name == "sequence-first":  # the first of the inputs' dims is then the sequence
        options = {name: value for name, value in options.items() if "mask" not in name and name != "is_causal"}
    model, plain, inputs = kind.adapted().train(training), kind.plain().train(training), kind.inputs()
    merged = changed(kind, model).train(training)
    inputs = inputs if len(inputs) == 3 else (inputs[0],) * 3
    with torch.set_grad_enabled(grad):
        (output, weights), (expected, by) = (each.attn(*inputs, **options) for each in (model, merged))
        base = plain(*inputs, **options)
    assert_close(output, expected, torch.float64)
    assert (output - base).abs().max() > 0.01
    assert (weights is None) == (by is None)
    if weights is not None:
        assert_close(weights, by, torch.float64)


def test_the_fast_path_is_taken_with_the_adapted_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fast = torch._native_multi_head_attention

    def counted(*args: Any) -> Any:
        calls.append(args)
        return fast(*args)

    monkeypatch.setattr(torch, "_native_multi_head_attention", counted)
    for kind in (PACKED_KIND, SPLIT_KIND):
        model = kind.adapted().eval()
        with torch.no_grad():
            assert_close(model(*kind.inputs()), changed(kind, model).train()(*kind.inputs()), torch.float64)
    assert len(calls) == 2


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_forward_computes_each_update_once(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []
    value = ReadWeight.value

    def counted(layer: ReadWeight, owner: nn.Module) -> Tensor:
        computed.append(type(layer))
        return value(layer, owner)

    monkeypatch.setattr(ReadWeight, "value", counted)
    model = PACKED_KIND.adapted().train(training)
    with torch.set_grad_enabled(training):
        model(*PACKED_KIND.inputs())
    assert len(computed) == len(set(computed)) == 2
    with torch.no_grad():
        for parameter in randlora.trainable_parameters(model):
            parameter.zero_()
    assert_close(model(*PACKED_KIND.inputs()), PACKED_KIND.plain()(*PACKED_KIND.inputs()), torch.float64)


def test_what_a_forward_reads_without_gradients_has_them_where_it_reads_with_them() -> None:
    attention = PACKED_KIND.adapted().attn
    with forward_of(attention):
        with torch.no_grad():
            assert not attention.in_proj_weight.requires_grad
        assert attention.in_proj_weight.requires_grad


def test_a_forward_that_fails_leaves_nothing_to_the_next() -> None:
    model = PACKED_KIND.adapted()
    with pytest.raises(AssertionError, match="embedding"):
        model(torch.ones(2, 5, 7, dtype=torch.float64))
    randlora.activate(model, [])
    assert read(model, "attn.in_proj_weight") is model.attn._parameters["in_proj_weight"]
    assert same_bits(model(*PACKED_KIND.inputs()), PACKED_KIND.plain().requires_grad_(False)(*PACKED_KIND.inputs()))


def test_a_layer_of_this_type_that_is_called_reads_its_weight_too() -> None:
    model = nn.Sequential(nn.modules.linear.NonDynamicallyQuantizableLinear(12, 8, dtype=torch.float64))
    base, x = copy.deepcopy(model), PACKED_KIND.inputs()[0]
    randlora.inject(model, r=3, targets=["0"])
    assert torch.equal(model(x), base(x))
    fill(model)
    assert_close(model(x), base(x) + x @ randlora.delta_weight(model, "0").T, torch.float64)
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in randlora.trainable_parameters(model))


@pytest.mark.medium
@needs_export
@pytest.mark.parametrize(
    "kind",
    [kind if kind.name in ("packed", "split", "separate") else further(kind) for kind in ATTENTION_KINDS],
    ids=lambda kind: kind.name,
)
def test_a_program_exported_without_the_compiler_computes_the_same(kind: AttentionKind) -> None:
    model, inputs = kind.adapted(torch.float32), kind.inputs(torch.float32)
    program = torch.export.export(model, inputs, strict=False)
    assert_close(program.module()(*inputs), model(*inputs), torch.float32)
