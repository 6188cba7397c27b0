"""Layers whose weight another module reads, or that it leaves out: adapted as they are read, or refused."""

import copy
import importlib
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers
from torch import Tensor, nn

import randlora
from randlora.errors import AdapterError, TargetError
from randlora.layers.scopes import in_call
from randlora.readers.parents import PARENTS, WITHOUT_GRADIENT
from tests.diffusion_models import flux, noise, patches, unet
from tests.kit import all_bits, fill, same_bits, untouched
from tests.models import clip, image, reproducible
from tests.transformers_zoo import tiny

TRANSFORMERS = "transformers.models"
SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
STATES: dict[str, Any] = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 4}
IDS = torch.tensor([[1, 2, 3, 4]])


def named(name: str) -> Any:
    """Import a class by its qualified name."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


Build = Callable[[Any], tuple[nn.Module, Callable[[], Any]]]


def one(given: Any, *args: Any, **options: Any) -> Build:
    """Build a module from some arguments, and what runs it on one input, or some."""

    def build(kind: Any) -> tuple[nn.Module, Callable[[], Any]]:
        owner = kind(*args, **options)
        return owner, lambda: owner(*given) if isinstance(given, tuple) else owner(copy.copy(given))

    return build


def inside(make: Callable[[], Any], name: str) -> Build:
    """Return the module of a whole model, and what runs the model."""

    def build(kind: Any) -> tuple[nn.Module, Callable[[], Any]]:
        model = make().eval()
        owner = model.get_submodule(name)
        assert type(owner) is kind
        return owner, lambda: model(IDS)

    return build


def altup(kind: Any, **options: Any) -> tuple[nn.Module, Callable[[], Any]]:
    config = transformers.Gemma3nTextConfig(hidden_size=8, altup_num_inputs=3, **options)
    owner, streams = kind(config), torch.randn(3, 1, 2, 8)

    def run() -> Any:
        with in_call():  # that of the decoder layer around it
            return owner.predict(streams), owner.correct(streams, streams[0] + 1)

    return owner, run


def bloom() -> nn.Module:
    sizes = {"vocab_size": 20, "hidden_size": 16, "n_layer": 1, "n_head": 2}
    config = transformers.BloomConfig(**sizes, pretraining_tp=2, slow_but_exact=True)
    return transformers.BloomModel(config)  # type: ignore[no-any-return]


def neomme() -> Any:
    model: Any = tiny("neomme", "NeoMMEForMaskedLM")
    model.unembedding_projection.weight = nn.Parameter(model.unembedding_projection.weight.detach().clone())  # untied
    return model


def falcon_mamba() -> Any:
    return transformers.FalconMambaModel(transformers.FalconMambaConfig(vocab_size=20, **STATES))


TDNN = SimpleNamespace(tdnn_dim=(8,), tdnn_kernel=(3,), tdnn_dilation=(1,))
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
WINDOW, TOKENS, SEVERAL = ([2, 2], [0, 0], 2), torch.randn(1, 3, 16), torch.randn(1, 4, 8)
MAP = torch.randn(1, 3, 8), torch.randn(1, 8, 2, 2)
BUILDS: dict[str, Build] = {
    "torch.nn.modules.activation.MultiheadAttention": one((torch.randn(3, 2, 8),) * 3, 8, 2),
    **{
        f"torchvision.models.swin_transformer.ShiftedWindowAttention{version}": one(SEVERAL[None], 8, *WINDOW)
        for version in ("", "V2")
    },
    "torchvision.models.video.swin_transformer.ShiftedWindowAttention3d": one(
        torch.randn(1, 1, 4, 4, 8), 8, [2, 2, 2], [0, 0, 0], 2
    ),
    "open_clip.modified_resnet.AttentionPool2d": one(torch.randn(1, 16, 2, 2), 2, 16, 2, 8),
    "diffusers.models.embeddings.HunyuanDiTAttentionPool": one(TOKENS, 3, 16, 2, 8),
    "timm.models.beit.Attention": one(SEVERAL, 8, 2, qkv_bias=True),
    "timm.models.eva.EvaAttention": one(SEVERAL, 8, 2, scale_norm=False),
    "timm.models.swin_transformer_v2.WindowAttention": one(SEVERAL, 8, (2, 2), 2),
    f"{TRANSFORMERS}.wavlm.modeling_wavlm.WavLMAttention": one(TOKENS, 16, 2),
    **{name: one(torch.randn(1, 8, 8), TDNN) for name in PARENTS if name.endswith(".TDNNLayer")},
    **{name: one(MAP, 8, 2) for name in PARENTS if name.endswith("DetrMHAttentionMap")},
    f"{TRANSFORMERS}.dab_detr.modeling_dab_detr.DabDetrMHAttentionMap": one(MAP, 8, 8, 2),
    f"{TRANSFORMERS}.gemma3n.modeling_gemma3n.Gemma3nTextAltUp": altup,
    "diffusers.models.autoencoders.autoencoder_kl_minimax_h3_audio.MiniMaxH3AudioCausalAttention": one(
        TOKENS, 16, 8, 2
    ),
    "diffusers.pipelines.ace_step.modeling_ace_step._AceStepResidualFSQ": one(SEVERAL, 8, [8, 5, 5]),
    "diffusers.pipelines.shap_e.renderer.ChannelsProj": one(torch.randn(2, 3, 8), vectors=3, channels=4, d_latent=8),
    "sentence_transformers.sparse_encoder.modules.sparse_auto_encoder.SparseAutoEncoder": one(
        {"sentence_embedding": torch.randn(4, 8)}, 8, 12, k=3, k_aux=4
    ),
    f"{TRANSFORMERS}.longcat_flash.modeling_longcat_flash.LongcatFlashTopkRouter": one(SEVERAL, ROUTER),
    f"{TRANSFORMERS}.mobilebert.modeling_mobilebert.MobileBertLMPredictionHead": one(TOKENS, MOBILE),
    f"{TRANSFORMERS}.mamba.modeling_mamba.MambaMixer": one(TOKENS, transformers.MambaConfig(**STATES), 0),
    f"{TRANSFORMERS}.falcon_mamba.modeling_falcon_mamba.FalconMambaMixer": inside(falcon_mamba, "layers.0.mixer"),
    f"{TRANSFORMERS}.jamba.modeling_jamba.JambaMambaMixer": one(TOKENS, JAMBA, 0),
    f"{TRANSFORMERS}.bloom.modeling_bloom.BloomAttention": inside(bloom, "h.0.self_attention"),
    f"{TRANSFORMERS}.bloom.modeling_bloom.BloomMLP": inside(bloom, "h.0.mlp"),
    f"{TRANSFORMERS}.neomme.modeling_neomme.NeoMMEForMaskedLM": inside(neomme, ""),
}
"""How to build and run a module of each class that never calls some layers of its own."""


def values_of(output: Any) -> list[Tensor]:
    """Return the floating tensors of what a module returns."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    parts = output.values() if hasattr(output, "values") else output if isinstance(output, tuple | list) else ()
    return [value for part in parts for value in values_of(part)]


