"""Tensors that bitsandbytes stored as codes of 4 or 8 bits, and reading the dense ones that they stand for.

Codes of 4 bits are two to a byte: levels of a table, scaled block by block. Codes of 8 bits are scaled row by row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from randlora.checkpoint.tensors_file import Entry
from randlora.files.tensor_file import read_tensor
from randlora.layers import bnb_codes

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, eq=False)
class Codes4bit:
    """A tensor stored as codes of 4 bits.

    Attributes:
        entry: The codes.
        parts: The tensors that say how to read them, by their names without the codes'.
        fields: What one of those says as JSON.
    """

    entry: Entry
    parts: Mapping[str, Entry]
    fields: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """``"nf4"`` or ``"fp4"``."""
        return str(self.fields["quant_type"])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that was quantized."""
        return tuple(self.fields["shape"])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that was quantized."""
        return FLOATS[self.fields["dtype"]]

    @property
    def needs_bitsandbytes(self) -> bool:
        """Whether `read` does."""
        return True

    def read(self) -> Tensor:
        """Read the codes and write them out in float32, with one rounding.

        They are written out as one row: blocks go on from row to row, of which bitsandbytes 0.50 on a CPU loses track.
        """
        from bitsandbytes.functional import QuantState  # noqa: PLC0415  # an optional extra

        state = QuantState.from_dict({name: read_tensor(part) for name, part in self.parts.items()}, device="cpu")
        state.shape = torch.Size([2 * self.entry.nbytes])
        written = bnb_codes.write_out_4bit(read_tensor(self.entry), state)
        return written.flatten()[: math.prod(self.shape)].reshape(self.shape)


@dataclass(frozen=True, eq=False)
class Codes8bit:
    """A matrix stored as codes of 8 bits.

    Attributes:
        entry: The codes.
        parts: The tensors that say how to read them, ``"SCB"`` with a scale for each row among them.
    """

    entry: Entry
    parts: Mapping[str, Entry]

    @property
    def kind(self) -> str:
        """``"8 bits"``."""
        return "8 bits"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that was quantized."""
        return self.entry.shape

    @property
    def dtype(self) -> None:
        """The dtype that was quantized, which nothing says."""
        return

    @property
    def needs_bitsandbytes(self) -> bool:
        """Whether `read` does."""
        return False

    def read(self) -> Tensor:
        """Read the codes and write them out in float32."""
        return bnb_codes.write_out_8bit(read_tensor(self.entry), read_tensor(self.parts["SCB"]))


Codes = Codes4bit | Codes8bit
