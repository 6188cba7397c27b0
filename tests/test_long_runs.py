"""Private training as on the page "Long runs, searches, privacy"; `make test-runs` has what needs other packages."""

import copy
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import randlora
from tests.kit import fill
from tests.models import GPT2, LLAMA, VIT, RealModel, logits
from tests.pages import DOCS, snippets

Case = tuple[nn.Module, Callable[..., Tensor], tuple[Tensor, ...]]


@cache
def page() -> dict[str, Any]:
    """Return the names that the page's program defines, after it has run."""
    (code,) = (each.code for each in snippets(DOCS / "long_runs.md"))
    names: dict[str, Any] = {"__name__": "page"}
    exec(code, names)
    return names


def of_trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: each for name, each in model.named_parameters() if each.requires_grad}


def real(kind: RealModel, **options: Any) -> Case:
    model, (inputs,) = kind.build(), [kind.inputs()]
    model.set_attn_implementation("eager")  # type: ignore[operator]  # torch warns of a loop over the others
    randlora.inject(model, **{"r": 4, "targets": "all-linear", **options})
    (name, batch), *_ = inputs.items()

    def loss(values: dict[str, Tensor], example: Tensor) -> Tensor:
        return logits(functional_call(model, values, (), {name: example[None]})).square().mean()

    return fill(model), loss, (batch,)


def small() -> Case:
    names = page().copy()
    loss = FunctionType(names["loss"].__code__, names)  # of a copy of the page's model
    names["model"] = fill(copy.deepcopy(names["model"]))
    return names["model"], loss, (torch.randn(7, 16), torch.randn(7, 1))


CASES: dict[str, Callable[[], Case]] = {
    "of the page": small,
    "llama, trained beside": lambda: real(LLAMA, train_also=["norm"]),
    "gpt2, blocks": lambda: real(GPT2, basis="block"),
    "vit": lambda: real(VIT),
}


@pytest.mark.parametrize("case", [*CASES])
def test_private_gradients_are_clipped_sums_of_single_backwards(case: str) -> None:
    model, loss, batch = CASES[case]()
    trained = of_trained(model)
    singles = []
    for example in zip(*batch, strict=True):
        model.zero_grad()
        loss(dict(trained), *example).backward()
        singles.append(torch.cat([each.grad.flatten() for each in trained.values() if each.grad is not None]))
    norms = [each.norm() for each in singles]
    for clip in (float(min(norms)) * 2, float(sum(norms) / len(norms)), 1e6):
        page()["set_gradients"](loss, trained, batch, clip, 0.0, 5)
        found = torch.cat([each.grad.flatten() for each in trained.values() if each.grad is not None])
        expected = sum(each * min(1, clip / norm) for each, norm in zip(singles, norms, strict=True)) / 5
        assert (found - expected).norm() < 1e-4 * torch.as_tensor(expected).norm()
        assert (found - sum(singles) / 5).norm() < 1e-4 * found.norm() or clip < 1e6
    assert len({round(float(norm), 6) for norm in norms}) == len(norms)


def test_noise_has_its_scale_and_nothing_else_in_each_entry_of_each_step() -> None:
    model, loss, batch = small()
    trained, set_gradients = of_trained(model), page()["set_gradients"]

    def gradients(noise: float, *given: Tensor) -> Tensor:
        set_gradients(loss, trained, given, 0.5, noise, 8)
        return torch.cat([each.grad.flatten() for each in trained.values() if each.grad is not None])

    for given in (batch, tuple(each[:0] for each in batch)):  # a draw may have no example
        without = gradients(0.0, *given)
        noises = torch.stack([(gradients(3.0, *given) - without) * 8 / (0.5 * 3.0) for _ in range(60)])
        count = noises.numel()
        assert abs(noises.mean()) < 5 / count**0.5
        assert abs(noises.std() - 1) < 5 / (2 * count) ** 0.5
        assert (noises.std(0) > 0.5).all(), "every entry has noise"
        apart = torch.corrcoef(noises) - torch.eye(60)
        assert apart.abs().max() < 6 / noises.shape[1] ** 0.5, "of steps"