def assert_all_are_trained(model: nn.Module) -> None:
    assert [fqn for fqn, value in model.named_parameters() if "randlora_lambda" in fqn and value.grad is None] == []


def test_every_class_that_never_calls_a_layer_is_built() -> None:
    never = {name for name, found in PARENTS.items() if any(not (part.when or part.problem) for part in found)}
    assert never <= BUILDS.keys() | {name for name in PARENTS if name.endswith("AssistantForCausalLM")}


@pytest.mark.parametrize("name", BUILDS)
def test_a_layer_that_is_read_acts_and_is_trained_as_if_it_were_merged(name: str) -> None:
    torch.manual_seed(0)
    owner, run = BUILDS[name](named(name))
    root = nn.ModuleDict({"owner": owner})
    names = [f"{parent.__module__}.{parent.__qualname__}" for parent in type(owner).__mro__]
    found = [part for each in names for part in PARENTS.get(each, ()) if part.where(owner) and not part.problem]

    def computed() -> list[Tensor]:
        torch.manual_seed(0)  # for dropout
        return values_of(run())

    for training in (True, False):
        root.train(training)
        randlora.inject(root, r=2, targets=[f"owner.{child}" for part in found for child in part.children])
        fill(root, spread=0.3)
        outputs = computed()
        torch.stack([value.sum() for value in outputs if value.requires_grad]).sum().backward()
        assert_all_are_trained(root)
        with torch.no_grad(), randlora.merged(root):
            merged = computed()
        with torch.no_grad(), randlora.disabled(root):
            base = computed()
        for ours, theirs in zip(outputs, merged, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-4 * max(1.0, theirs.abs().max().item()))
        assert any(not torch.allclose(ours, theirs, atol=1e-3) for ours, theirs in zip(outputs, base, strict=True))
        randlora.eject(root)


