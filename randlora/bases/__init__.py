"""The frozen random bases: their spec, their kinds, which this package registers, their draws and their storage."""

from randlora.bases import kinds as kinds
from randlora.bases.basis import BasisBank as BasisBank
from randlora.bases.spec import BasisSpec as BasisSpec
