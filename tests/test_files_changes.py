"""What adapters change in a checkpoint, and that they share bases as in a model."""

from pathlib import Path

import torch

from randlora.bases.basis import Basis
from randlora.files.base_fit import open_base
from randlora.files.changes import Changes, Merging, find_changes
from tests.model_directories import save_adapter, save_model
from tests.models import BERT, LLAMA


def bases(changes: Changes) -> list[Basis]:
    """List the bases of all updates, each once."""
    whole = [merging for merging in changes.computed.values() if isinstance(merging, Merging)]
    found = {id(update.basis): update.basis for merging in whole for update in merging.updates}
    return list(found.values())


def test_every_tensor_that_changes_is_named_and_no_other(tmp_path: Path) -> None:
    base = open_base(save_model(BERT, tmp_path / "base", is_sharded=True))
    adapter = save_adapter(BERT, tmp_path / "adapter", targets=["query"], train_also=["classifier"])
    changes = find_changes(base, {"a": (adapter, 1.0)})
    assert set(changes.merged) == {f"bert.encoder.layer.{layer}.attention.self.query.weight" for layer in (0, 1)}
    assert set(changes.replaced) == {"classifier.weight", "classifier.bias"}
    entry = base.directory.entries["bert.pooler.dense.weight"]
    (piece,) = changes.pieces(entry, torch.float32)
    assert torch.equal(piece.reshape(entry.shape), BERT.build().get_parameter(entry.name))


def test_adapters_of_equal_bases_share_them(tmp_path: Path) -> None:
    base = open_base(save_model(LLAMA, tmp_path / "base"))
    adapters = {name: (save_adapter(LLAMA, tmp_path / name, values=seed), 1.0) for seed, name in enumerate("ab")}
    assert len(bases(find_changes(base, adapters))) == 1


def test_bases_that_grow_are_grown_before_the_first_weight_is_merged(tmp_path: Path) -> None:
    base = open_base(save_model(LLAMA, tmp_path / "base"))
    small = save_adapter(LLAMA, tmp_path / "small", targets=["v_proj"], stream="portable")
    large = save_adapter(LLAMA, tmp_path / "large", targets=["up_proj"], stream="portable")
    (shared,) = bases(find_changes(base, {"small": (small, 1.0), "large": (large, 1.0)}))
    assert shared.extent == (48, 32)
