"""How alike features are, and the loss on the plane through three weights."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector

from benchmarks.quality import fashion, landscape
from benchmarks.quality.landscape import linear_cka, loss_at, plane_axes
from benchmarks.quality.task import Size


def test_cka_ignores_rotation_and_scale_and_shift_alone() -> None:
    torch.manual_seed(0)
    x, noise = torch.randn(2, 1000, 8)
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q
    assert linear_cka(x, x) == pytest.approx(1)
    assert linear_cka(x, 3 * x @ rotation + 1) == pytest.approx(1, abs=1e-5)
    assert linear_cka(x, x @ torch.randn(8, 8)) < 0.9
    assert linear_cka(x, noise) < 0.05


def test_the_plane_passes_through_its_points() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Flatten(), nn.Linear(784, 16), nn.GELU(), nn.Linear(16, 5)) for _ in range(3)]
    images = fashion.Images(torch.randn(20, 28, 28), torch.arange(20) % 5)
    points = [parameters_to_vector(model.parameters()).detach() for model in models]
    axes = plane_axes(*points)
    torch.testing.assert_close(axes @ axes.T, torch.eye(2))
    wanted = [loss_at(model, point, images) for model, point in zip(models, points, strict=True)]
    for point, loss in zip(points, wanted, strict=True):
        there = points[0] + (axes @ (point - points[0])) @ axes
        torch.testing.assert_close(there, point, rtol=0, atol=1e-5)
        assert loss_at(models[0], there, images) == pytest.approx(loss, abs=2e-4)


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of noise instead of clothes, few of them, and a model that knows nothing yet."""

    def read_images(part: str) -> tuple[fashion.Images, fashion.Images]:
        pixels = torch.randn(2, 200, 28, 28, generator=torch.Generator().manual_seed(len(part)))
        first, second = (fashion.Images(each, torch.arange(200) % fashion.CLASSES) for each in pixels)
        return first, second

    def pretrained(seed: int, _size: Size) -> fashion.VisionTransformer:
        torch.manual_seed(seed)
        return fashion.VisionTransformer()

    monkeypatch.setattr(fashion, "pretrained", pretrained)
    for module in (fashion, landscape):
        monkeypatch.setattr(module, "read_images", read_images)


@pytest.mark.medium
@pytest.mark.usefixtures("noise")
@pytest.mark.parametrize("name", ["full", "LoRA", "dense"])
def test_a_merged_model_computes_what_was_measured(name: str) -> None:
    plain, prepared, run = landscape.fine_tune(name, 0, "quick")
    assert prepared.measure()["accuracy"] == pytest.approx(run.found["accuracy"], abs=0.011)  # of 200
    pixels = torch.randn(4, 28, 28)
    torch.testing.assert_close(plain.eval()(pixels), prepared.model.eval()(pixels))


@pytest.mark.slow
@pytest.mark.usefixtures("noise")
def test_all_are_compared_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(landscape, "QUICK", tmp_path)
    monkeypatch.setattr(landscape, "LOSS_IMAGES", 20)
    monkeypatch.setattr(landscape, "LINE_POINTS", 3)
    monkeypatch.setattr(landscape, "RATES", {name: landscape.RATES[name] for name in landscape.CORNERS})
    landscape.main(seeds=2)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 6
    assert "| full | 0.003 |" in printed
    assert (
        "| 1.000 ± 0.000 | 1.000 ± 0.000 | 1.000 ± 0.000 | 1.000 ± 0.000 | 0.000 ± 0.000 | 0.000 ± 0.000 |" in printed
    )
    first, second = json.loads((tmp_path / "landscape.json").read_text())
    assert "plane" in first
    assert "plane" not in second
    for each in first["contestants"].values():
        assert each["line"]["test"][0] == first["contestants"]["full"]["line"]["test"][0]
        assert len(each["line"]["training"]) == 3
        assert all(0 < value <= 1.00001 for value in each["cka"])
    drawn = (tmp_path / "landscape.svg").read_bytes()
    monkeypatch.setattr(landscape, "measure", None)  # all are there
    landscape.main(seeds=2)
    assert capsys.readouterr().out == printed
    assert (tmp_path / "landscape.svg").read_bytes() == drawn
