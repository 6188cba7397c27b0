"""`AdapterTrainer`, and `AdapterCheckpoints` for any other trainer that is a `transformers.Trainer`, such as TRL's.

transformers has no public hook for the contents of a checkpoint and for loading it. `PRIVATE` names the private methods
that are overridden. `Reference` is the model without its trained adapters, with which some of TRL's trainers compare.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import save_fsdp_optimizer  # type: ignore[import-untyped]
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer import SCHEDULER_NAME

import randlora
from randlora.checkpoint.load import swap_each
from randlora.checkpoint.peft_layout import TENSORS_FILE
from randlora.errors import AdapterError, CheckpointError, warn
from randlora.integrations.optimizers import check_optimizers
from randlora.model.listing import AdapterInfo
from randlora.model.view import is_held_together
from randlora.state import adapted_root
from randlora.targets.census import Census
from randlora.targets.match import shortened

PRIVATE = ("_load_from_checkpoint", "_load_best_model", "_save_optimizer_and_scheduler")
"""Private methods of `Trainer` that `AdapterCheckpoints` overrides. A test checks their signatures."""

SENT = "_iter_named_params"
"""The private method of TRL's `VLLMGeneration` that yields names and values of weights for vLLM, each tensor once."""


class OptimizerCheck(TrainerCallback):  # type: ignore[misc]  # transformers carries no types
    """Checks the optimizer of a trainer, which makes it as training begins."""

    def __init__(self, *, is_supervised: bool) -> None:
        """Create the callback for one call of a trainer."""
        self.is_supervised = is_supervised

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:  # noqa: ARG002  # its hook
        """Raise an error or warn, as `check_optimizers` does."""
        check_optimizers(given["model"], [given["optimizer"]], is_supervised=self.is_supervised)


_Mixin: Any = object  # to be put before a `Trainer`, whose attributes it has


class LoadsAdapters(_Mixin):  # type: ignore[misc]
    """A mixin for a subclass of `transformers.Trainer` that loads the trained adapters from a checkpoint."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer.train` does, after a check of the optimizer."""
        kinds = {base.__name__ for base in type(self).__mro__ if base.__module__.startswith("trl.")}
        self.pop_callback(OptimizerCheck)  # of an earlier call
        self.add_callback(OptimizerCheck(is_supervised=not kinds or "SFTTrainer" in kinds))
        return super().train(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the adapters that are trained from a checkpoint, in place."""
        model = self.model if model is None else model
        trained = [info.name for info in _require_trained(model)]
        checkpoint = Path(resume_from_checkpoint)
        if len(trained) == 1:
            swap_each(model, {trained[0]: checkpoint})
            return
        if others := {path.parent.name for path in checkpoint.glob(f"*/{TENSORS_FILE}")}.difference(trained):
            raise CheckpointError(
                f"cannot resume from {str(checkpoint)!r}: it has {shortened(sorted(others))}, which the model lacks or "
                f"does not train (it trains {', '.join(trained)}): inject and activate the same adapters as in that run"
            )
        swap_each(model, {name: checkpoint / name for name in trained})

    def _load_best_model(self) -> None:
        """Load the best checkpoint of the run; DeepSpeed's from its own files, which have copies of what is trained."""
        if self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)


