"""The JSON of an adapter that PEFT wrote, beside its own tensors."""

from __future__ import annotations

import json
from functools import cache, partial
from typing import Any

import randlora
from randlora.checkpoint.read import AdapterFile, read_adapter
from randlora.errors import RandLoRAError
from tests.checkpoint_files import CONFIG_FILE, TENSORS_FILE
from tests.fuzz.files import Files, laid_out
from tests.fuzz.limits import bounded
from tests.fuzz.outcome import outcome
from tests.fuzz.seeds import of_peft
from tests.fuzz.target_adapter import READING, REST, check_rewritten, check_values, model_of
from tests.kit import untouched

TENSORS = ("stored", "drawn")


@cache
def _tensors(bases: str) -> bytes:
    return of_peft(bases)[f"adapter/{TENSORS_FILE}"]


def target(data: bytes) -> None:
    """Read a JSON file with the bases in the file, and with bases that its seed draws."""
    for bases in TENSORS:
        files: Files = {f"adapter/{CONFIG_FILE}": data, f"adapter/{TENSORS_FILE}": _tensors(bases)}
        with laid_out(files) as root:
            source = root / "adapter"
            with bounded(*READING):
                file = outcome(partial(read_adapter, source))
            with bounded(*REST):
                found = randlora.files.verify(source)
                if not isinstance(file, AdapterFile):
                    assert not found.passed
                    continue
                _check_options(json.loads(data), file)
                check_values(file)
                check_rewritten(file, root)
                kept = outcome(partial(randlora.files.convert, source, root / "peft", "peft"))
                if not isinstance(kept, RandLoRAError):
                    again = json.loads((root / "peft" / CONFIG_FILE).read_text(encoding="utf-8"))
                    assert json.dumps(again, sort_keys=True) == json.dumps(json.loads(data), sort_keys=True)
                sides = {fqn: (max(gamma.shape[-1], 2),) * 2 for fqn, (_, gamma) in file.values.items()}
                model = model_of(sides, file.trained)
                with untouched(model):
                    if not isinstance(outcome(partial(randlora.load, model, source)), RandLoRAError):
                        assert randlora.eject(model)


def _check_options(fields: dict[str, Any], file: AdapterFile) -> None:
    """Hold the options against a reading of the JSON of this test's own."""
    assert fields["peft_type"] == "RANDLORA"
    assert type(fields["r"]) is int
    assert {options.r for options in file.options.values()} == {fields["r"]}
    alpha = 20 * fields["r"] if fields["randlora_alpha"] is None else fields["randlora_alpha"]
    assert {options.alpha for options in file.options.values()} == {float(alpha)}
    assert file.config.dropout == fields.get("randlora_dropout", 0)
    assert file.config.seed == fields["projection_prng_key"] % 2**64
    assert file.config.basis == (
        "very_sparse" if fields.get("very_sparse") else "sparse" if fields.get("sparse") else "dense"
    )
