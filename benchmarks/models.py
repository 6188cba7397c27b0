"""Whole models from configs with random weights, adapted by each contestant."""

import warnings
from collections.abc import Callable

import peft
import torch
import transformers
from torch import Tensor, nn

import randlora
from benchmarks.layers import ALPHA, RANK

LLAMA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VIT_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
VOCABULARY = 1000

Step = Callable[[], None]


def llama(layers: int, side: int) -> nn.Module:
    """Make a Llama of a small vocabulary; its other proportions are those of Llama 2."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=side,
        intermediate_size=round(side * 11008 / 4096),
        num_hidden_layers=layers,
        num_attention_heads=side // 64,
        use_cache=False,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)  # type: ignore[no-any-return]


def vit(layers: int, side: int) -> nn.Module:
    """Make a ViT of 16×16 patches for 224×224 pixels."""
    config = transformers.ViTConfig(
        hidden_size=side, intermediate_size=4 * side, num_hidden_layers=layers, num_attention_heads=side // 64
    )
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(config)  # type: ignore[no-any-return]


def adapt(model: nn.Module, contestant: str, targets: list[str], *, adapters: int = 1) -> nn.Module:
    """Put a contestant on a model, or several adapters of ours at once."""
    if contestant == "frozen":
        return model.requires_grad_(requires_grad=False)
    if contestant == "full":
        return model
    if contestant == "LoRA":
        return by_peft(model, peft.LoraConfig(r=RANK, target_modules=targets))
    if contestant == "PEFT":
        config = peft.RandLoraConfig(r=RANK, randlora_alpha=int(ALPHA), randlora_dropout=0.0, target_modules=targets)
        return by_peft(model, config)
    blocks = (4, 8) if contestant == "block" else None
    names = [f"adapter{index}" for index in range(adapters)]
    for name in names:
        randlora.inject(
            model,
            r=RANK,
            alpha=ALPHA,
            targets=targets,
            basis=contestant,  # type: ignore[arg-type]
            blocks=blocks,
            name=name,
            trainable=True,
        )
    randlora.activate(model, names)
    return model


def by_peft(model: nn.Module, config: peft.PeftConfig) -> nn.Module:
    """Let PEFT adapt a model, without the warning that it calls transformers by an old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return peft.get_peft_model(model, config)  # type: ignore[no-any-return]


def training_step(model: nn.Module, inputs: Tensor) -> Step:
    """Return a step: forward, loss, backward, AdamW. Where nothing is trained, the input gets a gradient."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6) if trained else None
    model.train()
    if inputs.is_floating_point():
        labels = {"labels": torch.zeros(len(inputs), dtype=torch.long, device=inputs.device)}
    else:
        labels = {"labels": inputs}
    embedding = None if inputs.is_floating_point() else model.get_input_embeddings()  # type: ignore[operator]

    def step() -> None:
        if trained:
            loss = model(inputs, **labels).loss
        elif embedding is None:
            loss = model(inputs.requires_grad_(), **labels).loss
        else:
            loss = model(inputs_embeds=embedding(inputs).requires_grad_(), **labels).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step
