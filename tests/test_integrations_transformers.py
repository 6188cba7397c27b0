"""`AdapterCheckpoints` with the trainers of transformers, TRL and sentence-transformers, and an engine for vLLM."""

import copy
import inspect
import json
import shutil
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import transformers
from torch import nn

import randlora
from randlora.errors import AdapterError, CheckpointError
from tests import trainers
from tests.checkpoint_files import edit_fields, read_fields
from tests.further import further
from tests.hub_server import Hub
from tests.kit import Bits, adapt, all_bits, bits, fill, same_bits, untouched
from tests.trainers import ADAPTER_FILES, QUIET, adapted_model, files, plain_model, rows, tokenizer, trained_bits

pytestmark = [*QUIET, pytest.mark.medium]


@pytest.fixture(autouse=True)
def _in_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@cache
def kinds() -> dict[str, Any]:
    """Return trainers by name, with our mixin and as they are; it takes seconds to import them."""
    import trl
    from sentence_transformers import SentenceTransformerTrainer

    from randlora.integrations.transformers import AdapterCheckpoints, AdapterTrainer

    plain = trl.SFTTrainer, trl.DPOTrainer, trl.GRPOTrainer, transformers.Seq2SeqTrainer, SentenceTransformerTrainer
    ours = {
        each.__name__.removesuffix("Trainer"): type(each.__name__, (AdapterCheckpoints, each), {}) for each in plain
    }
    # one that sends weights by its own code, as those of TRL's experiments
    other = type("Other", (ours["GRPO"],), {"vllm_generation": property(lambda _: None, lambda *_: None)})
    stock = {"Trainer": transformers.Trainer, "SFTTrainer": trl.SFTTrainer}
    return {**ours, **stock, "Adapter": AdapterTrainer, "Other": other}


TEXTS = {"text": [f"{i} squared is {i * i}" for i in range(16)]}
PAIRS = {"a": [f"{i}" for i in range(16)], "b": ["x"] * 16, "score": [i / 16 for i in range(16)]}


def digits(completions: list[str], **_: Any) -> list[float]:
    return [sum(letter.isdigit() for letter in text) / 4 for text in completions]


