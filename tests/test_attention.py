"""The laws of `nn.MultiheadAttention`, whose forward reads the weights that are adapted, for every form of it."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import randlora
from randlora.layers.in_place import adapter_layers_of
from randlora.layers.read_weight import ReadWeight
from randlora.targets.walk import Census
from tests import reference
from tests.attention_kinds import ATTENTION_KINDS, AttentionKind, changed, every_attention
from tests.kit import adapter_values, all_bits, fill, same_bits
from tests.laws import adapted_names, assert_close, needs_export

PACKED_KIND, SPLIT_KIND = ATTENTION_KINDS[:2]
every_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


def read(model: nn.Module, fqn: str) -> Tensor:
    """Read a weight as attention does."""
    owner, _, attribute = (fqn if fqn.endswith("_weight") else f"{fqn}.weight").rpartition(".")
    value = getattr(model.get_submodule(owner), attribute)
    assert isinstance(value, Tensor)
    return value


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


@every_attention
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_a_fresh_adapter_changes_no_bit(kind: AttentionKind, training: bool, grad: bool) -> None:
    plain, model = kind.plain().train(training), kind.adapted(filled=False).train(training)
    plain.requires_grad_(grad)  # by which torch decides how it computes a linear layer
    with torch.set_grad_enabled(grad):
        assert same_bits(model(*kind.inputs()), plain(*kind.inputs()))


@every_dtype
@every_attention
def test_reading_gives_the_weight_and_the_oracles_update(kind: AttentionKind, dtype: torch.dtype) -> None:
    model, plain = kind.adapted(dtype), kind.plain(dtype)
    for site in Census.of(model).adapted:
        layer = site.layer
        part = layer.adapters["default"]
        *_, out_features, in_features = part.shape
        sides = max(out_features, in_features), min(out_features, in_features)
        bases = part.basis.slices(*sides, device="cpu", dtype=torch.float64)
        lambdas, gammas = (each.reshape(-1, *each.shape[-2:]) for each in layer.diagonals_of(site.owner, "default"))
        each = [
            reference.delta_weight(*bases, lam, gamma, 2.0, in_features=in_features)
            for lam, gamma in zip(lambdas, gammas, strict=True)
        ]
        update = torch.cat(each)
        found, own = read(model, site.fqn), read(plain, site.fqn)
        assert found.dtype == dtype
        assert_close(found, own.double() + update, dtype)
        assert (found.double() - own.double()).abs().max() > 0.01
    assert len(Census.of(model).adapted) == len(kind.sites)


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


def test_a_forward_that_fails_leaves_nothing_to_the_next() -> None:
    model = PACKED_KIND.adapted()
    with pytest.raises(AssertionError, match="embedding"):
        model(torch.ones(2, 5, 7, dtype=torch.float64))
    randlora.activate(model, [])
    assert read(model, "attn.in_proj_weight") is model.attn._parameters["in_proj_weight"]
    assert same_bits(model(*PACKED_KIND.inputs()), PACKED_KIND.plain().requires_grad_(False)(*PACKED_KIND.inputs()))


@every_attention
def test_gradients_are_those_of_finite_differences_and_reach_nothing_else(kind: AttentionKind) -> None:
    model = kind.adapted()
    names = [fqn for fqn, _ in model.named_parameters() if "randlora" in fqn]
    assert len(names) == 2 * len(kind.sites)
    model(*kind.inputs()).square().sum().backward()
    reached = {fqn for fqn, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == {*names}
    values = [model.get_parameter(fqn).detach().double().requires_grad_() for fqn in names]

    def run(*given: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(model, dict(zip(names, given, strict=True)), kind.inputs())
        return output.square().sum()

    assert torch.autograd.gradcheck(run, values, fast_mode=True)


@every_dtype
@every_attention
def test_merging_puts_in_what_was_read_and_unmerging_every_bit(kind: AttentionKind, dtype: torch.dtype) -> None:
    model, plain = kind.adapted(dtype), kind.plain(dtype)
    seen = {fqn: read(model, fqn).detach().clone() for fqn in kind.sites}
    with randlora.merged(model):
        assert all(same_bits(read(model, fqn), seen[fqn]) for fqn in kind.sites)
        assert all_bits(model.state_dict() | plain.state_dict()) == all_bits(model.state_dict())
    assert all_bits(dict(plain.named_parameters())).items() <= all_bits(dict(model.named_parameters())).items()
    report = randlora.merge(model)
    assert report.targets == kind.sites
    assert type(model.attn) is kind.build
    assert all(same_bits(read(model, fqn), seen[fqn]) for fqn in kind.sites)


@every_attention
def test_ejecting_gives_back_the_class_the_objects_and_every_bit(kind: AttentionKind) -> None:
    model, plain = kind.adapted(filled=False), kind.plain()
    attention, own = model.attn, dict(model.named_parameters())
    fill(model)
    randlora.eject(model)
    assert model.attn is attention
    assert type(model.attn) is kind.build
    assert type(model.attn.out_proj) is type(plain.attn.out_proj)
    assert all(parameter is own[fqn] for fqn, parameter in model.named_parameters())
    assert all_bits(model.state_dict()) == all_bits(plain.state_dict())
    assert same_bits(model(*kind.inputs()), plain(*kind.inputs()))


@every_attention
@pytest.mark.parametrize("basis", ["dense", "block"])
def test_a_saved_adapter_loads_bit_for_bit(kind: AttentionKind, basis: str, tmp_path: Path) -> None:
    model = kind.plain()
    randlora.inject(model, r=4, in_proj=kind.in_proj, basis=basis)  # type: ignore[arg-type]
    fill(model)
    randlora.save(model, tmp_path)
    again = kind.plain()
    report = randlora.load(again, tmp_path, trainable=True)
    assert report.targets == kind.sites
    assert report.config.in_proj == kind.in_proj
    assert all_bits(adapter_values(again)) == all_bits(adapter_values(model))
    assert same_bits(again(*kind.inputs()), model(*kind.inputs()))


@every_attention
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_of_another_dtype_computes_in_it_and_back(kind: AttentionKind, dtype: torch.dtype) -> None:
    model = kind.adapted()
    expected = model(*kind.inputs())
    model.to(dtype)
    found = model(*kind.inputs(dtype))
    assert found.dtype == dtype
    assert_close(found, expected, dtype)
    model.double()
    assert_close(model(*kind.inputs()), expected, dtype)


@every_attention
def test_adapters_add_up_and_do_not_touch_each_other(kind: AttentionKind) -> None:
    model, other = kind.adapted(), "packed" if kind.in_proj == "split" else "split"
    alone = model(*kind.inputs())
    randlora.inject(model, r=2, alpha=4, in_proj=other, stream="portable", name="other", trainable=True)  # type: ignore[arg-type]
    fill(model, "other", seed=1)
    assert same_bits(model(*kind.inputs()), alone)
    for fqn in kind.sites:
        updates = [randlora.delta_weight(model, fqn, name=name) for name in ("default", "other")]
        randlora.activate(model, {"default": 1.0, "other": 0.5})
        assert_close(read(model, fqn), read(kind.plain(), fqn) + updates[0] + 0.5 * updates[1], torch.float64)
        randlora.activate(model, "default")
    randlora.remove(model, "other")
    assert same_bits(model(*kind.inputs()), alone)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: torch.load(_saved(model), weights_only=False),
}


def _saved(model: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


@every_attention
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_computes_the_same_and_has_adapters_of_its_own(kind: AttentionKind, copied: Callable[..., Any]) -> None:
    model = kind.adapted()
    expected = model(*kind.inputs())
    twin = copied(model)
    assert same_bits(twin(*kind.inputs()), expected)
    randlora.eject(twin)
    assert type(twin.attn) is kind.build
    assert same_bits(twin(*kind.inputs()), kind.plain()(*kind.inputs()))
    assert same_bits(model(*kind.inputs()), expected)


def test_a_layer_of_this_type_that_is_called_reads_its_weight_too() -> None:
    model = nn.Sequential(nn.modules.linear.NonDynamicallyQuantizableLinear(12, 8, dtype=torch.float64))
    base, x = copy.deepcopy(model), PACKED_KIND.inputs()[0]
    randlora.inject(model, r=3, targets=["0"])
    assert torch.equal(model(x), base(x))
    fill(model)
    assert_close(model(x), base(x) + x @ randlora.delta_weight(model, "0").T, torch.float64)
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in randlora.trainable_parameters(model))


@pytest.mark.parametrize("enabled", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_the_adapted_weight_as_the_plain_one(enabled: torch.dtype) -> None:
    model, inputs = PACKED_KIND.adapted(torch.float32), PACKED_KIND.inputs(torch.float32)
    with torch.autocast("cpu", dtype=enabled):
        found, expected = model(*inputs), changed(PACKED_KIND, model)(*inputs)
    assert found.dtype == expected.dtype == enabled
    assert_close(found, expected, enabled)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_are_those_without_checkpointing(reentrant: bool) -> None:
    model, (x,) = SPLIT_KIND.adapted(), SPLIT_KIND.inputs()
    x.requires_grad_()
    model(x).square().sum().backward()
    expected = {fqn: parameter.grad for fqn, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    found = {fqn: parameter.grad for fqn, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(found) == 4
    assert all_bits(found) == all_bits(expected)


@pytest.mark.medium
@every_attention
def test_compiling_gives_one_graph_and_the_same_values(kind: AttentionKind) -> None:
    model = kind.adapted(torch.float32)
    expected = model(*kind.inputs(torch.float32))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = compiled(*kind.inputs(torch.float32))
    assert_close(found, expected, torch.float32)
    found.square().sum().backward()
    assert all(parameter.grad is not None for parameter in randlora.trainable_parameters(model))


@pytest.mark.medium
@needs_export
@every_attention
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_an_exported_program_computes_the_same(kind: AttentionKind, strict: bool) -> None:
    model, inputs = kind.adapted(torch.float32), kind.inputs(torch.float32)
    program = torch.export.export(model, inputs, strict=strict)
    assert_close(program.module()(*inputs), model(*inputs), torch.float32)
