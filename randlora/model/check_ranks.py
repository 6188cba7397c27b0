"""`check_ranks`: whether all processes have the same model with the same adapters on the same bases."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from randlora.errors import AdapterError, RandLoRAError, raise_collected
from randlora.model.view import View, opened, unwrapped_model
from randlora.modes import has_values
from randlora.places import is_whole, whole_only_inside
from randlora.replaced import whole_shape
from randlora.state import ModelState, adapted_root
from randlora.targets.census import Census, is_quantized, sizes
from randlora.targets.match import shortened

EXISTS, VALUES = "dtype", "values"
"""The facts of a tensor that tell whether it exists, and what it contains."""


OfTensors = Mapping[str, Mapping[str, str]]
"""Facts of tensors, by the tensor's name, and then by what they are about.

Those that a process does not know, such as values on the meta device, are not there.
"""


class Facts(NamedTuple):
    """What must be equal in all processes.

    Attributes:
        adapters: Facts of the adapters, by a phrase that names them.
        trained: Those of the tensors that adapters have.
        base: Those of the model's own parameters and buffers.
    """

    adapters: Mapping[str, str]
    trained: OfTensors
    base: OfTensors

    @property
    def digest(self) -> str:
        """A digest of all facts."""
        return hashlib.sha256(repr(self).encode()).hexdigest()


def check_ranks(model: nn.Module, *, values: bool = False, group: Any = None) -> None:
    """Check that all processes have the same model and the same adapters with the same bases. A collective.

    Each process draws or reads its own bases, which are never sent, and loads its own model, so nothing else would
    notice a difference. Call this in every process after `randlora.inject` or `randlora.load`, and before the model is
    sharded. It compares the adapters' names, weights, targets, r, alpha, dropout and ``train_also``, a SHA-256 of the
    bases, which takes about a second per GB of bases in float32, and the names, dtypes, shapes and ``requires_grad`` of
    all parameters. With a single process, nothing is compared.

    Args:
        model: A model with adapters, or a wrapper around it.
        values: Whether to compare the values too, bit for bit: of the base, by a SHA-256 of each parameter, which takes
            about a second per GB, and of what is trained. After a step of training, this tells whether gradients are
            averaged. Parameters that are sharded, offloaded or on the meta device are left out.
        group: The process group; ``None`` means all processes. For a pipeline, pass the processes of one stage, because
            stages have different layers.

    Raises:
        AdapterError: In every process, if something differs. The message says what differs between which ranks.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> _ = randlora.inject(model, r=4)
        >>> randlora.check_ranks(model)
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1):
        adapted_root(model)
        return
    problem, facts = "", Facts({}, {}, {})
    try:
        with opened(model, None) as view:
            trained = _trained_facts(view, with_values=values)
            base = _base_facts(view.state, Census.of(unwrapped_model(model)), with_values=values)
            facts = Facts(_adapter_facts(view.state), trained, base)
    except Exception as error:  # raised after the exchange: the other processes wait for this one
        problem = str(error) if isinstance(error, RandLoRAError) else repr(error)
    version = f"torch {torch.__version__}"
    by_rank = _gathered((problem, facts.digest, version), group)
    failed = [f"rank {rank}: {problem}" for rank, (problem, *_) in by_rank.items() if problem]
    raise_collected(AdapterError, failed, doing="compare the adapters of all ranks")
    if len({digest for _, digest, _ in by_rank.values()}) == 1:
        return
    every: dict[int, Facts] = _gathered(facts, group)
    differing = differences({rank: own.adapters for rank, own in every.items()})
    if not differing:  # from which these would follow
        differing = tensor_differences({rank: own.trained for rank, own in every.items()})
    of_base = tensor_differences({rank: own.base for rank, own in every.items()})
    versions = {rank: version for rank, (*_, version) in by_rank.items()}
    problems = [*differing, *of_base]
    if problems and len(set(versions.values())) > 1:
        problems.append(f"the versions of torch differ: {_by_value(versions)}")
    what = "models" if of_base else "adapters"
    raise_collected(AdapterError, problems, doing=f"go on: the ranks have different {what}")


