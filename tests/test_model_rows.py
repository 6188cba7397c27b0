"""Rows of embeddings and heads that an adapter trains: what they compute, and what the verbs do with them."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding as ScaledEmbedding

import randlora
from randlora import files
from randlora.errors import AdapterError, CheckpointError, ConfigError, MergeError, RandLoRAError, TargetError
from tests.checkpoint_files import CARD_FILE, read_tensors
from tests.kit import adapt, adapter_values, all_bits, on_one_line, same_bits, untouched
from tests.laws import needs_compiler
from tests.models import llama
from tests.quantized import of_4_bits

DATA = Path(__file__).parent / "data" / "golden_v4_rows"
ROWS, WIDTH = 11, 6
IDS = torch.tensor([[1, 3, 5, 10], [3, 7, 0, 1]])
WORDS = torch.tensor([[1, 3, 5, 60, 3, 7]])


class Words(nn.Module):
    """An embedding, a layer, and a head that may have the same table."""

    def __init__(self, *, is_tied: bool = True, has_bias: bool = False, padding: int | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(ROWS, WIDTH, padding)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, ROWS, bias=has_bias)
        if is_tied:
            self.head.weight = self.embed.weight
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)

    def forward(self, ids: Tensor) -> Tensor:
        output: Tensor = self.head(torch.tanh(self.body(self.embed(ids))))
        return output


class Scaled(Words):
    """An embedding with its own forward, and a head whose weight is read instead of called."""

    def __init__(self) -> None:
        super().__init__()
        table = self.embed.weight
        self.embed = ScaledEmbedding(ROWS, WIDTH, None, 3.0)
        self.embed.weight = table

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.body(self.embed(ids))), self.head.weight)


def whole(model: Any, *names: str) -> Any:
    """Return the model that some adapters make of one, without any: tables and weights are leaves."""
    plain = copy.deepcopy(model)
    randlora.eject(plain)
    plain.requires_grad_(True)
    with torch.no_grad():
        for name in names:
            plain.body.weight += randlora.delta_weight(model, "body", name=name)
            for fqn, numbers in next(each for each in randlora.adapters(model) if each.name == name).train_rows.items():
                rows = adapter_values(model, name)[f"{fqn.removesuffix('.weight')}.randlora_rows"]
                plain.get_parameter(fqn)[list(numbers)] = rows.to(plain.get_parameter(fqn))
    return plain


some_ids = st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=9)
some_rows = st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=4, unique=True)


@given(some_rows, some_rows, some_ids, st.booleans(), st.booleans(), st.sampled_from([None, 0, 3]))
@example([3, 5], [0], [3, 3, 1], False, True, 3)
@example([3, 5], [0], [3, 3, 1], True, False, 3)
@settings(max_examples=20, deadline=None)
def test_rows_are_those_of_a_whole_table_whose_gradient_is_masked(
    first: list[int], second: list[int], ids: list[int], is_tied: bool, has_bias: bool, padding: int | None
) -> None:
    model = Words(is_tied=is_tied, has_bias=has_bias, padding=padding).double()
    chosen = {"a": first, "b": [row for row in second if row not in first]}
    for name, rows in chosen.items():
        named = {"embed": rows} if is_tied else {"embed": rows, "head": rows[:1]}
        adapt(model, name=name, targets=["body"], train_rows=named if rows else None, trainable=True, values=len(name))
    randlora.activate(model, [*chosen])
    oracle, x = whole(model, *chosen), torch.tensor([ids])
    output, expected = model(x), oracle(x)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    for each in (output, expected):
        each.square().sum().backward()
    for info in randlora.adapters(model):
        values = adapter_values(model, info.name)
        for fqn, numbers in info.train_rows.items():
            found = values[f"{fqn.removesuffix('.weight')}.randlora_rows"].grad
            torch.testing.assert_close(found, oracle.get_parameter(fqn).grad[list(numbers)], rtol=1e-10, atol=1e-12)
    assert model.embed.weight.grad is None


def test_code_that_reads_the_table_or_has_its_own_forward_gets_the_rows_too() -> None:
    model = adapt(Scaled().double(), targets=["body"], train_rows={"embed": [3, 10]})
    oracle = whole(model, "default")
    output, expected = model(IDS), oracle(IDS)
    torch.testing.assert_close(output, expected)
    for each in (output, expected):
        each.square().sum().backward()
    rows = adapter_values(model)["embed.randlora_rows"]
    torch.testing.assert_close(rows.grad, oracle.embed.weight.grad[[3, 10]])
    assert same_bits(model.head.weight, model.embed.weight)  # outside of a call it is the table


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_replaces_the_rows_of_all_that_share_the_table_and_unmerging_restores_every_bit(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model = adapt(Words().to(dtype), targets=["body"], train_rows={"head": [3, 10]})
    oracle, table = whole(model, "default"), model.embed.weight
    rows = adapter_values(model)["embed.randlora_rows"]
    assert rows.dtype == torch.float32
    delta = randlora.delta_weight(model, "embed")
    assert delta.any(1).nonzero().flatten().tolist() == [3, 10]
    adapted, before = model(IDS), all_bits(model.state_dict())
    merged = dict(randlora.merged_tensors(model))
    assert {*merged} == {*oracle.state_dict()}
    for name in ("embed.weight", "head.weight"):
        assert same_bits(merged[name], oracle.embed.weight)
    for is_kept in (True, False):
        randlora.merge(model, reversible=is_kept)
        assert model.head.weight is model.embed.weight
        assert same_bits(model.embed.weight, merged["embed.weight"])
        torch.testing.assert_close(model(IDS), adapted, rtol=0.1 if dtype == torch.bfloat16 else 1e-5, atol=1e-1)
        if is_kept:
            assert all_bits(model.state_dict()) == before
            assert torch.equal(randlora.delta_weight(model, "embed"), delta)
            randlora.unmerge(model)
            assert model.head.weight is model.embed.weight is table
            assert all_bits(model.state_dict()) == before
    assert type(model.head) is nn.Linear
    assert type(model.embed) is nn.Embedding


def test_the_file_has_the_rows_and_their_numbers_and_loads_wherever_the_table_has_these_rows(tmp_path: Path) -> None:
    model = adapt(llama(tie_word_embeddings=True), train_rows={"embed_tokens": [60, 3]})
    report = randlora.save(model, tmp_path / "a")
    tensors = read_tensors(tmp_path / "a")[0]
    (key,) = (key for key in tensors if "embed" in key)
    assert tuple(tensors[key].shape) == (2, 32)
    state = randlora.adapter_state(model)
    facts = json.loads(state.metadata["randlora"])
    assert facts["format_version"] == 4
    assert facts["config"]["train_rows"] == [["model.embed_tokens.weight", [3, 60]]]
    assert "2 rows of model.embed_tokens.weight" in (tmp_path / "a" / CARD_FILE).read_text()
    assert "its RandLoRA adapts linear layers only, not model.embed_tokens.weight (rows)" in report.notes[0]
    summary, planned = files.inspect(tmp_path / "a"), randlora.plan(llama(), r=4, train_rows={"embed_tokens": [60, 3]})
    assert summary.trained == {"model.embed_tokens.weight": (2, 32)}
    assert summary.trainable_parameters == planned.trainable_parameters

    loaded: Any = llama(tie_word_embeddings=True, vocab_size=70)
    with torch.no_grad():
        for own, theirs in zip(loaded.parameters(), whole(model).parameters(), strict=True):
            own[: len(theirs)] = theirs
        loaded.model.embed_tokens.weight[[3, 60]] = 7.0  # whatever they are, they are replaced
    randlora.load(loaded, tmp_path / "a")
    assert torch.equal(loaded(WORDS).logits[..., :64], model(WORDS).logits)
    randlora.swap(loaded, state.with_tensors({name: 2 * tensor for name, tensor in state.tensors.items()}))
    assert torch.equal(adapter_values(loaded)["model.embed_tokens.randlora_rows"], 2 * tensors[key])
    other = adapt(llama(tie_word_embeddings=True), train_rows={"embed_tokens": [60, 4]})
    with untouched(other), pytest.raises(CheckpointError, match=r"rows of model.embed_tokens.weight"):
        randlora.swap(other, state)
    for small in (llama(tie_word_embeddings=True, vocab_size=60), llama(vocab_size=60)):
        with untouched(small), pytest.raises(CheckpointError, match="up to row 60, in the file: resize it first"):
            randlora.load(small, state)


def golden() -> Words:
    """Return a model with rows, and Λ and Γ, of a formula."""
    model = Words()
    randlora.inject(model, r=2, targets=["body"], train_rows={"embed": [3, 10]})
    with torch.no_grad():
        for number, value in enumerate(adapter_values(model).values()):
            value.copy_((torch.arange(value.numel()).view(value.shape) - 3 * number) / 8)
    return model


def test_the_golden_file_of_version_4_loads_and_is_written_again(tmp_path: Path) -> None:
    expected, model = golden(), Words()
    randlora.load(model, DATA)
    assert all_bits(adapter_values(model)) == all_bits(adapter_values(expected))
    randlora.save(model, tmp_path)
    assert all_bits(read_tensors(tmp_path)[0]) == all_bits(read_tensors(DATA)[0])


def test_adapters_have_their_own_rows_which_no_factor_scales_and_only_different_ones_act_together() -> None:
    model = Words()
    for name, rows in {"a": [1, 3], "b": [3, 5], "c": [10]}.items():
        adapt(model, name=name, targets=["body"], train_rows={"embed": rows}, values=ord(name))
    with untouched(model), pytest.raises(AdapterError, match=r"b and a|a and b each trained .* row 3 of embed.weight"):
        randlora.activate(model, ["a", "b"])
    randlora.activate(model, {"a": 0.0, "c": 0.0})
    oracle = whole(model, "a", "c")
    oracle.body = copy.deepcopy(Words().body)
    torch.testing.assert_close(model(IDS), oracle(IDS))
    with randlora.disabled(model):
        assert torch.equal(model(IDS), Words()(IDS))
    randlora.remove(model, "a")
    randlora.activate(model, "b")
    torch.testing.assert_close(model(IDS), whole(model, "b")(IDS))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(IDS), model(IDS))
        held = [each for key, each in copied.named_parameters(remove_duplicate=False) if key.endswith("rows.b")]
        assert len(held) == 2
        assert held[0] is held[1]
    routed = randlora.serving.routed(model, ["b", None])
    with pytest.raises(AdapterError, match="train_also or train_rows, and the model can use only one copy"), routed:
        pass
    with pytest.raises(AdapterError, match="combine does not sum"):
        randlora.serving.combine(model, {"b": 0.5, "c": 0.5}, name="d")
    randlora.eject(model)
    assert all_bits(model.state_dict()) == all_bits(Words().state_dict())
    assert [type(each) for each in (model.embed, model.head)] == [nn.Embedding, nn.Linear]


WRONG: list[tuple[dict[str, Any], dict[str, Any], type[RandLoRAError], str]] = [
    ({"embed": [ROWS]}, {}, TargetError, "embed.weight has 11 rows, and row 11 would be trained: resize it first"),
    ({"embed": [1, 1]}, {}, ConfigError, "at least one row, and different integers of at least 0"),
    ({"embed": [-1]}, {}, ConfigError, "at least one row, and different integers of at least 0"),
    ({"embed": []}, {}, ConfigError, "at least one row, and different integers of at least 0"),
    ({"embed": [1.5]}, {}, ConfigError, "must be an integer, got 1.5"),
    ({"embed": 1}, {}, ConfigError, "must be a sequence"),
    ({"embedding": [1]}, {}, TargetError, "matches no module with a weight; the nearest names are embed"),
    ({"norm": [1]}, {}, TargetError, "norm is a LayerNorm: expected an embedding"),
    ({"codes": [1]}, {}, TargetError, "codes is quantized"),
    ({"capped": [1]}, {}, TargetError, "by max_norm or scale_grad_by_freq"),
    ({"embed": [1], "head": [2]}, {}, TargetError, "different rows of embed.weight, once as 'head'"),
    ({"embed": [1]}, {"train_also": ["head"]}, TargetError, "embed.weight is named by targets or train_also too"),
    ({"other": [1]}, {"targets": ["other", "body"]}, TargetError, "other.weight is named by targets or train_also"),
]


@pytest.mark.parametrize(("rows", "options", "error", "message"), WRONG)
def test_rows_that_cannot_be_trained_are_refused_before_anything_is_touched(
    rows: dict[str, Any], options: dict[str, Any], error: type[RandLoRAError], message: str
) -> None:
    model = Words()
    model.norm, model.other, model.capped = nn.LayerNorm(6), nn.Embedding(4, 4), nn.Embedding(4, 4, max_norm=1)
    model.codes = of_4_bits(64, 8, quant_storage=torch.bfloat16)
    with untouched(model), pytest.raises(error, match=message):
        randlora.inject(model, **{"r": 2, "targets": ["body"], "train_rows": rows, **options})


def test_a_table_is_adapted_or_trained_in_one_way_by_all_adapters() -> None:
    model = Words(is_tied=False)
    adapt(model, name="rows", targets=["body"], train_rows={"embed": [1]})
    with untouched(model), pytest.raises(TargetError, match="its rows are trained, by rows: it cannot have both"):
        randlora.inject(model, r=2, name="b", targets=["embed"])
    with untouched(model), pytest.raises(AdapterError, match=r"rows of embed\.weight, and another one all of it"):
        randlora.inject(model, r=2, name="b", targets=["body"], train_also=["embed"])
    assert "embed" in randlora.plan(model, r=2, name="b", targets="all").skipped
    assert "embed" not in randlora.plan(Words(is_tied=False), r=2, targets="all", train_rows={"embed": [1]}).targets
    other = adapt(Words(is_tied=False), targets=["embed"])
    with untouched(other), pytest.raises(TargetError, match="embed is adapted already"):
        randlora.inject(other, r=2, name="b", targets=["body"], train_rows={"embed": [1]})
    untied = adapt(Words(is_tied=False), r=2, targets=["body"], train_also=["head"])
    model = adapt(Words(), r=2, targets=["body"], train_rows={"embed": [3]})
    with untouched(model), pytest.raises(AdapterError, match=r"rows of embed\.weight, and another one all of it"):
        randlora.load(model, randlora.adapter_state(untied), name="b")
    meta = Words().to("meta")
    assert randlora.plan(meta, r=2, train_rows={"embed": [1]}).train_rows == {"embed.weight": (1,)}
    with untouched(meta), pytest.raises(AdapterError, match=r"embed.weight holds no values yet"):
        randlora.inject(meta, r=2, train_rows={"embed": [1]})


def test_a_table_and_what_it_is_tied_to_may_not_change() -> None:
    model: Any = adapt(llama(tie_word_embeddings=True), train_rows={"embed_tokens": [3, 60]})
    model.resize_token_embeddings(70)  # which freezes the module with the rows
    with pytest.raises(AdapterError, match=r"had the shape \(64, 32\) and was resized"):
        model(WORDS)
    with pytest.raises(AdapterError, match=r"model.embed_tokens was 64 x 32 when it was adapted and is 70 x 32"):
        randlora.trainable_parameters(model)
    model = adapt(Words(), targets=["body"], train_rows={"embed": [3]})
    model.head.weight = nn.Parameter(model.head._parameters["weight"].detach().clone())
    with pytest.raises(MergeError, match=r"embed no longer has adapter 'default': .*, or its table tied"):
        randlora.merge(model)


def test_rows_are_saved_and_merged_whichever_module_with_the_table_comes_first() -> None:
    model: Any = adapt(Words(), targets=["body"], train_rows={"embed": [3]})
    expected, rows = model(IDS), model.embed.randlora_rows.default
    model._modules["embed"] = model._modules.pop("embed")
    assert same_bits(randlora.adapter_state(model).tensors["base_model.model.head.weight"], rows)
    randlora.merge(model)
    assert torch.allclose(model(IDS), expected, atol=1e-4)
    assert model.head.weight is model.embed.weight


@pytest.mark.parametrize("name", ["embed", "head"])
def test_a_forward_is_refused_if_one_of_the_modules_with_the_table_was_replaced(name: str) -> None:
    model: Any = adapt(Words(), targets=["body"], train_rows={"embed": [3]})
    expected, first = model(IDS), getattr(model, name)
    setattr(model, name, Words(is_tied=False).get_submodule(name))
    for _ in range(2):
        with pytest.raises(AdapterError, match=r"cannot run the model: embed.weight no longer has adapter 'default'"):
            model(IDS)
    for end in (lambda each: randlora.remove(each, "default"), randlora.eject):
        end(without := copy.deepcopy(model))
        assert [type(each) for each in without.children()] == [nn.Embedding, nn.Linear, nn.Linear]
        assert without(IDS).shape == expected.shape
    setattr(model, name, first)
    assert same_bits(model(IDS), expected)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # of PEFT
def test_files_are_merged_and_converted_as_in_memory(tmp_path: Path) -> None:
    base: Any = llama(tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    model = copy.deepcopy(base)
    for name, rows in {"a": [60, 3], "b": [5]}.items():
        adapt(model, name=name, train_rows={"embed_tokens": rows}, values=ord(name))
    randlora.save_all(model, tmp_path)
    report = files.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "merged", base=tmp_path / "base")
    assert report.replaced == ("model.embed_tokens.weight",)
    randlora.activate(model, ["a", "b"])
    files.save_merged(model, tmp_path / "saved")
    for directory in ("merged", "saved"):
        found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / directory).state_dict()
        assert all_bits(found) == all_bits(dict(randlora.merged_tensors(model)))
    adapt(model, name="c", train_rows={"embed_tokens": [3]})
    randlora.save(model, tmp_path / "c", name="c")
    with pytest.raises(CheckpointError, match=r"trained row 3 of model.embed_tokens.weight too"):
        files.merge([tmp_path / "a", tmp_path / "c"], tmp_path / "none", base=tmp_path / "base")
    randlora.save(adapt(copy.deepcopy(base), train_also=["embed_tokens"]), tmp_path / "whole")
    for order in (["a", "whole"], ["whole", "a"]):
        with pytest.raises(CheckpointError, match=r"one adapter trains rows of .*, and another one trains or adapts"):
            files.merge([tmp_path / name for name in order], tmp_path / "none", base=tmp_path / "base")
    files.convert(tmp_path / "a", tmp_path / "native", to="native")
    assert all_bits(read_tensors(tmp_path / "native")[0]) == all_bits(read_tensors(tmp_path / "a")[0])
    with pytest.raises(CheckpointError, match=r"not model.embed_tokens.weight \(rows\)"):
        files.convert(tmp_path / "a", tmp_path / "peft", to="peft")
    files.convert(tmp_path / "a", tmp_path / "lora", to="lora", rank=32, tolerance=1)
    randlora.activate(model, "a")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "lora")(input_ids=WORDS).logits
    torch.testing.assert_close(theirs, model(WORDS).logits, rtol=1e-4, atol=1e-5)


def test_rows_are_counted_and_said_and_told_from_those_that_nothing_has_trained(tmp_path: Path) -> None:
    rows: dict[str, Any] = {"train_rows": {"embed": [3, 10]}}
    none: dict[str, Any] = {}
    report, plain = (randlora.plan(Words(), r=2, targets=["body"], **each) for each in (rows, none))
    assert report.trainable_parameters - plain.trainable_parameters == 2 * WIDTH
    assert report.checkpoint_bytes - plain.checkpoint_bytes == 4 * 2 * WIDTH
    assert "also trained: 2 rows of embed.weight" in on_one_line(report)
    model = Words()
    assert randlora.inject(model, r=2, targets=["body"], **rows) == report
    (info,) = randlora.adapters(model)
    assert info.train_rows == {"embed.weight": (3, 10)}
    assert "also trained: 2 rows of embed.weight" in str(info)
    assert sum(each.numel() for each in randlora.trainable_parameters(model)) == report.trainable_parameters
    memory = [randlora.training_memory(Words(), 2, targets=["body"], **each).parameters for each in (rows, none)]
    assert memory[0] - memory[1] == 4 * 2 * WIDTH
    assert {*randlora.update_norms(model)} == {"body"}
    assert not randlora.check(model, IDS)
    state = randlora.adapter_state(model)
    assert randlora.RandLoRAConfig.from_dict(json.loads(state.metadata["randlora"])["config"]).train_rows
    assert "and its rows are the table's: nothing has trained it" in str(randlora.save(model, tmp_path).notes)
    adapter_values(model)["embed.randlora_rows"].data.add_(1)
    assert "nothing has trained it" not in str(randlora.save(model, tmp_path).notes)


def test_a_4_bit_model_and_one_converted_after_inject_compute_with_rows() -> None:
    model = Words()
    model.body = of_4_bits(64, 64)
    model.embed, model.head = nn.Embedding(ROWS, 64), nn.Linear(64, ROWS, bias=False)
    model.head.weight = model.embed.weight
    adapt(model, targets=["body"], train_rows={"embed": [3, 10]})
    oracle = copy.deepcopy(model)
    randlora.merge(oracle, quantized="dequantize")
    torch.testing.assert_close(model(IDS), oracle(IDS), rtol=1e-3, atol=1e-2)
    half = adapt(Words(), targets=["body"], train_rows={"embed": [3, 10]}).bfloat16()
    assert half(IDS).dtype == torch.bfloat16
    with torch.inference_mode():
        half(IDS)
    half(IDS).sum().backward()


def test_gradients_of_single_samples_are_those_of_each_alone() -> None:
    model = adapt(Words().double(), targets=["body"], train_rows={"embed": [3, 10]})
    values: dict[str, Tensor] = {name: each for name, each in model.named_parameters() if each.requires_grad}

    def loss(parameters: dict[str, Tensor], ids: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(model, parameters, (ids.unsqueeze(0),))
        return output.square().sum()

    before = model(IDS)
    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(values, IDS)
    assert all(each is values[name] for name, each in model.named_parameters() if name in values)
    assert same_bits(copy.deepcopy(model)(IDS), before)
    for index, ids in enumerate(IDS):
        alone = torch.autograd.grad(loss(values, ids), [*values.values()])
        for one, name in zip(alone, values, strict=True):
            torch.testing.assert_close(found[name][index], one)


@needs_compiler
@pytest.mark.medium
def test_compiled_code_computes_the_same() -> None:
    model = adapt(Words(), targets=["body"], train_rows={"embed": [3, 10]})
    adapt(model, name="b", targets=["body"], train_rows={"embed": [5]}, values=1)
    expected = {name: whole(model, name)(IDS) for name in ("default", "b")}
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for name, output in expected.items():
        randlora.activate(model, name)
        torch.testing.assert_close(compiled(IDS), output)
    randlora.activate(model, "default")
    compiled(IDS).square().sum().backward()
    oracle = whole(model, "default")
    oracle(IDS).square().sum().backward()
    rows = adapter_values(model)["embed.randlora_rows"]
    torch.testing.assert_close(rows.grad, oracle.embed.weight.grad[[3, 10]])
