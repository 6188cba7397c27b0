"""The two streams of PEFT: what each torch drew from a seed, and the same bits on every CPU."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from randlora.bases.basis import Basis
from randlora.bases.spec import PEFT_STREAMS, BasisSpec
from randlora.config import BasisKind
from tests.further import further
from tests.peer import PEFT_STREAM
from tests.strategies import KINDS_AND_STREAMS
from tests.test_golden import DATA

LARGE = BasisSpec("dense", "torch", 3, 32, 3072, 768)
"""Bases of 2.4 million entries, of which some are others wherever torch rounds twice."""

DIGESTS = """
import json, sys
from randlora.bases.basis import Basis
from randlora.bases.spec import BasisSpec
specs = [BasisSpec.from_dict(facts) for facts in json.load(sys.stdin)]
print(json.dumps([Basis(spec).digest(spec.max_dim, spec.min_dim) for spec in specs]))
"""


@pytest.mark.medium
@pytest.mark.parametrize("capability", ["default", further("avx2"), further("avx512")])
def test_bases_are_the_committed_ones_on_every_cpu(capability: str) -> None:
    """In a process each, as torch chooses once. What this CPU cannot do, torch would do all the same, and crash."""
    ranks = ("default", "avx2", "avx512")
    here = torch.backends.cpu.get_cpu_capability().lower()
    if capability != "default" and (here not in ranks or ranks.index(here) < ranks.index(capability)):
        pytest.skip(f"the CPU has no {capability}")
    golden = json.loads((DATA / "golden_digests.json").read_text(encoding="utf-8"))
    specs = {
        f"{kind}/{stream}": BasisSpec(kind, stream, 7, 8, 48, 30, (2, 4) if kind == "block" else None)
        for kind, stream in KINDS_AND_STREAMS
    }
    specs |= {f"dense/{stream} 3072x768": replace(LARGE, stream=stream) for stream in PEFT_STREAMS}
    found = subprocess.run(
        [sys.executable, "-c", DIGESTS],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        input=json.dumps([spec.to_dict() for spec in specs.values()]),
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert dict(zip(specs, json.loads(found), strict=True)) == golden


def peft_dense(spec: BasisSpec) -> tuple[Tensor, Tensor]:
    """Draw dense bases as PEFT 0.21.2 does, with whatever torch is installed: A, then each matrix of B."""
    generator = torch.Generator().manual_seed(spec.seed)

    def uniform(*shape: int) -> Tensor:
        drawn = torch.empty(shape, dtype=torch.bfloat16)
        return nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)

    basis_A = uniform(spec.r, 1, spec.min_dim)
    basis_B = torch.cat([uniform(spec.max_dim, 1, spec.r) for _ in range(spec.num_bases)], dim=1)
    return basis_A / basis_A.std(), basis_B / basis_B.std()


@pytest.mark.parametrize(
    "spec",
    [
        LARGE,
        BasisSpec("dense", "torch", 0, 15, 896, 200),
        BasisSpec("dense", "torch", 2**64 - 1, 1, 64, 64),
        BasisSpec("dense", "torch", 1, 100, 333, 7),
    ],
    ids=str,
)
def test_the_installed_torch_draws_one_of_the_two_streams(spec: BasisSpec) -> None:
    if PEFT_STREAM == "torch" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("torch rounds twice here")
    spec = replace(spec, stream=PEFT_STREAM)
    ours = Basis(spec).slices(spec.max_dim, spec.min_dim, device="cpu", dtype=torch.bfloat16)
    for found, expected in zip(ours, peft_dense(spec), strict=True):
        assert torch.equal(found, expected)


@settings(max_examples=60)
@given(
    kind=st.sampled_from(["sparse", "very_sparse"]),
    seed=st.integers(0, 2**32),
    r=st.integers(4, 32),
    sides=st.tuples(st.integers(16, 300), st.integers(16, 300)),
)
def test_the_scale_of_a_ternary_basis_is_that_of_peft(
    kind: BasisKind, seed: int, r: int, sides: tuple[int, int]
) -> None:
    """PEFT divides by what torch's ``std`` makes of the float32 entries, we by what their counts are."""
    spec = BasisSpec(kind, "torch", seed, r, max(sides), min(sides))
    for matrix in Basis(spec, extent=(spec.max_dim, spec.min_dim)).matrices():
        assert matrix.scale == (1 / matrix.values.float().std()).item()


def test_the_streams_are_drawn_from_the_same_numbers_and_differ_almost_everywhere() -> None:
    first, second = (
        Basis(replace(LARGE, stream=stream)).slices(3072, 768, device="cpu", dtype=torch.float32).B
        for stream in PEFT_STREAMS
    )
    assert (first != second).float().mean() > 0.99
    assert len(first.unique()) > 1000
    assert len(second.unique()) <= 256  # as many as 8 bits tell apart
