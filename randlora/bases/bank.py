"""The bases that a model's adapters share, looked up by spec."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

from randlora.bases.basis import Basis
from randlora.bases.spec import BasisSpec


class BasisBank:
    """The bases of one model. Adapters with equal specs share one `Basis`.

    Example:
        >>> bank = BasisBank()
        >>> basis = bank.acquire(BasisSpec("dense", "portable", seed=0, r=4, max_dim=8, min_dim=6))
        >>> basis.slices(8, 6, device="cpu", dtype=torch.float32).B.shape
        torch.Size([8, 2, 4])
    """

    def __init__(self) -> None:
        """Create an empty bank."""
        self._bases: list[Basis] = []

    def __iter__(self) -> Iterator[Basis]:
        """Iterate over the bases."""
        return iter(self._bases)

    def __len__(self) -> int:
        """Return the number of bases."""
        return len(self._bases)

    @property
    def nbytes(self) -> int:
        """Total bytes of the bases in storage."""
        return sum(basis.nbytes for basis in self._bases)

    def find(self, spec: BasisSpec, *, used: tuple[int, int] | None = None) -> Basis | None:
        """Return bases that can be used for a spec, or ``None``.

        Args:
            spec: The spec.
            used: ``(max_dim, min_dim)`` of the slices that layers use. If given, bases of the same family drawn for at
                least these dims are accepted too, as in PEFT. Otherwise the bits must be those of ``spec``.
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
        """Return the bases of a spec, adding them to the bank if it has none."""
        if (found := self.find(spec)) is not None:
            return found
        basis = Basis(spec)
        self._bases.append(basis)
        return basis

    def add(self, basis: Basis) -> None:
        """Add existing bases, unless the bank has them already."""
        if not any(basis is held for held in self._bases):
            self._bases.append(basis)

    def keep_only(self, used: Iterable[Basis]) -> None:
        """Remove every basis except those given."""
        wanted = {id(basis) for basis in used}
        self._bases = [basis for basis in self._bases if id(basis) in wanted]

    def __deepcopy__(self, memo: dict[int, Any]) -> BasisBank:
        """Return a bank with a copy of the list and the same bases."""
        twin = copy.copy(self)
        twin._bases = list(self._bases)
        return twin
