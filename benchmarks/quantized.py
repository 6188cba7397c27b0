"""Training on layers of bitsandbytes: the time of a step, and the bytes that are held, kept and needed."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import bitsandbytes
import torch
from torch import Tensor, nn

from benchmarks.command import Settings, main
from benchmarks.held import alive, among_new_objects, bytes_since, kept_for_backward, peak_of
from benchmarks.layers import AUTOCAST_CONTESTANTS, CONTESTANTS, Adapt, clear, put_on, training_step
from benchmarks.memory import in_bytes
from benchmarks.results import Row
from benchmarks.timing import REPEATS, interleaved

NAMES = ("frozen", "LoRA", "PEFT", "dense", "block")
QUICK_NAMES = ("frozen", "PEFT", "dense", "block")
OURS = ("dense", "block")
STEPS = 2
FEW_TOKENS = 128


def _nf4(in_features: int, out_features: int, dtype: torch.dtype) -> nn.Module:
    layer: nn.Module = bitsandbytes.nn.LinearNF4(in_features, out_features, bias=False, compute_dtype=dtype)
    return layer


def _8_bits(in_features: int, out_features: int, _: torch.dtype) -> nn.Module:
    layer: nn.Module = bitsandbytes.nn.Linear8bitLt(in_features, out_features, bias=False, has_fp16_weights=False)
    return layer


FORMS: dict[str, Callable[[int, int, torch.dtype], nn.Module]] = {"NF4": _nf4, "8 bits": _8_bits}
"""The scales of NF4 are quantized too. Layers of 8 bits compute in the dtype of their input."""


class Case(NamedTuple):
    """What is trained on.

    Attributes:
        form: One of `FORMS`.
        dtype: Of the input, and what the layer computes in.
        tokens: Rows of the input.
        in_features: The layer's input width.
        out_features: Its output width.
    """

    form: str
    dtype: torch.dtype
    tokens: int
    in_features: int = 1024
    out_features: int = 1024

    def __str__(self) -> str:
        """Write it in words."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.form}, {dtype}, T = {self.tokens}, {self.in_features}→{self.out_features}"

    @property
    def dense_bytes(self) -> int:
        """Bytes of the weight written out."""
        return self.in_features * self.out_features * self.dtype.itemsize


KINDS = (("NF4", torch.float32), ("NF4", torch.bfloat16), ("8 bits", torch.float32), ("8 bits", torch.bfloat16))
GATED = tuple(Case(*kind, 2048) for kind in KINDS[:3])
CASES = tuple(Case(*kind, tokens, 1024, out) for kind in KINDS for out in (1024, 4096) for tokens in (FEW_TOKENS, 2048))


def contestants(case: Case, names: Sequence[str]) -> dict[str, Adapt]:
    """Name who takes part: in bfloat16 PEFT's RandLoRA under autocast too, or it multiplies in float32."""
    chosen = {name: CONTESTANTS[name] for name in names}
    return chosen | ({"PEFT, autocast": AUTOCAST_CONTESTANTS["PEFT, autocast"]} if case.dtype == torch.bfloat16 else {})


def build(case: Case, adapt: Adapt, device: str, *, layers: int = 1) -> nn.Module:
    """Quantize layers of fixed random weights one after the other, and adapt them."""
    torch.manual_seed(0)
    shape = case.in_features, case.out_features
    model = nn.Sequential(*(FORMS[case.form](*shape, case.dtype) for _ in range(layers))).to(device)
    for bits in (4, 8):  # PEFT goes by these, which transformers sets
        setattr(model, f"is_loaded_in_{bits}bit", ("NF4" if bits == 4 else "8 bits") == case.form)
    return put_on(model, adapt, device)


def given(case: Case, device: str) -> tuple[Tensor, Tensor]:
    """Make an input that wants a gradient, and the gradient of the output."""
    x = torch.randn(case.tokens, case.in_features, dtype=case.dtype, device=device, requires_grad=True)
    return x, torch.randn(case.tokens, case.out_features, dtype=case.dtype, device=device)


def timed(case: Case, chosen: Mapping[str, Adapt], device: str, repeats: int) -> Row:
    """Time forward and backward, with the gradient of the input."""
    x, grad = given(case, device)
    steps = {name: training_step(build(case, adapt, device), x, grad) for name, adapt in chosen.items()}
    return Row(str(case), interleaved(steps, device=device, repeats=repeats))


def held(case: Case, adapt: Adapt, device: str) -> int:
    """Count the bytes that a further layer holds between steps, which is without the bases, as layers share them."""
    one, two = (_held_by(layers, case, adapt, device) for layers in (1, 2))
    return two - one


def _held_by(layers: int, case: Case, adapt: Adapt, device: str) -> int:
    x, grad = given(case, device)
    before = alive()
    model = build(case, adapt, device, layers=layers)
    step = training_step(model, x, grad)
    for _ in range(STEPS):
        step()
    clear((x, *model.parameters()))
    return bytes_since(before)


def measured(case: Case, chosen: Mapping[str, Adapt], device: str) -> list[Row]:
    """Count bytes: held between steps, kept from forward to backward, needed at the height of a step."""
    x, grad = given(case, device)
    square = case._replace(out_features=case.in_features)
    sizes: dict[str, dict[str, int]] = {"held": {}, "kept": {}, "needed": {}}
    for name, adapt in chosen.items():
        layer = build(case, adapt, device)
        step = training_step(layer, x, grad)
        step()
        sizes["held"][name] = held(square, adapt, device)
        sizes["kept"][name] = kept_for_backward(layer, x)
        clear((x, *layer.parameters()))
        sizes["needed"][name] = peak_of(step, device)
        if name in OURS:
            refuse_a_dense_copy(name, square, sizes["held"][name])
            refuse_a_dense_copy(name, case, sizes["kept"][name] - x.nbytes)
    return [Row(f"{what}, {case}", in_bytes(found)) for what, found in sizes.items()]


def refuse_a_dense_copy(name: str, case: Case, nbytes: int) -> None:
    """Stop where the weight written out would fit into what stays.

    Raises:
        RuntimeError: Where it would.
    """
    if nbytes >= case.dense_bytes:
        raise RuntimeError(f"{name}, {case}: {nbytes} bytes stay, and W written out takes {case.dense_bytes}")


def run(settings: Settings) -> Sequence[Row]:
    """Measure what has targets; in full, other shapes and a few tokens too, and PEFT's LoRA."""
    gated = GATED[:2] if settings.device == "cuda" else GATED  # a GPU multiplies codes of 8 bits as they are
    cases, names = (gated, QUICK_NAMES) if settings.is_quick else (CASES, NAMES)
    rows = []
    for case in cases:
        chosen = contestants(case, names)
        repeats = REPEATS if case.tokens > FEW_TOKENS else 5 * REPEATS  # what is short is disturbed more easily
        rows.append(timed(case, chosen, settings.device, repeats))
        if case.out_features == case.in_features:
            with among_new_objects():
                rows.extend(measured(case, chosen, settings.device))
    return rows


if __name__ == "__main__":
    main(("quantized", run))
