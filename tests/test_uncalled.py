"""Layers whose weight another module reads without calling them are refused: an adapter would have no effect."""

import importlib
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.torch_version import TorchVersion

import randlora
from randlora.errors import TargetError
from randlora.layers.uncalled import UNCALLED
from tests.kit import fill
from tests.models import bert, clip, image, llama, reproducible, torchvision_vit
from tests.transformers_zoo import tiny

TRANSFORMERS = "transformers.models"
TDNN = {"tdnn_dim": (8,), "tdnn_kernel": (3,), "tdnn_dilation": (1,)}
SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
STATES: dict[str, Any] = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 4}


def as_surveyed(name: str) -> Any:
    """Return a class's name as a parameter, skipped where transformers is older than the one that was surveyed."""
    is_older = name.startswith("transformers.") and TorchVersion(transformers.__version__) < "5.24"
    reason = "older versions of transformers call some of these layers, and lack some of the classes"
    return pytest.param(name, marks=pytest.mark.skipif(is_older, reason=reason))


def named(name: str) -> Any:
    """Import a class by its qualified name."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def scores(*args: Any) -> Callable[[Any], tuple[nn.Module, Callable[[Any], Any]]]:
    """Build one of DETR's maps of attention, and what runs it."""
    return lambda kind: (kind(*args), lambda owner: owner(torch.randn(1, 3, 8), torch.randn(1, 8, 2, 2)))


def one(x: Tensor, *args: Any, **options: Any) -> Callable[[Any], tuple[nn.Module, Callable[[Any], Any]]]:
    """Build a module from some arguments, and what runs it on one input."""
    return lambda kind: (kind(*args, **options), lambda owner: owner(x))


def layoutlm(kind: Any) -> tuple[nn.Module, Callable[[Any], Any]]:
    config = transformers.LayoutLMv2Config(**SIZES, max_2d_position_embeddings=16)
    box = torch.zeros(1, 3, 4, dtype=torch.long)
    mask = torch.zeros(1, 1, 1, 3)
    return kind(config), lambda owner: owner(torch.randn(1, 3, 16), mask, bbox=box, position_ids=torch.arange(3)[None])


def inside(make: Callable[[], Any], name: str) -> Callable[[Any], tuple[nn.Module, Callable[[Any], Any]]]:
    """Return the module of a whole model, and what runs the model."""

    def build(kind: Any) -> tuple[nn.Module, Callable[[Any], Any]]:
        model = make().eval()
        owner = model.get_submodule(name)
        assert type(owner) is kind
        return owner, lambda _: model(torch.tensor([[1, 2, 3]]))

    return build


def bloom() -> nn.Module:
    config = transformers.BloomConfig(
        vocab_size=20, hidden_size=16, n_layer=1, n_head=2, pretraining_tp=2, slow_but_exact=True
    )
    return transformers.BloomModel(config)  # type: ignore[no-any-return]


