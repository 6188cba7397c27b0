"""A model rebuilt from the headers of its checkpoint: linear layers, embeddings and parameters without values.

It has the names, shapes and dtypes of the real model and computes nothing. Whatever only looks at a model, such as
`randlora.plan`, works on it unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from randlora.checkpoint.tensors_file import Entry
from randlora.files.kinds import Kind, doubt, kind_of
from randlora.files.model_directory import ModelDirectory
from randlora.files.names import Naming, namings
from randlora.files.order import model_order
from randlora.layers.conv1d import Conv1DAdapter
from randlora.layers.registry import register_layer

BUFFERS = frozenset({"running_mean", "running_var", "num_batches_tracked", "masked_bias", "inv_freq", "position_ids"})
INPUT_EMBEDDINGS = frozenset({"embed_tokens", "embed_in", "word_embeddings", "wte", "shared"})
HEADS = ("lm_head", "embed_out", "cls.predictions.decoder", "lm_head.decoder")
TIED_HEADS = (
    (re.compile(r"Bert(ForMaskedLM|ForPreTraining|LMHeadModel)$"), "cls.predictions.decoder"),
    (re.compile(r"(Roberta|Camembert)For(MaskedLM|CausalLM)$"), "lm_head.decoder"),
    (re.compile(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration)$"), "lm_head"),
)
"""By class, the output head that a file lacks where it is tied to the embedding of the input."""


class Part(nn.Module):
    """Anything in a skeleton but a linear layer or an embedding: a container, a norm, a convolution."""


class Conv1D(nn.Module):
    """Stands for transformers' layer of that name, whose weight is stored ``(in_features, out_features)``."""


register_layer(Conv1D)(Conv1DAdapter)


class Skeleton(nn.Module):
    """A model of shapes, on the meta device.

    Attributes:
        config: ``model_type`` and ``_name_or_path``, as a transformers model has them.
        naming: How its names follow from those in the files.
        doubts: What was taken for something without certainty, one sentence each.
    """

    def __init__(self, directory: ModelDirectory, naming: Naming) -> None:
        """Make one without layers."""
        super().__init__()
        self.config = SimpleNamespace(model_type=directory.model_type, _name_or_path=str(directory.path))
        self.naming = naming
        self.doubts: tuple[str, ...] = ()

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the head of a language model, by the names it has in common models."""
        modules = dict(self.named_modules())
        return next((modules[name] for name in HEADS if isinstance(modules.get(name), nn.Linear)), None)


def skeleton(directory: ModelDirectory, naming: Naming | None = None) -> Skeleton:
    """Build a model of shapes after a checkpoint's headers.

    Args:
        directory: The checkpoint; a quantized one as `as_dense` gives it.
        naming: How its names become the model's; ``None`` for the model that ``config.json`` describes.

    Returns:
        A model whose parameters have the names, shapes and dtypes of the files' tensors and no values.
    """
    naming = naming or next(namings(directory))
    modules: dict[str, dict[str, Entry]] = {}
    for fqn, entry in sorted(
        ((naming.fqn(name), entry) for name, entry in directory.entries.items()), key=lambda pair: model_order(pair[0])
    ):
        module, _, attribute = fqn.rpartition(".")
        modules.setdefault(module, {})[attribute] = entry
    model = Skeleton(directory, naming)
    doubts = [] if directory.config else ["there is no config.json: what is a linear layer was told by names alone"]
    for fqn, entries in modules.items():
        weight = entries.get("weight")
        if fqn and weight is not None and len(weight.shape) == 2:
            kind = kind_of(fqn, entries, modules.get(fqn.rpartition(".")[0], ()), directory.model_type)
            _hang(model, fqn, _layer(kind, weight.shape))
            if (reason := doubt(fqn, kind, weight.shape, directory.config)) is not None:
                doubts.append(f"doubtful: {fqn} was taken for {reason}")
        _fill(_part(model, fqn), entries)
    _tie_head(model, directory)
    model.doubts = tuple(doubts)
    return model


def _part(model: nn.Module, fqn: str) -> nn.Module:
    """Return the module of a name, made of parts where it is not there yet."""
    module = model
    for attribute in fqn.split(".") if fqn else ():
        found = module._modules.get(attribute)
        module = module._modules.setdefault(attribute, Part()) if found is None else found  # type: ignore[assignment]
    return module


def _hang(model: nn.Module, fqn: str, layer: nn.Module) -> None:
    parent, _, attribute = fqn.rpartition(".")
    _part(model, parent)._modules[attribute] = layer


def _layer(kind: Kind, shape: tuple[int, ...]) -> nn.Module:
    """Make a layer of a kind; its parameters are those of the file."""
    if kind is Kind.CONV1D:
        return Conv1D()
    rows, columns = shape
    with torch.device("meta"):
        if kind is Kind.EMBEDDING:
            return nn.Embedding(rows, columns)
        if kind is Kind.ATTENTION_OUTPUT:
            return nn.modules.linear.NonDynamicallyQuantizableLinear(columns, rows, bias=False)
        return nn.Linear(columns, rows, bias=False)


def _fill(module: nn.Module, entries: Mapping[str, Entry]) -> None:
    """Give a module the parameters and buffers that the file has for it."""
    module._parameters.pop("bias", None)  # what the class says that it has not, where the file does not either
    for attribute, entry in entries.items():
        tensor = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
        if _is_buffer(attribute, tensor):
            module._buffers[attribute] = tensor
        else:
            module._parameters[attribute] = nn.Parameter(tensor, requires_grad=False)


def _is_buffer(attribute: str, tensor: Tensor) -> bool:
    """Whether a tensor is none that a model trains: statistics, positions, and the masks in GPT-2's first files."""
    is_mask = attribute == "bias" and tensor.ndim > 1
    return attribute in BUFFERS or is_mask or not (tensor.is_floating_point() or attribute == "weight")


def _tie_head(model: Skeleton, directory: ModelDirectory) -> None:
    """Let the head share the embedding of the input, where ``config.json`` or the head's absence says that it does."""
    says_tied = directory.config.get("tie_word_embeddings")
    name = next((head for kind, head in TIED_HEADS if kind.search(directory.architecture)), None)
    embedding = next((module for fqn, module in model.named_modules() if _is_input_embedding(fqn, module)), None)
    if name is None or embedding is None or says_tied is False:
        return
    head = dict(model.named_modules()).get(name)
    if head is None:
        weight = embedding._parameters["weight"]
        assert weight is not None, "an embedding has a weight"
        head = _layer(Kind.LINEAR, tuple(weight.shape))
        _hang(model, name, head)
    elif says_tied is None:
        return
    head._parameters["weight"] = embedding._parameters["weight"]


def _is_input_embedding(fqn: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and fqn.rsplit(".", 1)[-1] in INPUT_EMBEDDINGS