def test_gemma_clamps_what_it_reads_with_the_update_and_changes_no_frozen_weight() -> None:
    owner, run = altup(named(f"{TRANSFORMERS}.gemma3n.modeling_gemma3n.Gemma3nTextAltUp"), altup_coef_clip=0.02)
    model = nn.ModuleDict({"up": owner})
    randlora.inject(model, r=2, targets="all-linear")
    before = all_bits(fill(model, spread=0.3).state_dict())
    _, corrected = run()
    assert all_bits(model.state_dict()) == before
    with torch.no_grad(), randlora.merged(model):
        torch.testing.assert_close(run()[1], corrected)


# Whole models


def wavlm() -> nn.Module:
    config = transformers.WavLMConfig(
        **SIZES, conv_dim=(8, 8), conv_stride=(2, 2), conv_kernel=(3, 3), num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    return reproducible(lambda: transformers.WavLMModel(config))


def swin(version: str = "") -> nn.Module:
    models: Any = importlib.import_module("torchvision.models.swin_transformer")
    block, merging = (getattr(models, f"{name}{version}") for name in ("SwinTransformerBlock", "PatchMerging"))
    sizes = {"patch_size": [4, 4], "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": [2, 2]}
    return reproducible(lambda: models.SwinTransformer(**sizes, num_classes=3, block=block, downsample_layer=merging))


def rwkv(rescale_every: int = 2) -> Any:
    config = transformers.RwkvConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=4, attention_hidden_size=16, intermediate_size=16,
        rescale_every=rescale_every, use_cache=False,
    )  # fmt: skip
    return reproducible(lambda: transformers.RwkvModel(config))


PIXELS = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Any]]] = {
    "clip": (clip, lambda model: model(image()["x"][:1], IDS.repeat(1, 2))),
    "swin": (swin, lambda model: model(PIXELS)),
    "swin v2": (lambda: swin("V2"), lambda model: model(PIXELS)),
    "wavlm": (wavlm, lambda model: model(torch.randn(1, 200))),
}


@pytest.mark.parametrize("name", MODELS)
def test_whatever_is_adapted_in_a_whole_model_is_used_trained_and_equals_its_merged_model(name: str) -> None:
    build, run = MODELS[name]
    model = build().eval()

    def outputs() -> Tensor:
        torch.manual_seed(0)  # for an input that is drawn
        return torch.cat([value.flatten() for value in values_of(run(model))])

    before = outputs().detach()
    fqns = randlora.inject(model, r=2, targets="all-linear").targets
    torch.testing.assert_close(outputs(), before)
    fill(model, spread=0.3)
    started = outputs()
    (started * torch.randn_like(started)).sum().backward()
    assert_all_are_trained(model)
    with torch.no_grad():
        with randlora.merged(model):
            torch.testing.assert_close(outputs(), started, rtol=1e-3, atol=1e-3)
        with randlora.disabled(model):
            torch.testing.assert_close(outputs(), before)
    for fqn in fqns:
        if not fqn.endswith("_weight"):
            assert model.get_submodule(fqn).weight is model.get_parameter(f"{fqn}.weight")


