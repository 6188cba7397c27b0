"""The r, the alpha and the norm of each layer: reports and files that have them, and limits."""

import math
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
from randlora.checkpoint.header import parse_header
from randlora.config import BasisKind, Stream
from randlora.errors import AdapterError, CheckpointError, ConfigError
from tests import checkpoint_files as files
from tests.checkpoint_files import Case, bases_of, edit_fields, read_fields, read_tensors, refused, reseal
from tests.kit import adapt, adapter_values, all_bits, fill, untouched
from tests.laws import TOLERANCES, Mixed, adapted_names, adapter_layer, diagonals
from tests.model_directories import contents
from tests.models import LLAMA, outputs, tokens
from tests.read_kinds import ReadKind, every_read_kind
from tests.strategies import KINDS_AND_STREAMS

R = {"tall": 4, "inner.0": 6, ".*": 2}
ALPHA = {"wide": 3.0, "inner": 5, ".*": 8}
OPTIONS = {"wide": (2, 3.0), "tall": (4, 8.0), "inner.0": (6, 5.0), "inner.1": (2, 5.0)}


class Layers(nn.Module):
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
    model = CASE.build()
    return adapt(model, **{"r": R, "alpha": ALPHA, **options}, name=name)


def test_plan_and_inject_report_what_the_adapter_then_has() -> None:
    model = CASE.build()
    planned = randlora.plan(model, R, alpha=ALPHA)
    report = randlora.inject(model, R, alpha=ALPHA)
    assert report == planned
    rows = sorted((row.in_features, row.r, row.alpha, row.count) for row in report.rows)
    assert rows == [(4, 4, 8.0, 1), (5, 2, 5.0, 1), (6, 2, 3.0, 1), (9, 6, 5.0, 1)]
    assert report.trainable_parameters == sum(value.numel() for value in adapter_values(model).values())
    dims = {spec.r: (spec.max_dim, spec.min_dim) for spec in report.specs}
    assert dims == {2: (6, 4), 4: (9, 4), 6: (9, 5)}, "what PEFT would draw for the layers of each r"
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


def test_one_r_and_one_alpha_are_saved_as_ever_however_they_were_given(tmp_path: Path) -> None:
    randlora.save(trained(r=2, alpha=4.0), tmp_path / "expected")
    assert '"format_version": 1' in read_tensors(tmp_path / "expected")[1]["randlora"]
    randlora.save(trained(r={"wide": 2, ".*": 2}, alpha={".*": 4.0}), tmp_path / "found")
    assert contents(tmp_path / "found") == contents(tmp_path / "expected")


def test_files_and_what_is_said_of_them_have_the_options_of_each_layer(tmp_path: Path) -> None:
    note = (
        "PEFT has one r and one alpha for all layers and cannot use this adapter, "
        "which has r = 2 (2 layers), 4 (1 layer), 6 (1 layer) and alpha = 3 (1 layer), 5 (2 layers), 8 (1 layer)"
    )
    model, place = trained(), tmp_path / "adapter"
    assert randlora.save(model, place, bases="stored").notes == (note,)
    assert note in (place / "README.md").read_text(encoding="utf-8")
    summary = randlora.files.inspect(place)
    assert {layer.fqn: (layer.r, layer.alpha) for layer in summary.layers} == OPTIONS
    for layer in summary.layers:
        norm = torch.linalg.norm(randlora.delta_weight(model, layer.fqn))
        assert layer.frobenius == pytest.approx(norm.item())
    assert "r=2 (2 layers), 4 (1 layer), 6 (1 layer), alpha=3 (1 layer), 5 (2 layers), 8 (1 layer)" in str(summary)
    assert summary.writer.endswith("format 2")
    assert randlora.files.verify(place).passed
    loaded, twin = CASE.build(), CASE.build()
    randlora.load(loaded, place)
    randlora.inject(twin, config=randlora.adapters(loaded)[0].config)
    assert randlora.adapters(twin)[0].options == OPTIONS
    with pytest.raises(CheckpointError, match="PEFT has one r and one alpha for all layers"):
        randlora.files.convert(place, tmp_path / "peft", "peft")
    assert not (tmp_path / "peft").exists()
    report = randlora.files.convert(place, tmp_path / "lora", "lora", rank=5)
    assert report.relative_error < 1e-5
    assert {layer.fqn for layer in report.layers} == {*OPTIONS}


