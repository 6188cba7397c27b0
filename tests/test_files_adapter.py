"""An adapter opened on disk computes the updates of the model that carries it, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import randlora
from randlora.config import BasisKind
from randlora.errors import CheckpointError
from randlora.files.adapter import OpenAdapter, open_adapter
from tests.checkpoint_files import CASES, Case, trained
from tests.directories import base_directory, our_directory, their_directory
from tests.kit import same_bits
from tests.models import GPT2, LLAMA, RealModel, every_transformers_model
from tests.peer import THEIR_WARNINGS, in_ours, told_stream

pytestmark = THEIR_WARNINGS


@pytest.mark.parametrize("stream", ["torch", "portable"])
@pytest.mark.parametrize("basis", ["dense", "sparse", "very_sparse"])
@pytest.mark.parametrize("bases", ["seed", "stored"])
def test_updates_are_those_of_the_model(basis: BasisKind, stream: Any, bases: str, tmp_path: Path) -> None:
    source, model = our_directory(GPT2, tmp_path, basis, bases=bases, stream=stream)
    assert_same_updates(open_adapter(source), model)


def test_updates_of_block_bases_are_those_of_the_model(tmp_path: Path) -> None:
    source, model = our_directory(LLAMA, tmp_path, "block")
    assert_same_updates(open_adapter(source), model)


@pytest.mark.parametrize("case", [case for case in CASES if case.dtype == torch.float32], ids=lambda case: case.name)
def test_updates_of_layers_of_every_sort_are_those_of_the_model(case: Case, tmp_path: Path) -> None:
    model = trained(case)
    randlora.save(model, tmp_path)
    assert_same_updates(open_adapter(tmp_path), model)


@pytest.mark.parametrize("save_projection", [True, False], ids=["bases in the file", "bases from the key"])
@every_transformers_model
def test_updates_of_a_file_of_peft_are_those_of_the_model(
    kind: RealModel, save_projection: bool, tmp_path: Path
) -> None:
    source, _ = their_directory(kind, tmp_path, save_projection=save_projection)
    adapter = open_adapter(source, base_directory(kind, tmp_path), stream=told_stream(source))
    assert_same_updates(adapter, in_ours(kind, source))


def test_without_shapes_no_update_can_be_had_and_the_base_is_named(tmp_path: Path) -> None:
    source, _ = their_directory(LLAMA, tmp_path)
    adapter = open_adapter(source)
    assert adapter.shapes is None
    with pytest.raises(CheckpointError, match="only the smaller dim of each layer"):
        [*adapter.delta_weights("model.layers.0.self_attn.q_proj")]


def assert_same_updates(adapter: OpenAdapter, model: nn.Module) -> None:
    assert adapter.shapes
    for fqn, shape in adapter.shapes.items():
        expected = randlora.delta_weight(model, fqn).detach()
        assert tuple(expected.shape) == shape
        assert expected.any()
        (found,) = adapter.delta_weights(fqn)
        assert same_bits(found, expected)
