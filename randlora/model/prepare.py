"""Getting a quantized model ready for training, before `randlora.inject`.

Neither bitsandbytes nor transformers is imported: what they made is known by its type's name, or by what it can do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_map

from randlora.layers import bnb_codes
from randlora.layers.bnb import MAY_REPACK, Linear4bitAdapter
from randlora.layers.in_place import adapter_layers_of
from randlora.layers.registry import find_layer
from randlora.report import shortened
from randlora.state import attached_state, require_unmerged
from randlora.targets.walk import Census, Visit, is_norm, is_quantized

HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class PreparationReport:
    """What `randlora.prepare_quantized` did; prints as a few lines.

    Attributes:
        quantized: FQNs of the quantized linear layers.
        cast: FQNs of the modules whose parameters this call made float32.
        input_gradients: FQNs of the modules whose output now requires grad.
        checkpointing: Whether the model now checkpoints its activations in training.
        unpacked: FQNs of the 4-bit layers that bitsandbytes will not repack.
        put_in_order: FQNs of those that it had repacked before the call, or whose scales it left turned.
        notes: What was asked for and could not be done.
    """

    quantized: tuple[str, ...] = ()
    cast: tuple[str, ...] = ()
    input_gradients: tuple[str, ...] = ()
    checkpointing: bool = False
    unpacked: tuple[str, ...] = ()
    put_in_order: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return a line for each step, then the notes."""
        lines = [
            f"quantized layers: {len(self.quantized) or 'none'}",
            f"made float32: {shortened(self.cast) or 'nothing'}",
            f"require grad from the start: {shortened(self.input_gradients) or 'no inputs'}",
            f"checkpointing: {'on, in training mode' if self.checkpointing else 'off'}",
            f"kept from being repacked: {len(self.unpacked) or 'no'} layers",
        ]
        if self.put_in_order:
            lines.append(f"repacked already: {shortened(self.put_in_order)} (in order again, their scales less exact)")
        return "\n".join([*lines, *self.notes])


@runtime_checkable
class HasInputEmbeddings(Protocol):
    """A transformers model, as far as its inputs go."""

    def get_input_embeddings(self) -> nn.Module | None:
        """Return the module that sees the inputs first."""


@runtime_checkable
class HasActivationCheckpointing(Protocol):
    """A model of a recent transformers."""

    def activation_checkpointing_enable(self, *, activation_checkpointing_kwargs: dict[str, Any]) -> None:
        """Compute activations again in backward."""


@runtime_checkable
class HasGradientCheckpointing(Protocol):
    """A model of an older transformers, or one that follows it; recent ones warn that the name will go."""

    def gradient_checkpointing_enable(self, *, gradient_checkpointing_kwargs: dict[str, Any]) -> None:
        """Compute activations again in backward."""


def prepare_quantized(
    model: nn.Module,
    *,
    full_precision: bool = True,
    inputs_require_grad: bool = True,
    checkpointing: bool = True,
    unpacked: bool = True,
) -> PreparationReport:
    """Make a quantized model ready for training, in place; call it before `inject` and before the first forward pass.

    Each step can be left out, and a second call changes nothing more. A model without quantized layers is prepared in
    the same way. What requires grad stays as it is: `inject` freezes the model.

    Args:
        model: Any module, such as a transformers model loaded with a ``BitsAndBytesConfig``.
        full_precision: Make norms and the linear layers that are not quantized, such as the output head, float32 where
            they have 16 bits, and let embeddings give float32, so that hidden states are added up in it. Embeddings
            keep their 16 bits, unless one is tied to the head; so do convolutions and the like, which cast what they
            are given. The head and what is tied to it take twice the memory. A model that multiplies by a 16-bit
            parameter outside of a layer, as by an embedding's weight, must cast for itself, or leave this out.
        inputs_require_grad: Let the output of the embeddings require grad, without which reentrant checkpointing gives
            no gradients. They are what ``get_input_embeddings`` returns where a model or a part of it has that, as in
            transformers, else the first `nn.Embedding`.
        checkpointing: Switch checkpointing of activations on where the model has it, in the way that is not reentrant.
            A model that checkpoints already goes on in its way. transformers may let inputs require grad with it.
        unpacked: Keep bitsandbytes from repacking 4-bit weights at their first forward pass in evaluation mode, which
            it does on CPUs with AVX512-BF16: a repacked layer passes no gradient to its input. One that was repacked
            before the call, or has scales that saving it so left turned, is put in order again, with the scales
            rounded to bfloat16, and named in the report.

    Returns:
        What was done, and what could not be.

    Raises:
        AdapterError: While adapters are merged.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Embedding(9, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 9))
        >>> print(prepare_quantized(model.bfloat16()))
        quantized layers: none
        made float32: 1, 2
        require grad from the start: 0
        checkpointing: off
        kept from being repacked: no layers
        checkpointing stays off: Sequential has no method for it
    """
    for module in model.modules():
        if (state := attached_state(module)) is not None:
            require_unmerged(state, "prepare the model")
    visits = Census.of(model).first_visits
    embeddings = _input_embeddings(model)  # first, because it is somebody else's and could raise
    notes = []
    if checkpointing and not _enable_checkpointing(model):  # the same
        notes.append(f"checkpointing stays off: {type(model).__name__} has no method for it")
    cast = _make_float32(visits) if full_precision else []
    inputs = _let_inputs_require_grad(model, embeddings) if inputs_require_grad else ()
    if inputs_require_grad and not inputs:
        notes.append("no embedding was found: for reentrant checkpointing, let the batch itself require grad")
    four_bits = [visit for visit in visits if unpacked and find_layer(visit.module) is Linear4bitAdapter]
    out_of_order = [visit for visit in four_bits if bnb_codes.is_out_of_order(visit.module)]
    for visit in four_bits:
        vars(visit.module)[MAY_REPACK] = False
        layer = adapter_layers_of(visit.module).get("weight")
        if isinstance(layer, Linear4bitAdapter):
            layer.may_repack = False  # which is what ejecting gives back
    for visit in out_of_order:
        bnb_codes.put_in_order(visit.module)
    return PreparationReport(
        quantized=_fqns(visit for visit in visits if is_quantized(visit.module)),
        cast=_fqns(cast),
        input_gradients=inputs,
        checkpointing=_is_checkpointing(model),
        unpacked=_fqns(four_bits),
        put_in_order=_fqns(out_of_order),
        notes=tuple(notes),
    )


