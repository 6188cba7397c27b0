"""What adapters make of a checkpoint's tensors: which are merged into, and which are replaced.

The arithmetic is that of `randlora.merge`, update by update.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from randlora.bases.bank import BasisBank
from randlora.bases.spec import sliced_dims
from randlora.checkpoint.bases import file_basis
from randlora.checkpoint.fit import fit_sites
from randlora.checkpoint.layout import master_copy
from randlora.checkpoint.read import AdapterFile, read_adapter
from randlora.checkpoint.tensors_file import Entry
from randlora.errors import CheckpointError, MergeError
from randlora.files.model_directory import ModelDirectory
from randlora.files.names import namings
from randlora.files.quantized import DenseView
from randlora.files.skeleton import Skeleton, skeleton
from randlora.files.tensor_file import read_pieces
from randlora.layers.update import Update, folded, sum_updates
from randlora.model.merge import require_finite
from randlora.targets.site import Site, shapes_of
from randlora.targets.walk import Census


@dataclass(frozen=True, eq=False)
class Merging:
    """A weight that adapters are merged into.

    Attributes:
        site: Its place in the skeleton.
        updates: The adapters' updates, in the order in which they are summed.
    """

    site: Site
    updates: list[Update] = field(default_factory=list)

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """Return the merged weight, in the dtype and layout of ``weight``.

        Raises:
            MergeError: When it would not be finite.
        """
        dtype = torch.promote_types(weight.dtype, torch.float32)
        delta = sum_updates(self.updates, self.site.shape, device=weight.device, dtype=dtype)
        return require_finite(self.site.fqn, folded(weight, self.site.layer_class.in_storage_layout(delta)))


@dataclass(frozen=True, eq=False)
class Changes:
    """What adapters change in a checkpoint, by the names of its tensors.

    Attributes:
        merged: Weights that are merged into.
        replaced: Tensors with a version trained beside an adapter, which is that adapter's.
        base: The checkpoint.
    """

    merged: dict[str, Merging]
    replaced: dict[str, Tensor]
    base: DenseView

    def pieces(self, entry: Entry, dtype: torch.dtype) -> Iterator[Tensor]:
        """Go through the parts of what becomes of a tensor, reading it as they are asked for.

        Args:
            entry: A tensor of the checkpoint.
            dtype: What it shall be in. It is computed in the wider of this and its own, from codes in float32 at least,
                then rounded once.

        Raises:
            MergeError: When a value would not be finite, but for those that were not before.
        """
        is_coded = entry.name in self.base.codes
        wide = torch.promote_types(torch.float32 if is_coded else entry.dtype, dtype)
        own = self.replaced.get(entry.name)
        if (merging := self.merged.get(entry.name)) is not None:
            weight = self.base.read(entry) if own is None else own  # one adapter's own version, which another adapts
            yield _cast(entry.name, merging.merged(weight.to(wide)), dtype)
        elif own is not None:
            yield _cast(entry.name, own.to(wide), dtype)
        elif is_coded:
            yield _cast(entry.name, self.base.read(entry), dtype)
        else:
            yield from (_cast(entry.name, piece, dtype) for piece in read_pieces(entry))


def find_changes(base: DenseView, adapters: Mapping[Path, float]) -> Changes:
    """Read adapters, fit them to a checkpoint, draw their bases, and say which tensors they change.

    Args:
        base: The checkpoint.
        adapters: Directories of adapters and the factors of their updates.

    Raises:
        CheckpointError: When an adapter or its bases cannot be had, or it does not fit the checkpoint, or two of them
            trained the same parameter beside them.
    """
    files = {}
    for path in adapters:
        with _about(path):
            files[path] = read_adapter(path)
    model = _skeleton(base.directory, files.values())
    census = Census.of(model)
    parameters = {held.fqn: id(held.parameter) for held in census.parameters}
    bank = BasisBank()
    merged: dict[int, Merging] = {}
    replaced: dict[int, Tensor] = {}
    for path, factor in adapters.items():
        file = files[path]
        with _about(path):
            sites = fit_sites(census, file, needs_values=False)
            basis = file_basis(file, shapes_of(sites), bank)
            if taken := [fqn for fqn in file.trained if parameters[fqn] in replaced]:
                raise CheckpointError(
                    f"an adapter before it trained {', '.join(taken)} too, and the model has room for one"
                )
        basis.extend(*sliced_dims(site.shape for site in sites))
        bank.add(basis)
        for site in sites:
            lam, gamma = (master_copy(part, "cpu") for part in file.values[site.fqn])
            update = Update(basis, lam, gamma, file.config.scaling * factor)
            merged.setdefault(id(site.weight), Merging(site)).updates.append(update)
        replaced |= {parameters[fqn]: tensor for fqn, tensor in file.trained.items()}
    places = {name: parameters.get(model.naming.fqn(name)) for name in base.directory.entries}
    return Changes(
        {name: merged[place] for name, place in places.items() if place in merged},
        {name: replaced[place] for name, place in places.items() if place in replaced},
        base,
    )


def _skeleton(directory: ModelDirectory, files: Iterable[AdapterFile]) -> Skeleton:
    """Build the checkpoint's skeleton under the names that the adapters use, or else under its usual ones."""
    weights = {f"{fqn}.weight" for file in files for fqn in file.values}
    for naming in namings(directory):
        if weights <= {naming.fqn(name) for name in directory.entries}:
            return skeleton(directory, naming)
    return skeleton(directory)


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.dtype == dtype:
        return tensor
    converted = tensor.to(dtype)
    if not torch.equal(torch.isfinite(converted), torch.isfinite(tensor)):
        raise MergeError(f"{name} has values too large for {dtype}: choose a wider dtype")
    return converted


@contextmanager
def _about(path: Path) -> Iterator[None]:
    """Name the adapter in errors about it."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"cannot merge {str(path)!r}: {error}") from error
