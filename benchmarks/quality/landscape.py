"""Where fine-tuning ends: ``python -m benchmarks.quality.landscape --full``.

The paper of RandLoRA shows deep features closer to those of full fine-tuning than LoRA's, and a deeper minimum. Here
both are measured on the clothes: features after each block by linear CKA (Kornblith et al., 2019), and the loss on
a plane through three minima and on lines from full fine-tuning to each merged adapter, whose head comes along.
"""

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import peft
import torch
import torch.nn.functional as F
import typer
from matplotlib import rcParams
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import randlora
from benchmarks.quality.contestants import MAIN
from benchmarks.quality.fashion import CLOTHES_TASK, Images, VisionTransformer, read_images
from benchmarks.quality.figures import INK, STYLES, draw_curve
from benchmarks.quality.runs import Key, Run
from benchmarks.quality.significance import mean_and_error
from benchmarks.quality.task import Prepared, Size
from benchmarks.quality.training import make_run
from benchmarks.results import in_markdown

RATES = {"frozen": 0.0, "full": 3e-3, "LoRA, equal size": 1e-2, "LoRA": 3e-3, "dense": 3e-3, "block": 3e-3}
"""The best of three learning rates each on seed 0, for all who take part."""
CORNERS = {"full": "o", "LoRA, equal size": "s", "dense": "^"}
"""Who spans the plane, with their markers."""
LABELS = {
    "frozen": "before training",
    "full": "full fine-tuning",
    "LoRA, equal size": "LoRA of equal size",
    "LoRA": "LoRA, r = 32",
    "dense": "RandLoRA, dense",
}
"""What they are called in the figure; a fifth, ``block``, is close to ``dense`` and in the table alone."""
KEPT = Path("benchmarks/quality/results/landscape.json")
FIGURE = Path("docs/figures/landscape.svg")
QUICK = Path("build/benchmarks/quality")
CKA_IMAGES = 1000
LOSS_IMAGES = 500
LINE_POINTS = 7
MARGIN = 0.3  # around the corners, as a share of their extent
console = Console(highlight=False, soft_wrap=True)


def plane_axes(origin: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return orthonormal axes, ``(2, parameters)``, of the plane through three points, ``(parameters,)`` each."""
    axes: Tensor = torch.linalg.qr(torch.stack([first - origin, second - origin], dim=1)).Q.T
    return axes


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Compare features of the same inputs, ``(inputs, any)`` each: 1 where one is the other, rotated and scaled."""
    x, y = (each.double() - each.double().mean(0) for each in (x, y))
    return float((x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))


@torch.no_grad()
def features(model: VisionTransformer, pixels: Tensor) -> list[Tensor]:
    """Return the mean of the tokens after each block, ``(images, width)``, of which the head reads the last."""
    found: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda *args: found.append(args[-1].mean(1))) for block in model.blocks]
    model.eval().features(pixels)
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def loss_at(model: nn.Module, point: Tensor, images: Images) -> float:
    """Return the loss of a model with other parameters, ``(parameters,)``, which it keeps."""
    vector_to_parameters(point, model.parameters())
    logits = torch.cat([model.eval()(some) for some in images.pixels.split(50)])  # which caches hold
    return round(float(F.cross_entropy(logits, images.labels)), 4)


def fine_tune(name: str, seed: int, size: Size) -> tuple[VisionTransformer, Prepared, Run]:
    """Make a run as the curves do, and return a plain model with the merged weights and the new head, too."""
    kept: list[tuple[Prepared, object]] = []

    def adapt(prepared: Prepared, seed: int) -> object:
        kept.append((prepared, MAIN[name].adapt(prepared, seed)))
        return kept[0][1]

    key = Key(CLOTHES_TASK.name, name, RATES[name], seed)
    run = make_run(CLOTHES_TASK, replace(MAIN[name], adapt=adapt), key, size)
    ((prepared, adapted),) = kept
    if isinstance(adapted, peft.PeftModel):
        adapted.merge_and_unload()
    elif randlora.adapters(prepared.model):
        randlora.merge(prepared.model)
    plain = VisionTransformer()  # whose parameters are in one order, whatever a library did to it
    plain.load_state_dict(prepared.model.state_dict())
    return plain, prepared, run


def measure(seed: int, size: Size, *, points: int) -> dict[str, Any]:
    """Train all on one seed, and compare them; on a plane of ``points`` x ``points``, unless that is 0."""
    trained = {name: fine_tune(name, seed, size) for name in RATES}
    models = {name: model for name, (model, _, _) in trained.items()}
    batches: Sequence[Images] = trained["full"][1].batches  # an epoch has more images than are taken
    seen = Images(torch.cat([each.pixels for each in batches]), torch.cat([each.labels for each in batches]))
    parts = {"training": seen, "test": read_images("t10k")[1]}
    images = {part: each[torch.arange(min(LOSS_IMAGES, len(each.labels)))] for part, each in parts.items()}
    of_each = {name: features(model, parts["test"].pixels[:CKA_IMAGES]) for name, model in models.items()}
    weights = {name: parameters_to_vector(model.parameters()).detach() for name, model in models.items()}
    model = copy.deepcopy(models["full"])
    steps = torch.linspace(0, 1, LINE_POINTS).tolist()
    contestants = {
        name: {
            "accuracy": run.found["accuracy"],
            "cka": [round(linear_cka(*pair), 5) for pair in zip(of_each[name], of_each["full"], strict=True)],
            "line": {
                part: [loss_at(model, torch.lerp(weights["full"], weights[name], step), each) for step in steps]
                for part, each in images.items()
            },
        }
        for name, (_, _, run) in trained.items()
    }
    return {"contestants": contestants} | ({"plane": on_plane(model, weights, images, points)} if points else {})


