"""Adapters whose layers have their own r and alpha: every law that holds for one r holds for several."""

import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import randlora
from randlora.bases import BasisBank, BasisSpec
from randlora.bases.spec import KINDS
from randlora.checkpoint.header import parse_header
from randlora.config import BasisKind, Stream
from randlora.errors import CheckpointError
from tests import reference
from tests.checkpoint_files import (
    Case,
    bases_of,
    doubted,
    edit_fields,
    edit_tensors,
    read_fields,
    read_tensors,
    refused,
    reseal,
)
from tests.kit import adapter_values, fill
from tests.model_directories import contents, merge_in_memory, save_adapter, save_model, write
from tests.models import LLAMA, outputs, tokens
from tests.strategies import KINDS_AND_STREAMS

R = {"tall": 4, "inner.0": 6, ".*": 2}
ALPHA = {"wide": 3.0, "inner": 5, ".*": 8}
SHAPES = {"wide": (4, 6), "tall": (9, 4), "inner.0": (5, 9), "inner.1": (3, 5)}
OPTIONS = {"wide": (2, 3.0), "tall": (4, 8.0), "inner.0": (6, 5.0), "inner.1": (2, 5.0)}
DIMS = {2: (6, 4), 4: (9, 4), 6: (9, 5)}
"""For each r, what PEFT would draw for the layers that have it."""