def _gathered(own: object, group: Any) -> dict[int, Any]:
    """Return what each process gives, by rank; a collective."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, own, group=group)
    ranks = range(dist.get_world_size()) if group is None else dist.get_process_group_ranks(group)
    return dict(zip(ranks, found, strict=True))


def differences(facts: Mapping[int, Mapping[str, str]]) -> list[str]:
    """Return what differs between ranks, as sentences that say which rank has what."""
    names = dict.fromkeys(name for own in facts.values() for name in own)
    found = {name: {rank: own.get(name, "nothing") for rank, own in facts.items()} for name in names}
    return [f"{name}: {_by_value(own)}" for name, own in found.items() if len(set(own.values())) > 1]


def tensor_differences(facts: Mapping[int, OfTensors]) -> list[str]:
    """Return how tensors differ between ranks, as sentences; those that differ alike are in one.

    The values of a tensor that differs otherwise are not compared.
    """
    alike: dict[tuple[object, ...], list[str]] = {}
    said: dict[tuple[object, ...], str] = {}
    for name in dict.fromkeys(name for own in facts.values() for name in own):
        of_ranks = {rank: own.get(name, {EXISTS: "nothing"}) for rank, own in facts.items()}
        whats = dict.fromkeys(what for own in of_ranks.values() for what in own)
        found = {what: {rank: own[what] for rank, own in of_ranks.items() if what in own} for what in whats}
        differing = [what for what, known in found.items() if len(set(known.values())) > 1]
        for what in differing:
            known = found[what]
            if what != VALUES:
                key: tuple[object, ...] = what, *known.items()
            elif differing == [VALUES]:  # a digest says no more than which ranks have the same one
                digests = [*known.values()]
                key = what, *known, *map(digests.index, digests)
            else:
                continue
            alike.setdefault(key, []).append(name)
            said.setdefault(key, _by_value(known))
    return [
        f"{key[0]} of {shortened(names)}: {said[key]}{f' (of {names[0]})' if key[0] == VALUES and names[1:] else ''}"
        for key, names in alike.items()
    ]


def _by_value(values: Mapping[int, str]) -> str:
    """Return what which ranks have: ``"torch 2.9 on rank 0; torch 2.13 on ranks 1, 2"``."""
    by_value: dict[str, list[str]] = {}
    for rank, value in values.items():
        by_value.setdefault(value, []).append(str(rank))
    return "; ".join(
        f"{value} on rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)}" for value, ranks in by_value.items()
    )


def _adapter_facts(state: ModelState) -> dict[str, str]:
    facts = {"the names of the adapters": ", ".join(state.adapters)}
    for name, adapter in state.adapters.items():
        options = {str(each) for each in adapter.options.values()}
        facts[f"the factor of {name!r}"] = (
            _counted("one for each layer", map(str, sorted(adapter.weight.items())))
            if isinstance(adapter.weight, Mapping)
            else str(adapter.weight)
        )
        facts[f"the dropout of {name!r}"] = str(adapter.config.dropout)
        facts[f"the targets of {name!r}, their r and alpha"] = _counted(
            f"{len(adapter.options)} with {', '.join(sorted(options))}", map(str, sorted(adapter.options.items()))
        )
        facts[f"what {name!r} trains beside Λ and Γ"] = _counted(
            f"{len(adapter.trained)} parameters", sorted(adapter.trained)
        )
        for r, basis in adapter.bases.items():
            what = f"the bases of r={r} of {name!r}"
            facts[f"the spec of {what}"] = f"{basis.spec}{'' if basis.stored is None else ', stored in the file'}"
            facts[what] = f"SHA-256 {basis.digest(*basis.extent)[:16]} for layers of {'x'.join(map(str, basis.extent))}"
    return facts


def _counted(text: str, lines: Iterable[str]) -> str:
    """Return a short text with a digest of all lines."""
    return f"{text} (digest {hashlib.sha256('/'.join(lines).encode()).hexdigest()[:8]})"


def _trained_facts(view: View, *, with_values: bool) -> OfTensors:
    """Return the facts of Λ, Γ and the parameters of ``train_also`` of all adapters."""
    trained: dict[str, tuple[Tensor, ...]] = {
        f"Λ and Γ of {site.fqn} of {name!r}": site.layer.diagonals_of(site.owner, name)
        for site in view.census.adapted
        for name in site.layer.adapters
    }
    for name, adapter in view.state.adapters.items():
        trained |= {f"{fqn}, which {name!r} trains": (copy,) for fqn, copy in adapter.parameters.items()}
    return {name: _facts_of(tensors, with_values=with_values) for name, tensors in trained.items()}


def _base_facts(state: ModelState, census: Census, *, with_values: bool) -> OfTensors:
    """Return the facts of a model's own parameters and buffers, of which adapters may have copies.

    Buffers have the values from when the model was adapted, because processes that train have different statistics.
    """
    originals = {id(entry.live): entry.original for entry in state.replaced.values() if not entry.is_lost}
    facts = {
        held.fqn: _facts_of((originals.get(id(held.tensor), held.tensor),), with_values=with_values)
        for held in census.parameters
    }
    for held in census.buffers:
        facts[held.fqn] = _facts_of((held.tensor,), with_values=with_values and is_quantized(held.module))
    for fqn, before in state.buffers_before.items() if with_values else ():
        facts[f"{fqn} when the model was adapted"] = {VALUES: _sha256((before,))}
    return facts


def _facts_of(tensors: tuple[Tensor, ...], *, with_values: bool) -> dict[str, str]:
    """Return the facts of one tensor, or of several together."""
    found = {
        EXISTS: _joined(each.dtype for each in tensors),
        "requires_grad": _joined(each.requires_grad for each in tensors),
    }
    # else it has no shape, or that of a part
    if not any(is_lazy(each) or whole_only_inside(each) is not None for each in tensors):
        found["shape"] = _joined(sizes(whole_shape(each)) for each in tensors)
        if with_values and all(has_values(each) and is_whole(each) for each in tensors):
            found[VALUES] = _sha256(tensors)
    return found


def _joined(values: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(map(str, values)))


def _sha256(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        for part in _parts(tensor.data):
            digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
            digest.update(part.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return f"SHA-256 {digest.hexdigest()[:16]}"


def _parts(data: Any) -> Iterator[Tensor]:
    """Yield the tensors that a tensor is made of: itself, or of a subclass such as torchao's those within."""
    if not hasattr(data, "__tensor_flatten__"):
        yield data
        return
    names, _ = data.__tensor_flatten__()
    for name in names:
        yield from _parts(getattr(data, name))