class AdapterCheckpoints(LoadsAdapters):
    """A mixin for trainers of transformers and TRL: checkpoints contain the adapter and not the model.

    Put it first: ``class SFT(AdapterCheckpoints, trl.SFTTrainer)``. Call `randlora.inject` before you make the trainer.
    A checkpoint contains the files of `randlora.save`, and the trainer's own files for the optimizer, the scheduler and
    the generators, with FSDP and DeepSpeed too. To resume, make model and adapter in the same way again.

    If several adapters are trained, each is saved in a subdirectory with its name. Adapters that are not trained are
    not saved.

    For TRL's trainers that compare with a reference model, the reference is the same model without the trained
    adapters, unless a ``ref_model`` is given, so no second model is loaded. Trainers that sample with vLLM through
    TRL's `VLLMGeneration` send it the weights of `randlora.merged_tensors`.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Raise an error for a new class in which a trainer, with its checkpoints, comes before the mixin."""
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[: cls.__mro__.index(AdapterCheckpoints)]
        if any(issubclass(base, Trainer) and not issubclass(base, AdapterCheckpoints) for base in before):
            ordered = sorted(cls.__bases__, key=lambda base: not issubclass(base, AdapterCheckpoints))
            given, right = (", ".join(base.__name__ for base in bases) for bases in (cls.__bases__, ordered))
            raise AdapterError(
                f"class {cls.__name__}({given}) would write checkpoints that it cannot resume from: put the mixin "
                f"first, class {cls.__name__}({right})"
            )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Make the trainer.

        Raises:
            AdapterError: If the model has no trainable adapter, parameters require grad that are not in the adapter's
                files, ``peft_config`` is given, or the trainer cannot send merged weights to vLLM.
        """
        given = inspect.signature(super().__init__).bind_partial(*args, **kwargs)
        if kwargs.get("peft_config", given.arguments.get("peft_config")) is not None:
            raise AdapterError(
                "peft_config= would add a PEFT adapter and freeze the one that randlora.inject added: leave it out"
            )
        model = given.arguments.get("model")
        if isinstance(model, nn.Module):
            trained = [info.name for info in _require_trained(model)]
            with _accepted(model), referring(self, given, Reference(lambda: getattr(self, "model", model), trained)):
                super().__init__(*given.args, **given.kwargs)
        else:  # made in there, by a function or from a name
            super().__init__(*args, **kwargs)
            _require_trained(self.model)
        if getattr(self.args, "use_vllm", False):
            _send_merged(getattr(self, "vllm_generation", None))

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer.train` does, except that ``True`` means the newest complete checkpoint."""
        if self.model_init is None:  # else another model is made now
            _require_added(self.model)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = _newest_complete(Path(self.args.output_dir))
        forgive = self.model.register_load_state_dict_post_hook if self.is_deepspeed_enabled else nullcontext
        with forgive(_forgive_frozen):
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:  # noqa: FBT001, FBT002
        """Save the trained adapters, and what else a trainer saves. All processes of a run call this; one writes."""
        directory = Path(output_dir or self.args.output_dir)
        trained = _require_trained(self.model)
        is_sharded = is_held_together(self.model)
        for info in trained if self.args.should_save or is_sharded else ():
            own = directory if len(trained) == 1 else directory / info.name
            randlora.save(self.model, own, name=info.name)
        if self.args.should_save:
            processing = getattr(self, "processing_class", None)
            processing = processing or getattr(getattr(self, "data_collator", None), "tokenizer", None)
            if processing is not None:
                processing.save_pretrained(directory)
            torch.save(self.args, directory / "training_args.bin")
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save the states of the optimizer and the scheduler without the base, which an engine would save beside it."""
        if self.is_fsdp_enabled:  # what is trained is in the adapter's files
            plugin = self.accelerator.state.fsdp_plugin
            save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
            if self.args.should_save:
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))
            return
        engine = self.model_wrapped.__dict__ if self.is_deepspeed_enabled else {}
        if engine:
            engine["save_checkpoint"] = partial(self.model_wrapped.save_checkpoint, exclude_frozen_parameters=True)
        try:
            super()._save_optimizer_and_scheduler(output_dir)
        finally:
            engine.pop("save_checkpoint", None)


class AdapterTrainer(AdapterCheckpoints, Trainer):  # type: ignore[misc]
    """A `transformers.Trainer` whose checkpoints contain the adapter and not the model; see `AdapterCheckpoints`."""


def _require_trained(model: nn.Module) -> list[AdapterInfo]:
    """Return the adapters that are trained. Raises an error if there is none, or if anything else is trained."""
    trained = [info for info in randlora.adapters(model) if info.is_trainable]
    if not trained:
        raise AdapterError(
            "the model has no trainable adapter: call randlora.inject(model) before the trainer is made, or "
            "randlora.load(model, path, trainable=True)"
        )
    own = {id(parameter) for parameter in randlora.trainable_parameters(model)}
    others = [name for name, held in model.named_parameters() if held.requires_grad and id(held) not in own]
    if others:
        raise AdapterError(
            f"{shortened(others)} requires grad and belongs to no adapter, so checkpoints would not contain it: name "
            "it in train_also=, or set requires_grad to False"
        )
    return trained


def _require_added(model: nn.Module) -> None:
    """Raise an error if the model computes without the adapters that require grad: training would not change them."""
    trained = _require_trained(model)
    _, state = adapted_root(model)
    if state.is_merged or state.is_disabled:
        done = "merged" if state.is_merged else "disabled"
        raise AdapterError(f"the adapters are {done}, so training would not change them: unmerge or leave the block")
    if not any(info.is_active for info in trained):
        names = ", ".join(info.name for info in trained)
        raise AdapterError(f"{names} is not active and would not be trained: call randlora.activate(model, name)")


def _forgive_frozen(model: nn.Module, keys: Any) -> None:
    """Let a checkpoint of DeepSpeed that has no frozen parameters be loaded by its strict loading."""
    frozen = {name for name, held in model.named_parameters(remove_duplicate=False) if not held.requires_grad}
    keys.missing_keys[:] = [name for name in keys.missing_keys if name not in frozen]


def _send_merged(engine: Any) -> None:
    """Have TRL send vLLM the merged weights. It would send the parameters as they are, including the adapters'."""
    if SENT not in dir(engine):
        raise AdapterError(
            "this trainer cannot send the merged weights to vLLM, as GRPOTrainer of TRL 1.16 can: upgrade TRL, or "
            "train with use_vllm=False"
        )

    def merged() -> Iterator[tuple[str, Tensor]]:
        model = engine.model
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        tied = set(names).difference(name for name, _ in model.named_parameters())
        return ((name, tensor) for name, tensor in randlora.merged_tensors(model) if name not in tied)

    setattr(engine, SENT, merged)