WINDOW = ([2, 2], [0, 0], 2)
IMAGE = torch.randn(1, 4, 4, 8)
ROUTER = SimpleNamespace(
    num_experts_per_tok=1, num_local_experts=4, hidden_size=8, n_routed_experts=4, zero_expert_num=0,
    routed_scaling_factor=1.0,
)  # fmt: skip
MOBILE = transformers.MobileBertConfig(
    vocab_size=20, hidden_size=16, embedding_size=8, num_hidden_layers=1, num_attention_heads=2, true_hidden_size=16
)
JAMBA = transformers.JambaConfig(
    vocab_size=20, hidden_size=16, num_attention_heads=2, num_key_value_heads=1, use_mamba_kernels=False,
    mamba_dt_rank=4, mamba_d_state=4, intermediate_size=16,
)  # fmt: skip
TOKENS = torch.randn(1, 3, 16)
BUILDS: dict[str, Callable[[Any], tuple[nn.Module, Callable[[Any], Any]]]] = {
    "torchvision.models.swin_transformer.ShiftedWindowAttention": one(IMAGE, 8, *WINDOW),
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": one(IMAGE, 8, *WINDOW),
    "torchvision.models.video.swin_transformer.ShiftedWindowAttention3d": one(IMAGE[None], 8, [2, 2, 2], [0, 0, 0], 2),
    "open_clip.modified_resnet.AttentionPool2d": one(torch.randn(1, 16, 2, 2), 2, 16, 2, 8),
    "diffusers.models.embeddings.HunyuanDiTAttentionPool": one(torch.randn(1, 3, 16), 3, 16, 2, 8),
    "timm.models.beit.Attention": one(torch.randn(1, 4, 8), 8, 2, qkv_bias=True),
    "timm.models.eva.EvaAttention": one(torch.randn(1, 4, 8), 8, 2, scale_norm=False),
    "timm.models.swin_transformer_v2.WindowAttention": one(torch.randn(1, 4, 8), 8, (2, 2), 2),
    f"{TRANSFORMERS}.wavlm.modeling_wavlm.WavLMAttention": one(TOKENS, 16, 2),
    **{name: one(torch.randn(1, 8, 8), SimpleNamespace(**TDNN)) for name in UNCALLED if name.endswith(".TDNNLayer")},
    **{name: scores(8, 2) for name in UNCALLED if name.endswith("DetrMHAttentionMap")},
    f"{TRANSFORMERS}.dab_detr.modeling_dab_detr.DabDetrMHAttentionMap": scores(8, 8, 2),
    f"{TRANSFORMERS}.layoutlmv2.modeling_layoutlmv2.LayoutLMv2Encoder": layoutlm,
    f"{TRANSFORMERS}.longcat_flash.modeling_longcat_flash.LongcatFlashTopkRouter": one(torch.randn(1, 3, 8), ROUTER),
    f"{TRANSFORMERS}.mobilebert.modeling_mobilebert.MobileBertLMPredictionHead": one(TOKENS, MOBILE),
    f"{TRANSFORMERS}.mamba.modeling_mamba.MambaMixer": one(TOKENS, transformers.MambaConfig(**STATES), 0),
    f"{TRANSFORMERS}.falcon_mamba.modeling_falcon_mamba.FalconMambaMixer": inside(
        lambda: transformers.FalconMambaModel(transformers.FalconMambaConfig(vocab_size=20, **STATES)), "layers.0.mixer"
    ),
    f"{TRANSFORMERS}.jamba.modeling_jamba.JambaMambaMixer": one(TOKENS, JAMBA, 0),
    f"{TRANSFORMERS}.bloom.modeling_bloom.BloomAttention": inside(bloom, "h.0.self_attention"),
    f"{TRANSFORMERS}.bloom.modeling_bloom.BloomMLP": inside(bloom, "h.0.mlp"),
    f"{TRANSFORMERS}.neomme.modeling_neomme.NeoMMEForMaskedLM": inside(lambda: tiny("neomme", "NeoMMEForMaskedLM"), ""),
}
"""How to build and run a module of each class that never calls some layers of its own."""


def readings(owner: nn.Module) -> list[tuple[str, str]]:
    """Return what the table says of a module: names of layers, and when it does not call them."""
    names = [f"{parent.__module__}.{parent.__qualname__}" for parent in type(owner).__mro__]
    return [
        (child, reading.when)
        for name in names
        for reading in UNCALLED.get(name, ())
        if reading.where(owner)
        for child in reading.children
    ]


def test_every_class_that_never_calls_a_layer_is_built() -> None:
    never = {name for name, found in UNCALLED.items() if any(not reading.when for reading in found)}
    assert never <= BUILDS.keys()


@pytest.mark.parametrize("name", [as_surveyed(name) for name in BUILDS])
def test_no_layer_of_the_table_is_called(name: str) -> None:
    torch.manual_seed(0)
    owner, run = BUILDS[name](named(name))
    children = [child for child, when in readings(owner) if not when]
    assert children
    called = []
    for child in children:
        owner.get_submodule(child).register_forward_hook(lambda *_, child=child: called.append(child))
    with torch.no_grad():
        run(owner)
    assert not called


@pytest.mark.parametrize("name", [as_surveyed(name) for name in UNCALLED])
def test_the_code_of_every_class_of_the_table_reads_the_weight(name: str) -> None:
    code = inspect.getsource(named(name))
    for reading in UNCALLED[name]:
        for child in reading.children:
            assert f"self.{child}.weight" in code


# What inject() does with them


