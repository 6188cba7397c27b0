"""PEFT as a peer: its adapters and ours, built, filled and saved, and whether the two say the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, RandLoraConfig, get_peft_model
from torch import Tensor, nn
from torch.torch_version import TorchVersion

import randlora
from randlora.checkpoint.bases import stream_notes
from randlora.checkpoint.read import read_adapter
from randlora.config import BasisKind, Stream
from tests.kit import Bits, all_bits, fill
from tests.model_directories import save_model
from tests.models import GPT2, RealModel, outputs

TOLERANCE = 2e-4
"""How far our output may be from PEFT's, as a share of what the adapter changes: the two differ in rounding only."""

PEFT_FLAGS: dict[BasisKind, dict[str, bool]] = {
    "dense": {},
    "sparse": {"sparse": True},
    "very_sparse": {"very_sparse": True},
}

PEFT_STREAM: Stream = "torch" if TorchVersion(torch.__version__) >= "2.12" else "torch-2.11"
"""The stream that PEFT draws dense bases from under the torch installed."""

as_peft_draws = pytest.mark.skipif(
    PEFT_STREAM != "torch", reason="PEFT draws other dense bases under torch 2.11 and older"
)

R = 6  # does not divide 32, the smaller side of most layers
ALPHA = 15
PREFIX = "base_model.model."

THEIR_WARNINGS = [
    # transformers renames what PEFT still calls by its old name
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Specified to not save basis_A and basis_B:UserWarning"),
    # a file with the bases once, and not once a layer: PEFT 0.21.2 reads it right all the same
    pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning"),
    # a file of ours says that its bases are those of torch 2.11 and older, in a field that PEFT passes over
    pytest.mark.filterwarnings(r"ignore:Unexpected keyword arguments \['randlora_stream'\]:UserWarning"),
]


TRAINERS_WARNINGS = [
    # transformers on a machine without a GPU
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
    # transformers and TRL, which call what transformers renames
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
    # Lightning's advice, and what it still calls by an old name
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
    # diffusers' schedulers make arrays of tensors, and torch's have no `copy` yet
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]


def peft_config(kind: RealModel, basis: BasisKind = "dense", **options: Any) -> RandLoraConfig:
    options = {"r": R, "randlora_alpha": ALPHA, "target_modules": list(kind.targets), **options}
    return RandLoraConfig(fan_in_fan_out=kind.name == "gpt2", **PEFT_FLAGS[basis], **options)


def peft_model(
    kind: RealModel,
    basis: BasisKind = "dense",
    *,
    dtype: torch.dtype = torch.float32,
    autocast: bool = True,
    adapter: str = "default",
    **options: Any,
) -> PeftModel:
    base, config = kind.build().to(dtype), peft_config(kind, basis, **options)
    model = get_peft_model(base, config, adapter_name=adapter, autocast_adapter_dtype=autocast).eval()
    return fill(model, spread=0.2)


def peft_draw(basis: BasisKind) -> Stream | None:
    return PEFT_STREAM if basis == "dense" else None


def our_model(kind: RealModel, basis: BasisKind = "dense", **options: Any) -> nn.Module:
    model = kind.build()
    ours = {"r": R, "alpha": ALPHA, "targets": kind.targets, "basis": basis, "stream": peft_draw(basis)}
    randlora.inject(model, **{**ours, **options})
    return fill(model, options.get("name", "default"))


def their_values(model: nn.Module, name: str = "default") -> Iterator[tuple[str, Tensor, Tensor]]:
    for key, gamma in model.named_parameters():
        if key.endswith(f".randlora_gamma.{name}"):
            fqn = key.removesuffix(f".randlora_gamma.{name}")
            lam = model.get_parameter(f"{fqn}.randlora_lambda.{name}")
            yield fqn.removeprefix(PREFIX), lam.detach(), gamma.detach()


def assert_same_effect(ours: nn.Module, theirs: nn.Module, kind: RealModel, tolerance: float = TOLERANCE) -> None:
    """Hold our output against PEFT's, in units of what PEFT's adapter changes; a change too small would prove nothing.

    The base is PEFT's own model with its adapter off, so the head that ``modules_to_save`` replaced is off too.
    """
    inputs = kind.inputs()
    expected = outputs(theirs, inputs).double()
    assert isinstance(theirs, PeftModel)
    with theirs.disable_adapter():
        base = outputs(theirs, inputs).double()
    effect = (expected - base).abs().max()
    assert effect > 0.05 * base.abs().max(), "the adapter changes too little for a comparison"
    assert (outputs(ours, inputs).double() - expected).abs().max() <= tolerance * effect


def in_peft(kind: RealModel, directory: Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    return PeftModel.from_pretrained(kind.build().to(dtype), directory, **options).eval()


def in_peft_bit_for_bit(model: nn.Module) -> dict[str, Bits]:
    return all_bits({**dict(model.named_parameters()), **dict(model.named_buffers())})


def told_stream(directory: Path) -> Stream | None:
    return PEFT_STREAM if PEFT_STREAM != "torch" and stream_notes(read_adapter(directory)) else None


def in_ours(kind: RealModel, directory: Path, **options: Any) -> nn.Module:
    model = kind.build()
    randlora.load(model, directory, **{"stream": told_stream(directory), **options})
    return model


def untied() -> Any:
    model: Any = GPT2.build()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def base_directory(kind: RealModel, parent: Path) -> Path:
    return save_model(kind, parent / "base")


def our_directory(
    kind: RealModel, parent: Path, basis: BasisKind = "dense", *, bases: Any = "seed", **options: Any
) -> tuple[Path, nn.Module]:
    model = our_model(kind, basis, **options)
    randlora.save(model, parent / "ours", bases=bases)
    return parent / "ours", model


def their_directory(kind: RealModel, parent: Path, basis: BasisKind = "dense", **options: Any) -> tuple[Path, Any]:
    model = peft_model(kind, basis, **options)
    model.save_pretrained(parent / "theirs")
    return parent / "theirs", model
