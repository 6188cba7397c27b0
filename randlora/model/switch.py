"""The adapters of a model: activating, disabling and removing them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from randlora.blocks import BLOCKS, open_elsewhere
from randlora.errors import AdapterError, TargetError, raise_collected
from randlora.functional import Compute
from randlora.hints import require_types
from randlora.layer_options import Factor
from randlora.layers.in_place import drop_adapter
from randlora.model.change import all_or_nothing
from randlora.model.engines import tell_changed
from randlora.model.factors import resolved_factors
from randlora.model.inject import eject
from randlora.model.install import require_detachable, require_own, shared_slots
from randlora.model.trainable import offloaded_diagonals
from randlora.model.view import opened
from randlora.replaced import whole_shape
from randlora.state import CHANGING, ModelState, adapted_root, require_unmerged, require_unused
from randlora.targets.match import nearest_names
from randlora.targets.walk import Census


def activate(
    model: nn.Module,
    names: str | Iterable[str] | Mapping[str, Factor],
    *,
    layers: str | Iterable[str] | None = None,
) -> None:
    """Activate adapters, in place, and deactivate all others. `set_trainable` sets which of them are trained.

    A layer in which an adapter has the factor 0 computes as without it, at no cost. Parameters of ``train_also`` have
    no factor: the copies of an active adapter are in use.

    Args:
        model: A model with adapters.
        names: One name; several names, whose updates are summed; or a mapping from names to factors of the updates. A
            factor may be a mapping itself, from patterns of layers to numbers, such as
            ``{"decoder": 0.5, ".*": 1.0}``: the first that matches a layer applies, each layer must have one, and 0
            leaves a layer out.
        layers: The layers in which they act: one or several patterns, each an FQN or a suffix of FQNs, of layers or of
            modules with layers inside, or else a regex matched with ``fullmatch``. ``None`` means all layers.

    Raises:
        AdapterError: For an unknown name, a factor that is not finite, a pattern that matches no layer, adapters that
            train the same parameter with ``train_also``, or if merged adapters are not among these with the factors
            that they were merged with.

    Warns:
        UserWarning: If parameters require grad that the `DistributedDataParallel` around the model does not know,
            because they did not when it was made: their gradients would not be averaged over the processes.
    """
    with opened(model, "activate", writes=True) as view:
        state, census = view.state, view.census
        weights = resolved_factors(state, names, layers)
        if any(weights.get(name) != weight for name, weight in state.merged.items()):
            require_unmerged(state, "activate others")
        raise_collected(AdapterError, _activation_problems(state, weights), doing="activate")
        if state.is_merged and state.exchanged(name for name in state.adapters if name in weights):
            require_unmerged(state, "activate adapters with train_also")  # which may be of a weight that is merged into
        state.require_exchangeable([name for name in state.adapters if name in weights], "activate")
        state.activate(weights)
        for site in census.adapted:
            site.layer.seat(site.owner)
        if not state.is_merged:
            state.install_parameters()
        tell_changed(view.root)


def disabled(model: nn.Module) -> AbstractContextManager[Any]:
    """Disable all adapters inside a ``with`` block, so that the model computes as without adapters.

    Blocks can be nested. The previous state is restored on exit, even after an exception. In a copy of the model that
    is made inside, which no block restores, the adapters are inactive.

    Raises:
        AdapterError: If the model has no adapter, or its adapters are merged. On exit, if accelerate has offloaded
            parameters inside that an adapter trains copies of: the adapters are disabled then until its hooks are
            removed and another function is called.
    """

    def checked(census: Census, state: ModelState) -> object:
        require_unmerged(state, "disable")
        require_own(census, state, "disable the adapters")
        if open_elsewhere(state.disabled):
            raise AdapterError("cannot disable the adapters while another thread, or task, routes through this model")
        state.require_exchangeable([], "disable the adapters")
        return object()

    return without_active(model, checked)


@contextmanager
def without_active(model: nn.Module, checked: Callable[[Census, ModelState], object]) -> Iterator[object]:
    """Run a block in which the active adapters are not, and end it even after an exception or an interrupt.

    Args:
        model: A model with adapters.
        checked: Checks the model, without changing it, and returns what `ModelState.open_block` takes.
    """
    block: object = None

    def end() -> None:
        if block is None:  # it was refused
            return
        BLOCKS.set(tuple(each for each in BLOCKS.get() if each is not block))
        with CHANGING:
            state.ended.append(block)
            state.require_loaded(root)  # else the model's own values would be loaded over the copies
            state.adopt_parameters(root)

    try:
        with opened(model, None) as view:
            root, state = view.root, view.state
            block = checked(view.census, state)
            # without copies to exchange it is one assignment; to keep what could be undone takes far longer
            with all_or_nothing(view.census, state) if state.replaced else nullcontext():
                state.open_block(block)
                state.install_parameters()
        BLOCKS.set((*BLOCKS.get(), block))
        yield block
    finally:
        try:
            end()
        except BaseException:  # an interrupt, after which nothing else would
            end()
            raise


def remove(model: nn.Module, name: str) -> None:
    """Remove one adapter, in place, without changing the output of others. Removing the last one is `eject`.

    Args:
        model: A model with adapters.
        name: The adapter to remove.

    Raises:
        AdapterError: If the model has no such adapter, its adapters are merged, or an open block of
            `randlora.serving.routed` names it.
    """
    with opened(model, "remove an adapter", writes=True) as view:
        state, census = view.state, view.census
        name = state.adapter(name).name
        doing = f"remove {name!r}"
        require_unmerged(state, doing)
        require_unused(state, name, doing)
        if len(state.adapters) == 1:
            eject(view.root)
            return
        state.require_exchangeable([other for other in state.active if other != name], doing)
        sites = [site for site in census.adapted if name in site.layer.adapters]
        require_detachable(census, doing, sites)
        del state.adapters[name]
        for site in sites:
            drop_adapter(site.owner, site.layer, name)
        state.forget_unused()


def delta_weight(model: nn.Module, fqn: str, *, name: str | None = None) -> Tensor:
    """Compute the update of one layer's weight.

    Args:
        model: A model with adapters.
        fqn: The layer's fully qualified name.
        name: One adapter, with factor 1; ``None`` means the active ones with their factors.

    Returns:
        ``(out_features, in_features)`` for every kind of layer, in float32, or float64 if the weight is. If the model
        is sharded, this is a collective: every process calls it and gets the whole update.

    Raises:
        AdapterError: If the model has no adapter, or none of that name, or accelerate offloads Λ and Γ.
        TargetError: If the layer is not adapted.
    """
    require_types(delta_weight, {"fqn": fqn, "name": name})
    doing = f"compute the update of {fqn}"
    with opened(model, doing) as view:
        sites = {site.fqn: site for site in view.census.adapted}
        if fqn not in sites:
            raise TargetError(f"{fqn!r} is not adapted; the nearest adapted layers are {nearest_names(fqn, sites)}")
        raise_collected(AdapterError, offloaded_diagonals(view.census), doing=doing)
        site = sites[fqn]
        factors = site.layer.factors(view.state.active) if name is None else {view.state.adapter(name).name: 1.0}
        return site.layer.delta_weight(site.owner, factors)


def _activation_problems(state: ModelState, weights: Mapping[str, Factor]) -> list[str]:
    problems = [
        f"{name!r} trained {fqn} of shape {was}, and the model has {now} now: load an adapter of the new shape"
        for name in weights.keys() & state.adapters.keys()
        for fqn, copy in state.adapters[name].trained.items()
        if (was := whole_shape(copy)) != (now := whole_shape(state.replaced[fqn].original))
    ]
    trained: dict[str, list[str]] = {}
    for name in weights.keys() & state.adapters.keys():
        for fqn in state.adapters[name].trained:
            trained.setdefault(fqn, []).append(name)
    problems += shared_slots(state, [*state.adapters.values()], trained)
    problems += [
        f"{' and '.join(sorted(names))} each trained their own copy of {fqn}, and only one can be active: activate one"
        for fqn, names in trained.items()
        if len(names) > 1
    ]
    return problems


def set_compute(model: nn.Module, compute: Compute = "auto") -> None:
    """Set how the layers of a model compute. This changes speed, memory and rounding, nothing else.

    Args:
        model: A model with adapters.
        compute: ``"factored"`` multiplies the tokens by both factors of the update, ``"materialized"`` computes the
            update first, ``"auto"`` chooses the cheaper way for the sizes of each call, see `randlora.functional.cost`.
            A compiled or exported program, which may be run with any sizes, is factored with ``"auto"``.

    Raises:
        AdapterError: If the model has no adapter.
        ConfigError: For any other value.

    Example:
        >>> import torch, randlora
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> report = randlora.inject(model, r=8, targets="all-linear")
        >>> randlora.set_compute(model, "materialized")
    """
    require_types(set_compute, {"compute": compute})
    _, state = adapted_root(model)
    state.compute = compute