SAMPLES = {"num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 4}


def given_to(kind: str) -> tuple[Any, Any, dict[str, Any]]:
    """Return the class of a trainer's arguments, its data, and what else it is given."""
    import trl
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainingArguments

    words = {"processing_class": tokenizer()}
    match kind:
        case "SFT" | "SFTTrainer":
            return trl.SFTConfig, Dataset.from_dict(TEXTS), words
        case "DPO":
            return trl.DPOConfig, trainers.preferences(), words
        case "GRPO" | "Other":
            return trl.GRPOConfig, trainers.preferences(), {**words, "reward_funcs": digits}
        case "SentenceTransformer":
            return SentenceTransformerTrainingArguments, Dataset.from_dict(PAIRS), {}
        case "Seq2Seq":
            return transformers.Seq2SeqTrainingArguments, rows(), {}
    return transformers.TrainingArguments, rows(), {}


TO_TRAINER = ("optimizers", "processing_class", "eval_dataset", "model_init", "ref_model", "peft_config", "loss")


def trainer(kind: str, model: Any = None, **options: Any) -> Any:
    make, data, given = given_to(kind)
    own = {name: options.pop(name) for name in TO_TRAINER if name in options}
    args = trainers.arguments(make, "run", **(SAMPLES if kind in ("GRPO", "Other") else {}), **options)
    return kinds()[kind](model=model, args=args, train_dataset=data, **given, **own)


def with_optimizer() -> Any:
    model = fill(adapted_model(basis="block"))
    optimizer = torch.optim.SGD(randlora.trainable_parameters(model), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    return trainer("Adapter", model, optimizers=(optimizer, schedule))


def several(*names: str) -> Any:
    model: nn.Module = plain_model()
    for name in names:
        adapt(model, r=4, name=name, trainable=True)
    randlora.activate(model, [*names])
    randlora.set_trainable(model, [*names])
    return model


def encoder() -> Any:
    import sentence_transformers
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        transformers.BertModel(transformers.BertConfig(vocab_size=130, **sizes)).save_pretrained("bert")
        tokenizer().save_pretrained("bert")
        parts = [Transformer("bert"), Pooling(32), Dense(32, 8)]
    return sentence_transformers.SentenceTransformer(modules=parts, device="cpu")


def of_sentences() -> Any:
    from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss

    model = encoder()
    model[2].requires_grad_(False)
    randlora.inject(model, r=4, targets=["query", "value"])
    return trainer("SentenceTransformer", model, loss=CosineSimilarityLoss(model))


TRAINERS: dict[str, Callable[[], Any]] = {
    "usual": lambda: trainer("Adapter", adapted_model(train_also=["norm"], dropout=0.2)),
    "given": with_optimizer,
    "made by a function": lambda: trainer("Seq2Seq", model_init=lambda: adapted_model()),  # noqa: PLW0108
    "of several adapters": lambda: trainer("Adapter", several("a", "b", "c")),
    "of sentences": of_sentences,
}


@pytest.mark.parametrize(
    "kind", ["usual", "given", "of several adapters", further("made by a function"), further("of sentences")]
)
def test_a_resumed_run_goes_on_in_the_same_parameters_and_ends_with_the_same_bits(kind: str) -> None:
    through, rest, checkpoint = TRAINERS[kind](), TRAINERS[kind](), Path("run/checkpoint-2")
    through.train()
    assert files(checkpoint) >= {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    for part in [checkpoint / name for name in "abc"] if "several" in kind else [checkpoint]:
        assert files(part) >= ADAPTER_FILES
    assert not [name for name in files(checkpoint) if name.startswith(("model", "pytorch_model", "modules"))]
    shutil.rmtree("run/checkpoint-4")
    if "several" in kind:  # a field that nobody knows is kept
        edit_fields(checkpoint / "b", {"of_later": 7})
    if kind == "usual":  # another start, of which nothing may be left
        fill(rest.model, seed=3)
    before = [*map(id, randlora.trainable_parameters(rest.model))]
    rest.train(resume_from_checkpoint=True if kind == "given" else str(checkpoint))
    assert kind == "made by a function" or before == [*map(id, randlora.trainable_parameters(rest.model))]
    assert trained_bits(rest.model) == trained_bits(through.model)
    assert "several" not in kind or read_fields(Path("run/checkpoint-4/b"))["of_later"] == 7


def test_the_best_adapter_is_given_back_and_old_checkpoints_are_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted_model()
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "save_total_limit": 2}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    run = trainer("Adapter", model, eval_dataset=rows(), **options)
    run.train()
    best = Path(run.state.best_model_checkpoint)  # greater is better, so not the last
    assert files("run") == {best.name, "checkpoint-4"}
    first, last = plain_model(), plain_model()
    randlora.load(first, best, trainable=True)
    randlora.load(last, "run/checkpoint-4", trainable=True)
    assert trained_bits(model) == trained_bits(first) != trained_bits(last)
    monkeypatch.setattr(transformers.trainer, "deepspeed_load_checkpoint", load := Mock())
    run.is_deepspeed_enabled = True  # which has files of another kind
    run._load_best_model()
    assert load.call_args.args[1] == str(best)


def test_several_adapters_are_restored_all_or_none() -> None:
    trainer("Adapter", several("a", "b", "c")).train()
    checkpoint = Path("run/checkpoint-2")

    def refused(names: str, message: str) -> None:
        model = several(*names)
        with untouched(model), pytest.raises(CheckpointError, match=message):
            trainer("Adapter", model).train(resume_from_checkpoint=str(checkpoint))

    refused("ab", "it has c, which the model lacks")
    refused("a", "there are some inside it: a, b, c")
    tensors = checkpoint / "b" / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:50])
    refused("abc", "b/adapter_model.safetensors is truncated")


@pytest.mark.parametrize("damage", ["half-a-state", "no-adapter", "half-an-optimizer"])
def test_true_passes_over_a_checkpoint_that_was_not_written_to_its_end(damage: str) -> None:
    through, rest = (trainer("Adapter", adapted_model()) for _ in range(2))
    last = Path("run/checkpoint-4")
    with pytest.raises(ValueError, match="no complete checkpoint in 'run'"):
        rest.train(resume_from_checkpoint=True)
    through.train()
    if damage == "no-adapter":
        (last / "adapter_model.safetensors").unlink()
    elif damage == "half-an-optimizer":  # as a kill leaves it while enable_jit_checkpoint saves the same step again
        (last / "optimizer.pt").write_bytes((last / "optimizer.pt").read_bytes()[:50])
        (last / "checkpoint-is-incomplete.txt").touch()
    else:
        (last / "trainer_state.json").write_text('{"epoch": 1')
    rest.train(resume_from_checkpoint=True)
    assert trained_bits(rest.model) == trained_bits(through.model)
    assert json.loads((last / "trainer_state.json").read_text())["global_step"] == 4