def test_files_that_contradict_one_another_about_one_r_are_refused_or_doubted(tmp_path: Path) -> None:
    randlora.save(trained(), tmp_path)
    tensors, metadata = read_tensors(tmp_path)
    edit_fields(tmp_path, {"rank_pattern": {**read_fields(tmp_path)["rank_pattern"], "wide": 64}})
    model = CASE.build()
    files.doubted(model, tmp_path, "adapter_config.json says rank_pattern=")
    assert torch.equal(CASE.output(model), CASE.output(trained()))
    randlora.save(trained(), tmp_path)
    bases = parse_header(metadata["randlora"], tensors).bases
    reseal(tmp_path, bases={**bases, 6: replace(bases[6], digest="0" * 64)})
    refused(CASE.build(), tmp_path, "the dense bases (stream=torch, seed=0, r=6, dims=9x5) drawn here")
    assert [check.outcome for check in randlora.files.verify(tmp_path).checks] == ["passed", "passed", "failed"]
    files.edit_tensors(tmp_path, {})
    refused(CASE.build(), tmp_path, "have lost the header that goes with rank_pattern")


@pytest.mark.parametrize("r", [4, {"q_proj": 8, ".*": 4}])
def test_peft_refuses_several_r_and_computes_another_update_of_several_alpha(r: Any, tmp_path: Path) -> None:
    """What the note of `save` and the page on saving say. Bases of one r have PEFT's keys."""
    model = LLAMA.build()
    randlora.inject(model, r, alpha={"q_proj": 4, ".*": 8}, targets=["q_proj", "v_proj"])
    assert "cannot use this adapter" in randlora.save(fill(model), tmp_path, bases="stored").notes[0]
    patterns = read_fields(tmp_path).get("rank_pattern", {})
    assert (bool(patterns), [*patterns]) == (r != 4, sorted(patterns))
    refused = nullcontext() if r == 4 else pytest.raises(RuntimeError, match="size mismatch")
    with warnings.catch_warnings(record=True) as caught, refused:
        warnings.simplefilter("always")
        theirs = PeftModel.from_pretrained(LLAMA.build(), tmp_path)
        assert not torch.allclose(theirs(**tokens()).logits, outputs(model, tokens()), rtol=1e-3)
    assert any("alpha_pattern" in str(one.message) for one in caught)


@pytest.mark.product
@every_read_kind
def test_a_limit_scales_whole_layers_and_the_norm_of_one_term_of_each_matrix_is_exact(kind: ReadKind) -> None:
    dtype = kind.dtypes[0]
    model = kind.adapted(dtype).to(dtype)
    norm, update = randlora.update_norms(model)[kind.target].item(), randlora.delta_weight(model, kind.target)
    before = all_bits(adapter_values(model))
    assert randlora.limit_norms(model, norm * 1.01)[kind.target].item() == norm
    assert all_bits(adapter_values(model)) == before
    randlora.limit_norms(model, norm / 4)
    torch.testing.assert_close(randlora.update_norms(model)[kind.target].item(), norm / 4, rtol=1e-6, atol=0)
    torch.testing.assert_close(randlora.delta_weight(model, kind.target), update / 4, rtol=1e-5, atol=1e-7)
    with torch.no_grad():  # one term, or one of each matrix of a stack, whose norm is known
        lam = kind.diagonals(model)[0]
        lam.copy_(nn.functional.pad(lam[..., -1:, :1].clone(), (0, lam.shape[-1] - 1, lam.shape[-2] - 1, 0)))
    found, update = randlora.update_norms(model)[kind.target], randlora.delta_weight(model, kind.target)
    assert found > 0
    assert found.shape == ()
    torch.testing.assert_close(found.double(), update.double().norm(), rtol=TOLERANCES[dtype], atol=0)


@pytest.mark.parametrize(("basis", "stream"), KINDS_AND_STREAMS)
def test_its_value_and_gradients_are_those_of_the_norms_of_the_terms(basis: BasisKind, stream: Stream) -> None:
    model = nn.Sequential(nn.Linear(20, 14, dtype=torch.float64), nn.Linear(25, 16, dtype=torch.float64))
    randlora.inject(model, r=4, basis=basis, stream=stream, targets=["0", "1"])
    fill(model.double(), spread=1)
    part = adapter_layer(model[0]).adapters["default"]
    basis_A, basis_B = part.basis.slices(20, 14, device="cpu", dtype=torch.float64)
    lam, gamma = diagonals(model[0])
    columns = basis_B.flatten(1).unflatten(1, lam.shape)
    expected = part.scaling * torch.einsum("kj,okj,ki,ji->kjoi", lam, columns, basis_A[:, 0], gamma).norm()
    found = randlora.update_norms(model)["0"]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    wanted = torch.autograd.grad(expected, (lam, gamma))
    for gradient, own in zip(torch.autograd.grad(found, (lam, gamma)), wanted, strict=True):
        torch.testing.assert_close(gradient, own, rtol=1e-10, atol=1e-12)


def adapted(**options: Any) -> Mixed:
    model = Mixed()
    randlora.inject(model, r=3, targets=["q", "up", "down"], **options)
    return fill(model, options.get("name", "default"))


