r"""The arithmetic: a frozen linear layer plus the update of an adapter.

RandLoRA (Albert et al., ICLR 2025, arXiv 2502.00987, eq. 4) writes the update of a frozen weight as a sum of
``num_bases`` products of random frozen bases and trained diagonal scalings, ``Σ_j B_j Λ_j A Γ_j``, with A shared by
all terms and A, B shared by all layers.

With ``max_dim = max(out, in)``, ``min_dim = min(out, in)``, ``num_bases = ceil(min_dim / r)`` the tensors are

| name | shape | meaning |
|---|---|---|
| ``basis_A`` | ``(r, min_dim)`` | the small basis |
| ``basis_B`` | ``(max_dim, r·num_bases)`` | the large basis |
| ``lam`` | ``(r, num_bases)`` | Λ, trained |
| ``gamma`` | ``(num_bases, min_dim)`` | Γ, trained |

and the update is ``scaling · UB @ UA``, transposed if ``in > out``, where row ``p = k·num_bases + j`` of ``UA`` is
``lam[k, j] · basis_A[k] · gamma[j]`` and ``UB`` is ``basis_B``. The pairing by the flat index p is the same as in PEFT
0.15 to 0.21 and in the authors' code; an adapter is only valid with the pairing it was trained with.
"""

from randlora.functional.cost import Compute as Compute
from randlora.functional.operation import Diagonals as Diagonals
from randlora.functional.operation import WriteOut as WriteOut
from randlora.functional.operation import adapted_linear as adapted_linear
from randlora.functional.operation import delta_weight as delta_weight
from randlora.functional.operation import update_norm as update_norm
from randlora.functional.operation import update_rows as update_rows
from randlora.functional.pairs import BlockPair as BlockPair
from randlora.functional.pairs import DensePair as DensePair
from randlora.functional.pairs import Pair as Pair