def inactive() -> Any:
    model = several("base", "other")
    randlora.activate(model, "base")
    randlora.set_trainable(model, "base", trainable=False)
    randlora.set_trainable(model, "other")
    return model


def with_a_head_that_is_trained() -> Any:
    model = adapted_model()
    model.lm_head.weight.requires_grad = True
    return model


def with_norm(**options: Any) -> Any:
    model = plain_model(**options)
    randlora.inject(model, r=8, targets="all-linear", train_also=["norm"])
    return model


SYNCED = {"sync_ref_model": True}
DROPPING: dict[str, Any] = {"targets": ["lm_head"], "dropout": 0.1}
VLLM = "trl.generation.vllm_generation.VLLMGeneration"
WITH_VLLM: dict[str, Any] = {"use_vllm": True, "vllm_mode": "colocate"}


def refused() -> list[tuple[str, Callable[[], Any], dict[str, Any], str]]:
    import peft

    other_peft = {"peft_config": peft.LoraConfig(target_modules=["q_proj"])}
    return [
        ("Adapter", plain_model, {}, "no trainable adapter"),
        ("Adapter", inactive, {}, r"other is not active and .* call randlora\.activate"),
        ("Adapter", with_a_head_that_is_trained, {}, r"lm_head.weight requires grad .* train_also="),
        ("DPO", adapted_model, SYNCED, "sync_ref_model=True"),
        ("GRPO", adapted_model, {"beta": 0.5, **SYNCED}, "sync_ref_model=True"),
        ("SFT", adapted_model, other_peft, "peft_config= .* leave it out"),
        ("DPO", adapted_model, other_peft, "peft_config= .* leave it out"),
        ("SFT", lambda: adapted_model(**DROPPING), {}, r"dropout cannot act \(TRL's trainers do this"),
        ("Other", with_norm, WITH_VLLM, "cannot send the merged weights to vLLM"),
    ]


def test_what_a_trainer_cannot_do_or_checkpoint_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from randlora.integrations.transformers import AdapterCheckpoints, AdapterTrainer

    monkeypatch.setattr(f"{VLLM}._init_vllm", lambda _: None)
    for kind, build, options, message in refused():
        with pytest.raises(AdapterError, match=message):
            trainer(kind, build(), **options).train()
    for block in (randlora.merged, randlora.disabled):
        with block(model := adapted_model()), pytest.raises(AdapterError, match=f"are {block.__name__}, so training"):
            trainer("Adapter", model).train()
    monkeypatch.delattr(f"{VLLM}._iter_named_params")
    with pytest.raises(AdapterError, match="cannot send the merged weights to vLLM"):
        trainer("GRPO", with_norm(), **WITH_VLLM)
    trainer("Adapter", adapted_model(), max_steps=2).train()
    model = fill(adapted_model(r=4))  # the table of differences is in tests/test_swap.py
    with untouched(model), pytest.raises(CheckpointError, match="has r=4 and alpha=80, but in the files r=8"):
        trainer("Adapter", model).train(resume_from_checkpoint=True)
    stock = transformers.Trainer
    for first, mixin in ((stock, AdapterCheckpoints), (type("Own", (stock,), {}), AdapterTrainer)):
        with pytest.raises(AdapterError, match=f"put the mixin first, .*{mixin.__name__}, {first.__name__}"):
            type("Wrong", (first, mixin), {})
        type("Right", (type("Own", (mixin, first), {}),), {})


def test_what_is_overridden_and_not_public_is_named_and_called_as_it_was() -> None:
    from randlora.integrations.transformers import PRIVATE, AdapterCheckpoints, LoadsAdapters

    stock = transformers.Trainer
    written = vars(AdapterCheckpoints) | vars(LoadsAdapters)
    own = {name for name in written if name in dir(stock) and not name.startswith("__")}
    assert {name for name in own if name.startswith("_")} == set(PRIVATE)
    assert own - set(PRIVATE) == {"save_model", "train", "args", "model", "state"} & own
    for name in (*PRIVATE, "save_model"):
        found, theirs = (inspect.signature(getattr(kind, name)).parameters for kind in (AdapterCheckpoints, stock))
        assert [*found] == [*theirs], name