def test_layers_of_rwkv_that_it_divides_in_place_are_left_out_and_the_rest_is_merged_as_it_acts() -> None:
    model = rwkv()
    report = randlora.inject(model, r=2)
    divided = {f"blocks.{i}.{child}" for i in (2, 3) for child in ("attention.output", "feed_forward.value")}
    assert {fqn for fqn, why in report.skipped.items() if "load the model with rescale_every=0" in why} == divided
    assert {"blocks.1.attention.output", "blocks.2.attention.value"} <= set(report.targets)
    fill(model)
    effects = []
    for training in (True, False):
        model.train(training)
        with torch.no_grad():
            adapted = model(IDS)[0]
            with randlora.disabled(model):
                effects.append(adapted - model(IDS)[0])
            with randlora.merged(model):
                torch.testing.assert_close(model(IDS)[0], adapted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*effects, rtol=1e-3, atol=1e-3)
    assert not randlora.inject(rwkv(0), r=2).skipped


# What is refused


def quantize(model: nn.Module, *names: str) -> nn.Module:
    """Replace linear layers, by the ends of their names, by layers with codes, which cannot be read as weights."""
    for fqn, module in [*model.named_modules()]:
        if fqn.endswith(names):
            assert isinstance(module, nn.Linear)
            owner, _, child = fqn.rpartition(".")
            layer = bitsandbytes.nn.Linear4bit(module.in_features, module.out_features, bias=module.bias is not None)
            setattr(model.get_submodule(owner), child, layer.to("cpu"))
    return model


