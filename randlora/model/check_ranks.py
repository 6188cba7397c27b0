"""`check_ranks`: whether all processes have the same adapters on the same bases."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from randlora.errors import AdapterError, RandLoRAError, raise_collected
from randlora.model.view import View, opened
from randlora.places import is_whole
from randlora.state import ModelState, adapted_root

Facts = Mapping[str, str]
"""What must be equal in all processes, by a phrase that names it."""


def check_ranks(model: nn.Module, *, values: bool = False, group: Any = None) -> None:
    """Check that all processes have the same adapters on the same bases, as a collective.

    Bases are drawn or read by each process for itself and never sent, so nothing else would tell that two of them
    differ. Call it in every process after `randlora.inject` or `randlora.load`. Compared are the adapters' names,
    weights, targets, r, alpha, dropout and ``train_also``, and a SHA-256 of the bases, which takes about a second per
    GB of them in float32. Nothing is compared if there is one process.

    Args:
        model: A model with adapters, or one that wraps it.
        values: Whether to compare what the adapters train too, bit for bit: after a step of training, it tells whether
            gradients are averaged. Parameters that are sharded, offloaded or on the meta device are left out.
        group: The process group; ``None`` means all processes. Of a pipeline, give the processes of one stage, because
            stages have different layers.

    Raises:
        AdapterError: In every process, if something differs. The message names what, and which ranks have what.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> _ = randlora.inject(model, r=4)
        >>> randlora.check_ranks(model)
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1):
        adapted_root(model)
        return
    problem, facts = "", {}
    try:
        with opened(model, None) as view:
            facts = _facts(view.state) | (_values(view) if values else {})
    except Exception as error:  # raised after the exchange: the other processes wait for this one
        problem = str(error) if isinstance(error, RandLoRAError) else repr(error)
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, (problem, facts, f"torch {torch.__version__}"), group=group)
    ranks = range(dist.get_world_size()) if group is None else dist.get_process_group_ranks(group)
    failed = [f"rank {rank}: {problem}" for rank, (problem, *_) in zip(ranks, gathered, strict=True) if problem]
    raise_collected(AdapterError, failed, doing="compare the adapters of all ranks")
    versions = {rank: version for rank, (*_, version) in zip(ranks, gathered, strict=True)}
    differing = differences(dict(zip(ranks, (facts for _, facts, _ in gathered), strict=True)))
    if differing and len(set(versions.values())) > 1:
        differing.append(f"the versions of torch differ: {_by_value(versions)}")
    raise_collected(AdapterError, differing, doing="go on: the ranks have different adapters")


def differences(facts: Mapping[int, Facts]) -> list[str]:
    """Return what differs between ranks, as sentences that say which rank has what."""
    names = dict.fromkeys(name for own in facts.values() for name in own)
    found = {name: {rank: own.get(name, "nothing") for rank, own in facts.items()} for name in names}
    return [f"{name}: {_by_value(own)}" for name, own in found.items() if len(set(own.values())) > 1]


def _facts(state: ModelState) -> dict[str, str]:
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


def _values(view: View) -> dict[str, str]:
    """Return a SHA-256 of all that the adapters train and each process has whole."""
    trained: dict[str, tuple[Tensor, ...]] = {
        f"Λ and Γ of {site.fqn} of {name!r}": site.layer.diagonals_of(site.owner, name)
        for site in view.census.adapted
        for name in site.layer.adapters
    }
    for name, adapter in view.state.adapters.items():
        trained |= {f"{fqn}, which {name!r} trains": (copy,) for fqn, copy in adapter.trained.items()}
    return {what: _sha256(parts) for what, parts in trained.items() if all(map(_is_whole, parts))}


def _is_whole(parameter: Tensor) -> bool:
    return is_whole(parameter) and not parameter.is_meta


def _sha256(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return f"SHA-256 {digest.hexdigest()[:16]}"


def _counted(text: str, lines: Iterable[str]) -> str:
    """Return a short text with a digest of all lines."""
    return f"{text} (digest {hashlib.sha256('/'.join(lines).encode()).hexdigest()[:8]})"


def _by_value(values: Mapping[int, str]) -> str:
    """Return what which ranks have: ``"torch 2.9 on rank 0; torch 2.13 on ranks 1, 2"``."""
    by_value: dict[str, list[str]] = {}
    for rank, value in values.items():
        by_value.setdefault(value, []).append(str(rank))
    return "; ".join(
        f"{value} on rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)}" for value, ranks in by_value.items()
    )
