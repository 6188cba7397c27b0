"""Measure how much of an update is rounded away when it is merged into the codes of a quantized layer.

Prints the table of ``docs/quantized.md``. It takes a few seconds, from the repository's root, with bitsandbytes
installed: ``python docs/figures/measure_rounding.py``
"""

import sys

import bitsandbytes
import torch
from torch import nn

import randlora

SIDE = 1024
STD = 0.02
SHARES = (0.01, 0.03, 0.1, 0.3)
KINDS = ("NF4", "FP4", "8 bits")


def quantized(kind: str) -> nn.Sequential:
    """Quantize a layer of normal weights."""
    layer = (
        bitsandbytes.nn.Linear8bitLt(SIDE, SIDE, bias=False, has_fp16_weights=False)
        if kind == "8 bits"
        else bitsandbytes.nn.Linear4bit(SIDE, SIDE, bias=False, quant_type=kind.lower(), compute_dtype=torch.float32)
    )
    nn.init.normal_(layer.weight, std=STD)
    return nn.Sequential(layer).to("cpu")


def rounded_away(kind: str, share: float) -> float:
    """Merge an update of a share of the weight's norm, and return what is lost as a share of the update's norm."""
    torch.manual_seed(0)
    model = quantized(kind)
    randlora.inject(model, r=32, targets=["0"])
    with torch.no_grad():
        for parameter in randlora.trainable_parameters(model):
            nn.init.normal_(parameter)
        norm = randlora.delta_weight(model, "0").norm()
        model.get_parameter("0.randlora_lambda.default").mul_(share * STD * SIDE / norm)
    return randlora.merge(model).rounding["0"].relative


def main() -> None:
    """Print the table."""
    rows = [
        ["norm of the update, as a share of the weight's", *(f"{share:.0%}" for share in SHARES)],
        ["---", *("--:" for _ in SHARES)],
        *([kind, *(f"{rounded_away(kind, share):.0%}" for share in SHARES)] for kind in KINDS),
    ]
    sys.stdout.writelines(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    main()
