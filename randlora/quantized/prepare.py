"""Preparing a quantized model for training, before `randlora.inject`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from randlora.errors import AdapterError, raise_collected
from randlora.hints import NotTheModel, require_types
from randlora.layers.in_place import adapter_layers_of
from randlora.layers.registry import find_layer
from randlora.model.view import unchanged_if_raised
from randlora.quantized.bnb import MAY_REPACK, REPACKED, Linear4bitAdapter, is_repacked, quant_state
from randlora.state import attached_state, require_unmerged
from randlora.targets.census import Census, Visit, is_norm, is_quantized
from randlora.targets.match import shortened

HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class PreparationReport(NotTheModel):
    """The report of `randlora.prepare_quantized`; prints as a few lines.

    Attributes:
        quantized: FQNs of the quantized linear layers.
        cast: FQNs of the modules whose parameters were converted to float32.
        input_gradients: FQNs of the modules whose output now requires grad.
        checkpointing: Whether activation checkpointing is enabled.
        unpacked: FQNs of the 4-bit layers that bitsandbytes will not repack.
        notes: Requested steps that were not possible.
    """

    quantized: tuple[str, ...] = ()
    cast: tuple[str, ...] = ()
    input_gradients: tuple[str, ...] = ()
    checkpointing: bool = False
    unpacked: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return a line for each step, followed by the notes."""
        lines = (
            f"quantized layers: {len(self.quantized) or 'none'}",
            f"converted to float32: {shortened(self.cast) or 'none'}",
            f"outputs that now require grad: {shortened(self.input_gradients) or 'none'}",
            f"checkpointing: {'on, in training mode' if self.checkpointing else 'off'}",
            f"layers with repacking disabled: {len(self.unpacked) or 'none'}",
        )
        return "\n".join([*lines, *self.notes])


def prepare_quantized(
    model: nn.Module,
    *,
    full_precision: bool = True,
    inputs_require_grad: bool = True,
    checkpointing: bool = True,
    unpacked: bool = True,
) -> PreparationReport:
    """Prepare a quantized model for training, in place. Call it before `inject` and before the first forward pass.

    Each step can be turned off, and a second call changes nothing. A model without quantized layers is prepared in the
    same way. ``requires_grad`` flags do not change, because `inject` freezes the model.

    Args:
        model: Any module, such as a transformers model loaded with a ``BitsAndBytesConfig``.
        full_precision: Whether to convert 16-bit norms, and linear layers that are not quantized (such as the output
            head), to float32, and to cast the outputs of embeddings to float32, so that hidden states are summed in
            float32. Embeddings stay 16-bit unless tied to the head. Other layers, such as convolutions, stay 16-bit and
            cast their inputs. The head and weights tied to it take twice the memory. If a model multiplies by a 16-bit
            parameter outside of a layer, such as an embedding's weight, it must cast by itself; else use ``False``.
        inputs_require_grad: Whether the outputs of the input embeddings require grad, which reentrant checkpointing
            needs. The embeddings are found by ``get_input_embeddings`` of the model or of a submodule, as in
            transformers; otherwise, the first `nn.Embedding` is used.
        checkpointing: Whether to enable non-reentrant activation checkpointing if the model supports it. If it is
            enabled already, it is not changed. transformers may also make inputs require grad.
        unpacked: Whether to keep bitsandbytes from repacking 4-bit weights in their first forward pass in evaluation
            mode, which it does on CPUs with AVX512-BF16: a repacked layer gives no gradient of its input.

    Raises:
        AdapterError: If adapters are merged, or 4-bit weights were repacked before.
        ConfigError: If a flag is neither ``True`` nor ``False``.

    Examples:
        >>> layers = torch.nn.Embedding(9, 8), torch.nn.LayerNorm(8)
        >>> model = torch.nn.Sequential(*layers, torch.nn.Linear(8, 9))
        >>> print(prepare_quantized(model.bfloat16()))
        quantized layers: none
        converted to float32: 1, 2
        outputs that now require grad: 0
        checkpointing: off
        layers with repacking disabled: none
        checkpointing stays off: Sequential has no method for it
    """
    flags = {"full_precision": full_precision, "inputs_require_grad": inputs_require_grad}
    flags |= {"checkpointing": checkpointing, "unpacked": unpacked}
    require_types(prepare_quantized, flags)
    visits = Census.of(model).first_visits
    for module in model.modules():
        if (state := attached_state(module)) is not None:
            require_unmerged(state, "prepare the model")
    four_bits = [visit for visit in visits if unpacked and find_layer(visit.module) is Linear4bitAdapter]
    repacked = [
        visit.fqn for visit in four_bits if is_repacked(quant_state(visit.module, visit.module.get_parameter("weight")))
    ]
    raise_collected(AdapterError, [f"{fqn} {REPACKED}" for fqn in repacked], doing="prepare the model")
    with unchanged_if_raised(*_changeable(model)):
        embeddings = _input_embeddings(model)  # may raise, so before all that reaches beyond modules, such as a config
        notes = []
        if checkpointing and not _enable_checkpointing(model):
            notes.append(f"checkpointing stays off: {type(model).__name__} has no method for it")
        cast = _make_float32(visits) if full_precision else []
        inputs: tuple[str, ...] = ()
        if inputs_require_grad:
            inputs = _let_outputs_require_grad(model, embeddings)
            if not inputs:
                notes.append("no embedding was found: for reentrant checkpointing, make the inputs require grad")
        for visit in four_bits:
            vars(visit.module)[MAY_REPACK] = False
            layer = adapter_layers_of(visit.module).get("weight")
            if isinstance(layer, Linear4bitAdapter):
                layer.may_repack = False  # the value that ejecting restores
    return PreparationReport(
        quantized=tuple(visit.fqn for visit in visits if is_quantized(visit.module)),
        cast=tuple(cast),
        input_gradients=inputs,
        checkpointing=_is_checkpointing(model),
        unpacked=tuple(visit.fqn for visit in four_bits),
        notes=tuple(notes),
    )


