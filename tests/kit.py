"""What every room of the tests needs: values for an adapter, bits to compare, and snapshots that tell of any trace."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

import randlora
from randlora.layers.scopes import begin_call, end_call
from randlora.report import Report
from randlora.state import attached_state
from randlora.targets.census import Census

WAIT = 30.0  # seconds until a test fails that would wait for ever

Bits = tuple[torch.dtype, tuple[int, ...], bytes]
Model = TypeVar("Model", bound=nn.Module)


def fill(model: Model, name: str = "default", *, seed: int = 0, spread: float = 0.05) -> Model:
    """Move all values of an adapter of ours, or all that PEFT trains, by about ``spread``; return the model."""
    generator = torch.Generator().manual_seed(seed)
    trained = {fqn: parameter for fqn, parameter in model.named_parameters() if parameter.requires_grad}
    values = adapter_values(model, name) if Census.of(model).adapted else trained
    with torch.no_grad():
        for parameter in values.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * spread)
    return model


def adapt(model: Model, *, values: int = 0, spread: float = 0.05, **options: Any) -> Model:
    """Inject an adapter, and give it values as after some training, which are drawn from a seed; return the model."""
    randlora.inject(model, **{"r": 4, **options})
    return fill(model, options.get("name", "default"), seed=values, spread=spread)


def set_alpha(model: nn.Module, alpha: float, name: str = "default") -> None:
    """Give an adapter an alpha that one from a file may have, and that `inject` refuses."""
    adapter = randlora.state.adapted_root(model)[1].adapter(name)
    adapter.config = replace(adapter.config, alpha=alpha)
    adapter.options = {fqn: own._replace(alpha=alpha) for fqn, own in adapter.options.items()}
    for site in Census.of(model).adapted:
        if (part := site.layer.adapters.get(name)) is not None:
            part.options = adapter.options[part.fqn]
            part.scaling = part.options.scaling


def adapter_values(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Return Λ, Γ and the parameters trained beside one adapter, by key."""
    found: dict[str, Tensor] = {
        f"{site.fqn}.{part}": value
        for site in Census.of(model).adapted
        if name in site.layer.adapters
        for part, value in zip(
            ("randlora_rows",) if site.layer.is_rows else ("randlora_lambda", "randlora_gamma"),
            site.layer.diagonals_of(site.owner, name),
            strict=True,
        )
    }
    return found | dict(randlora.state.adapted_root(model)[1].adapter(name).trained)


@contextmanager
def in_call() -> Iterator[None]:
    """Treat the block as a call of a module around weights that are read."""
    begin_call(nn.Module(), ())
    try:
        yield
    finally:
        end_call(nn.Module(), (), None)


def read(model: nn.Module, fqn: str) -> Tensor:
    owner, _, attribute = fqn.rpartition(".")
    with in_call():
        value = getattr(model.get_submodule(owner), attribute)
    assert isinstance(value, Tensor)
    return value


def bits(tensor: Tensor) -> Bits:
    """Return everything a tensor says, to be compared with ``==``: NaN equals itself, and -0.0 is not 0.0."""
    if is_lazy(tensor) or tensor.is_meta:
        return tensor.dtype, () if is_lazy(tensor) else tuple(tensor.shape), b""
    held = tensor.detach()
    if hasattr(held, "__tensor_flatten__"):  # a subclass that is made of several, as torchao's
        raw = b"".join(bits(getattr(held, name))[2] for name in held.__tensor_flatten__()[0])
    else:
        raw = held.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return tensor.dtype, tuple(tensor.shape), raw


def all_bits(tensors: Mapping[str, Tensor]) -> dict[str, Bits]:
    return {name: bits(tensor) for name, tensor in tensors.items()}


def same_bits(first: Tensor, second: Tensor) -> bool:
    return bits(first) == bits(second)


@dataclass(frozen=True)
class Same:
    """Equal to itself only; holds on to the object, so that no other gets its id."""

    held: object = field(compare=False)
    identity: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "identity", id(self.held))


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Take down all that a refused call must leave alone: objects, bits, flags, attributes, adapters and bases."""
    state = attached_state(model)
    found: dict[str, Any] = {
        "adapters": randlora.adapters(model),
        "replaced": sorted(state.replaced) if state else None,
        "bases": [(Same(basis), basis.spec, basis.extent) for basis in state.bank] if state else None,
    }
    for fqn, module in model.named_modules(remove_duplicate=False):
        found[f"module {fqn}"] = (Same(module), sorted(vars(module)), module.training)
    for fqn, parameter in model.named_parameters(remove_duplicate=False):
        found[f"parameter {fqn}"] = (Same(parameter), parameter.requires_grad)
    held = dict(model.named_buffers(remove_duplicate=False)) | model.state_dict()  # scales of codes are in it alone
    for fqn, value in held.items():
        found[f"value {fqn}"] = bits(value) if isinstance(value, Tensor) else value
    return found


def assert_unchanged(model: nn.Module, before: Mapping[str, Any]) -> None:
    """Hold a model against its snapshot; say what changed, and not how, for that is long."""
    after = snapshot(model)
    changed = [what for what in before.keys() | after.keys() if before.get(what) != after.get(what)]
    assert not changed, f"changed: {sorted(changed)}"


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Assert that what happens inside leaves the model exactly as it was."""
    before = snapshot(model)
    yield
    assert_unchanged(model, before)


def working_nbytes(model: nn.Module) -> int:
    """Count the bytes of the working copies of an adapted model's bases. On a CPU one may be the storage itself."""
    bank = randlora.state.adapted_root(model)[1].bank
    pairs = [pair for basis in bank for pair in basis._pairs.values()]
    forms = [form for pair in pairs for form in (pair, pair.written) if form is not None]
    copies = [copy for basis in bank for copy in basis._copies.values()]
    held = [tensor.untyped_storage() for each in (*copies, *((form.A, form.B) for form in forms)) for tensor in each]
    return sum({storage.data_ptr(): storage.nbytes() for storage in held}.values())


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def on_one_line(report: Report) -> str:
    """Return what a report prints, with its lines joined: those that do not fit are wrapped."""
    return " ".join(str(report).split())