def on_plane(
    model: nn.Module, weights: Mapping[str, Tensor], images: Mapping[str, Images], points: int
) -> dict[str, Any]:
    """Return the losses on the plane through the corners, a row for each y, with the coordinates of all."""
    origin = weights["full"]
    axes = plane_axes(*(weights[name] for name in CORNERS))
    corners = {name: (axes @ (weights[name] - origin)).tolist() for name in CORNERS}
    ends = [(min(each), max(each)) for each in zip(*corners.values(), strict=True)]
    xs, ys = (
        np.linspace(low - MARGIN * (high - low), high + MARGIN * (high - low), points).tolist() for low, high in ends
    )
    losses = {
        part: [[loss_at(model, origin + torch.tensor([x, y]) @ axes, each) for x in xs] for y in ys]
        for part, each in images.items()
    }
    return {"corners": corners, "x": xs, "y": ys, "loss": losses}


def table_of(seeds: Sequence[Mapping[str, Any]]) -> str:
    """Write a table in Markdown, means over seeds with standard errors; a barrier is how far a line rises.

    Of CKA only the last block's: the figure has all.
    """
    titles = ["method", "accuracy", "CKA, last block", "barrier, training", "barrier, test"]
    titles += ["training loss", "test loss", "rate"]
    lines = []
    for name, rate in RATES.items():
        own = [seed["contestants"][name] for seed in seeds]
        by_part = [[each["line"][part] for each in own] for part in ("training", "test")]
        columns = [
            [each["accuracy"] for each in own],
            [each["cka"][-1] for each in own],
            *([max(line) - max(line[0], line[-1]) for line in part] for part in by_part),
            *([line[-1] for line in part] for part in by_part),
        ]
        sums = [mean_and_error(column) for column in columns]
        lines.append([name, *(f"{mean:.3f} ± {error:.3f}" for mean, error in sums), f"{rate:g}"])
    return in_markdown(titles, lines)


def draw(seeds: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw CKA after each block with standard errors, and the losses on the plane of the first seed as contours."""
    rcParams["svg.hashsalt"] = "landscape"  # so that the same losses give the same file
    picture = Figure(figsize=(8.4, 6.4), layout="constrained")
    panels = picture.subplot_mosaic([["features", "features"], ["training", "test"]])
    features, maps = panels["features"], [panels["training"], panels["test"]]
    plane = seeds[0]["plane"]
    for axes, (part, losses) in zip(maps, plane["loss"].items(), strict=True):
        levels = np.geomspace(np.min(losses), np.max(losses), 14)
        norm = LogNorm(levels[0], levels[-1])
        filled = axes.contourf(plane["x"], plane["y"], losses, levels, norm=norm, cmap="cividis")
        corners = [
            axes.plot(*corner, marker, color="white", markeredgecolor="black", label=LABELS[name])[0]
            for (name, marker), corner in zip(CORNERS.items(), plane["corners"].values(), strict=True)
        ]
        picture.colorbar(filled, ax=axes, format="%.2g", ticks=levels[::2]).ax.tick_params(colors=INK)
        axes.set_title(f"{part} loss", color=INK)
    picture.legend(handles=corners, loc="outside lower center", ncols=3, framealpha=0, labelcolor=INK)
    for name in (name for name in LABELS if name != "full"):
        by_block = zip(*(seed["contestants"][name]["cka"] for seed in seeds), strict=True)
        sums = [mean_and_error(block) for block in by_block]
        places = [(float(block), math.nan) for block in range(len(sums))]
        draw_curve(features, LABELS[name], places, sums, **STYLES.get(name, {"color": INK, "linestyle": ":"}))
    features.set_title("CKA with full fine-tuning, by block", color=INK)
    features.set_xticks(range(len(seeds[0]["contestants"]["full"]["cka"])))
    features.legend(framealpha=0, labelcolor=INK)
    for axes in (*maps, features):
        axes.tick_params(colors=INK)
        for spine in axes.spines.values():
            spine.set_color(INK)
    picture.savefig(file, transparent=True, metadata={"Date": None})


def main(
    seeds: Annotated[int, typer.Option(help="Runs of each method.")] = 5,
    full: Annotated[bool, typer.Option("--full", help="Use all data, not a quick look with little of it.")] = False,  # noqa: FBT002
) -> None:
    """Compare on the seeds that are missing, draw the plane of the first, and sum all up."""
    file, figure = (KEPT, FIGURE) if full else (QUICK / KEPT.name, QUICK / FIGURE.name)
    file.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    for seed in range(len(found), seeds):
        points = 0 if seed else 11 if full else 5
        found.append(measure(seed, "full" if full else "quick", points=points))
        file.write_text(json.dumps(found) + "\n", encoding="utf-8")
    draw(found, figure)
    console.print(table_of(found))


if __name__ == "__main__":
    typer.run(main)
