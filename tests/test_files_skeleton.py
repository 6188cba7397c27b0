"""A skeleton has the names, shapes, dtypes and kinds of layers of the model, and no values."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from randlora.files.model_directory import read_model_directory
from randlora.files.names import Naming
from randlora.files.skeleton import Skeleton, skeleton
from randlora.layers.registry import find_layer
from randlora.targets.walk import Census
from tests.model_directories import contents, save_model, write
from tests.models import GPT2, LLAMA, RealModel, every_transformers_model


def of(directory: Path) -> Skeleton:
    """Build the skeleton of a directory."""
    return skeleton(read_model_directory(directory))


def parameters(model: nn.Module) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """List parameters in the model's order; a tied one comes at each of its places."""
    return [(fqn, found.dtype, tuple(found.shape)) for fqn, _, _, found in Census.of(model).parameters]


@every_transformers_model
@pytest.mark.parametrize("is_sharded", [False, True], ids=["one-file", "sharded"])
def test_the_parameters_are_those_of_the_model_in_its_order(kind: RealModel, is_sharded: bool, tmp_path: Path) -> None:
    model = kind.build().to(torch.bfloat16)
    built = of(write(model, tmp_path, is_sharded=is_sharded))
    ours, theirs = parameters(built), parameters(model)
    assert sorted(ours) == sorted(theirs)
    matrices = [entry for entry in ours if len(entry[2]) == 2]
    assert matrices == [entry for entry in theirs if len(entry[2]) == 2]
    assert all(parameter.is_meta and not parameter.requires_grad for parameter in built.parameters())
    assert built.config.model_type == kind.name
    assert built.doubts == ()


@every_transformers_model
def test_the_linear_layers_are_those_of_the_model_and_served_alike(kind: RealModel, tmp_path: Path) -> None:
    model = kind.build()

    def layers(model: nn.Module) -> list[tuple[str, object]]:
        return [(visit.fqn, find_layer(visit.module)) for visit in Census.of(model).visits if find_layer(visit.module)]

    assert layers(of(write(model, tmp_path))) == layers(model) != []


def test_building_reads_no_value(tmp_path: Path) -> None:
    save_model(LLAMA, tmp_path)
    path = tmp_path / "model.safetensors"
    size, before = path.stat().st_size, parameters(of(tmp_path))
    header = path.read_bytes()[: size - read_model_directory(tmp_path).nbytes]
    path.write_bytes(header + b"\xff" * (size - len(header)))
    assert parameters(of(tmp_path)) == before


def test_names_may_be_what_the_caller_says(tmp_path: Path) -> None:
    directory = read_model_directory(save_model(GPT2, tmp_path))
    built = skeleton(directory, Naming(added="outer.", dropped="transformer."))
    assert "outer.h.0.attn.c_attn" in dict(built.named_modules())


@pytest.mark.parametrize("says_tied", [None, True, False])
def test_a_head_is_tied_where_the_config_or_its_absence_says_so(says_tied: bool | None, tmp_path: Path) -> None:
    save_model(GPT2, tmp_path)  # which has no head in its file
    config = (tmp_path / "config.json").read_text(encoding="utf-8")
    said = {None: "", True: '"tie_word_embeddings": true,', False: '"tie_word_embeddings": false,'}[says_tied]
    (tmp_path / "config.json").write_text(config.replace('"tie_word_embeddings": true,', said), encoding="utf-8")
    without, modules = of(tmp_path), dict(of(tmp_path).named_modules())
    assert ("lm_head" in modules) == (says_tied is not False)
    assert (without.get_output_embeddings() is not None) == (says_tied is not False)

    held = load_file(tmp_path / "model.safetensors")
    held["lm_head.weight"] = held["transformer.wte.weight"].clone()
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    with_head = dict(named for named in of(tmp_path).named_parameters(remove_duplicate=False))
    assert (with_head["lm_head.weight"] is with_head["transformer.wte.weight"]) == (says_tied is True)


def test_nothing_is_written(tmp_path: Path) -> None:
    before = contents(save_model(LLAMA, tmp_path))
    of(tmp_path)
    assert contents(tmp_path) == before
