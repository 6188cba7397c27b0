"""The frozen random bases: their spec, their kinds, which this package registers, their draws and their storage."""

from randlora.bases import block as block
from randlora.bases import dense as dense
from randlora.bases import ternary as ternary
from randlora.bases.bank import BasisBank as BasisBank
from randlora.bases.spec import BasisSpec as BasisSpec
