"""torchvision's vision transformer, whose attention is an `nn.MultiheadAttention`."""

import torch

import randlora
from tests.models import TORCHVISION_VIT, outputs, torchvision_vit

INPUTS = TORCHVISION_VIT.inputs()
BLOCKS = [f"encoder.layers.encoder_layer_{index}" for index in range(2)]


def trained() -> torch.nn.Module:
    model = torchvision_vit()
    randlora.inject(model, r=6, targets="all-linear")
    with torch.no_grad():
        for parameter in randlora.trainable_parameters(model):
            parameter.copy_(torch.randn(parameter.shape) / max(parameter.shape) ** 0.5)
    return model


def test_all_linear_adapts_attention_and_the_layers_after_it() -> None:
    report = randlora.inject(torchvision_vit(), r=6, targets="all-linear")
    in_block = ("self_attention.in_proj_weight", "self_attention.out_proj", "mlp.0", "mlp.3")
    assert report.targets == tuple(f"{block}.{layer}" for block in BLOCKS for layer in in_block)
    assert report.skipped == {"heads.head": "the output head"}


def test_a_fresh_adapter_changes_no_bit_of_the_output() -> None:
    model = torchvision_vit().requires_grad_(False)  # by which torch decides how it computes a linear layer
    expected = outputs(model, INPUTS)
    assert expected.abs().max() > 0.1
    randlora.inject(model, r=6, targets="all-linear")
    assert torch.equal(outputs(model, INPUTS), expected)


def test_merging_gives_the_adapted_output_from_plain_layers() -> None:
    model = trained()
    base, expected = outputs(torchvision_vit(), INPUTS), outputs(model, INPUTS)
    assert (expected - base).abs().max() > 0.1
    randlora.merge(model)
    assert {type(module) for module in model.modules()} == {type(module) for module in torchvision_vit().modules()}
    torch.testing.assert_close(outputs(model, INPUTS), expected, rtol=1e-4, atol=1e-5)


def test_ejecting_gives_the_base_back() -> None:
    model = trained()
    randlora.eject(model)
    assert torch.equal(outputs(model, INPUTS), outputs(torchvision_vit(), INPUTS))
    torch.testing.assert_close(model.state_dict(), torchvision_vit().state_dict(), rtol=0, atol=0)


def test_every_adapted_layer_gets_a_gradient() -> None:
    model = trained()
    model(**INPUTS).square().sum().backward()
    gradients = [parameter.grad for parameter in randlora.trainable_parameters(model)]
    assert len(gradients) == 2 * 2 * 4
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
