"""How an adapter starts: which of Λ and Γ moves first, how large the first step is, and what does not depend on it."""

import copy
import math
import pickle
from pathlib import Path
from typing import Any, get_args

import peft
import pytest
import torch
from torch import Tensor, nn

import randlora
from randlora.config import Init
from randlora.errors import ConfigError
from randlora.layers.diagonals import Diagonal
from tests.kit import adapter_values, all_bits, fill, untouched
from tests.laws import TOKENS, Mixed
from tests.model_directories import contents
from tests.peer import THEIR_WARNINGS
from tests.read_kinds import ReadKind, every_family
from tests.strategies import every_start

pytestmark = THEIR_WARNINGS

LR = 1e-3
TALL, SQUARE, WIDE = (256, 192), (192, 192), (96, 256)
"""Of layers, ``(out, in)``: large enough for the size of an update to be near its expectation."""


def step(shape: tuple[int, int], adapt: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False))
    x, y = torch.randn(512, shape[1]), torch.randn(512, shape[0])
    (gradient,) = torch.autograd.grad((plain(x) - y).square().sum(), [*plain.parameters()])
    model: nn.Module = adapt(plain)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], LR, weight_decay=0.0)
    (model(x) - y).square().sum().backward()
    optimizer.step()
    return model, gradient


def first_update(shape: tuple[int, int], **options: Any) -> tuple[Tensor, float]:
    model, gradient = step(shape, lambda plain: (randlora.inject(plain, **options), plain)[1])
    update = randlora.delta_weight(model.double(), "0").detach()
    return update, -float((update * gradient).sum() / update.norm() / gradient.norm())


@every_start
def test_one_of_both_moves_in_the_first_step_and_the_other_in_the_second(init: Init) -> None:
    model = Mixed()
    randlora.inject(model, config=randlora.RandLoRAConfig(r=4), init=init)
    optimizer = torch.optim.AdamW(randlora.trainable_parameters(model), LR, weight_decay=0.0)
    seen = [all_bits(adapter_values(model))]
    for _ in range(2):
        optimizer.zero_grad()
        model(TOKENS).square().sum().backward()
        optimizer.step()
        seen.append(all_bits(adapter_values(model)))
    start, first, second = seen
    assert {key for key in start if start[key] != first[key]} == {key for key in start if init in key}
    assert not [key for key in start if first[key] == second[key]]


@pytest.mark.parametrize("shape", [TALL, WIDE], ids=str)
def test_the_first_update_from_gamma_is_of_full_rank_and_nearer_to_the_gradient(shape: tuple[int, int]) -> None:
    (by_lambda, far), (by_gamma, near) = (first_update(shape, r=4, init=init) for init in ("lambda", "gamma"))
    assert [int(torch.linalg.matrix_rank(update)) for update in (by_lambda, by_gamma)] == [4, min(shape)]
    assert near > 3 * far > 0
    num_moved = min(shape) // 4 * min(shape)
    assert near == pytest.approx(math.sqrt(2 / math.pi * num_moved / math.prod(shape)), rel=0.1)


LORA = {"lora_r": 32, "lora_alpha": 64}
RSLORA = {"lora_r": 8, "lora_alpha": 8, "use_rslora": True}
LIKE = [(TALL, 4, LORA), (WIDE, 4, LORA), (SQUARE, 32, RSLORA), (WIDE, 128, LORA)]  # 128 does not divide a side of WIDE


