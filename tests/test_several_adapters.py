"""Two adapters of a transformer that differ in anything: neither changes the other, added, saved, loaded or removed.

These are the cases in which a second adapter of PEFT's RandLoRA breaks the first, or is not what was trained.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import randlora
from tests.kit import fill

pytestmark = pytest.mark.medium

IDS = torch.arange(12).view(2, 6)
FIRST: dict[str, Any] = {"r": 4, "alpha": 8, "targets": ["v_proj"]}
SECOND: dict[str, dict[str, Any]] = {
    "the same": {},
    "a smaller r": {"r": 2},
    "a larger r": {"r": 8},
    "an r that divides no dim": {"r": 5},
    "an r above every dim": {"r": 100},
    "other layers": {"targets": ["q_proj"]},
    "larger layers too": {"targets": ["v_proj", "down_proj"]},
    "all layers": {"targets": "all-linear"},
    "another seed": {"seed": 7},
    "sparse bases": {"basis": "sparse"},
    "block bases": {"basis": "block", "blocks": (2, 2)},
    "another scaling": {"alpha": 1},
}
every_second = pytest.mark.parametrize("second", SECOND)


def plain() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64,
    )  # fmt: skip
    model: nn.Module = transformers.LlamaForCausalLM(config).eval()
    return model


def add(model: nn.Module, name: str, options: dict[str, Any]) -> None:
    randlora.inject(model, name=name, **{**FIRST, **options})
    fill(model, name, seed=len(name), spread=0.3)


@torch.no_grad()
def output(model: nn.Module, name: str) -> Tensor:
    randlora.activate(model, name)
    logits: Tensor = model(input_ids=IDS).logits
    return logits


@every_second
@pytest.mark.parametrize(
    "order", [("first", "second"), pytest.param(("second", "first"), marks=pytest.mark.slow)], ids="-".join
)
def test_neither_changes_the_other_and_both_come_back(second: str, order: tuple[str, str], tmp_path: Path) -> None:
    options = {"first": {}, "second": SECOND[second]}
    model, wanted = plain(), {}
    for name in order:
        add(model, name, options[name])
        wanted[name] = output(model, name)
    one, other = wanted[order[0]], wanted[order[1]]
    assert torch.equal(output(model, order[0]), one)
    if second != "the same":
        assert not torch.allclose(one, other, atol=1e-4)
    randlora.save(model, tmp_path / order[0], name=order[0], bases="seed")
    randlora.save(model, tmp_path / order[1], name=order[1], bases="stored")  # PEFT loads no such pair
    loaded = plain()
    for number, name in enumerate(order):
        single = plain()
        randlora.load(single, tmp_path / name)
        assert torch.equal(output(single, "default"), wanted[name]), "reloaded alone"
        randlora.load(loaded, tmp_path / name, name=name)
        for known in order[: number + 1]:
            assert torch.equal(output(loaded, known), wanted[known]), "loaded beside the other"
    randlora.remove(loaded, order[0])
    assert torch.equal(output(loaded, order[1]), wanted[order[1]])


@every_second
@torch.no_grad()
def test_both_act_together_and_on_rows_of_one_batch(second: str) -> None:
    """PEFT's `PeftMixedModel`, which activates adapters of several kinds, takes none of RandLoRA."""
    model, summed = plain(), plain()
    add(model, "first", {})
    add(model, "second", SECOND[second])
    rows = torch.stack([output(model, "second")[0], output(model, "first")[1]])
    with randlora.serving.routed(model, ["second", "first"]):
        torch.testing.assert_close(model(input_ids=IDS).logits, rows, rtol=1e-5, atol=1e-5)
    factors = {"first": 0.5, "second": 2.0}
    for info in randlora.adapters(model):
        for fqn in info.targets:
            update = factors[info.name] * randlora.delta_weight(model, fqn, name=info.name)
            summed.get_parameter(f"{fqn}.weight").add_(update)
    randlora.activate(model, factors)
    torch.testing.assert_close(model(input_ids=IDS).logits, summed(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)
