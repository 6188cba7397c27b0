"""The types of what an adapter's two files say, field by field. Readers check whole files against them first.

What types cannot say, such as which numbers are ranks, `RandLoRAConfig` and `BasisSpec` check.
"""

from typing import Any, NotRequired, TypedDict


class BasisFacts(TypedDict):
    """A `BasisSpec` in our header."""

    kind: str
    stream: str
    seed: int
    r: int
    max_dim: int
    min_dim: int
    blocks: tuple[int, int] | None


class RecordFacts(TypedDict):
    """A `BasisRecord` in our header."""

    basis: BasisFacts
    basis_sha256: str
    is_reproducible: bool


class ConfigFacts(TypedDict):
    """A `RandLoRAConfig` in our header, which lists names: nothing in a file is a pattern."""

    r: int | list[tuple[str, int]]
    targets: list[str]
    exclude: None
    alpha: float | list[tuple[str, float]] | None
    dropout: float
    basis: str
    stream: str | None
    blocks: tuple[int, int] | None
    seed: int
    train_also: list[str] | None
    in_proj: NotRequired[str]
    experts: NotRequired[str]


class ModelClassFacts(TypedDict):
    """A `ModelClass` in our header."""

    library: str
    name: str
    labels: NotRequired[list[str]]
    problem_type: NotRequired[str]


class HeaderFacts(TypedDict):
    """What our header has in every version of the format; the first files lack some."""

    config: ConfigFacts
    targets: dict[str, list[int]]
    library_version: str
    sha256: str
    torch_version: NotRequired[str | None]
    transposed: NotRequired[list[str] | None]
    kinds: NotRequired[dict[str, str]]
    model_class: NotRequired[ModelClassFacts]


class HeaderFacts1(HeaderFacts, RecordFacts):
    """Our header in version 1, with one pair of bases."""


class HeaderFacts2(HeaderFacts):
    """Our header in version 2, with bases by r."""

    bases: dict[str, RecordFacts]


class HeaderFacts3(HeaderFacts2):
    """Our header in version 3, with the names of the buffers among what was trained."""

    buffers: list[str]


class PeftFields(TypedDict, total=False):
    """``adapter_config.json``, which may have fields of any other name."""

    alpha_pattern: dict[str, float] | None
    auto_mapping: dict[str, Any] | None
    base_model_name_or_path: str | None
    bias: str
    fan_in_fan_out: bool
    inference_mode: bool
    init_weights: bool
    layers_pattern: list[str] | str | None
    layers_to_transform: list[int] | int | None
    modules_to_save: list[str] | None
    peft_type: str
    peft_version: str | None
    projection_prng_key: int
    r: int
    randlora_alpha: float
    randlora_dropout: float
    randlora_stream: str
    rank_pattern: dict[str, int] | None
    revision: str | None
    save_projection: bool
    sparse: bool
    target_modules: list[str] | str | None
    task_type: str | None
    very_sparse: bool