def wavlm() -> nn.Module:
    config = transformers.WavLMConfig(
        **SIZES, conv_dim=(8, 8), conv_stride=(2, 2), conv_kernel=(3, 3), num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    return reproducible(lambda: transformers.WavLMModel(config))


def swin(version: str = "") -> nn.Module:
    models: Any = importlib.import_module("torchvision.models.swin_transformer")
    block = models.SwinTransformerBlockV2 if version else models.SwinTransformerBlock
    merging = models.PatchMergingV2 if version else models.PatchMerging
    sizes = {"patch_size": [4, 4], "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": [2, 2]}
    return reproducible(lambda: models.SwinTransformer(**sizes, num_classes=3, block=block, downsample_layer=merging))


def test_named_they_are_an_error() -> None:
    message = (
        r"features\.1\.0\.attn\.qkv \(Linear\) is never called, because ShiftedWindowAttention reads its weight, so "
        "an adapter would have no effect: exclude it"
    )
    with pytest.raises(TargetError, match=message):
        randlora.inject(swin(), r=2, targets=["qkv"])


@pytest.mark.parametrize("targets", ["all", "all-linear", None])
def test_rules_skip_them_with_the_reason(targets: str | None) -> None:
    model = swin("V2")
    report = randlora.inject(model, r=2, targets=targets)
    assert not [fqn for fqn in report.targets if fqn.endswith(("attn.qkv", "attn.proj"))]
    reason = "is never called, because ShiftedWindowAttentionV2 reads its weight, so an adapter would have no effect"
    skipped = {fqn: why for fqn, why in report.skipped.items() if "attn" in fqn}
    places = [f"features.{i}.{j}.attn" for i in (1, 3) for j in (0, 1)]
    assert skipped == {f"{place}.{child}": reason for place in places for child in ("qkv", "proj")}


def test_a_default_that_finds_nothing_else_is_that_of_other_models() -> None:
    report = randlora.inject(wavlm(), r=2)
    assert "all linear layers" in report.rule
    assert report.targets
    assert not [fqn for fqn in report.targets if fqn.endswith(("q_proj", "k_proj", "v_proj", "out_proj"))]
    assert report.skipped["encoder.layers.0.attention.q_proj"].startswith("is never called")


def test_at_times_is_said() -> None:
    model = transformers.Mamba2Model(
        transformers.Mamba2Config(
            vocab_size=20, hidden_size=16, state_size=4, num_hidden_layers=1, num_heads=4, head_dim=8, n_groups=1
        )
    )
    with pytest.raises(TargetError, match="is not called when the kernels of mamba-ssm are used, because Mamba2Mixer"):
        randlora.inject(model, r=2, targets=["out_proj"])


@pytest.mark.parametrize("options", [{"qkv_bias": False}, {"qkv_bias": True, "qkv_bias_separate": True}])
def test_a_module_that_calls_them_with_its_options_is_adapted(options: dict[str, bool]) -> None:
    model = nn.Sequential(named("timm.models.beit.Attention")(8, 2, **options))
    assert "0.qkv" in randlora.inject(model, r=2, targets="all-linear").targets


# No adapter is a silent no-op


def resnet_clip() -> nn.Module:
    kind = named("open_clip.modified_resnet.ModifiedResNet")
    return reproducible(lambda: kind([1, 1, 1, 1], output_dim=8, heads=2, image_size=32, width=8))


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return reproducible(lambda: transformers.T5Model(config))


def mamba() -> nn.Module:
    return reproducible(lambda: transformers.MambaModel(transformers.MambaConfig(vocab_size=20, **STATES)))


def convnext() -> nn.Module:
    models: Any = importlib.import_module("torchvision.models.convnext")
    setting = [models.CNBlockConfig(8, 16, 1), models.CNBlockConfig(16, None, 1)]
    return reproducible(lambda: models.ConvNeXt(setting, num_classes=3))


IDS = torch.tensor([[1, 2, 3, 4]])
PIXELS = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Any]]] = {
    "clip": (clip, lambda model: model(image()["x"][:1], IDS.repeat(1, 2))),
    "convnext": (convnext, lambda model: model(PIXELS)),
    "vit": (torchvision_vit, lambda model: model(**image())),
    "bert": (bert, lambda model: model(IDS)),
    "llama": (llama, lambda model: model(IDS)),
    "mamba": (mamba, lambda model: model(IDS)),
    "swin": (swin, lambda model: model(PIXELS)),
    "swin v2": (lambda: swin("V2"), lambda model: model(PIXELS)),
    "t5": (t5, lambda model: model(input_ids=IDS, decoder_input_ids=IDS)),
    "wavlm": (wavlm, lambda model: model(torch.randn(1, 200))),
}


def without_use(model: nn.Module, run: Callable[[Any], Any]) -> set[str]:
    """Run a model, and return the adapters' Λ that have no gradient, because nothing that they change is read."""
    output = run(model)
    values = [output] if isinstance(output, Tensor) else [*getattr(output, "values", lambda: output)()]
    used = [value.float().sum() for value in values if isinstance(value, Tensor) and value.requires_grad]
    torch.stack(used).sum().backward()
    return {name for name, value in model.named_parameters() if "randlora_lambda" in name and value.grad is None}


@pytest.mark.medium
@pytest.mark.parametrize("rule", ["all-linear", None])
@pytest.mark.parametrize("name", MODELS)
def test_whatever_a_rule_adapts_is_used(name: str, rule: str | None) -> None:
    build, run = MODELS[name]
    model = build()
    assert randlora.inject(model, r=2, targets=rule).targets
    assert without_use(fill(model), run) == set()


def test_a_model_of_nothing_else_is_refused() -> None:
    with pytest.raises(TargetError, match=r"attnpool\.q_proj \(is never called, because AttentionPool2d reads"):
        randlora.inject(resnet_clip(), r=2, targets="all-linear")
