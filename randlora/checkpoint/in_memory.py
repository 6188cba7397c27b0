"""`AdapterState`: an adapter in memory, with the tensors and the metadata of its files; `adapter_state` returns one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from randlora.checkpoint.contents import StoredAs, contents_of, gathered, value_problems
from randlora.checkpoint.header import HEADER_KEY, metadata_of, parse_header
from randlora.checkpoint.peft_config import PeftFields
from randlora.checkpoint.read import AdapterFile, disagreements, sort_contents
from randlora.errors import CheckpointError, raise_collected
from randlora.hints import mistyped, require_types
from randlora.ranks import raise_on_every_rank
from randlora.targets.match import shortened


@dataclass(frozen=True, eq=False)
class AdapterState:
    """All of an adapter, as `randlora.save` writes it, in memory: to send, to average, to put into a model again.

    It can be pickled, and belongs to no model: its tensors are copies.

    Attributes:
        tensors: Λ and Γ in float32, or float64 if they are, and the parameters of ``train_also`` in their own dtype, on
            the CPU, by their names in ``adapter_model.safetensors``.
        metadata: The metadata of that file, with a SHA-256 of the tensors.
        config: The contents of ``adapter_config.json``.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    config: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> AdapterState:
        """Return the same adapter with other values, such as an average over clients, and their SHA-256.

        Args:
            tensors: A tensor for each name in ``tensors``, of the same shape. Values are rounded to the dtype there.

        Raises:
            CheckpointError: If names or shapes differ.
        """
        require_types(AdapterState.with_tensors, {"tensors": tensors})
        named = [
            ("there are no values of", sorted(self.tensors.keys() - tensors.keys())),
            ("the adapter has no tensor", sorted(tensors.keys() - self.tensors.keys())),
        ]
        problems = [f"{what} {shortened(names)}" for what, names in named if names]
        problems += [
            f"{name} has shape {tuple(tensors[name].shape)}, expected {tuple(own.shape)}"
            for name, own in self.tensors.items()
            if name in tensors and tensors[name].shape != own.shape
        ]
        raise_collected(CheckpointError, problems, doing="give an adapter other values")
        values = {
            name: tensors[name].detach().to(device="cpu", dtype=own.dtype, copy=True).contiguous()
            for name, own in self.tensors.items()
        }
        header = parse_header(_header_of(self), self.tensors)
        return replace(self, tensors=values, metadata=self.metadata | metadata_of(header, values))


def adapter_state(model: nn.Module, name: str | None = None, *, bases: StoredAs = "seed") -> AdapterState:
    """Return one adapter as `randlora.save` would write it, in memory.

    If any parameter of the model is sharded, as by `fully_shard`, this is a collective: every process calls it, and
    gets the whole adapter.

    Args:
        model: A model with adapters.
        name: The adapter's name; ``None`` means the only one.
        bases: Whether the bases are in it, as for `randlora.save`.

    Returns:
        Copies of the tensors, on the CPU, with the metadata of the file.

    Raises:
        AdapterError: If the model has no adapter, or several and no ``name`` is given.
        CheckpointError: If `randlora.save` would not write it.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> _ = randlora.inject(model, r=4)
        >>> state = randlora.adapter_state(model)
        >>> state = state.with_tensors({name: tensor / 2 for name, tensor in state.tensors.items()})
        >>> randlora.swap(model, state)
    """
    require_types(adapter_state, {"model": model, "name": name})
    doing = "return the state of an adapter"
    (held,), ranks = gathered(model, [name], bases, doing=doing, is_for_all=True)
    with raise_on_every_rank(ranks):
        raise_collected(CheckpointError, value_problems(held), doing=doing)
        contents = contents_of(held)
    config = json.loads(json.dumps(contents.fields))  # as it is read from a file
    return AdapterState(contents.tensors, metadata_of(contents.header, contents.tensors), config)


def file_of(state: AdapterState) -> AdapterFile:
    """Return the contents of the files that a state would be saved as, with tensors of their own, after checking it.

    Raises:
        CheckpointError: If it is no state of an adapter, or its values were changed by other means than `with_tensors`.
    """
    problems = [
        *mistyped(state.tensors, dict[str, Tensor], "tensors"),
        *mistyped(state.metadata, dict[str, str], "metadata"),
        *mistyped(state.config, dict[str, Any], "config"),
    ]
    problems = problems or [*mistyped(state.config, PeftFields, "config")]
    raise_collected(CheckpointError, problems, doing="use the state of an adapter")
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.tensors.items()}
    try:
        header = parse_header(_header_of(state), tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; values are changed with AdapterState.with_tensors") from error
    fields = json.loads(json.dumps(state.config))
    file = sort_contents(fields, header, tensors, None, doing="use the state of an adapter")
    return replace(file, basis_copies=int(bool(file.bases)), doubts=tuple(disagreements(fields, header)))


def _header_of(state: AdapterState) -> str:
    if HEADER_KEY not in state.metadata:
        raise CheckpointError(
            f"the metadata of the state has no {HEADER_KEY!r}, which randlora.adapter_state and randlora.save write"
        )
    return state.metadata[HEADER_KEY]
