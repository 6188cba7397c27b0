"""Modules of every kind of weight and of none, and reports of what is left out of them."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import randlora
from randlora.layers import AdapterLayer, registry
from randlora.readers.read_weight import ReadWeight
from randlora.report import Report
from randlora.targets.left_out import LeftOut

RULES = (None, "all-linear", "all")


class Odd(nn.Module):
    """Parameters that no kind serves: a matrix, a stack of matrices and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(3, 5))
        self.stack = nn.Parameter(torch.zeros(2, 3, 4))
        self.scale = nn.Parameter(torch.zeros(7))


class Rare(Odd):
    """The same under another name."""


class Kernel(nn.Module):
    """A layer of the kind "convolution"."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class Experts(nn.Module):
    """Two matrices that other code reads, of the kind "experts", and one that no kind serves."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.zeros(8, 6))
        self.down_proj = nn.Parameter(torch.zeros(6, 8))
        self.router = nn.Parameter(torch.zeros(4, 6))


class Attention(nn.Module):
    """A matrix that other code reads, of the kind "attention"."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Parameter(torch.zeros(12, 4))


class _Plain(AdapterLayer):
    @classmethod
    def features(cls, owner: nn.Module) -> tuple[int, int]:
        out_features, in_features = owner._parameters[cls.attribute].shape  # type: ignore[union-attr]
        return in_features, out_features

    @staticmethod
    def in_storage_layout(delta: Tensor) -> Tensor:
        return delta


class KernelAdapter(_Plain):
    kind = "convolution"


class UpReader(_Plain, ReadWeight):
    kind, attribute = "experts", "up_proj"


class DownReader(_Plain, ReadWeight):
    kind, attribute = "experts", "down_proj"


class InReader(_Plain, ReadWeight):
    kind, attribute = "attention", "in_proj"


def register(patch: pytest.MonkeyPatch) -> None:
    """Register the kinds above until the patch is undone."""
    patch.setattr(registry, "_layers", dict(registry._layers))
    patch.setattr(registry, "_readers", {name: dict(kinds) for name, kinds in registry._readers.items()})
    randlora.layers.register_layer(Kernel)(KernelAdapter)
    for reader in (UpReader, DownReader):
        randlora.layers.register_layer(Experts)(reader)
    randlora.layers.register_layer(Attention)(InReader)


def quiet_plan(model: nn.Module, **options: Any) -> Report:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the default adapts only", UserWarning)
        return randlora.plan(model, **{"r": 2, **options})


def groups(report: Report) -> dict[str, LeftOut]:
    return {group.kind or group.owner or "": group for group in report.left_out if group.reason is None}


def mixed() -> nn.ModuleDict:
    return nn.ModuleDict({
        "attention": Attention(),
        "up": nn.Linear(4, 6),
        "kernel": Kernel(),
        "experts": Experts(),
        "odd": Odd(),
        "head": nn.Sequential(Kernel(), nn.Linear(6, 3)),
    })


def integers() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    return layer


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        layer: nn.Module = torch.nn.utils.weight_norm(nn.Linear(4, 6))
    return layer


UNSOUND: dict[str, Any] = {
    "integers": integers,
    "normed": lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)),
    "normed_of_old": old_weight_norm,
    "normed_kernel": lambda: torch.nn.utils.parametrizations.weight_norm(Kernel()),
}


def names_of(fqn: str) -> set[str]:
    """Return the names under which a parameter may be listed."""
    owner, _, attribute = fqn.rpartition(".")
    computed_from = attribute.removesuffix("_g").removesuffix("_v") == "weight" or ".parametrizations." in fqn
    return {fqn, owner.split(".parametrizations.")[0]} if computed_from else {fqn}


def matrices(model: nn.Module) -> list[tuple[Tensor, list[str]]]:
    places: dict[int, tuple[Tensor, list[str]]] = {}
    for fqn, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.ndim >= 2:
            places.setdefault(id(parameter), (parameter, []))[1].append(fqn)
    return list(places.values())


def assert_every_matrix_is_told_of_once(model: nn.Module, report: Report) -> None:
    total = sum(parameter.numel() for parameter in model.parameters())
    vectors = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim < 2)
    adapted = skipped = left = 0
    for parameter, fqns in matrices(model):
        names = set().union(*map(names_of, fqns))
        is_adapted, is_skipped = bool(names & set(report.targets)), bool(names & set(report.skipped))
        is_left = [group for group in report.left_out if names & set(group.fqns)]
        assert is_adapted + is_skipped + len(is_left) == 1, (fqns, is_adapted, is_skipped, is_left)
        adapted += parameter.numel() * is_adapted
        skipped += parameter.numel() * is_skipped
        left += parameter.numel() * bool(is_left)
    assert left == sum(group.parameters for group in report.left_out)
    assert adapted + skipped + left + vectors == total
    shares = (adapted + skipped + vectors) / total + sum(group.share for group in report.left_out)
    assert shares == pytest.approx(1)
