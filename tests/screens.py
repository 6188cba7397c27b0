"""The blocks ``console`` of the page on the command line, each what its commands print: ``python -m tests.screens``."""

import io
import json
import re
import shlex
import sys
import tempfile
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path

import torch
import transformers

from randlora.__main__ import main
from randlora.disk.formats import Planned, header_bytes
from tests.model_directories import save_adapter, save_model
from tests.models import LLAMA
from tests.quantized import quantize

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"
SCREEN = re.compile(r"^```console\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
CONTINUED = "\\\n"
COMMAND = re.compile(r"^\$ (?P<words>(?:.*\\\n)*.*\n)", re.MULTILINE)


def prepare(directory: Path) -> None:
    write_llama_3_8b(directory / "Llama-3-8B")
    base = save_model(LLAMA, directory / "tiny-llama", dtype=torch.bfloat16, is_sharded=True)
    (base / "tokenizer.json").write_text("{}", encoding="utf-8")
    quantize(LLAMA, "nf4", directory / "tiny-llama-4bit")
    save_adapter(LLAMA, directory / "poems", dtype=torch.bfloat16, targets=["q_proj", "v_proj"])
    save_adapter(LLAMA, directory / "prose", dtype=torch.bfloat16, targets=["q_proj", "up_proj"], values=1)


def write_llama_3_8b(directory: Path) -> None:
    """Write a checkpoint with the headers of Llama-3-8B; its 16 GB of values are a hole in the file."""
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    config = transformers.LlamaConfig(vocab_size=128256, architectures=["LlamaForCausalLM"], **sizes)
    with torch.device("meta"):
        weights = transformers.LlamaForCausalLM(config).state_dict()
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")
    tensors = [Planned(name, torch.bfloat16, tuple(weight.shape), list) for name, weight in weights.items()]
    with (directory / "model.safetensors").open("wb") as file:
        file.write(header_bytes(tensors, {"format": "pt"}))
        file.truncate(file.tell() + sum(tensor.nbytes for tensor in tensors))


def printed(command: str) -> str:
    program, *words = shlex.split(command)
    assert program == "randlora", f"a screen runs {program}"
    screen = io.StringIO()
    with redirect_stdout(screen), redirect_stderr(screen):
        main(words)
    return "".join(f"{line.rstrip()}\n" for line in screen.getvalue().splitlines())


def record(page: str, directory: Path) -> str:

    def again(screen: re.Match[str]) -> str:
        commands = COMMAND.finditer(screen["text"])
        shown = [f"{command[0]}{printed(command['words'].replace(CONTINUED, ''))}" for command in commands]
        return f"```console\n{''.join(shown)}```"

    prepare(directory)
    with chdir(directory):
        return SCREEN.sub(again, page)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        recorded = record(PAGE.read_text(encoding="utf-8"), Path(made))
    if recorded != PAGE.read_text(encoding="utf-8"):
        PAGE.write_text(recorded, encoding="utf-8")
        sys.stdout.write(f"recorded {PAGE} anew\n")