def test_where_the_update_is_zero_the_gradient_is_too_and_none_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    for zero in ("lambda", "gamma", "lambda gamma"):
        model = adapted()
        for fqn, value in adapter_values(model).items():
            if fqn.rsplit("_", 1)[1] in zero:
                nn.init.zeros_(value)
        norms = randlora.update_norms(model)
        assert {norm.item() for norm in norms.values()} == {0.0}
        sum(norms.values(), torch.zeros(())).backward()
        assert all(value.grad is not None and not value.grad.any() for value in adapter_values(model).values())
    monkeypatch.setattr("randlora.layers.base.whole", lambda parameter: parameter.detach())  # as of ZeRO-3
    with pytest.raises(AdapterError, match=r"the update of q would give no gradients .* under torch\.no_grad"):
        randlora.update_norms(model)
    with torch.no_grad():
        assert randlora.update_norms(model).keys() == norms.keys()


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_norms_and_limits_are_of_the_adapter_itself_whatever_is_active_or_merged_and_in_any_mode(context: Any) -> None:
    model = adapted(name="a")
    randlora.inject(model, r=2, targets=["q"], name="b")
    assert randlora.update_norms(model, name="b").keys() == {"q"}
    norms = {fqn: norm.item() for fqn, norm in randlora.update_norms(model, name="a").items()}
    for active in ({"a": 0.5, "b": 1.0}, "b", "a", None):
        randlora.merge(model, reversible=True) if active is None else randlora.activate(model, active)
        with context(), torch.autocast("cpu", torch.bfloat16):
            found = randlora.update_norms(model, name="a")
        assert {fqn: norm.item() for fqn, norm in found.items()} == norms
        assert {norm.requires_grad for norm in found.values()} == {context is torch.enable_grad}
    with pytest.raises(AdapterError, match=r"limit the norms .* call randlora\.unmerge\(model\) first"):
        randlora.limit_norms(model, 1e-3, name="a")
    with pytest.raises(AdapterError, match=r"several adapters \(a, b\): give name="):
        randlora.update_norms(model)
    randlora.unmerge(model)
    before, least = all_bits(model.state_dict()), min(norms, key=lambda fqn: norms[fqn])
    with context():
        randlora.limit_norms(model, {least: math.inf, ".*": norms[least] / 2}, name="a")
    changed = {name for name, value in all_bits(model.state_dict()).items() if value != before[name]}
    assert changed == {f"{fqn}.randlora_lambda.a" for fqn in adapted_names(model) - {least}}
    for fqn, norm in randlora.update_norms(model, name="a").items():
        assert norm.item() == pytest.approx(norms[least] / (1 if fqn == least else 2), rel=1e-6)
    randlora.update_norms(model, name="a")["q"].backward()  # which parameters that became inference tensors refuse


def test_limits_are_by_the_names_that_norms_have_and_none_are_of_a_model_that_lost_a_layer() -> None:
    model = nn.ModuleDict({"conv1": nn.Linear(8, 8), "layer1": nn.ModuleDict({"conv1": nn.Linear(8, 8)})})
    norms = randlora.update_norms(adapt(model))
    limits = {"conv1": 2 * norms["conv1"].item(), "layer1.conv1": norms["layer1.conv1"].item() / 2}
    randlora.limit_norms(model, limits)
    found = [norm.item() for norm in randlora.update_norms(model).values()]
    assert found == pytest.approx([norms["conv1"].item(), limits["layer1.conv1"]])
    model["conv1"] = nn.Linear(8, 8)
    for call in (randlora.update_norms, lambda each: randlora.limit_norms(each, 1.0)):
        with pytest.raises(AdapterError, match=r"conv1 no longer has adapter 'default'"):
            call(model)


def test_a_limit_of_zero_ends_in_zero_values_that_are_not_finite_stay_and_one_that_is_none_is_refused() -> None:
    model = adapted()
    refused: list[tuple[Any, str]] = [
        *((number, f"must be a number of at least 0, got {number}") for number in (-1.0, math.nan, True)),
        ({"q": 1.0}, r"limit= has no pattern for .*add '\.\*'"),
        ({"nowhere": 1.0, ".*": 1.0}, "'nowhere'.*matches no target"),
        ({"q": "1"}, "the limit of 'q' must be a number of at least 0, got '1'"),
    ]
    for limit, message in refused:
        with untouched(model), pytest.raises(ConfigError, match=message):
            randlora.limit_norms(model, limit)
    adapter_values(model)["q.randlora_lambda"].data[0, 0] = math.inf
    adapter_values(model)["up.randlora_lambda"].data[0, 0] = math.nan
    before = all_bits(adapter_values(model))
    for _ in range(2):
        randlora.limit_norms(model, 0)
    assert not adapter_values(model)["down.randlora_lambda"].any()
    changed = {name for name, value in all_bits(adapter_values(model)).items() if value != before[name]}
    assert changed == {"down.randlora_lambda"}
