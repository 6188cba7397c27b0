"""torchvision's vision transformer, whose attention is an `nn.MultiheadAttention`."""

import torch

import randlora
from tests.kit import fill
from tests.models import TORCHVISION_VIT, outputs, torchvision_vit

INPUTS = TORCHVISION_VIT.inputs()
BLOCKS = [f"encoder.layers.encoder_layer_{index}" for index in range(2)]


def test_a_vision_transformer_is_adapted_trained_merged_and_ejected() -> None:
    model = torchvision_vit().requires_grad_(False)  # by which torch decides how it computes a linear layer
    base = outputs(model, INPUTS)
    report = randlora.inject(model, r=6, targets="all-linear")
    in_block = ("self_attention.in_proj_weight", "self_attention.out_proj", "mlp.0", "mlp.3")
    assert report.targets == tuple(f"{block}.{layer}" for block in BLOCKS for layer in in_block)
    assert report.skipped == {"heads.head": "the output head"}
    assert base.abs().max() > 0.1
    assert torch.equal(outputs(model, INPUTS), base)
    fill(model)
    model(**INPUTS).square().sum().backward()
    gradients = [parameter.grad for parameter in randlora.trainable_parameters(model)]
    assert len(gradients) == 2 * 2 * 4
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
    expected = outputs(model, INPUTS)
    assert (expected - base).abs().max() > 0.1
    with randlora.merged(model):
        torch.testing.assert_close(outputs(model, INPUTS), expected, rtol=1e-4, atol=1e-5)
    randlora.eject(model)
    assert {type(module) for module in model.modules()} == {type(module) for module in torchvision_vit().modules()}
    assert torch.equal(outputs(model, INPUTS), base)
    torch.testing.assert_close(model.state_dict(), torchvision_vit().state_dict(), rtol=0, atol=0)