def cast_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Cast floating inputs to the dtype of the module's weights: a forward pre-hook."""
    dtype = next(parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    cast_args, cast_kwargs = tree_map(cast, (args, kwargs))  # an LSTM takes its state as a tuple
    return cast_args, cast_kwargs


def float32_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:  # noqa: ARG001
    """Make a module's output float32 where it has 16 bits: a forward hook."""
    return output.float() if output.dtype in HALVES else output


def require_grad(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    """Let a module's output require grad: a forward hook."""
    output.requires_grad_(True)  # noqa: FBT003


def _make_float32(visits: Sequence[Visit]) -> list[Visit]:
    """Make norms and dense linear layers float32; return what that changed, layers tied to them included."""
    raised = [visit for visit in visits if _is_norm_or_dense(visit.module)]
    halves = {id(tensor): tensor for visit in raised for tensor in _own_tensors(visit.module) if tensor.dtype in HALVES}
    if not halves:
        return []
    for tensor in halves.values():
        tensor.data = tensor.data.float()  # the same object, so that what is tied stays tied
    for visit in visits:
        _let_dtypes_meet(visit.module)
    return [visit for visit in visits if any(id(tensor) in halves for tensor in _own_tensors(visit.module))]


def _is_norm_or_dense(module: nn.Module) -> bool:
    """Whether a module is a norm, or a dense linear layer, which some adapter layer serves."""
    is_stored_otherwise = any(type(tensor.data) is not Tensor for tensor in _own_tensors(module))  # as torchao does
    if is_stored_otherwise or is_quantized(module) or is_parametrized(module):
        return False
    return is_norm(module) or isinstance(find_layer(module), type)


def _holds_half_matrices(module: nn.Module) -> bool:
    """Whether a module holds 16-bit matrices, as a convolution does, and would refuse the float32 of a norm."""
    if is_quantized(module):
        return False
    tensors = module.parameters() if is_parametrized(module) else _own_tensors(module)
    return any(tensor.dtype in HALVES and tensor.ndim > 1 for tensor in tensors)


def _let_dtypes_meet(module: nn.Module) -> None:
    """Hook a module, once, so that it works in the float32 stream that norms and embeddings now give."""
    if isinstance(module, nn.Embedding):
        if float32_output not in module._forward_hooks.values():
            module.register_forward_hook(float32_output)
    elif _is_norm_or_dense(module) or _holds_half_matrices(module):
        has_weights = any(parameter.is_floating_point() for parameter in module.parameters())
        if has_weights and cast_inputs not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(cast_inputs, with_kwargs=True)


def _own_tensors(module: nn.Module) -> list[Tensor]:
    """List a module's own parameters and buffers that have values."""
    held = [*module._parameters.values(), *module._buffers.values()]
    return [tensor for tensor in held if tensor is not None and not is_lazy(tensor)]


def _let_inputs_require_grad(model: nn.Module, embeddings: Sequence[nn.Module]) -> tuple[str, ...]:
    """Hook what sees the inputs first, each module once; return their FQNs."""
    for module in embeddings:
        if require_grad not in module._forward_hooks.values():
            module.register_forward_hook(require_grad)
    return tuple(fqn for fqn, module in model.named_modules() if module in embeddings)


def _input_embeddings(model: nn.Module) -> list[nn.Module]:
    """Ask the model and its parts, as one of text and images has two; where none knows, take the first embedding."""
    found = []
    for module in model.modules():
        if isinstance(module, HasInputEmbeddings):
            with suppress(NotImplementedError):  # which is how transformers says that there are none
                found.append(module.get_input_embeddings())
    known = [module for module in found if module is not None]
    return known or list(islice((module for module in model.modules() if isinstance(module, nn.Embedding)), 1))


def _enable_checkpointing(model: nn.Module) -> bool:
    """Switch checkpointing on, unless it is; say whether it is on now."""
    if _is_checkpointing(model):
        return True
    if not getattr(model, "supports_gradient_checkpointing", True):  # transformers' flag, which nobody else need have
        return False
    if isinstance(model, HasActivationCheckpointing):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    elif isinstance(model, HasGradientCheckpointing):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        return False
    return True


def _is_checkpointing(model: nn.Module) -> bool:
    """Read the flags that transformers sets on the modules it checkpoints."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _fqns(visits: Iterable[Visit]) -> tuple[str, ...]:
    return tuple(visit.fqn for visit in visits)
