"""How an adapter starts: initial values of Λ and Γ, and the alpha with which its first step is as large as LoRA's.

Either Λ or Γ starts at zero, so that the update is zero, and the other one at a constant. The gradient of the constant
one is then zero, so the first step of an optimizer moves only the one at zero. Adam moves each entry by the learning
rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from randlora.bases.spec import Shape, count_bases
from randlora.config import ALPHA_PER_RANK, LARGEST_FACTOR, LARGEST_RANK
from randlora.errors import ConfigError, raise_collected
from randlora.hints import require_types, shortly
from randlora.options import Init as Init

SHARE = 0.5
"""The share of its initial value, 1 / min_dim, by which such a step changes Γ with the default alpha, from 50 on."""

LARGEST_RATE = 1e-2
"""The largest learning rate to try first."""


def initial_values(init: Init, shape: Shape) -> tuple[float, float]:
    """Return the initial values of all entries of Λ and of Γ, for an update of this shape or a stack of them."""
    constant = 1 / min(shape[-2:])
    return (0.0, constant) if init == "lambda" else (constant, 0.0)


def first_learning_rate(scaling: float, min_dim: int) -> float:
    """Return the learning rate to try first: ``0.5 / min_dim * sqrt(20 / scaling)``, at most 1e-2.

    The best rates of this repository's runs, at widths from 64 to 1024, are near it. So is the rate that others used
    for Llama-3-8B, at 4096. Both have a scaling of 10 to 20. Long runs need less, down to a tenth or even less, and so
    does reinforcement learning. See the page on the learning rate.

    Args:
        scaling: ``alpha / r``, by which the update is scaled.
        min_dim: The smaller side of the adapted layers.
    """
    size = abs(scaling) / ALPHA_PER_RANK
    return min(SHARE / min_dim / math.sqrt(size), LARGEST_RATE) if size else LARGEST_RATE


def equivalent_alpha(
    lora_r: int,
    lora_alpha: float,
    r: int = 32,
    *,
    shape: tuple[int, int] | None = None,
    use_rslora: bool = False,
) -> float:
    """Return the alpha with which the first step of Adam is as large as with LoRA at the same learning rate.

    The size is the root mean square of the entries of the update. For LoRA with PEFT's initial values it is
    ``scaling · lr · sqrt(lora_r / (3 · in_features))``. Here it is ``alpha / r · lr · sqrt(num_bases · r)`` times the
    initial value of Λ or Γ, with either ``init`` of `inject`. For layers with ``in_features <= out_features`` that are
    large compared to ``r``, this gives ``alpha / r = lora_alpha / lora_r · sqrt(lora_r / 3)``.

    Args:
        lora_r: The rank of LoRA.
        lora_alpha: The alpha of LoRA, whose update is scaled by ``lora_alpha / lora_r``.
        r: The rank of one random basis.
        shape: ``(out_features, in_features)`` of a layer. ``None`` means any layer with
            ``in_features <= out_features``. In other layers, the first step is then too large by a factor of
            ``sqrt(in_features / out_features)``.
        use_rslora: Whether LoRA's update is scaled by ``lora_alpha / sqrt(lora_r)`` instead, as with PEFT's option of
            this name.

    Returns:
        The alpha for ``inject(model, r=r, alpha=...)``.

    Raises:
        ConfigError: For invalid values.

    Examples:
        >>> round(randlora.equivalent_alpha(lora_r=32, lora_alpha=64, r=32), 2)
        209.02
    """
    given = {name: value for name, value in locals().items() if name != "given"}
    require_types(equivalent_alpha, given)
    raise_collected(ConfigError, [*_problems(given)], doing="compute an equivalent alpha")
    scaling = lora_alpha / (math.sqrt(lora_r) if use_rslora else lora_r)
    if shape is None:
        return r * scaling * math.sqrt(lora_r / 3)
    lora_size = scaling * math.sqrt(lora_r / (3 * shape[1]))
    return r * lora_size * min(shape) / math.sqrt(count_bases(min(shape), r) * r)


def _problems(given: dict[str, Any]) -> Iterator[str]:
    """Yield which arguments of `equivalent_alpha` are out of range."""
    counts = {name: given[name] for name in ("lora_r", "r")}
    counts |= {f"shape[{index}]": size for index, size in enumerate(given["shape"] or ())}
    for name, value in counts.items():
        if not 0 < value <= LARGEST_RANK:
            yield f"{name} must be a positive integer of at most {LARGEST_RANK}, got {shortly(value)}"
    if not 0 < (alpha := given["lora_alpha"]) <= LARGEST_FACTOR:
        yield f"lora_alpha must be a positive number of at most {LARGEST_FACTOR:g}, got {shortly(alpha)}"
