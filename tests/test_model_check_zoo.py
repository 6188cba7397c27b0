"""`make slow` checks a model of every type of transformers, and some of diffusers and torchvision."""

import re
from typing import Any

import pytest
import torch
from torch import nn

import randlora
from randlora.errors import TargetError
from tests.diffusion_models import flux, noise, patches, unet
from tests.models import library, reproducible
from tests.transformers_zoo import every_type
from tests.zoo_inputs import CannotRunError, runnable
from tests.zoo_unchecked import EXPECTED, MOST, UNCHECKED

PARTS = 48
"""In how many tests the types are checked, for several processes to share."""


def selected(model: nn.Module) -> set[str]:
    """Return what any rule adapts."""
    found: set[str] = set()
    for rule in (None, "all-linear", "all"):
        try:
            found |= {site.fqn for site in randlora.find_targets(model, rule)}
        except TargetError:  # nothing, or tied weights
            continue
    return found


def problems(name: str, model: nn.Module, *args: Any, **kwargs: Any) -> list[str]:
    """Return what is found in a model of which all rules' targets are adapted, except what is expected."""
    targets = selected(model)
    if not targets:
        return []
    randlora.inject(model, r=4, targets=lambda fqn, _: fqn in targets)
    report = randlora.check(model, *args, **kwargs)
    assert report.checked or name in EXPECTED
    pattern, _ = EXPECTED.get(name, ("(?!)", ""))
    return [f"{name}: {problem}" for problem in report.problems if not re.search(pattern, problem.fqn)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(PARTS))
def test_nothing_is_found_in_any_type_of_transformers(part: int) -> None:
    found: list[str] = []
    for model_type, names in list(every_type().items())[part::PARTS]:
        torch.manual_seed(0)
        try:
            model, inputs = runnable(model_type, names)
        except CannotRunError as error:
            found += [] if model_type in UNCHECKED else [f"{model_type} does not run: {error}"]
        else:
            found += problems(model_type, model, **inputs)
    assert found == []


def test_what_is_unchecked_or_expected_exists_and_does_not_grow() -> None:
    assert {*UNCHECKED, *EXPECTED} <= every_type().keys()
    assert len(UNCHECKED) <= MOST


@pytest.mark.slow
@pytest.mark.parametrize(("build", "inputs"), [(unet, noise), (flux, patches)], ids=["UNet", "Flux"])
def test_nothing_is_found_in_diffusers(build: Any, inputs: Any) -> None:
    assert problems("", build(), **inputs()) == []


TORCHVISION = (
    *("resnet18", "squeezenet1_1", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5", "mnasnet0_5"),
    *("regnet_y_400mf", "efficientnet_b0", "densenet121"),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION)
def test_nothing_is_found_in_torchvision(name: str) -> None:
    model = reproducible(getattr(library("torchvision").models, name))
    assert problems("", model, torch.randn(2, 3, 64, 64)) == []