class Layers(nn.Module):
    """Layers of several shapes and kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.tall = nn.Linear(6, 4), nn.Linear(4, 9, bias=False)
        self.inner = nn.Sequential(Conv1D(5, 9), nn.Linear(5, 3))
        nn.init.normal_(self.inner.get_parameter("0.weight"))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.inner(torch.tanh(self.tall(self.wide(x))))
        return output


CASE = Case("per-layer", Layers, dtype=torch.float64)


def trained(name: str = "default", **options: Any) -> nn.Module:
    """Build the model with an adapter of several r and alpha, and values as after training."""
    model = CASE.build()
    randlora.inject(model, **{"r": R, "alpha": ALPHA, **options}, name=name)
    return fill(model, name)


@pytest.mark.parametrize(("basis", "stream"), KINDS_AND_STREAMS)
def test_each_layer_computes_with_its_own_r_and_alpha(basis: BasisKind, stream: Stream) -> None:
    model = trained(basis=basis, stream=stream)
    values = adapter_values(model)
    for fqn, (r, alpha) in OPTIONS.items():
        (out, into), layer = SHAPES[fqn], model.get_submodule(fqn)
        bases = BasisBank().acquire(BasisSpec(basis, stream, 0, r, *DIMS[r], KINDS[basis].default_blocks(r, ())))
        drawn = bases.slices(max(out, into), min(out, into), device="cpu", dtype=torch.float64)
        lam, gamma = (values[f"{fqn}.randlora_{part}"] for part in ("lambda", "gamma"))
        update = reference.delta_weight(*drawn, lam, gamma, alpha / r, in_features=into)
        x = torch.linspace(-1, 1, 2 * into, dtype=torch.float64).reshape(2, -1)
        output = layer(x)
        with randlora.disabled(model):
            torch.testing.assert_close(output - layer(x), x @ update.T, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(randlora.delta_weight(model, fqn), update, rtol=1e-10, atol=1e-12)


def test_plan_and_inject_report_what_the_adapter_then_has() -> None:
    model = CASE.build()
    planned = randlora.plan(model, R, alpha=ALPHA)
    report = randlora.inject(model, R, alpha=ALPHA)
    assert report == planned
    assert {(row.in_features, row.r, row.alpha, row.count) for row in report.rows} == {
        (6, 2, 3.0, 1), (4, 4, 8.0, 1), (9, 6, 5.0, 1), (5, 2, 5.0, 1)
    }  # fmt: skip
    assert report.trainable_parameters == sum(value.numel() for value in adapter_values(model).values())
    assert {spec.r: (spec.max_dim, spec.min_dim) for spec in report.specs} == DIMS
    assert report.basis_bytes == sum(basis.nbytes for basis in bases_of(model).values())
    (info,) = randlora.adapters(model)
    assert (info.specs, dict(info.options), info.config.r) == (report.specs, OPTIONS, R)
    assert " r  alpha " in str(report)
    assert "r=6, num_bases=1" in str(model)
    assert " alpha " not in str(randlora.plan(CASE.build(), R, alpha=4)).splitlines()[5]
    assert "its bases of r=8 are additional" in str(randlora.plan(model, {"tall": 4, ".*": 8}, name="other"))
    assert "additional" not in str(randlora.plan(model, R, name="other"))


def test_layers_of_one_r_share_bases_and_so_do_adapters() -> None:
    def held() -> list[int]:
        return [basis.spec.r for basis in randlora.state.adapted_root(model)[1].bank]

    model = trained("several", stream="portable")
    before = held()
    randlora.inject(model, 4, alpha=1, stream="portable", name="one")
    randlora.inject(model, {"wide": 6, ".*": 2}, stream="portable", name="two")
    assert held() == before
    several, one, two = (bases_of(model, name) for name in ("several", "one", "two"))
    assert (one[4], two[6], two[2]) == (several[4], several[6], several[2])
    randlora.remove(model, "several")
    assert sorted(held()) == [2, 4, 6]
    randlora.remove(model, "two")
    assert held() == [4]


@pytest.mark.parametrize("options", [{"r": {"wide": 2, ".*": 2}, "alpha": {".*": 4.0}}, {"r": 2, "alpha": 4.0}])
def test_one_r_and_one_alpha_are_saved_as_ever_however_they_were_given(options: dict[str, Any], tmp_path: Path) -> None:
    randlora.save(trained(r=2, alpha=4.0), tmp_path / "expected")
    assert '"format_version": 1' in read_tensors(tmp_path / "expected")[1]["randlora"]
    randlora.save(trained(**options), tmp_path / "found")
    assert contents(tmp_path / "found") == contents(tmp_path / "expected")


def test_files_and_what_is_said_of_them_have_the_options_of_each_layer(tmp_path: Path) -> None:
    note = (
        "PEFT has one r and one alpha for all layers and cannot use this adapter, "
        "which has r = 2 (2 layers), 4 (1 layer), 6 (1 layer) and alpha = 3 (1 layer), 5 (2 layers), 8 (1 layer)"
    )
    model = trained()
    assert randlora.save(model, tmp_path, bases="stored").notes == (note,)
    assert note in (tmp_path / "README.md").read_text(encoding="utf-8")
    summary = randlora.files.inspect(tmp_path)
    assert {layer.fqn: (layer.r, layer.alpha) for layer in summary.layers} == OPTIONS
    for layer in summary.layers:
        norm = torch.linalg.norm(randlora.delta_weight(model, layer.fqn))
        assert layer.frobenius == pytest.approx(norm.item())
    assert "r=2 (2 layers), 4 (1 layer), 6 (1 layer), alpha=3 (1 layer), 5 (2 layers), 8 (1 layer)" in str(summary)
    assert summary.writer.endswith("format 2")
    assert randlora.files.verify(tmp_path).passed
    loaded, twin = CASE.build(), CASE.build()
    randlora.load(loaded, tmp_path)
    randlora.inject(twin, config=randlora.adapters(loaded)[0].config)
    assert randlora.adapters(twin)[0].options == OPTIONS


def test_files_that_contradict_one_another_about_one_r_are_refused_or_doubted(tmp_path: Path) -> None:
    randlora.save(trained(), tmp_path)
    tensors, metadata = read_tensors(tmp_path)
    edit_fields(tmp_path, {"rank_pattern": {**read_fields(tmp_path)["rank_pattern"], "wide": 64}})
    model = CASE.build()
    doubted(model, tmp_path, "adapter_config.json says rank_pattern=")
    assert torch.equal(CASE.output(model), CASE.output(trained()))
    randlora.save(trained(), tmp_path)
    bases = parse_header(metadata["randlora"], tensors).bases
    reseal(tmp_path, bases={**bases, 6: replace(bases[6], digest="0" * 64)})
    refused(CASE.build(), tmp_path, "the dense bases (stream=torch, seed=0, r=6, dims=9x5) drawn here")
    assert [check.outcome for check in randlora.files.verify(tmp_path).checks] == ["passed", "passed", "failed"]
    reseal(tmp_path, {"base_model.model.tall.randlora_lambda": torch.ones(2, 1, dtype=torch.float64)})
    refused(CASE.build(), tmp_path, "tall has randlora_lambda (2, 1) and randlora_gamma (1, 4): expected (4, num_bases")
    edit_tensors(tmp_path, {})
    refused(CASE.build(), tmp_path, "have lost the header that goes with rank_pattern")


@pytest.mark.parametrize("r", [4, {"q_proj": 8, ".*": 4}])
def test_peft_warns_of_patterns_refuses_several_r_and_computes_another_update_of_several_alpha(
    r: Any, tmp_path: Path
) -> None:
    """What the note of `save` and the page on saving say. Bases of one r have PEFT's keys."""
    model = LLAMA.build()
    randlora.inject(model, r, alpha={"q_proj": 4, ".*": 8}, targets=["q_proj", "v_proj"])
    assert "cannot use this adapter" in randlora.save(fill(model), tmp_path, bases="stored").notes[0]
    assert ("rank_pattern" in read_fields(tmp_path)) is (r != 4)
    refused = nullcontext() if r == 4 else pytest.raises(RuntimeError, match="size mismatch")
    with warnings.catch_warnings(record=True) as caught, refused:
        warnings.simplefilter("always")
        theirs = PeftModel.from_pretrained(LLAMA.build(), tmp_path)
        assert not torch.allclose(theirs(**tokens()).logits, outputs(model, tokens()), rtol=1e-3)
    assert any("alpha_pattern" in str(one.message) for one in caught)


