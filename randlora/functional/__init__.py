r"""The formula, and nothing else: a frozen linear layer with what an adapter adds to it.

RandLoRA (Albert et al., ICLR 2025, arXiv 2502.00987, eq. 4) writes the update of a frozen weight as a sum of
``num_bases`` products of random frozen bases and trained diagonal scalings, ``Σ_j B_j Λ_j A Γ_j``, with A shared by
all terms and A, B shared by all layers.

With ``max_dim = max(out, in)``, ``min_dim = min(out, in)``, ``num_bases = ceil(min_dim / r)`` the tensors are

| name | shape | meaning |
|---|---|---|
| ``basis_A`` | ``(r, min_dim)`` | the small basis |
| ``basis_B`` | ``(max_dim, r·num_bases)`` | the large basis |
| ``lam`` | ``(r, num_bases)`` | Λ, trained, starts at 0 |
| ``gamma`` | ``(num_bases, min_dim)`` | Γ, trained, starts at ``1 / max(num_bases, min_dim)`` |

and the update is ``scaling · UB @ UA``, oriented as the weight, where row ``p = k·num_bases + j`` of
``UA`` is ``lam[k, j] · basis_A[k] · gamma[j]`` and ``UB`` is ``basis_B``. The pairing by the flat index p is the one of
PEFT 0.15 to 0.21 and of the authors' code; a checkpoint is only right under it.

The rooms: `dense` and `block` know the products with bases of their kind, each under the same names; `adapted` puts a
layer's weight and update together; `cost` chooses among the ways to compute; `operation` is what autograd sees.
"""

from randlora.functional.adapted import Pair
from randlora.functional.block import BlockPair
from randlora.functional.cost import Compute
from randlora.functional.dense import DensePair
from randlora.functional.diagonals import Diagonals
from randlora.functional.operation import WriteOut, adapted_linear, delta_weight

__all__ = [
    "BlockPair",
    "Compute",
    "DensePair",
    "Diagonals",
    "Pair",
    "WriteOut",
    "adapted_linear",
    "delta_weight",
]
