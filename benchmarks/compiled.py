"""Compiled models beside the peers: forward and backward, and the graphs that switching among adapters takes.

Steps are compiled by inductor where there is a compiler of C++ or a GPU, else they are run as `aot_eager` traces them.
torch uses one thread, because two of kernels as short as these wait for each other wherever other work runs. Graphs are
counted, and the counts are the same on every machine.
"""

import os
import shutil
from collections.abc import Callable, Sequence

import peft
import torch
import torch._dynamo.config
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import randlora
from benchmarks.command import Settings, main
from benchmarks.layers import CONTESTANTS, RANK, clear, put_on, training_step
from benchmarks.models import LLAMA_TARGETS, VOCABULARY, adapt, llama
from benchmarks.overhead import counts, one_thread
from benchmarks.results import Row
from benchmarks.timing import Figure, interleaved

NAMES = ("frozen", "LoRA", "PEFT", "dense", "block")
QUICK_NAMES = ("LoRA", "PEFT", "block")  # each takes seconds to compile
STACK, SIDE, TOKENS = 4, 512, 256
LLAMA_LAYERS, LLAMA_SIDE, LLAMA_TOKENS = 1, 256, 256
WINDOWS = 31
CALLS = 2  # the first call of a window also looks for its contestant's graph among the others'
ADAPTERS = 20
SWITCHED_SIDE = 64

SWITCHING = f"graphs of {ADAPTERS} adapters of one spec in turn"


def backend(device: str) -> str:
    """Return the compiler's backend."""
    has_compiler = device == "cuda" or shutil.which(os.environ.get("CXX", "g++")) is not None
    return "inductor" if has_compiler else "aot_eager"


def stack_case(device: str) -> str:
    """Name the row of the stack of layers."""
    return f"{STACK} layers {SIDE}→{SIDE}, T = {TOKENS}, {backend(device)}"


def llama_case(device: str) -> str:
    """Name the row of the Llama."""
    return f"Llama, {LLAMA_LAYERS} layer, d = {LLAMA_SIDE}, T = {LLAMA_TOKENS}, {backend(device)}"


def compiled(model: nn.Module, device: str) -> nn.Module:
    """Compile a model; a contestant may break it into several graphs."""
    program: nn.Module = torch.compile(model, backend=backend(device))  # type: ignore[assignment]
    return program


def stacks(names: Sequence[str], device: str) -> Row:
    """Time forward and backward of linear layers one after another, with the gradient of the input."""
    x = torch.randn(TOKENS, SIDE, device=device, requires_grad=True)
    grad = torch.randn(TOKENS, SIDE, device=device)
    steps = {}
    for name in names:
        torch.manual_seed(0)
        model = put_on(nn.Sequential(*(nn.Linear(SIDE, SIDE) for _ in range(STACK))), CONTESTANTS[name], device)
        steps[name] = training_step(compiled(model, device), x, grad)
    return Row(stack_case(device), timed(steps, device))


def llamas(names: Sequence[str], device: str) -> Row:
    """Time forward, loss and backward of a small Llama."""
    ids = torch.randint(VOCABULARY, (1, LLAMA_TOKENS), device=device)
    steps = {}
    for name in names:
        model = adapt(llama(LLAMA_LAYERS, LLAMA_SIDE), name, LLAMA_TARGETS).to(device).train()
        steps[name] = llama_step(model, ids, device)
    return Row(llama_case(device), timed(steps, device))


def llama_step(model: nn.Module, ids: Tensor, device: str) -> Callable[[], None]:
    """Return forward, loss and backward, with the gradient of the embeddings."""
    program = compiled(model, device)
    x = model.get_input_embeddings()(ids).detach().requires_grad_()  # type: ignore[operator]
    leaves = [x, *model.parameters()]

    def step() -> None:
        clear(leaves)
        program(inputs_embeds=x, labels=ids).loss.backward()

    return step


def timed(steps: dict[str, Callable[[], None]], device: str) -> dict[str, Figure]:
    """Take turns; the first turn compiles and does not count."""
    figures = interleaved(steps, device=device, repeats=WINDOWS, calls=CALLS)
    torch._dynamo.reset()
    return figures


def switching() -> Row:
    """Count the graphs of a frozen model that is used with one adapter after another, as a server does."""
    names = [f"adapter{index}" for index in range(ADAPTERS)]
    first, *others = names
    targets = ["0", "1"]
    config = peft.LoraConfig(r=RANK, target_modules=targets)
    lora = peft.get_peft_model(two_layers(), config, first)
    for name in others:
        lora.add_adapter(name, config)
    model = two_layers()
    for name in names:
        randlora.inject(model, r=RANK, targets=targets, name=name, trainable=False)
    found = {
        "LoRA": graphs(lora, names, lambda name: lora.set_adapter(name, inference_mode=True)),
        "dense": graphs(model, names, lambda name: randlora.activate(model, name)),
    }
    return Row(SWITCHING, counts({**found, "one graph": 1}, "graphs"))


def two_layers() -> nn.Module:
    """Make the model whose adapters are switched."""
    return nn.Sequential(nn.Linear(SWITCHED_SIDE, SWITCHED_SIDE), nn.Linear(SWITCHED_SIDE, SWITCHED_SIDE)).eval()


def graphs(model: nn.Module, names: Sequence[str], use: Callable[[str], object]) -> int:
    """Count the graphs that the compiler makes while adapters take turns, twice."""
    torch._dynamo.reset()
    counter = CompileCounter()
    program, x = torch.compile(model, backend=counter), torch.randn(3, SWITCHED_SIDE)
    # recompile_limit, under the name that torch 2.6 has too: after eight graphs it would compile no more
    with torch.no_grad(), torch._dynamo.config.patch(cache_size_limit=1000):
        for name in [*names, *names]:
            use(name)
            torch.testing.assert_close(program(x), model(x))
    torch._dynamo.reset()
    return int(counter.frame_count)


@one_thread()
def run(settings: Settings) -> Sequence[Row]:
    """Measure the layers, and count; in full, the Llama too, and all contestants."""
    device = settings.device
    if settings.is_quick:
        return [stacks(QUICK_NAMES, device), switching()]
    return [stacks(NAMES, device), llamas(NAMES, device), switching()]


if __name__ == "__main__":
    main(("compiled", run))
