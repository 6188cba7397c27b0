"""The types of what an adapter's two files say, field by field. Readers check whole files against them first.

What types cannot say, such as which numbers are ranks, `RandLoRAConfig` and `BasisSpec` check.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, Union, get_args, get_origin

from randlora.config import OPTIONS
from randlora.hints import UNIONS


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


def _in_file(hint: Any) -> Any:
    """Return the type that values of an option have in a file: names for patterns, and lists of pairs for mappings."""
    kinds = get_args(hint) if get_origin(hint) in UNIONS else (hint,)
    if Sequence[str] in kinds:
        return list[str] | None
    pairs = [list[tuple[str, get_args(kind)[1]]] if get_origin(kind) is Mapping else kind for kind in kinds]  # type: ignore[misc]
    return Union[tuple(pairs)]  # noqa: UP007 (of any number)


if TYPE_CHECKING:
    ConfigFacts = dict[str, Any]
else:
    _OWN = {name: _in_file(option.type) for name, option in OPTIONS.items()}
    ConfigFacts = TypedDict(
        "ConfigFacts", {name: NotRequired[own] if OPTIONS[name].since > 1 else own for name, own in _OWN.items()}
    )
    """A `RandLoRAConfig` in our header, which lists names: nothing in a file is a pattern."""


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