def test_the_rate_and_the_optimizer_are_looked_at_as_training_begins() -> None:
    from randlora.integrations.transformers import LoadsAdapters

    kinds()["Tuned"] = type("Tuned", (LoadsAdapters, transformers.Trainer), {})  # as ms-swift's
    short: dict[str, Any] = {"max_steps": 1, "save_strategy": "no", "learning_rate": 5e-5, "warmup_steps": 1}
    trainer("DPO", adapted_model(), **short).train()  # which needs a lower rate: it is no warning, which would raise
    for kind, times in (("Adapter", 2), ("SFT", 1), ("Tuned", 1)):
        run = trainer(kind, adapted_model(), **short)
        for _ in range(times):
            with pytest.warns(
                UserWarning, match=r"^learning rate 5e-05 is far below 0\.0094, which the report"
            ) as caught:
                run.train()
            assert len(caught) == 1
    model = plain_model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    randlora.inject(model, r=8)
    late = trainer("Adapter", model, optimizers=(optimizer, None))
    with pytest.raises(AdapterError, match="the optimizer has frozen parameters"):
        late.train()


def test_a_push_has_the_adapter_and_save_model_the_tokenizer_too(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # a client that an earlier test may have made
    options = {"push_to_hub": True, "hub_model_id": "me/adapter", "max_steps": 2}
    run = trainer("Adapter", adapted_model(), processing_class=tokenizer(), **options)
    run.train()
    run.save_model("saved")
    assert files("saved") == ADAPTER_FILES | {"tokenizer.json", "tokenizer_config.json", "training_args.bin"}
    run.push_to_hub()
    with pytest.warns(UserWarning, match="wrote adapter 'default'"):
        run.model.push_to_hub("me/by-method")
    assert set(hub.repositories["me/by-method"].files()) >= ADAPTER_FILES
    found = set(hub.repositories["me/adapter"].files())
    assert found >= ADAPTER_FILES
    assert not [name for name in found if name.startswith(("model", "pytorch_model"))]


@pytest.mark.parametrize(("is_whole", "method"), [(True, "save_pretrained"), (False, "save")])
def test_a_sentence_transformer_saves_the_adapter_and_as_it_was_merged(is_whole: bool, method: str) -> None:
    model, other = encoder(), encoder()
    part, inside = (each if is_whole else each[0].auto_model for each in (model, other))
    adapt(part, r=4, targets=["query", "value"], save_pretrained="adapter")
    getattr(model, method)("saved")
    assert files("saved") >= ADAPTER_FILES
    randlora.load(inside, "saved")
    assert same_bits(other.encode("7", convert_to_tensor=True), model.encode("7", convert_to_tensor=True))
    randlora.merge(part)
    expected = model.encode("7", convert_to_tensor=True)
    model.save("merged")
    again = type(model)("merged", device="cpu")
    assert same_bits(again.encode("7", convert_to_tensor=True), expected)


def test_a_stock_trainer_saves_the_adapter_and_says_that_it_cannot_resume() -> None:
    model, other = adapted_model(), plain_model()
    with pytest.warns(UserWarning, match=r"neither resume .* put AdapterCheckpoints first") as told:
        trainer("Trainer", model).train()
    assert len({str(each.message) for each in told if "wrote" in str(each.message)}) == 1
    randlora.load(other, "run/checkpoint-4", trainable=True)
    assert trained_bits(other) == trained_bits(model)


@pytest.mark.parametrize("kind", ["DPO", "SFTTrainer"])  # which read the weight of the head instead of calling it
def test_an_adapter_of_the_head_is_trained_and_acts_as_if_it_were_merged(kind: Any) -> None:
    model = adapted_model(targets=["lm_head"])
    before, run = trained_bits(model), trainer(kind, model, save_strategy="no")
    batch = next(iter(run.get_train_dataloader()))
    run.compute_loss(model, dict(batch)).backward()
    assert all(value.grad is not None for value in randlora.trainable_parameters(model))
    run.train()
    assert trained_bits(model) != before
    if kind == "DPO":  # whose reference is the model without adapters, which a merged one is not
        return
    fill(model).eval()
    losses = []
    for context in (nullcontext(), randlora.merged(model), randlora.disabled(model)):
        with context, torch.no_grad():
            losses.append(run.compute_loss(model, dict(batch)).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) != pytest.approx(losses[2], rel=1e-2)


def reference_of(run: Any, model: Any = None) -> list[Bits]:
    batch = next(iter(run.get_train_dataloader()))
    return [*map(bits, run.compute_ref_log_probs(run.ref_model if model is None else model, batch))]


def test_dpo_trains_as_with_a_copy_of_the_base_which_is_its_reference_to_the_last_bit() -> None:
    shared, copied = (
        trainer("DPO", adapted_model(train_also=["norm", "lm_head"]), **given)
        for given in ({}, {"ref_model": plain_model()})
    )
    assert list(shared.ref_model.parameters()) == []
    shared.train()
    copied.train()
    assert trained_bits(shared.model) == trained_bits(copied.model)
    assert reference_of(shared) == reference_of(copied) != reference_of(shared, shared.model)


def test_references_that_are_computed_before_training_are_those_of_the_base() -> None:
    with pytest.warns(UserWarning, match=r"the model without default, which was trained before: .*merge"):
        run = trainer("DPO", fill(adapted_model()), precompute_ref_log_probs=True)
    plain = trainer("DPO", adapted_model(), precompute_ref_log_probs=True)
    assert run.train_dataset["ref_chosen_logps"] == plain.train_dataset["ref_chosen_logps"]
    assert run._precompute_model_hash == plain._precompute_model_hash
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the reference is the model without")
        trainer("DPO", adapted_model(init="gamma"))  # which moves Γ first, and was not trained before


def test_an_adapter_that_is_not_trained_is_part_of_the_reference() -> None:
    model, other = fill(adapted_model()), plain_model()
    randlora.set_trainable(model, "default", trainable=False)
    randlora.inject(model, r=4, name="dpo", trainable=True)
    randlora.activate(model, ["default", "dpo"])
    run = trainer("DPO", model)
    run.train()
    expected = trainer("DPO", fill(adapted_model()), ref_model=plain_model())
    assert reference_of(run) == reference_of(expected, expected.model)
    assert [info.name for info in randlora.adapters(model) if info.is_active] == ["default", "dpo"]
    randlora.load(other, "run/checkpoint-4", trainable=True)  # the one that was trained is saved
    assert trained_bits(other) == trained_bits(model)


def test_the_reference_is_the_plain_base_and_no_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "trl.trainer.grpo_trainer.create_model_from_path", lambda *_, **__: pytest.fail("a second model")
    )
    run = trainer("GRPO", with_norm(), beta=0.5, max_steps=1, bf16=False)
    assert (run.beta, run.args.beta, list(run.ref_model.parameters())) == (0.5, 0.5, [])
    run.train()
    assert "kl" in run.state.log_history[0]
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert same_bits(run.ref_model(ids).logits, plain_model()(ids).logits)
        assert not same_bits(run.model(ids).logits, plain_model()(ids).logits)


