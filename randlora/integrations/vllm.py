"""`MergedSource`: the merged weights of an adapted model for vLLM's weight transfer, without merging the model.

vLLM's trainer engines take it as their ``source``, except the one of ``nccl_m2n``, which sends shards. Written for the
interface of vLLM 0.32: ``WeightSource`` in ``vllm/distributed/weight_transfer/base.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource, layerwise_groups

from randlora.errors import MergeError
from randlora.files.save_merged import NAMES_IN_MEMORY, not_written, saved_as
from randlora.model.merged_tensors import MergedTensors, Share, StateDictEntry, quantized_site
from randlora.model.view import together

DOING = "send the merged weights to vLLM"


class MergedSource(WeightSource):  # type: ignore[misc]  # vLLM carries no types
    """The merged weights of a model, computed anew in each round, as a `WeightSource` of vLLM.

    Names and shapes are those of the model's checkpoint: tensors that transformers stores differently, such as the
    experts of Mixtral, are converted as ``save_pretrained`` does, one by one. Values have the same bits as after
    `randlora.merge`. Parameters are yielded, tied ones once, and buffers only if an adapter trains them.

    If the model is sharded, such as by `fully_shard` or ZeRO-3, every process makes a source and an engine with it, and
    all send together.
    """

    def __init__(self, model: nn.Module, *, dtype: torch.dtype | None = None) -> None:
        """Find the names, dtypes and shapes of the weights.

        Args:
            model: A model with adapters, or a wrapper of torch or DeepSpeed around one.
            dtype: The dtype of all floating tensors; ``None`` as for `randlora.merged_tensors`.

        Raises:
            RandLoRAError: As `randlora.merged_tensors` does.
            MergeError: If the model's checkpoint has one tensor for several parameters, such as those of attention.
        """
        self._model, self._dtype, self._places = model, dtype, dict[str, int]()
        with together(model, writes=False):
            tensors = self._tensors()
            self._saved, notes = saved_as(tensors)
            if NAMES_IN_MEMORY in notes:
                raise MergeError(
                    f"cannot {DOING}: a checkpoint of this model has tensors that transformers makes of several "
                    "parameters together, and they are sent one by one: write files with randlora.files.save_merged"
                )
            planned = {entry.fqn: self._saved(entry.fqn, tensors.on_meta(entry)) for entry in tensors.entries}
        parts = {name: tensor for found in planned.values() for name, tensor in found.items()}
        order = [name for group in layerwise_groups([*parts]) for name in group]  # in which vLLM takes layers
        self._metadata = [ParamMeta(name, parts[name].dtype, tuple(parts[name].shape)) for name in order]
        places = {name: place for place, name in enumerate(order)}
        self._places = {fqn: min(map(places.__getitem__, found)) for fqn, found in planned.items()}

    def metadata(self) -> list[ParamMeta]:
        """Return the name, the dtype and the shape of each tensor, as they were when the source was made."""
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Return an iterator over names and tensors: the adapters as they are now, merged in.

        Raises:
            RandLoRAError: As `randlora.merged_tensors` does.
        """
        with together(self._model, writes=False):
            found = self._tensors().each(self._saved, Share.PART)
        return (part for parts in found for part in parts.items())

    def _tensors(self) -> MergedTensors:
        tensors = MergedTensors.of(self._model, self._dtype, doing=DOING)
        trained = {id(own) for adapter in tensors.state.adapters.values() for own in adapter.trained.values()}
        left_out, entries = not_written(tensors.census), dict[object, StateDictEntry]()
        for entry in tensors.entries:
            fqn, module, attribute = entry
            held = module._parameters.get(attribute, module._buffers.get(attribute))
            is_weight = attribute not in module._buffers or quantized_site(tensors.census, module) is not None
            if fqn not in left_out and (is_weight or id(held) in trained):
                entries.setdefault((id(module), attribute) if held is None else id(held), entry)
        return replace(tensors, entries=sorted(entries.values(), key=lambda entry: self._places.get(entry.fqn, 0)))
