"""What the host does before any arithmetic: one layer's call, small models eager and compiled, operators and graphs.

One layer and one token leave almost nothing to multiply, so these times are those of Python, of autograd and of torch's
dispatcher. They are taken with one thread of torch: a second one has nothing to do, and waits for a turn on a processor
that other work has taken. Operators and graphs are counted, and the counts are the same on every machine.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch._inductor.utils
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from benchmarks.command import Settings, console, main
from benchmarks.layers import CONTESTANTS, build, training_step
from benchmarks.models import LLAMA_TARGETS, VOCABULARY, adapt, llama
from benchmarks.models import training_step as model_step
from benchmarks.results import Row
from benchmarks.targets import judged
from benchmarks.timing import Figure, interleaved
from randlora.functional.scratch import Observer

try:
    fresh_cache = torch._inductor.utils.fresh_cache
except AttributeError:
    fresh_cache = torch._inductor.utils.fresh_inductor_cache  # its name in torch 2.6

NAMES = ("frozen", "LoRA", "PEFT", "dense", "block")
SIDE = 64
CALLS = 10  # timed together: few, so that some windows pass without a change of process
WINDOWS = 150
MODEL_SIDE, MODEL_TOKENS = 256, 16
EAGER_LAYERS = 12
COMPILED_LAYERS, MORE_COMPILED_LAYERS = 2, 12
MODEL_WINDOWS = 11
COMPILED_CALLS = 5  # the first call of a window also looks for its contestant's graph among the others'
WIDE = 1024
OPERATOR_TOKENS = (1, 2048)
GRAPH_TOKENS = (2, 7, 32, 130, 600, 3000)  # no 1, of which the compiler always makes a graph of its own
LIMITS = {"12 operators": 12, "6 operators": 6}

CALL = f"call without gradients, {SIDE}→{SIDE}, one token"
STEP = f"forward and backward, {SIDE}→{SIDE}, one token"


class Dispatched(Observer):
    """Notes the operators that torch dispatches below autograd while it is active.

    Attributes:
        operators: In their order; one that several others make up is not noted, but those are.
    """

    def __init__(self) -> None:
        """Note nothing yet."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note an operator and let it run."""
        self.operators.append(func)
        return func(*args, **(kwargs or {}))


def computes(operator: Any) -> bool:
    """Return whether an operator touches values, so that a GPU would launch a kernel: views and questions do not."""
    return operator.namespace == "aten" and not operator.is_view and operator != torch.ops.aten._unsafe_view.default


def layers_of(side: int, device: str) -> dict[str, nn.Module]:
    """Return every contestant's layer of the same weights, still in its sequential model."""
    return {name: build(CONTESTANTS[name], side, side, torch.float32, device) for name in NAMES}


def calls_of_a_layer(device: str) -> list[Row]:
    """Time one token through one small layer: in inference without gradients, and in training with all of them."""
    models, x = layers_of(SIDE, device), torch.randn(1, SIDE, device=device)
    leaf, grad = x.clone().requires_grad_(), torch.randn(1, SIDE, device=device)

    def call(layer: nn.Module) -> Callable[[], Tensor]:
        return lambda: layer(x)

    steps = {name: training_step(model.get_submodule("0"), leaf, grad) for name, model in models.items()}
    stepping = interleaved(steps, device=device, repeats=WINDOWS, calls=CALLS)
    runs = {name: call(model.eval().get_submodule("0")) for name, model in models.items()}
    with torch.no_grad():
        calling = interleaved(runs, device=device, repeats=WINDOWS, calls=CALLS)
    return [Row(CALL, calling), Row(STEP, stepping)]


def operators_of_a_layer(tokens: int, device: str) -> list[Row]:
    """Count the operators of a forward in training: all, and those that compute."""
    x = torch.randn(tokens, WIDE, device=device, requires_grad=True)
    found: dict[str, list[Any]] = {}
    for name, layer in layers_of(WIDE, device).items():
        layer(x)  # bases are drawn and laid out once
        with Dispatched() as dispatched:
            layer(x)
        found[name] = dispatched.operators
    case = f"{WIDE}→{WIDE}, T = {tokens}"
    computing = {name: sum(map(computes, operators)) for name, operators in found.items()}
    return [
        Row(f"operators that compute, {case}", counts({**computing, **LIMITS}, "operators")),
        Row(f"operators dispatched, {case}", counts({k: len(v) for k, v in found.items()}, "operators")),
    ]


