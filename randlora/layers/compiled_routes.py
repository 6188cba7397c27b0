"""`randlora.routed` in compiled code: one operator for each layer, which no compiler looks into.

A compiled program is then the same whichever adapters the rows go through: the operator asks the block that is open
when it runs. What needs more, as gradients, or a module that reads its weight, runs uncompiled, between two graphs.
"""

from __future__ import annotations

import functools
import itertools
import sys
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from randlora.bases.basis import is_exporting
from randlora.errors import AdapterError
from randlora.layers.routed import routed_output
from randlora.routing import Routing

Function = TypeVar("Function", bound=Callable[..., Any])

REASON = "randlora.routed computes it without a compiler: compile without fullgraph=True, or what is around it"
OWNERS: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()
"""The adapted modules that operators run for, by number."""

_NUMBERS = itertools.count()


def uncompiled(function: Function) -> Function:
    """Mark a function as `torch.compiler.disable` does, without importing the compiler."""
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **kwargs)

    vars(call).update(_torchdynamo_disable=True, _torchdynamo_disable_msg=REASON, _torchdynamo_disable_recursive=True)
    return call  # type: ignore[return-value]


def numbered(owner: nn.Module, number: Tensor | None) -> Tensor:
    """Return the number of an adapted module, a tensor on the CPU: a compiler makes a program for each value of an int.

    Args:
        owner: The module.
        number: Its number, or that of the module that it is a copy of, if it has one.
    """
    if number is None or OWNERS.get(int(number)) is not owner:
        with torch.inference_mode(mode=False):
            number = torch.tensor(next(_NUMBERS), device="cpu")
        OWNERS[int(number)] = owner
    return number


def routed_layer(layer: Any, owner: nn.Module, x: Any, output: Tensor) -> Tensor:
    """Return the output of a layer plus, for each token, the product with the update of its adapter, compiled or not.

    Args:
        layer: The adapter layer.
        owner: Its module.
        x: The input, ``(batch, ..., in_features)``.
        output: The output of the base, ``(batch, ..., out_features)``.
    """
    routing: Routing = layer.state.routing
    if not torch.compiler.is_compiling():
        return routed_output(layer.routes(owner), routing, x, output, has_dropout=owner.training)
    if is_exporting():
        raise AdapterError("a program cannot be exported in a block of routed: export one adapter, or merge it")
    has_gradients = torch.is_grad_enabled()
    if not isinstance(x, Tensor) or (has_gradients and (x.requires_grad or routing.trains)):
        return _uncompiled_output(layer, owner, x, output)
    result: Tensor = torch.ops.randlora.routed(
        x, output, layer.number, layer.attribute, routing.batch, routing.tokens, has_gradients
    )
    return result


@uncompiled
def _uncompiled_output(layer: Any, owner: nn.Module, x: Any, output: Tensor) -> Tensor:
    return routed_output(layer.routes(owner), layer.state.routing, x, output, has_dropout=owner.training)


@torch.library.custom_op("randlora::routed", mutates_args=())
def routed_operator(
    x: Tensor,
    output: Tensor,
    number: Tensor,
    attribute: str,
    batch: int,
    tokens: int,
    has_gradients: bool,  # noqa: FBT001
) -> Tensor:
    """Return the output of a layer plus, for each token, the product with the update of its adapter.

    Args:
        x: The input, ``(batch, ..., in_features)``, which needs no gradient.
        output: The output of the base, ``(batch, ..., out_features)``.
        number: The number of the module.
        attribute: The name of its weight.
        batch: The size of the batch of the call of the model.
        tokens: That of the next dimension of its input.
        has_gradients: Whether gradients of Λ and Γ would be recorded.
    """
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise AdapterError(
            "routed cannot be recorded in a CUDA graph, which would replay the adapters of one batch for all: compile "
            "without mode='reduce-overhead' or 'max-autotune', or activate one adapter at a time"
        )
    owner: Any = OWNERS.get(int(number))
    layer = None if owner is None else owner.__dict__.get("randlora", {}).get(attribute)
    if layer is None or layer.state.routing is None:
        raise AdapterError(
            "a program that was compiled in a block of routed runs outside of one: call it in "
            "`with randlora.routed(model, names):`, or compile the model again"
        )
    routing: Routing = layer.state.routing
    used = [name for name in routing.adapters if name in layer.adapters]
    if has_gradients and any(part.requires_grad for name in used for part in layer.diagonals_of(owner, name)):
        raise AdapterError(
            "an adapter became trainable inside of a block of routed, which compiled code cannot train then: begin "
            "another block, or call it in torch.no_grad()"
        )
    routing.batch, routing.tokens = batch, tokens
    with torch.no_grad():
        result = routed_output(layer.routes(owner), routing, x, output, has_dropout=owner.training)
    return result.clone() if result.data_ptr() == output.data_ptr() else result  # which is output if all rows are base


@routed_operator.register_fake
def _(x: Tensor, output: Tensor, *_: Any) -> Tensor:  # noqa: ARG001
    return torch.empty_like(output, memory_format=torch.contiguous_format)