class Engine:
    """What vLLM is to TRL: a plain model of its own that takes weights by name."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.received: list[str] = []
        worker = SimpleNamespace(model_runner=SimpleNamespace(model=self))
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))

    def load_weights(self, weights: Any) -> None:
        """Take tensors one by one; a name that the model does not have is an error, as in vLLM."""
        places = dict(self.model.named_parameters())
        for name, tensor in weights:
            self.received.append(name)
            assert tensor.shape == places[name].shape
            places[name].data.copy_(tensor)

    def reset_prefix_cache(self) -> None: ...
    def update_named_params(self, metadata: list[tuple[str, str, list[int]]], weights: Any) -> None:
        """Take tensors as the client of a server does, which is told all names, dtypes and shapes before."""
        held = list(weights)
        assert metadata == [(name, str(value.dtype).removeprefix("torch."), [*value.shape]) for name, value in held]
        self.load_weights(held)


@pytest.mark.parametrize(("mode", "is_tied"), [("colocate", False), ("server", True)])
def test_an_engine_is_sent_the_merged_model(mode: str, is_tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: Any) -> None:
        self.llm = self.vllm_client = Engine(plain_model(tie_word_embeddings=is_tied))

    monkeypatch.setattr(f"{VLLM}._init_vllm", start)
    model, plain = (make(tie_word_embeddings=is_tied) for make in (with_norm, plain_model))
    options = {**WITH_VLLM, "vllm_mode": mode, "vllm_importance_sampling_correction": False}
    generation = trainer("GRPO", model, **options).vllm_generation
    places = dict(generation.llm.model.named_parameters())
    for seed in (1, 2):
        fill(model, seed=seed)
        generation.sync_weights()
        randlora.merge(merged := copy.deepcopy(model))
        assert all_bits(places) == all_bits(dict(merged.named_parameters()))
    assert generation.llm.received == [*places] * 2
    changed = {name for name, value in plain.named_parameters() if not same_bits(value, places[name])}
    assert changed == {name for name in places if "_proj" in name or name == "model.norm.weight"}
