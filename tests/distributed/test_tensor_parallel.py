"""Tensor parallelism: what it sends, dropout and losses of split layers, and plans of transformers' models."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import _StridedShard

import randlora
from randlora.errors import AdapterError, RandLoRAError
from randlora.functional.region import take_spans
from randlora.places import values_within
from randlora.sharded.places import is_split, part_at
from randlora.sharded.tensor_parallel import local_product, on_mesh
from tests.distributed.engines import around, split, within
from tests.distributed.processes import in_four, in_two
from tests.distributed.test_engines import EXPERTS, PLANS, WHOLE, Planned
from tests.distributed.trained import Block, Drawn, Made, Net, close, drawn, require_equal_on_ranks
from tests.kit import fill
from tests.pages import snippet

DRAWN = Drawn(targets=("embed", "up", "down", "head"))
IDS = torch.arange(8).view(2, 4)


placed = st.one_of(
    st.integers(0, 1).map(Shard),
    st.builds(lambda dim, pieces: _StridedShard(dim, split_factor=pieces), st.integers(0, 1), st.integers(1, 3)),
    st.sampled_from([Replicate(), Partial()]),
)
splits = st.integers(1, 3).flatmap(
    lambda ndim: st.tuples(
        st.lists(placed, min_size=ndim, max_size=ndim), st.lists(st.integers(1, 4), min_size=ndim, max_size=ndim)
    )
)


@given(st.tuples(st.integers(0, 9), st.integers(1, 9)), splits, st.data())
def test_the_part_is_that_which_torch_finds(
    shape: tuple[int, int], split: tuple[list[Any], list[int]], data: st.DataObject
) -> None:
    placements, mesh = split
    coordinate = [data.draw(st.integers(0, processes - 1)) for processes in mesh]
    values = expected = torch.arange(math.prod(shape)).view(shape)
    for placement, processes, index in zip(placements, mesh, coordinate, strict=True):
        if is_split(placement):
            parts, _ = placement._split_tensor(expected, processes, with_padding=False)
            expected = parts[index]
    assert torch.equal(values_within(values, part_at(shape, placements, mesh, coordinate)), expected)


@settings(max_examples=40)
@given(st.integers(1, 13), st.integers(1, 13), st.sampled_from(["dense", "block"]), splits)
def test_parts_of_any_size_on_any_number_of_processes_compute_and_merge_as_the_whole(
    out: int, into: int, basis: Any, split: tuple[list[Any], list[int]]
) -> None:
    model = nn.Sequential(nn.Linear(into, out, bias=False)).double()
    randlora.inject(model, r=2, targets=["0"], basis=basis)
    trained = [*randlora.trainable_parameters(fill(model.double()))]
    owner: Any = model[0]
    layer, weight = owner.randlora["weight"], owner.weight
    x, upstream = drawn(3, into, seed=0).double().requires_grad_(), drawn(3, out, seed=1).double()
    update = layer.update(owner, layer.adapters["default"], 1.0)
    whole, (placements, mesh) = layer.with_updates(weight, [update]), split
    total = torch.zeros_like(upstream)
    for coordinate in itertools.product(*map(range, mesh)):
        if any(index and not is_split(each) for index, each in zip(coordinate, placements, strict=True)):
            continue  # a copy of the part of another process
        part = part_at((out, into), placements, mesh, coordinate)
        merged = layer.part_with_updates(values_within(weight, part), part, (out, into), [update])
        torch.testing.assert_close(merged, values_within(whole, part))
        region = layer.region_of((out, into), part)
        product = local_product(update.within(region), take_spans(x, region.columns, 1), region, "auto")
        assert all(each is not None for each in torch.autograd.grad(product.sum(), [x, *trained], retain_graph=True))
        total = total.index_add(1, torch.cat([torch.arange(*span) for span in region.rows]), product)
    expected = x @ (whole - weight).T
    torch.testing.assert_close(total, expected)
    found, own = (torch.autograd.grad(each, [x, *trained], upstream) for each in (total, expected))
    torch.testing.assert_close(found, own)


def gradients_alike(one: nn.Module, model: nn.Module, within: float = 5e-6) -> None:
    for ours, expected in zip(*map(randlora.trainable_parameters, (model, one)), strict=True):
        close(gradient_of(ours), gradient_of(expected), within)


def gradient_of(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad


@in_two
def test_nothing_is_sent_but_gradients() -> None:
    """Beside what the plain model sends whose table is trained."""
    base = split(DRAWN.build())
    for fqn, parameter in base.named_parameters():
        parameter.requires_grad_(fqn == "embed.weight")
    forward, both = [], []
    for each in (base, within(split)(DRAWN)):
        with torch.no_grad(), CommDebugMode() as communication:
            each(IDS)
        forward.append(communication.get_total_counts())
        with CommDebugMode() as communication:
            each(IDS).square().sum().backward()
        both.append(communication.get_total_counts())
    assert 0 < forward[0] < both[0]
    assert forward[1] == forward[0]
    assert both[1] == both[0] + 2 * 6  # of Λ and of Γ of six layers


@in_two
@pytest.mark.parametrize("order", [around, within])
def test_dropout_leaves_processes_with_the_same_adapter(order: Any) -> None:
    model = order(partial(split, table="whole"))(Drawn(dropout=0.5, targets=("up", "down", "head")))
    torch.manual_seed(dist.get_rank())
    found = [model(IDS), model(IDS)]
    assert not torch.equal(*found)
    found[0].square().mean().backward()
    found += map(gradient_of, randlora.trainable_parameters(model))
    require_equal_on_ranks({str(index): each.detach() for index, each in enumerate(found)})


@in_two
@pytest.mark.slow
def test_a_compiled_model_is_one_graph(tmp_path: Path) -> None:
    models = [within(split)(DRAWN) for _ in range(2)]
    compiled: Any = torch.compile(models[1], backend="aot_eager", fullgraph=True)
    outputs = [models[0](IDS), compiled(IDS)]
    close(outputs[1], outputs[0])
    for output in outputs:
        output.square().mean().backward()
    gradients_alike(*models)
    case, x = PLANS["packed"].written(tmp_path), drawn(3, 16, seed=0).double()
    one, planned = (each.model.layers[0].mlp for each in (case.adapted(), case.adapt(case.split())))
    compiled = torch.compile(planned, backend="aot_eager", fullgraph=True)
    close(compiled(x), one(x))


@in_two
def test_a_whole_layer_is_given_whole_tokens_some_of_them_or_some_of_their_features() -> None:
    mesh, x = init_device_mesh("cpu", (2,)), drawn(2, 4, 6, seed=0)
    case = Made(lambda: nn.Sequential(nn.Linear(6, 8)), {"r": 4, "targets": ["0"]}, lambda *_: (x,))
    one = case.adapted()
    expected = one(x)
    expected.square().mean().backward()
    for placement in (Replicate(), Shard(1), Shard(2)):
        model, placed = case.build(), distribute_tensor(x, mesh, [placement])
        distribute_module(model[0], mesh)
        case.adapt(model)
        with CommDebugMode() as communication:
            output = model[0](placed)
        assert communication.get_total_counts() == 0 or placement == Shard(2)
        close(output.full_tensor(), expected)
        output.square().mean().backward()
        gradients_alike(one, model)


@in_four
@pytest.mark.slow
def test_the_order_of_the_page() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = Block(16, 32)
    exec(snippet("tensor_parallel.md", "parallelize_module"), {"randlora": randlora, "model": model, "mesh": mesh})
    model(torch.randn(4, 16)).square().mean().backward()
    assert [type(parameter.grad) for parameter in randlora.trainable_parameters(model)] == [DTensor] * 4


@in_two
def test_the_code_of_the_page_splits_and_adapts(tmp_path: Path) -> None:
    PLANS["llama"].written(tmp_path)
    code = snippet("tensor_parallel.md", "tp_plan").replace("meta-llama/Llama-3.1-8B", str(tmp_path))
    exec(code, found := {"randlora": randlora})
    model: Any = found["model"]
    assert isinstance(model.model.layers[0].self_attn.q_proj.weight, DTensor)
    assert len([*randlora.trainable_parameters(model)]) == 14
    model(input_ids=(ids := torch.arange(12).view(2, 6)), labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in randlora.trainable_parameters(model))
    other = split(Net(16, 32, 12))
    randlora.inject(other, r=4, targets=["up"])
    for each in (model, other):
        refused = pytest.raises(AdapterError, match="split by tensor parallelism, which routed does not support")
        with torch.no_grad(), randlora.serving.routed(each, ["default", None]), refused:
            each(ids)


@in_two
@pytest.mark.parametrize("table", ["rows", "columns"])
@pytest.mark.parametrize("is_split_first", [True, False])
def test_rows_of_a_table_that_is_split_are_refused(is_split_first: bool, table: str) -> None:
    inject = partial(randlora.inject, r=3, targets=["up"], train_rows={"embed": [1, 2]})
    model, steps = Net(8, 12, 11), (inject, partial(split, table=table))
    for step in steps[::-1] if is_split_first else steps:
        step(model)
    with pytest.raises(AdapterError, match=r"split by tensor parallelism: .* use train_also"):
        model(IDS)


ONLY_EXPERTS = {"targets": ".*experts.*"}


@in_two
def test_each_stack_of_experts_sums_once_and_processes_without_tokens_take_part(tmp_path: Path) -> None:
    case = replace(PLANS["mixtral"], adapter=ONLY_EXPERTS).written(tmp_path / "a")
    model = case.adapt(case.split())
    with mock.patch("randlora.sharded.tensor_parallel.on_mesh", side_effect=on_mesh) as counted:
        model(*case.batch(0, 0))
    assert counted.call_count == 2  # of one layer: gate_up_proj and down_proj, whose experts all have tokens
    case = Planned("mixtral", {**EXPERTS, "num_experts_per_tok": 1}, WHOLE, ONLY_EXPERTS).written(tmp_path / "b")
    one, model = case.adapted(), case.adapt(case.split())
    for each in (one, model):
        each(torch.tensor([[3]])).square().mean().backward()
    gradients_alike(one, model, within=1e-12)


@in_two
def test_what_a_plan_leaves_without_a_way_to_train_is_refused(tmp_path: Path) -> None:
    """Experts whose processes have different batches, and layers of bitsandbytes, which do not compute either."""
    from transformers import BitsAndBytesConfig

    parallel = {"tp_size": 1, "fsdp_size": 2, "ep_size": 2}
    experts = replace(PLANS["mixtral"], parallel=parallel).written(tmp_path / "a").split()
    codes = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True), "dtype": torch.float32}
    quantized = PLANS["llama"].written(tmp_path / "b").split(**codes)
    with pytest.raises(AssertionError):  # of bitsandbytes
        quantized(IDS)
    for model, targets, said in (
        (experts, ["gate_up_proj"], "gate_up_proj is split by EpDispatchExpertsParallel"),
        (quantized, "all-linear", "q_proj is a quantized Linear4bit whose weight ColwiseParallel"),
    ):
        before = {name: type(module) for name, module in model.named_modules()}
        with pytest.raises(RandLoRAError, match=said):
            randlora.inject(model, r=4, targets=targets)
        assert before == {name: type(module) for name, module in model.named_modules()}