def _changeable(model: nn.Module) -> tuple[list[object], list[Tensor]]:
    """Return the arguments of `unchanged_if_raised`: everything that preparing a model may change."""
    objects: list[object] = []
    values: list[Tensor] = []
    for module in model.modules():
        kind = find_layer(module)
        objects += [module, *adapter_layers_of(module).values()]
        objects += kind.beside(module) if isinstance(kind, type) else []
        values += _own_tensors(module)
    return objects, values


def _let_outputs_require_grad(model: nn.Module, embeddings: list[nn.Module]) -> tuple[str, ...]:
    """Add a hook to the input embeddings, once, and return their FQNs."""
    for module in embeddings:
        if require_grad not in module._forward_hooks.values():
            module.register_forward_hook(require_grad)
    return tuple(fqn for fqn, module in model.named_modules() if module in embeddings)


def cast_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Cast floating inputs to the dtype of the module's parameters; a forward pre-hook."""
    dtype = next(parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())

    def cast(value: Any) -> Any:
        if type(value) in (tuple, list):  # an LSTM takes its state as a tuple
            return type(value)(map(cast, value))
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return cast(args), {name: cast(value) for name, value in kwargs.items()}


def float32_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:  # noqa: ARG001
    """Cast a 16-bit output to float32; a forward hook."""
    return output.float() if output.dtype in HALVES else output


def require_grad(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    """Make a module's output require grad; a forward hook."""
    output.requires_grad_(True)  # noqa: FBT003


def _make_float32(visits: Sequence[Visit]) -> list[str]:
    """Convert norms and dense linear layers to float32; return the FQNs of changed modules, including tied ones."""
    raised = [visit for visit in visits if _is_norm_or_dense(visit.module)]
    halves = {id(tensor): tensor for visit in raised for tensor in _own_tensors(visit.module) if tensor.dtype in HALVES}
    if not halves:
        return []
    for tensor in halves.values():
        tensor.data = tensor.data.float()  # in place, so that tied parameters stay tied
    for visit in visits:
        _let_dtypes_meet(visit.module)
    return [visit.fqn for visit in visits if any(id(tensor) in halves for tensor in _own_tensors(visit.module))]


def _is_norm_or_dense(module: nn.Module) -> bool:
    """Whether a module is a norm or a dense linear layer that can be adapted."""
    is_stored_otherwise = any(type(tensor.data) is not Tensor for tensor in _own_tensors(module))  # as in torchao
    if is_stored_otherwise or is_quantized(module) or is_parametrized(module):
        return False
    entry = find_layer(module)  # what reads a weight may read 16-bit weights beside it, as attention does
    return is_norm(module) or (isinstance(entry, type) and not entry.is_read)


def _holds_half_matrices(module: nn.Module) -> bool:
    """Whether a module has 16-bit matrices, as convolutions do, and would raise for the float32 output of a norm."""
    if is_quantized(module):
        return False
    tensors = module.parameters() if is_parametrized(module) else _own_tensors(module)
    return any(tensor.dtype in HALVES and tensor.ndim > 1 for tensor in tensors)


def _let_dtypes_meet(module: nn.Module) -> None:
    """Add a hook to a module, once, so that it works with the float32 outputs of norms and embeddings."""
    if isinstance(module, nn.Embedding):
        if float32_output not in module._forward_hooks.values():
            module.register_forward_hook(float32_output)
    elif _is_norm_or_dense(module) or _holds_half_matrices(module):
        has_weights = any(parameter.is_floating_point() for parameter in module.parameters())
        if has_weights and cast_inputs not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(cast_inputs, with_kwargs=True)


def _own_tensors(module: nn.Module) -> list[Tensor]:
    """Return a module's own parameters and buffers that are initialized."""
    held = [*module._parameters.values(), *module._buffers.values()]
    return [tensor for tensor in held if tensor is not None and not is_lazy(tensor)]


def _input_embeddings(model: nn.Module) -> list[nn.Module]:
    """Return the input embeddings of the model and its submodules (text and image), else the first embedding."""
    found = []
    for module in model.modules():
        if (get := getattr(module, "get_input_embeddings", None)) is not None:
            with suppress(NotImplementedError):  # transformers raises this if there are none
                found.append(get())
    known = [module for module in found if module is not None]
    return known or list(islice((module for module in model.modules() if isinstance(module, nn.Embedding)), 1))


def _enable_checkpointing(model: nn.Module) -> bool:
    """Enable activation checkpointing if it is not enabled; return whether it is now."""
    if _is_checkpointing(model):
        return True
    if not getattr(model, "supports_gradient_checkpointing", True):  # a flag of transformers models only
        return False
    for name in ("activation_checkpointing", "gradient_checkpointing"):  # the latter in older versions of transformers
        if (enable := getattr(model, f"{name}_enable", None)) is not None:
            enable(**{f"{name}_kwargs": {"use_reentrant": False}})
            return True
    return False


def _is_checkpointing(model: nn.Module) -> bool:
    """Whether a module has the flag that transformers sets for checkpointing."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