def counts(found: dict[str, int], unit: str) -> dict[str, Figure]:
    """Return figures of counts, which do not vary."""
    return {name: Figure(count, count, unit) for name, count in found.items()}


def graphs(layer: nn.Module, device: str, *, dynamic: bool | None) -> int:
    """Count the graphs that the compiler makes of a layer in training for several numbers of tokens, one by one."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(layer, backend=counter, dynamic=dynamic)
    for tokens in GRAPH_TOKENS:
        compiled(torch.randn(tokens, SIDE, device=device, requires_grad=True)).sum().backward()
    return int(counter.frame_count)


def graphs_of_a_layer(device: str, *, dynamic: bool | None) -> Row:
    """Count every contestant's graphs; one whom the compiler refuses takes no part."""
    found: dict[str, int] = {}
    for name, layer in layers_of(SIDE, device).items():
        try:
            found[name] = graphs(layer, device, dynamic=dynamic)
        except Exception as error:  # the compiler's own, and what it trips over
            console.print(f"{name} does not compile with dynamic={dynamic}: {type(error).__name__}", highlight=False)
    torch._dynamo.reset()
    return Row(f"graphs of {len(GRAPH_TOKENS)} token counts, dynamic={dynamic}", counts(found, "graphs"))


def model_case(what: str, layers: int) -> str:
    """Name the row of a small model."""
    return f"{what}, Llama, {layers} layers, d = {MODEL_SIDE}, T = {MODEL_TOKENS}"


def eager_models(layers: int, device: str) -> Row:
    """Time whole steps of a small Llama, AdamW included."""
    inputs = torch.randint(VOCABULARY, (1, MODEL_TOKENS), device=device)
    steps = {
        name: model_step(adapt(llama(layers, MODEL_SIDE), name, LLAMA_TARGETS).to(device), inputs) for name in NAMES
    }
    return Row(model_case("eager step", layers), interleaved(steps, device=device, repeats=MODEL_WINDOWS))


def compiled_models(layers: int, names: Sequence[str], device: str) -> list[Row]:
    """Time the first step of compiled models, which compiles them by inductor from nothing, and the steps after it."""
    torch._dynamo.reset()
    inputs = torch.randint(VOCABULARY, (1, MODEL_TOKENS), device=device)
    steps, first = {}, {}
    for name in names:
        model = torch.compile(adapt(llama(layers, MODEL_SIDE), name, LLAMA_TARGETS).to(device))
        steps[name] = model_step(model, inputs)  # type: ignore[arg-type]
        with fresh_cache():  # or a contestant would find the kernels that an earlier one, or an earlier run, has left
            start_compiler(device)
            start = time.perf_counter()
            steps[name]()
            first[name] = time.perf_counter() - start
    taken = {name: Figure(seconds, seconds, "s") for name, seconds in first.items()}
    figures = interleaved(steps, device=device, repeats=MODEL_WINDOWS, calls=COMPILED_CALLS)
    torch._dynamo.reset()
    return [Row(model_case("compiled step", layers), figures), Row(model_case("compile time", layers), taken)]


def start_compiler(device: str) -> None:
    """Compile next to nothing: the compiler's processes start, and its headers are compiled, once for all kernels."""
    x = torch.randn(8, device=device)
    torch._inductor.compile(torch.fx.symbolic_trace(nn.SiLU()), [x])  # Dynamo would know it from the time before


def compiling(case: str, *, is_quick: bool) -> list[str]:
    """Name whom a compiled model is measured with: in the quick set those that have targets."""
    wanted = judged("overhead", case) | judged("overhead", case.replace("compiled step", "compile time"))
    return [name for name in NAMES if name in wanted or not is_quick]


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute with one thread for the while."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def run(settings: Settings) -> Sequence[Row]:
    """Measure what has targets; in full, compile the larger model and all contestants too."""
    device = settings.device
    rows = calls_of_a_layer(device)
    for tokens in OPERATOR_TOKENS:
        rows.extend(operators_of_a_layer(tokens, device))
    rows.extend(graphs_of_a_layer(device, dynamic=dynamic) for dynamic in (None, True))
    rows.append(eager_models(EAGER_LAYERS, device))
    for layers in (COMPILED_LAYERS,) if settings.is_quick else (COMPILED_LAYERS, MORE_COMPILED_LAYERS):
        names = compiling(model_case("compiled step", layers), is_quick=settings.is_quick)
        rows.extend(compiled_models(layers, names, device))
    return rows


if __name__ == "__main__":
    main(("overhead", run))
