"""What the tests of trainers share: a tiny model, a tokenizer, data and arguments, without the Hub."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import randlora
from tests.checkpoint_files import CARD_FILE, CONFIG_FILE, TENSORS_FILE
from tests.kit import Bits, bits
from tests.peer import TRAINERS_WARNINGS

ADAPTER_FILES = {CARD_FILE, CONFIG_FILE, TENSORS_FILE}
LETTERS = {chr(code): code for code in range(128)}

QUIET = [
    *TRAINERS_WARNINGS,
    pytest.mark.filterwarnings("ignore:.*torch_dtype.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*None of the inputs have requires_grad=True.*:UserWarning"),
]


def plain_model(**options: Any) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=130, **sizes | options))


def adapted_model(**options: Any) -> LlamaForCausalLM:
    model = plain_model()
    randlora.inject(model, **{"r": 8, **options})
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel(LETTERS | {"<pad>": 128, "<eos>": 129}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def rows() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, 130, (16, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


def preferences() -> Any:
    """Return examples for TRL's `DPOTrainer`."""
    from datasets import Dataset

    chosen, rejected = ([f" {i * i}" for i in range(16)], [f" {i}" for i in range(16)])
    return Dataset.from_dict({"prompt": [f"{i} squared is" for i in range(16)], "chosen": chosen, "rejected": rejected})


def arguments(make: Callable[..., Any], directory: Path | str, **options: Any) -> Any:
    """Make the arguments of a trainer that saves every second of four steps."""
    given: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    given |= {"report_to": [], "disable_tqdm": True, "use_cpu": True, "logging_steps": 1, "seed": 3}
    return make(str(directory), **given | options)


def trained_bits(model: nn.Module) -> list[Bits]:
    return [bits(parameter) for parameter in randlora.trainable_parameters(model)]


def files(directory: Path | str) -> set[str]:
    return {path.name for path in Path(directory).iterdir()}
