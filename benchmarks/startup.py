"""Starting: putting an adapter on a model of Llama-3-8B's shapes, whose weights hold no values, and drawing bases."""

import time
from collections.abc import Callable, Sequence

import peft
import torch
import transformers
from torch import nn

import randlora
from benchmarks.command import Settings, main
from benchmarks.layers import ALPHA, RANK
from benchmarks.models import LLAMA_TARGETS, by_peft
from benchmarks.processes import held_bytes, in_own_process, peak_bytes
from benchmarks.results import Row
from benchmarks.timing import Figure
from randlora.bases import BasisBank
from randlora.bases.basis import Basis

REPEATS = 3
FLOAT = 4
LIMIT = 0.35e9
SIDES = ((4096, 4096), (4096, 1024), (14336, 4096))  # larger and smaller, of all layers of Llama-3-8B
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
KINDS = ("dense", "block", "very_sparse")


def llama_3_8b() -> nn.Module:
    """Make the model on the meta device: shapes without values."""
    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)  # type: ignore[no-any-return]


def start_peft() -> dict[str, float]:
    """Time PEFT's way; its bases are buffers that every layer refers to, float32 whatever the model's dtype.

    On a model without values they lose theirs, but not their size.
    """
    model, before, start = llama_3_8b(), held_bytes(), time.perf_counter()
    config = peft.RandLoraConfig(r=RANK, randlora_alpha=int(ALPHA), target_modules=LLAMA_TARGETS)
    adapted = by_peft(model, config)
    seconds = time.perf_counter() - start
    buffers = [buffer for name, buffer in adapted.named_buffers() if "randlora_A" in name or "randlora_B" in name]
    held = sum(buffer.nbytes for buffer in buffers)
    layers = sum(name.endswith("default") for name in adapted.state_dict() if "randlora_lambda" in name)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    return {
        "seconds": seconds,
        "bases": held,
        "peak": peak_bytes() - before,
        "file": (1 + layers) * held + FLOAT * trained,  # the bases once at the top and once for every layer
        **dict.fromkeys(DTYPES, held),
    }


def start_ours(kind: str) -> dict[str, float]:
    """Time ours; a model without values draws nothing, so the bases are asked for as the first layer would."""
    model, before, start = llama_3_8b(), held_bytes(), time.perf_counter()
    report = randlora.inject(model, r=RANK, alpha=ALPHA, targets=LLAMA_TARGETS, basis=kind)  # type: ignore[arg-type]
    basis = BasisBank().acquire(randlora.adapters(model)[0].specs[0])
    basis.extend(14336, 4096)
    held = sum(matrix.values.nbytes for matrix in basis.matrices())
    seconds, peak = time.perf_counter() - start, peak_bytes() - before
    return {
        "seconds": seconds,
        "bases": held,
        "peak": peak,
        "file": FLOAT * report.trainable_parameters,
        "stored": FLOAT * report.trainable_parameters + held,
        **{name: held_to_compute(basis, dtype) for name, dtype in DTYPES.items()},
    }


def held_to_compute(basis: Basis, dtype: torch.dtype) -> int:
    """Count the bytes of bases, and of the copies to compute with, once all layers have computed in a dtype."""
    basis.release()
    pairs = [basis.pair(*sides, device=torch.device("cpu"), dtype=dtype) for sides in SIDES]
    tensors = [part for pair in pairs for part in (pair.A, pair.B)]
    tensors += [matrix.values for matrix in basis.matrices()]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def run(settings: Settings) -> Sequence[Row]:
    """Start PEFT and ours with dense bases some times, each in a process of its own, in turn; in full, all kinds."""
    starts: dict[str, tuple[Callable[..., dict[str, float]], tuple[str, ...]]] = {
        "PEFT": (start_peft, ()),
        **{kind: (start_ours, (kind,)) for kind in KINDS[: 1 if settings.is_quick else None]},
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in starts}
    for _ in range(REPEATS):
        for name, (start, args) in starts.items():
            found[name].append(in_own_process(start, *args))

    def figures(key: str, unit: str) -> dict[str, Figure]:
        return {name: Figure.of([one[key] for one in measured], unit) for name, measured in found.items()}

    def single(size: float) -> Figure:
        return Figure(size, size, "B")

    peer, ours = found["PEFT"][0], found["dense"][0]
    return [
        Row("time to inject and draw", figures("seconds", "s")),
        Row("bytes of bases", figures("bases", "B")),
        *(Row(f"bytes of bases and copies to compute in {name}", figures(name, "B")) for name in DTYPES),
        Row("peak of memory", figures("peak", "B")),
        Row("bytes of a checkpoint with bases", {"PEFT": single(peer["file"]), "ours": single(ours["stored"])}),
        Row("bytes of a checkpoint by seed", {"ours": single(ours["file"]), "0.35 GB": single(LIMIT)}),
    ]


if __name__ == "__main__":
    main(("startup", run))
