"""The frozen random bases: their spec, kinds, draws and storage. Importing this package registers the kinds."""

from randlora.bases import kinds as kinds
from randlora.bases.basis import BasisBank as BasisBank
from randlora.bases.spec import BasisSpec as BasisSpec
