"""Draw ``spectra.svg``: what RandLoRA and LoRA make of the same full-rank target, at equal parameter counts.

Left, the singular values of the best update found for a target whose singular values are all 1. Right, what is left of
targets whose k-th singular value is k^-p, from flat (p = 0) to steep (p = 1). LoRA's best update is known in closed
form, the largest singular values of the target; RandLoRA's Λ and Γ are fitted with L-BFGS in float64.

It takes a few minutes, from the repository's root: ``python docs/figures/make_spectra.py``
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib import rcParams
from matplotlib.figure import Figure
from torch import Tensor, nn

import randlora

Kind = Literal["dense", "block", "very_sparse"]

OUTPUT = Path(__file__).with_name("spectra.svg")
WIDTH = 128
R = 8
LORA_RANK = 8
EXPONENTS = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)
ITERATIONS = 500
LORA_STYLE: dict[str, Any] = {"color": "#d55e00", "linestyle": "-"}
STYLES: dict[Kind, dict[str, Any]] = {
    "dense": {"color": "#0072b2", "linestyle": "-"},
    "block": {"color": "#56b4e9", "linestyle": (0, (3, 2))},
    "very_sparse": {"color": "#cc79a7", "linestyle": "-"},
}


def target_matrix(exponent: float) -> Tensor:
    """Make a ``(WIDTH, WIDTH)`` matrix with singular values ``k**-exponent``, scaled to the norm of a rotation."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.linalg.qr(torch.randn((2, WIDTH, WIDTH), generator=generator, dtype=torch.float64)).Q
    values = torch.arange(1, WIDTH + 1, dtype=torch.float64).pow(-exponent)
    matrix: Tensor = left @ values.diag() @ right.T
    return matrix.mul(WIDTH**0.5 / values.norm().item())


def fit_randlora(target: Tensor, kind: Kind) -> tuple[Tensor, int]:
    """Fit Λ and Γ to a target, and return the update with the number of parameters trained."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
    trainable = randlora.inject(model, r=R, basis=kind).trainable_parameters
    model.double()
    lam, gamma = parameters = list(randlora.trainable_parameters(model))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        lam.normal_(std=0.1, generator=generator)
        gamma.normal_(std=0.01, generator=generator)
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=ITERATIONS, history_size=30, line_search_fn="strong_wolfe", tolerance_change=0
    )

    def closure() -> float:
        optimizer.zero_grad()
        loss = (randlora.delta_weight(model, "0") - target).square().sum() / target.square().sum()
        loss.backward()
        return loss.item()

    optimizer.step(closure)
    return randlora.delta_weight(model, "0").detach(), trainable


def fit_lora(target: Tensor) -> tuple[Tensor, int]:
    """Return the best update of rank ``LORA_RANK`` (Eckart and Young) with the number of parameters of its factors."""
    left, values, right = torch.linalg.svd(target)
    values[LORA_RANK:] = 0
    return left * values @ right, 2 * WIDTH * LORA_RANK


def residual(update: Tensor, target: Tensor) -> float:
    """Return ``|update - target| / |target|`` in the Frobenius norm."""
    return float((update - target).norm() / target.norm())


def draw(
    targets: Mapping[float, Tensor], curves: Mapping[str, tuple[dict[str, Any], Mapping[float, Tensor]]]
) -> Figure:
    """Draw both panels.

    Args:
        targets: By exponent.
        curves: By label, how to draw a method and its updates by exponent.
    """
    rcParams.update({"font.size": 10, "svg.hashsalt": "randlora", "axes.titlesize": 11, "axes.titlelocation": "left"})
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    spectrum, rest = figure.subplots(1, 2)
    steps = range(1, WIDTH + 1)
    spectrum.plot(steps, torch.linalg.svdvals(targets[0.0]), color="0.45", linestyle=":", label="the target")
    for label, (style, updates) in curves.items():
        spectrum.plot(steps, torch.linalg.svdvals(updates[0.0]), linewidth=2, label=label, **style)
        left = [residual(updates[exponent], target) for exponent, target in targets.items()]
        rest.plot(list(targets), left, marker="o", linewidth=2, **style)
    spectrum.set(
        title=f"Updates fitted to a flat target, r = {R}", xlabel="k", ylabel="k-th singular value", ylim=(-0.03, 1.2)
    )
    rest.set(
        title="What they leave over, from flat to steep targets",
        xlabel="p, where the target's k-th singular value is $k^{-p}$",
        ylabel="relative residual (lower is better)",
        ylim=(0, 1.03),
    )
    for axes in (spectrum, rest):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def main() -> None:
    """Fit every method to every target, print what is left over, and write the figure."""
    targets = {exponent: target_matrix(exponent) for exponent in EXPONENTS}
    lora = {exponent: fit_lora(target) for exponent, target in targets.items()}
    curves = {f"LoRA, rank {LORA_RANK} ({lora[0.0][1]:,} parameters)": (LORA_STYLE, lora)}
    for kind, style in STYLES.items():
        fitted = {exponent: fit_randlora(target, kind) for exponent, target in targets.items()}
        curves[f"RandLoRA, {kind} ({fitted[0.0][1]:,})"] = (style, fitted)
    drawn = {
        label: (style, {exponent: update for exponent, (update, _) in pairs.items()})
        for label, (style, pairs) in curves.items()
    }
    for label, (_, updates) in drawn.items():
        left = ", ".join(f"{residual(updates[exponent], target):.3f}" for exponent, target in targets.items())
        rank = int(torch.linalg.matrix_rank(updates[0.0]))
        print(f"{label}; rank {rank}; residuals {left}")
    draw(targets, drawn).savefig(OUTPUT, metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main()
