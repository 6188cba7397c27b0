"""Directories of real models and of their adapters, ours and PEFT's."""

from pathlib import Path
from typing import Any

from torch import nn

import randlora
from randlora.config import BasisKind
from tests.model_directories import save_model
from tests.models import RealModel
from tests.peer import our_model, peft_model


def base_directory(kind: RealModel, parent: Path) -> Path:
    """Save a model as transformers does."""
    return save_model(kind, parent / "base")


def our_directory(
    kind: RealModel, parent: Path, basis: BasisKind = "dense", *, bases: Any = "seed", **options: Any
) -> tuple[Path, nn.Module]:
    """Save an adapter of ours; return the adapted model too."""
    model = our_model(kind, basis, **options)
    randlora.save(model, parent / "ours", bases=bases)
    return parent / "ours", model


def their_directory(kind: RealModel, parent: Path, basis: BasisKind = "dense", **options: Any) -> tuple[Path, Any]:
    """Save an adapter of PEFT's; return PEFT's model too."""
    model = peft_model(kind, basis, **options)
    model.save_pretrained(parent / "theirs")
    return parent / "theirs", model
