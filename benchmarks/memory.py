"""Memory: what a layer keeps from forward to backward, and the peak of whole training steps."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks.command import Settings, main
from benchmarks.layers import MORE_CONTESTANTS, build
from benchmarks.models import LLAMA_TARGETS, VOCABULARY, adapt, llama, training_step
from benchmarks.processes import held_bytes, in_own_process, peak_bytes
from benchmarks.results import Row
from benchmarks.timing import Figure

SIDE = 1024
TOKENS = (1, 128, 2048)
CONTESTANTS = ("frozen", "full", "LoRA", "PEFT", "dense", "block", "very_sparse")
QUICK_CONTESTANTS = ("frozen", "full", "PEFT", "dense", "block")
FLOAT = 4
STEPS = 2


def kept_by(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Count the bytes that autograd holds after a forward, beside the model's parameters and buffers."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}
    held: list[Tensor] = []

    def look(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)  # or a later tensor could take its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor):
        forward()
    return sum(found.values())


def kept_by_layer(layer: nn.Module, tokens: int) -> int:
    """Count the bytes that a forward of a layer keeps, its input among them."""
    x = torch.randn(tokens, SIDE, requires_grad=True, device=next(layer.parameters()).device)
    return kept_by(layer, lambda: layer(x))


def kept(tokens: int, device: str) -> Row:
    """Compare what is kept, also with PEFT's less the ``m²`` floats that ours must save."""
    layers = {name: build(adapt, SIDE, SIDE, torch.float32, device) for name, adapt in MORE_CONTESTANTS.items()}
    sizes = {name: kept_by_layer(layer, tokens) for name, layer in layers.items()}
    sizes["PEFT less m² floats"] = sizes["PEFT"] - FLOAT * SIDE**2
    return Row(f"kept by a layer, T = {tokens}", in_bytes(sizes))


def in_bytes(sizes: dict[str, int]) -> dict[str, Figure]:
    """Make figures of sizes, which do not vary."""
    return {name: Figure(size, size, "B") for name, size in sizes.items()}


def peak_of_training(contestant: str, device: str) -> int:
    """Train a Llama for some steps and return the peak above what the process, or its share of a GPU, held before."""
    before = held_bytes()
    model = adapt(llama(layers=6, side=SIDE), contestant, LLAMA_TARGETS).to(device)
    step = training_step(model, torch.randint(VOCABULARY, (1, 512), device=device))
    for _ in range(STEPS):
        step()
    return torch.cuda.max_memory_allocated() if device == "cuda" else peak_bytes() - before


def run(settings: Settings) -> Sequence[Row]:
    """Measure what layers keep, and the peaks of whole steps."""
    rows = [kept(tokens, settings.device) for tokens in TOKENS]
    names = QUICK_CONTESTANTS if settings.is_quick else CONTESTANTS
    peaks = {name: in_own_process(peak_of_training, name, settings.device) for name in names}
    return [*rows, Row(f"peak of a step, Llama, 6 layers, d = {SIDE}, T = 512", in_bytes(peaks))]


if __name__ == "__main__":
    main(("memory", run))