@contextmanager
def _accepted(model: nn.Module) -> Iterator[None]:
    """Have `Trainer` accept a quantized model, which it does if it believes that PEFT has adapted it.

    TRL then casts what is trained to bfloat16, which is undone: Λ and Γ are trained in float32.
    """
    held = [(parameter, parameter.data) for parameter in randlora.trainable_parameters(model)]
    is_quantized = getattr(model, "is_quantized", False)
    if is_quantized:
        vars(model)["_hf_peft_config_loaded"] = True
    try:
        yield
    finally:
        if is_quantized:
            del vars(model)["_hf_peft_config_loaded"]
            for parameter, data in held:
                parameter.data = data.to(parameter.device)


def _newest_complete(directory: Path) -> str:
    """Return the newest checkpoint of a run that has an adapter and the file that the trainer writes last."""
    found: dict[int, Path] = {}
    for path in directory.glob("checkpoint-*"):
        with suppress(OSError, ValueError):  # no number, or no such file, or the beginning of one
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            is_cut = (path / "checkpoint-is-incomplete.txt").exists()  # of enable_jit_checkpoint, once more into it
            found |= {int(path.name.split("-")[1]): path for _ in islice(path.rglob(TENSORS_FILE), not is_cut)}
    if not found:
        raise ValueError(f"there is no complete checkpoint in {str(directory)!r}")
    return str(found[max(found)])