@pytest.mark.parametrize(("shape", "r", "lora"), LIKE)
def test_the_first_step_is_as_large_as_that_of_pefts_lora(shape: tuple[int, int], r: int, lora: dict[str, Any]) -> None:
    def size(update: Tensor) -> float:
        return float(update.square().mean().sqrt())

    options = {name.removeprefix("lora_") if name == "lora_r" else name: value for name, value in lora.items()}
    config: Any = peft.LoraConfig(target_modules=["0"], **options)
    model: Any = step(shape, lambda plain: peft.get_peft_model(plain, config))[0]
    wanted = size(model.base_model.model[0].get_delta_weight("default").detach())
    for init in ("lambda", "gamma"):
        alpha = randlora.equivalent_alpha(**lora, r=r, shape=shape)
        assert size(first_update(shape, r=r, alpha=alpha, init=init)[0]) == pytest.approx(wanted, rel=0.1)
    if r < min(shape):
        without_shape = size(first_update(shape, r=r, alpha=randlora.equivalent_alpha(**lora, r=r))[0])
        assert without_shape == pytest.approx(wanted * math.sqrt(max(1, shape[1] / shape[0])), rel=0.1)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"lora_r": 0}, "lora_r must be a positive number of at most 1048576, got 0"),
    ({"lora_alpha": -1}, r"lora_alpha must be a positive number of at most 1e\+15, got -1"),
    ({"lora_alpha": float("nan")}, "lora_alpha must be a finite number, got nan"),
    ({"r": {".*": 4}}, "r must be an integer, got {'"),
    ({"r": -4, "lora_alpha": 0}, "2 problems:\n.*\n.*lora_alpha must be"),
    ({"shape": (4,)}, "shape must have 2 entries, got 1"),
    ({"shape": (4, 0)}, r"shape\[1\] must be a positive number"),
    ({"use_rslora": 1}, "use_rslora must be True or False, got 1"),
]


def test_an_equivalent_alpha_is_that_of_the_formulas_and_other_values_and_starts_are_refused() -> None:
    assert randlora.equivalent_alpha(32, 64) == pytest.approx(32 * 6.532, rel=1e-4)
    assert randlora.equivalent_alpha(32, 16, 8) == pytest.approx(8 * 1.633, rel=1e-3)
    assert randlora.equivalent_alpha(16, 8, use_rslora=True) == pytest.approx(32 * 2 * math.sqrt(16 / 3))
    for given, message in REFUSED:
        with pytest.raises(ConfigError, match=message):
            randlora.equivalent_alpha(**{**LORA, **given})
    model = Mixed()
    for verb in (randlora.inject, randlora.plan):
        with untouched(model), pytest.raises(ConfigError, match="init must be one of lambda, gamma, got 'Gamma'"):
            verb(model, r=4, init="Gamma")  # type: ignore[arg-type]


def reset(model: nn.Module) -> None:
    """Give Λ and Γ of all adapters their initial values, as FSDP does."""
    for module in model.modules():
        if isinstance(module, Diagonal):
            module.reset_parameters()  # of both kinds of `Diagonal`


@every_family
def test_weights_that_are_read_start_again_as_they_did(kind: ReadKind) -> None:
    for init in get_args(Init):
        model = kind.adapted(filled=False, init=init)
        start = all_bits(adapter_values(model))
        reset(fill(model))
        assert all_bits(adapter_values(model)) == start


def test_each_adapter_starts_again_as_it_did_whatever_happened_to_it_and_files_do_not_say_how(tmp_path: Path) -> None:
    model = Mixed()
    for name, init in (("a", "gamma"), ("b", "lambda")):
        randlora.inject(model, r=4, name=name, init=init, stream="portable")  # type: ignore[arg-type]
    start = {name: all_bits(adapter_values(model, name)) for name in ("a", "b")}
    with torch.no_grad():
        for own, other in zip(adapter_values(model, "a").values(), adapter_values(model, "b").values(), strict=True):
            own.fill_(0.5)
            other.fill_(0.5)
    first, second = (contents(randlora.save(model, tmp_path / name, name=name).directory) for name in ("a", "b"))
    assert first == second
    randlora.load(model, tmp_path / "a", name="loaded")
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        reset(each)
        found = [all_bits(adapter_values(each, name)) for name in ("a", "b", "loaded")]
        assert found == [start["a"], start["b"], start["b"]]