def mamba2() -> nn.Module:
    sizes = {"vocab_size": 20, "hidden_size": 32, "state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1}
    return transformers.Mamba2Model(transformers.Mamba2Config(num_hidden_layers=1, **sizes))  # type: ignore[no-any-return]


def positions(module: str, config: str, encoder: str) -> nn.Module:
    """Build an encoder of documents, whose biases of positions are read without gradients or not at all."""
    made = named(f"{TRANSFORMERS}.{module}.configuration_{module}.{config}")(
        **SIZES, max_2d_position_embeddings=16, has_relative_attention_bias=True, has_spatial_attention_bias=True
    )
    return nn.ModuleDict({"encoder": named(f"{TRANSFORMERS}.{module}.modeling_{module}.{encoder}")(made)})


NO_EFFECT = "so an adapter would have no effect"
UNDER = "has no gradient, because {} reads its weight under torch.no_grad"
V2, V3 = (("layoutlm" + v, f"LayoutLM{v}Config", f"LayoutLM{v}Encoder") for v in ("v2", "v3"))
PP = "pp_doclayout_v2", "PPDocLayoutV2ReadingOrderConfig", "PPDocLayoutV2ReadingOrderEncoder"
REFUSED: list[tuple[Callable[[], nn.Module], str, str]] = [
    (
        lambda: quantize(swin(), "qkv"),
        "features.1.0.attn.qkv (Linear4bit)",
        f"is never called, because ShiftedWindowAttention reads its weight, {NO_EFFECT}",
    ),
    (
        lambda: quantize(mamba2(), "out_proj"),
        "layers.0.mixer.out_proj (Linear4bit)",
        "is not called when the kernels of mamba-ssm are used, because Mamba2Mixer",
    ),
    (lambda: positions(*V2), "encoder.rel_pos_bias (Linear)", UNDER.format(V2[2])),
    (lambda: positions(*V3), "encoder.rel_pos_x_bias (Linear)", UNDER.format(V3[2])),
    (lambda: positions(*PP), "encoder.rel_pos_bias (Linear)", UNDER.format(PP[2])),
    (lambda: positions(*PP), "encoder.rel_pos_x_bias (Linear)", f"is never used by {PP[2]}, {NO_EFFECT}"),
    (rwkv, "blocks.2.attention.output (Linear)", "is in a RwkvBlock, whose weights the model divides in place"),
]


@pytest.mark.parametrize(("build", "layer", "words"), REFUSED, ids=[row[1] for row in REFUSED])
def test_what_cannot_be_adapted_is_refused_with_the_reason_and_skipped_by_rules(
    build: Callable[[], nn.Module], layer: str, words: str
) -> None:
    model, fqn = build(), layer.partition(" ")[0]
    with untouched(model), pytest.raises(TargetError) as refused:
        randlora.inject(model, r=2, targets=[fqn])
    assert f"{layer} {words}" in str(refused.value)
    for rule in ("all", "all-linear"):
        report = randlora.plan(model, r=2, targets=rule)
        assert report.skipped[fqn].startswith(words)
        assert fqn not in report.targets
        assert report.targets


def test_a_default_skips_them_and_adapts_all_linear_layers_where_nothing_else_is_left_and_dropout_is_refused() -> None:
    report = randlora.plan(quantize(wavlm(), "q_proj", "k_proj", "v_proj", "out_proj"), r=2)
    assert "all linear layers" in report.rule
    assert report.targets
    assert report.skipped["encoder.layers.0.attention.q_proj"].startswith("is never called")
    with pytest.raises(TargetError, match=r"attn\.qkv is a weight that other code reads, and dropout=0.1 cannot reach"):
        randlora.inject(swin(), r=2, targets=["qkv"], dropout=0.1)
    for options in ({"qkv_bias": False}, {"qkv_bias": True, "qkv_bias_separate": True}):  # with which it calls them
        model = quantize(nn.Sequential(named("timm.models.beit.Attention")(8, 2, **options)), "qkv")
        assert "0.qkv" in randlora.inject(model, r=2, targets="all-linear").targets


def test_what_chooses_tokens_runs_without_gradients_and_rules_leave_it_out() -> None:
    kinds = [named(name) for name in WITHOUT_GRADIENT]
    assert {kind.forward.__code__ for kind in kinds} == {torch.no_grad()(lambda: None).__code__}
    indexer: nn.Module = kinds[0].__new__(kinds[0])
    nn.Module.__init__(indexer)
    indexer.wk = nn.Linear(4, 4)
    model = nn.ModuleDict({"indexer": indexer, "other": nn.Linear(4, 4)})
    for rule in ("all", "all-linear"):
        report = randlora.plan(model, r=2, targets=rule)
        assert report.targets == ("other",)
        assert "chooses tokens under torch.no_grad" in report.skipped["indexer.wk"]
    assert randlora.plan(model, r=2, targets=["wk"]).targets == ("indexer.wk",)


# fuse_qkv_projections() of diffusers

every_model = pytest.mark.parametrize(("build", "draw"), [(flux, patches), (unet, noise)], ids=["flux", "unet"])


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore:.*gemm_4bit")
@every_model
def test_of_joined_projections_the_joined_are_adapted_and_a_single_one_is_refused(build: Any, draw: Any) -> None:
    model, given = build().eval(), draw()
    model.fuse_qkv_projections()
    refused = r"\.to_v \(Linear\) is not called, because \w+ calls to_qkv"
    with untouched(model), pytest.raises(TargetError, match=refused):
        randlora.inject(model, r=2, targets=["to_v"])
    report = randlora.inject(model, r=2)
    assert "to_qkv" in {fqn.rpartition(".")[2] for fqn in report.targets}
    left = [why for fqn, why in report.skipped.items() if fqn.endswith(".to_v")]
    assert any(f"calls to_qkv instead, {NO_EFFECT}" in why for why in left)
    output = fill(model)(**given).sample
    output.sum().backward()
    assert_all_are_trained(model)
    with torch.no_grad(), randlora.merged(model):
        torch.testing.assert_close(model(**given).sample, output, rtol=1e-4, atol=1e-4)
    model.unfuse_qkv_projections()  # which takes apart what is adapted, and in Flux deletes it
    if build is unet:
        with pytest.raises(AdapterError, match=r"to_qkv is adapted and is not called, because Attention calls to_q, t"):
            model(**given)
    else:
        with pytest.raises(AdapterError, match=r"to_qkv no longer has adapter 'default': the module was replaced"):
            [*randlora.trainable_parameters(model)]


@pytest.mark.medium
@every_model
def test_joining_what_is_adapted_is_an_error_when_it_is_used_until_it_is_undone(build: Any, draw: Any) -> None:
    model, given = build().eval(), draw()
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    randlora.inject(model, r=2)
    expected = fill(model)(**given).sample
    model.fuse_qkv_projections()
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(AdapterError, match=r"to_q is adapted and is not called, .* undo fuse_qkv_projections"):
            each(**given)
    model.unfuse_qkv_projections()
    assert same_bits(model(**given).sample, expected)
    randlora.eject(model)
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == hooks
    model.fuse_qkv_projections()
    model(**given)
