"""`check_ranks`: whether all processes have the same model with the same adapters on the same bases."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from randlora.config import described
from randlora.errors import AdapterError, RandLoRAError, raise_collected
from randlora.model.view import WRAPPERS, View, opened
from randlora.places import has_values, is_whole, whole_only_inside
from randlora.ranks import Ranks
from randlora.replaced import unwrapped, whole_shape
from randlora.state import adapted_root
from randlora.targets.census import Census, is_quantized, sizes
from randlora.targets.match import shortened

Facts = Mapping[str, str]  # what must be equal in all processes, in words, by what it is about
VALUES = "the values of "  # begins the names of what only the processes that have values know


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
        AdapterError: In every process, if something differs. The message says what, and which ranks have what.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> _ = randlora.inject(model, r=4)
        >>> randlora.check_ranks(model)
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1):
        adapted_root(model)
        return
    problem, facts = "", dict[str, Facts]()
    try:
        with opened(model, None) as view:
            base = Census.of(unwrapped(model, WRAPPERS))
            facts["adapters"] = dict(_adapter_facts(view, with_values=values))
            facts["models"] = dict(_base_facts(view, base, with_values=values))
    except Exception as error:  # raised after the exchange: the other processes wait for this one
        problem = str(error) if isinstance(error, RandLoRAError) else repr(error)
    by_rank = _gathered((problem, hashlib.sha256(repr(facts).encode()).hexdigest()), group)
    failed = [f"rank {rank}: {problem}" for rank, (problem, _) in by_rank.items() if problem]
    raise_collected(AdapterError, failed, doing="compare the adapters of all ranks")
    if len({digest for _, digest in by_rank.values()}) > 1:
        facts_by_rank = _gathered(facts, group)
        found = {what: difference({rank: every[what] for rank, every in facts_by_rank.items()}) for what in facts}
        what, problems = "models" if found["models"] else "adapters", [*filter(None, found.values())]
        raise_collected(AdapterError, problems, doing=f"go on: the ranks have different {what}")


def _gathered(own: object, group: Any) -> dict[int, Any]:
    """Return what each process gives, by rank; a collective."""
    ranks = range(dist.get_world_size()) if group is None else dist.get_process_group_ranks(group)
    return dict(zip(ranks, Ranks((group,), is_first=True).gathered(own), strict=True))


def difference(by_rank: Mapping[int, Facts]) -> str:
    """Return what differs first between ranks, which rank has what, and the names of the rest; empty for nothing."""
    differing: dict[str, Mapping[int, str]] = {}
    for name in dict.fromkeys(name for facts in by_rank.values() for name in facts):
        texts = {rank: facts[name] for rank, facts in by_rank.items() if name in facts}
        if not name.startswith(VALUES):
            texts |= {rank: "nothing" for rank in by_rank if rank not in texts}
        if len(set(texts.values())) > 1:
            differing[name] = texts
    if not differing:
        return ""
    first, *rest = differing
    ranks: dict[str, list[str]] = {}
    for rank, text in differing[first].items():
        ranks.setdefault(text, []).append(str(rank))
    which = [f"{text} on rank{'s' if len(own) > 1 else ''} {', '.join(own)}" for text, own in ranks.items()]
    return f"{first}: {'; '.join(which)}" + (f"; also different: {shortened(rest)}" if rest else "")


def _adapter_facts(view: View, *, with_values: bool) -> Iterator[tuple[str, str]]:
    """Yield the facts of the adapters, of their bases, and of the tensors that they train."""
    yield "the names of the adapters", ", ".join(view.state.adapters)
    for name, adapter in view.state.adapters.items():
        options = described(adapter.options)
        factor = "one for each layer" if isinstance(adapter.weight, Mapping) else adapter.weight
        every = repr([sorted(adapter.options.items()), sorted(adapter.trained), adapter.weight])
        digest = hashlib.sha256(every.encode()).hexdigest()[:8]
        said = f"r={options['r']}, alpha={options['alpha']}, dropout={adapter.config.dropout}, factor={factor}, "
        said += f"{len(adapter.targets)} targets, {len(adapter.trained)} parameters beside Λ and Γ, digest {digest}"
        yield f"adapter {name!r}", said
        for r, basis in adapter.bases.items():
            digest, extent = basis.digest(*basis.extent)[:16], "x".join(map(str, basis.extent))
            stored = "" if basis.stored is None else ", stored in the file"
            yield f"the bases of r={r} of {name!r}", f"{basis.spec}{stored}: SHA-256 {digest} for layers of {extent}"
    for site in view.census.adapted:
        for name in site.layer.adapters:
            diagonals = site.layer.diagonals_of(site.owner, name)
            yield from _tensor_facts(f"Λ and Γ of {site.fqn} of {name!r}", diagonals, with_values=with_values)
    for name, adapter in view.state.adapters.items():
        for fqn, copy in adapter.parameters.items():
            yield from _tensor_facts(f"{fqn}, which {name!r} trains", [copy], with_values=with_values)


def _base_facts(view: View, base: Census, *, with_values: bool) -> Iterator[tuple[str, str]]:
    """Yield the facts of the model's own parameters and buffers, of which adapters may have copies."""
    originals = {id(entry.live): entry.original for entry in view.state.replaced.values() if not entry.is_lost}
    for held in base.parameters:
        yield from _tensor_facts(held.fqn, [originals.get(id(held.tensor), held.tensor)], with_values=with_values)
    for held in base.buffers:
        yield from _tensor_facts(held.fqn, [held.tensor], with_values=with_values and is_quantized(held.module))
    # buffers as they were when the model was adapted: processes that train have different statistics
    for fqn, before in view.state.buffers_before.items() if with_values else ():
        yield f"{VALUES}{fqn} when the model was adapted", _digest([before])


def _tensor_facts(name: str, tensors: Sequence[Tensor], *, with_values: bool) -> Iterator[tuple[str, str]]:
    # else a tensor has no shape, or that of a part
    has_shape = not any(is_lazy(each) or whole_only_inside(each) is not None for each in tensors)
    shapes = [f", {sizes(whole_shape(each))}" if has_shape else "" for each in tensors]
    shaped = zip(tensors, shapes, strict=True)
    yield name, " and ".join(f"{each.dtype}{shape}, requires_grad={each.requires_grad}" for each, shape in shaped)
    if with_values and has_shape and all(has_values(each) and is_whole(each) for each in tensors):
        yield f"{VALUES}{name}", _digest(tensors)


def _digest(tensors: Iterable[Tensor]) -> str:
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
