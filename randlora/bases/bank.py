"""The bases that a model's adapters share, found by content."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

from randlora.bases.basis import Basis
from randlora.bases.spec import BasisSpec


class BasisBank:
    """The bases of one model, found by content: adapters that name equal bases hold the same object.

    Example:
        >>> bank = BasisBank()
        >>> basis = bank.acquire(BasisSpec("dense", "portable", seed=0, r=4, max_dim=8, min_dim=6))
        >>> basis.slices(8, 6, device="cpu", dtype=torch.float32).B.shape
        torch.Size([8, 2, 4])
    """

    def __init__(self) -> None:
        """Make an empty bank."""
        self._bases: list[Basis] = []

    def __iter__(self) -> Iterator[Basis]:
        """Go through the bases held."""
        return iter(self._bases)

    def __len__(self) -> int:
        """Count the bases held."""
        return len(self._bases)

    @property
    def nbytes(self) -> int:
        """Bytes that all bases take in storage."""
        return sum(basis.nbytes for basis in self._bases)

    def find(self, spec: BasisSpec, *, used: tuple[int, int] | None = None) -> Basis | None:
        """Find bases that serve a spec.

        Args:
            spec: What is wanted.
            used: ``(max_dim, min_dim)`` that layers really slice. Bases of the same family drawn for at least these
                dims serve too, as they do in PEFT. Without it only the very bits of ``spec`` do.
        """
        for basis in self._bases:
            held = basis.spec
            if basis.stored is not None or held.family != spec.family:
                continue
            covers = used is not None and held.max_dim >= used[0] and held.min_dim >= used[1]
            if held == spec or held.is_prefix_stable or covers:
                return basis
        return None

    def acquire(self, spec: BasisSpec) -> Basis:
        """Return the bases of a spec, adding them where they are not held."""
        if (found := self.find(spec)) is not None:
            return found
        basis = Basis(spec)
        self._bases.append(basis)
        return basis

    def add(self, basis: Basis) -> None:
        """Hold bases made elsewhere, unless they are held."""
        if not any(basis is held for held in self._bases):
            self._bases.append(basis)

    def keep_only(self, used: Iterable[Basis]) -> None:
        """Let go of every basis but those given."""
        wanted = {id(basis) for basis in used}
        self._bases = [basis for basis in self._bases if id(basis) in wanted]

    def __deepcopy__(self, memo: dict[int, Any]) -> BasisBank:
        """Copy the list, share the bases."""
        twin = copy.copy(self)
        twin._bases = list(self._bases)
        return twin
