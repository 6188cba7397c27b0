"""What is particular to embeddings: rows, padding, options of torch's, subclasses, ties and resizing."""

import copy
from functools import partial
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

import randlora
from randlora.errors import AdapterError, TargetError
from randlora.readers.read_weight import EmbeddingAdapter
from tests.kit import fill, same_bits, untouched
from tests.laws import adapter_layer, assert_close
from tests.models import GPT2
from tests.read_kinds import Scaled


def adapted(embedding: nn.Module, **options: Any) -> nn.Sequential:
    model = nn.Sequential(embedding)
    randlora.inject(model, **{"r": 3, "alpha": 6, "targets": ["0"], "stream": "portable", **options})
    return fill(model)


def table(model: nn.Sequential) -> Tensor:
    weight = adapter_layer(model[0]).weight_of(model[0])
    assert weight is not None
    return weight.detach() + randlora.delta_weight(model, "0")


def test_the_update_of_the_table_is_not_formed_for_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> Tensor:
        raise AssertionError("the whole table was read")

    model = adapted(nn.Embedding(30, 12))
    expected = table(model)[torch.tensor([[1, 2], [2, 29]])]
    monkeypatch.setattr(EmbeddingAdapter, "read", read)
    found = model(torch.tensor([[1, 2], [2, 29]]))
    assert_close(found, expected, torch.float32)
    found.sum().backward()


def test_positions_of_padding_have_the_rows_of_the_table_and_no_gradient() -> None:
    padded, plain = (adapted(nn.Embedding(30, 12, padding_idx=index)) for index in (2, None))
    padded[0].load_state_dict(plain[0].state_dict())
    ids = torch.tensor([2, 2, 9])
    assert same_bits(padded(ids), plain(ids))
    assert_close(padded(ids)[0], table(padded)[2], torch.float32)
    gradients = []
    for model, own in ((padded, ids), (plain, ids[2:])):
        model(own).square().sum().backward()
        gradients.append([parameter.grad for parameter in randlora.trainable_parameters(model)])
    for of_padded, of_others in zip(*gradients, strict=True):
        assert of_padded is not None
        assert of_others is not None
        assert_close(of_padded, of_others, torch.float32)


def test_options_that_concern_the_gradient_of_the_frozen_table_change_nothing() -> None:
    tables = nn.Embedding(30, 12), nn.Embedding(30, 12, scale_grad_by_freq=True), nn.Embedding(30, 12, sparse=True)
    models = [adapted(table) for table in tables]
    gradients = []
    for model in models:
        model[0].load_state_dict(models[0][0].state_dict())
        model(torch.tensor([3, 3, 9])).square().sum().backward()
        gradients.append([parameter.grad for parameter in randlora.trainable_parameters(model)])
        assert model[0].get_parameter("weight").grad is None
    for found in gradients[1:]:
        torch.testing.assert_close(found, gradients[0], rtol=0, atol=0)


def test_a_table_that_is_renormalized_quantized_or_tied_is_refused() -> None:
    renormalized = nn.Sequential(nn.Embedding(30, 12, max_norm=1.0))
    refused = [
        (renormalized, "0", r"0 has max_norm=1\.0, with which its forward changes the"),
        (GPT2.build(), "wte", r"transformer\.wte is tied to lm_head\.weight"),
    ]
    for model, target, match in refused:
        with untouched(model), pytest.raises(TargetError, match=match):
            randlora.inject(model, r=3, targets=[target])
    for kind in (bitsandbytes.nn.Embedding8bit, bitsandbytes.nn.EmbeddingNF4):
        for model in (nn.Sequential(kind(16, 64)), nn.Sequential(kind(16, 64)).to("cpu")):
            with pytest.raises(TargetError, match=rf"0 \({kind.__name__}\) cannot be adapted: its table is quantized"):
                randlora.inject(model, r=3, targets=["0"])


@pytest.mark.parametrize(
    ("embedding", "given"),
    [
        (lambda: Scaled(20, 12), (torch.tensor([[1, 4]]),)),
        (lambda: Gemma3TextScaledWordEmbedding(20, 12, 0, embed_scale=3.5), (torch.tensor([[1, 4]]),)),
        (partial(OPTLearnedPositionalEmbedding, 18, 12), (torch.ones(1, 4, dtype=torch.int64),)),
        (partial(bitsandbytes.nn.StableEmbedding, 16, 12), (torch.tensor([3, 9]),)),
    ],
    ids=["scaled", "gemma", "opt-positions", "bitsandbytes"],
)
def test_a_forward_of_a_subclass_computes_with_the_adapted_table(embedding: Any, given: tuple[Tensor, ...]) -> None:
    plain = embedding()
    model = adapted(copy.deepcopy(plain))
    with torch.no_grad():
        plain.weight.copy_(table(model))
    found = model[0](*given)
    assert_close(found, plain(*given), torch.float32)
    found.square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in randlora.trainable_parameters(model))  # type: ignore[union-attr]
    assert randlora.merge(model).notes == ()
    assert_close(model[0](*given), found, torch.float32)


def test_a_table_that_was_resized_since_is_an_error_and_not_another_result() -> None:
    """Not by transformers, which is refused: see tests/test_model_replaced.py."""
    model = nn.Sequential(nn.Embedding(20, 12))
    randlora.inject(model, r=3, targets="0")
    fill(model)
    table = model.get_submodule("0")
    assert isinstance(table, nn.Embedding)
    table.get_parameter("weight").data = torch.randn(24, 12)
    table.num_embeddings = 24
    with pytest.raises(AdapterError, match=r"\(24, 12\) had the shape \(20, 12\) when it was adapted"):
        model(torch.tensor([[3]]))


def test_an_index_outside_of_the_table_is_torchs_error() -> None:
    for num_rows in (30, 5):
        model = adapted(nn.Embedding(num_rows, 12))
        with pytest.raises(IndexError, match="out of range"):
            model(torch.tensor([num_rows]))