def test_peft_is_refused_and_a_lora_approximates(tmp_path: Path) -> None:
    randlora.save(trained(), tmp_path / "one")
    with pytest.raises(CheckpointError, match="PEFT has one r and one alpha for all layers"):
        randlora.files.convert(tmp_path / "one", tmp_path / "two", "peft")
    assert not (tmp_path / "two").exists()
    report = randlora.files.convert(tmp_path / "one", tmp_path / "lora", "lora", rank=5)
    assert report.relative_error < 1e-5
    assert {layer.fqn for layer in report.layers} == {*SHAPES}


@pytest.mark.medium
def test_files_are_merged_as_in_memory_and_planned_as_the_model(tmp_path: Path) -> None:
    base = save_model(LLAMA, tmp_path / "base", dtype=torch.bfloat16)
    by_layer: dict[str, Any] = {"r": {"q_proj": 8, "layers.1": 2, ".*": 4}, "alpha": {"up_proj": 4, ".*": 16}}
    adapters = {
        save_adapter(LLAMA, tmp_path / "one", dtype=torch.bfloat16, **by_layer): 1.0,
        save_adapter(LLAMA, tmp_path / "two", dtype=torch.bfloat16, r={"v_proj": 4, ".*": 8}, values=1): 0.5,
    }
    report = randlora.files.merge(adapters, tmp_path / "out", base=base)
    merged = merge_in_memory(LLAMA, adapters, dtype=torch.bfloat16)
    assert contents(report.out) == contents(write(merged, tmp_path / "expected"))
    options: dict[str, Any] = {"r": {"q_proj": 8, ".*": 4}, "targets": list(LLAMA.targets)}
    model = LLAMA.build().bfloat16()
    assert randlora.files.training_memory(base, **options) == randlora.training_memory(model, **options)
    assert randlora.files.plan(base, **options) == randlora.inject(model, **options)