class Reference(nn.Module):
    """A model without some of its adapters, for a loss that compares with it. It calls the model and has no parameters.

    The ``trained`` adapters are left out. Other active adapters remain active.
    """

    trained: tuple[str, ...]

    def __init__(self, policy: Callable[[], nn.Module], trained: Sequence[str]) -> None:
        """Take what returns the model, which a trainer may wrap later, and the names of adapters."""
        super().__init__()
        vars(self).update(_policy=policy, trained=tuple(trained))  # not as a submodule
        for name in ("config", "base_model_prefix"):  # which a trainer reads of a model that it prepares
            if hasattr(self.policy, name):
                vars(self)[name] = getattr(self.policy, name)

    @property
    def policy(self) -> nn.Module:
        """The model, with the wrappers that a trainer has put around it."""
        return vars(self)["_policy"]()  # type: ignore[no-any-return]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the model without the adapters, ignoring a forward that a trainer has set here."""
        with self._without_adapters():
            return self.policy(*args, **kwargs)

    forward = __call__

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Return the weights that it computes with. From these, a trainer recognizes results computed before."""
        with self._without_adapters():
            held: dict[str, Tensor] = self.policy.state_dict(*args, **kwargs)
        left_out = {name for name in held if ".randlora_" in name and name.rpartition(".")[2] in self.trained}
        return {name: value for name, value in held.items() if name not in left_out}

    @contextmanager
    def _without_adapters(self) -> Iterator[None]:
        policy = self.policy
        weights = {info.name: info.weight for info in randlora.adapters(policy) if info.weight is not None}
        others = {name: weight for name, weight in weights.items() if name not in self.trained}
        if not others:
            with randlora.disabled(policy):
                yield
            return
        randlora.activate(policy, others)
        try:
            yield
        finally:
            randlora.activate(policy, weights)


@contextmanager
def referring(trainer: Any, given: inspect.BoundArguments, reference: Reference) -> Iterator[None]:
    """Within the block, have a new trainer of TRL use the reference instead of a model that it would load."""
    arguments: Any = given.arguments.get("args")
    takes_one = "ref_model" in given.signature.parameters and given.arguments.get("ref_model") is None
    kinds = {base.__name__ for base in type(trainer).__mro__ if base.__module__.startswith("trl.")}
    loads_one = bool(kinds & {"GRPOTrainer", "RLOOTrainer"})  # which take none, and load one unless ``beta`` is 0
    beta = getattr(arguments, "beta", 0.0) if loads_one else 0.0
    if not takes_one and not beta:
        yield
        return
    if getattr(arguments, "sync_ref_model", False):
        raise AdapterError(
            "sync_ref_model=True copies trained values into the reference, but here the reference is the same model "
            "without its adapters: leave it out, or give a ref_model"
        )
    if is_deepspeed_zero3_enabled() and any(each.train_also for each in randlora.adapters(reference.policy)):
        warn(
            "the reference is a second model that TRL loads, because an engine of ZeRO-3 cannot replace what "
            "train_also trains by the model's own values. Leave train_also out, or use ZeRO-2"
        )
        yield
        return
    _warn_if_trained(reference)
    if takes_one:
        given.arguments["ref_model"] = reference
    else:
        arguments.beta = 0.0  # or it loads one
    if getattr(arguments, "deepspeed_plugin", None) is not None:  # its engines ask a parameter for the dtype
        reference.register_parameter("placeholder", nn.Parameter(torch.zeros(1), requires_grad=False))
    try:
        yield
    finally:
        reference._parameters.pop("placeholder", None)
        if beta:
            arguments.beta = beta
    if beta:
        trainer.beta = beta
    if beta or trainer.ref_model is not None:  # without the engine that TRL has put around it
        trainer.ref_model = reference


def _warn_if_trained(reference: Reference) -> None:
    """Warn if what is left out was trained before, which a reference should usually have."""
    trained = reference.trained
    if any(
        all(part.any() for part in site.layer.diagonals_of(site.owner, name))
        for site in Census.of(reference.policy).adapted
        for name in site.layer.adapters
        if name in trained and not site.layer.is_rows  # which are never zero
    ):
        warn(
            f"the reference is the model without {', '.join(trained)}, which was trained before: if the reference "
            "should be the model as it is now, merge the adapter first and inject a new one, or give a ref_model"
        )
