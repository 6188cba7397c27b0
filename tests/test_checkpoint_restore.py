"""`restore`: the values of an adapter go from files into the parameters that there are."""

from pathlib import Path

import pytest
import torch
from torch import nn

import randlora
from randlora.checkpoint.restore import restore
from randlora.errors import CheckpointError


def test_parameters_without_values_are_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 12))
    randlora.inject(model, r=4)
    randlora.save(model, tmp_path)
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(8, 12))
    randlora.inject(empty, r=4)
    with pytest.raises(CheckpointError, match="no values to write to"):
        restore(empty, tmp_path)
