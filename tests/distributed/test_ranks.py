"""`check_ranks`: all processes are told what differs between them, and which has what. Which hold a model together."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.two_tensor import TwoTensor

import randlora
from randlora.errors import AdapterError
from randlora.ranks import Ranks, agree, agreeing, raise_on_every_rank
from randlora.sharded.check_ranks import difference
from randlora.state import adapted_root, is_adapted
from tests.distributed.engines import ENGINES, sharded
from tests.distributed.processes import LAW, in_two, on_all
from tests.distributed.trained import Drawn, drawn_models

DRAWN = Drawn(r=4, basis="block", train_also=("norm",))
OPTIONS: dict[str, Any] = {"r": 4, "targets": ["up", "down"], "stream": "portable", "basis": "sparse"}


@LAW
@given(drawn=drawn_models)
@in_two
def test_equal_adapters_pass(drawn: Drawn) -> None:
    model = drawn.adapted()
    randlora.check_ranks(model)
    randlora.check_ranks(DistributedDataParallel(model, broadcast_buffers=False), group=dist.new_group())


def refused(model: nn.Module, said: str, what: str = "adapters", **options: Any) -> str:
    with pytest.raises(
        AdapterError, match=rf"cannot go on: (the ranks have different {what}|.*, 2 problems)"
    ) as caught:
        randlora.check_ranks(model, **options)
    first, second = on_all(str(caught.value))
    assert first == second
    assert said in first, first
    return first


@in_two
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seed": 1}, "on rank 0; sparse bases (stream=portable, seed=1, "),
        ({"alpha": 3}, "adapter 'default': r=4, alpha=80, dropout=0.0, factor=1.0, 4 targets, 0 parameters"),
        ({"r": 2}, "also different: the bases of r=4 of 'default', Λ and Γ of"),
        ({"exclude": "blocks.0.up"}, "on rank 0; r=4, alpha=80, dropout=0.0, factor=1.0, 3 targets"),
        ({"train_also": ["norm"]}, "0 parameters"),
        ({"dropout": 0.5}, "dropout=0.5"),
        ({"name": "other"}, "the names of the adapters: default on rank 0; other on rank 1"),
        ({"active": False}, "factor=None"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_every_rank_gets_the_same_error(options: dict[str, Any], said: str) -> None:
    model = DRAWN.build()
    randlora.inject(model, **OPTIONS | (options if dist.get_rank() else {}))
    refused(model, said)


@in_two
def test_bases_of_other_bits_and_a_rank_without_adapters_stop_all() -> None:
    model = DRAWN.build()
    if dist.get_rank() == 0:
        randlora.inject(model, **OPTIONS)
    with pytest.raises(AdapterError, match=r"cannot compare the adapters of all.*rank 1: "):
        randlora.check_ranks(model)
    if dist.get_rank():
        randlora.inject(model, **OPTIONS)
        (basis,) = adapted_root(model)[1].bank  # as after a fault of the memory or of the machine
        basis.matrices()[1].values[0, 0] += 1
    refused(model, "the bases of r=4 of 'default': sparse bases")


def changed(model: Any, fqn: str, change: Callable[[Tensor], Tensor]) -> bool:
    owner, _, name = fqn.rpartition(".")
    held = model.get_submodule(owner)
    if name in held._buffers:
        held._buffers[name] = change(held._buffers[name])
    else:
        own = held._parameters[name]
        held._parameters[name] = nn.Parameter(change(own.detach()), own.requires_grad)
    return True


BIAS = "head.bias: torch.float32, 11, requires_grad=False on rank 0; "
EMBED = "embed.weight: torch.float32, 11 x 12, requires_grad=False on rank 0; torch.bfloat16"
ELSEWHERE: dict[str, tuple[Callable[[Any], object], str]] = {
    "dtype": (nn.Module.bfloat16, EMBED),
    "dtype of one": (partial(changed, fqn="head.bias", change=Tensor.double), f"{BIAS}torch.float64"),
    "shape": (partial(changed, fqn="head.bias", change=lambda own: own[:7]), f"{BIAS}torch.float32, 7"),
    "lacking": (lambda model: setattr(model.head, "bias", None), f"{BIAS}nothing on rank 1"),
    "dtype of a buffer": (partial(changed, fqn="counts", change=Tensor.float), "counts: torch.int64, 3, requires_grad"),
}
"""How the model of one process may differ, and what is said of it at no cost."""


@in_two
@pytest.mark.parametrize(("what", "way"), [*((what, "whole") for what in ELSEWHERE), ("dtype of one", "sharded")])
def test_a_different_base_is_found(what: str, way: str) -> None:
    model = DRAWN.build()
    model.register_buffer("counts", torch.arange(3))
    change, said = ELSEWHERE[what]
    if dist.get_rank():
        change(model)
    DRAWN.adapt(model)
    if way == "sharded":
        sharded(model)
    refused(model, said, "models")


@in_two
@pytest.mark.parametrize("engine", ["", "FSDP2", "FSDP2 first"])
def test_an_adapter_that_only_some_processes_train_is_found(engine: str) -> None:
    model = ENGINES[engine].make(DRAWN) if engine else DRAWN.adapted()
    randlora.check_ranks(model, values=True)
    for parameter in randlora.trainable_parameters(model):
        parameter.requires_grad = dist.get_rank() == 0
    said = refused(model, "requires_grad=True on rank 0; torch.float32")
    assert "Λ and Γ of embed of 'default': " in said
    assert "; also different: Λ and Γ of blocks.0.up of 'default', " in said
    assert "problems" not in said, "only what adapters have differs"


def changed_everywhere(model: nn.Module) -> None:
    for name, _ in [*model.named_parameters()]:
        changed(model, name, lambda own: own + 1)


def changed_in_part(own: Tensor) -> Tensor:
    return TwoTensor(vars(own)["a"], vars(own)["b"] + 1)


def one_more(own: Tensor) -> Tensor:
    return own + 1


DIGEST, OF_ALL = ": SHA-256 ", "different: the values of blocks.0.up.weight, the values of blocks.0.up.bias, "
VALUES: dict[str, tuple[Callable[[Any], object], str]] = {
    "another model": (changed_everywhere, OF_ALL),
    "blocks.1.up.weight": (partial(changed, fqn="blocks.1.up.weight", change=Tensor.neg), DIGEST),
    "blocks.0.norm.weight": (partial(changed, fqn="blocks.0.norm.weight", change=Tensor.neg), DIGEST),
    "head.bias": (partial(changed, fqn="head.bias", change=changed_in_part), DIGEST),
    "counts": (partial(changed, fqn="counts", change=one_more), f" when the model was adapted{DIGEST}"),
}
TRAINED = {
    "Λ and Γ of blocks.0.up of 'default'": "blocks.0.up.randlora_gamma.default",
    "blocks.0.norm.bias, which 'default' trains": "blocks.0.norm.bias",
}


@in_two
@pytest.mark.parametrize("what", [*VALUES, *TRAINED])
def test_other_values_are_found_where_asked_for(what: str) -> None:
    model = DRAWN.build()
    model.register_buffer("counts", torch.arange(3))
    changed(model, "head.bias", lambda own: TwoTensor(own, own.clone()))
    change, said = VALUES.get(what, (lambda _: None, DIGEST))
    if dist.get_rank():
        change(model)
    DRAWN.adapt(model)
    with torch.no_grad():  # an adapter of equal values, whatever the base has
        for name, copy in adapted_root(model)[1].adapters["default"].parameters.items():
            copy.fill_(len(name))
        if what in TRAINED:
            randlora.check_ranks(model, values=True)
            model.get_parameter(TRAINED[what]).add_(dist.get_rank())
    randlora.check_ranks(model)
    found = refused(
        model,
        said if what == "another model" else f"the values of {what}{said}",
        "adapters" if what in TRAINED else "models",
        values=True,
    )
    assert what not in TRAINED or "also different" not in found, "nothing else differs"


@in_two
def test_what_only_one_process_has_is_not_compared_nor_are_statistics() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)).to("meta" if dist.get_rank() else "cpu")
    randlora.inject(model, 2, targets=["0"], train_also=["1"])
    model.append(nn.LazyLinear(3))  # without a shape yet
    randlora.check_ranks(model, values=True)
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    for parameter in model.parameters():
        dist.broadcast(parameter.data, 0)
    randlora.inject(model, 2, targets=["0"], train_also=["1"])
    model(torch.randn(4, 6) + dist.get_rank())
    randlora.check_ranks(model, values=True)


@in_two
def test_an_error_is_raised_in_all_wherever_in_nested_blocks_a_process_raises_it() -> None:
    """The same object more than once, or another error while it is undone, as when there is no room for that."""
    own, is_last = Ranks((dist.group.WORLD,), dist.get_rank() == 0), dist.get_rank() == 1
    error = KeyError("before, inside or after")

    def raise_at(*places: str, place: str) -> None:
        if is_last and place in places:
            raise error

    def run(place: str) -> None:
        with raise_on_every_rank(own):
            raise_at("before", place=place)
            assert agree(dist.get_rank()) == [0, 1]
            try:
                with raise_on_every_rank(None):  # of the same processes
                    raise_at("inside", "undone", place=place)
            except KeyError:
                if is_last and place == "undone":
                    raise MemoryError from None
                raise
            raise_at("after", place=place)

    for place in ("before", "inside", "after", "undone"):
        with pytest.raises(MemoryError if is_last and place == "undone" else KeyError):
            run(place)
        assert on_all(place) == [place] * 2, "nothing was left to send"
    assert agreeing() is None
    assert agree(3) == [3], "outside of a block there are no other processes"


@in_two
def test_meshes_without_one_that_has_all_processes_are_refused() -> None:
    model = DRAWN.build()
    meshes = [DeviceMesh("cpu", [rank]) for rank in range(2)]
    for index, mesh in enumerate(meshes):
        layer = model.get_submodule(f"blocks.{index}.up")
        own = distribute_tensor(layer.get_parameter("weight").detach(), mesh, [Shard(0)])
        layer.register_parameter("weight", nn.Parameter(own))
    with pytest.raises(AdapterError, match="so not all could take part in one call") as caught:
        randlora.inject(model, 4, targets=[f"blocks.{dist.get_rank()}.up"])
    assert "whose processes [1] are not in the first" in str(caught.value)
    assert len(set(on_all(str(caught.value)))) == 1
    assert not is_adapted(model)


def test_in_one_process_there_is_nothing_to_compare_and_all_ranks_of_a_value_are_named() -> None:
    model = DRAWN.build()
    with pytest.raises(AdapterError, match="no adapter"):
        randlora.check_ranks(model)
    randlora.check_ranks(DRAWN.adapt(model))
    facts = {0: {"a": "x", "b": "y", "c": ""}, 2: {"a": "x", "b": "z"}, 3: {"a": "x", "b": "y"}}
    assert difference(facts) == "b: y on ranks 0, 3; z on rank 2; also different: c"
    assert difference({0: {}, 1: {"the values of a": "x"}}) == "", "what only one knows is not compared"
