"""Layers whose weight another module reads, or that it leaves out: adapted as they are read, or refused."""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import randlora
from randlora.errors import AdapterError, TargetError
from randlora.readers.parents import PARENTS, WITHOUT_GRADIENT
from tests.kit import adapt, all_bits, fill, in_call, same_bits, untouched
from tests.laws import assert_close
from tests.models import clip, flux, library, noise, patches, reproducible, torchvision_vit, unet
from tests.quantized import of_4_bits
from tests.transformers_zoo import tiny

SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
IDS = torch.tensor([[1, 2, 3, 4]])


def class_name(name: str) -> str:
    return name.rpartition(".")[2]


Build = Callable[[Any], tuple[nn.Module, Callable[[], Any]]]


def one(given: Any, *args: Any, **options: Any) -> Build:
    def build(kind: Any) -> tuple[nn.Module, Callable[[], Any]]:
        owner = kind(*args, **options)
        return owner, lambda: owner(*given) if isinstance(given, tuple) else owner(copy.copy(given))

    return build


def inside(make: Callable[[], Any], name: str) -> Build:
    def build(kind: Any) -> tuple[nn.Module, Callable[[], Any]]:
        model = make().eval()
        owner = model.get_submodule(name)
        assert type(owner) is kind
        return owner, lambda: model(IDS)

    return build


def altup(kind: Any, **options: Any) -> tuple[nn.Module, Callable[[], Any]]:
    owner = kind(transformers.Gemma3nTextConfig(hidden_size=8, altup_num_inputs=3, **options))
    streams = torch.randn(3, 1, 2, 8)

    def run() -> Any:
        with in_call():  # that of the decoder layer around it
            return owner.predict(streams), owner.correct(streams, streams[0] + 1)

    return owner, run


def neomme() -> Any:
    model: Any = tiny("neomme", "NeoMMEForMaskedLM")
    model.unembedding_projection.weight = nn.Parameter(model.unembedding_projection.weight.detach().clone())  # untied
    return model


def model_of(name: str, **sizes: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(**sizes)
    return reproducible(lambda: getattr(transformers, f"{name}Model")(config))


bloom = partial(
    model_of, "Bloom", vocab_size=20, hidden_size=16, n_layer=1, n_head=2, pretraining_tp=2, slow_but_exact=True
)
wavlm = partial(
    model_of, "WavLM", **SIZES, conv_dim=(8, 8), conv_stride=(2, 2), conv_kernel=(3, 3), layerdrop=0.0,
    num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, apply_spec_augment=False,
)  # fmt: skip
rwkv = partial(
    model_of, "Rwkv", vocab_size=20, hidden_size=16, num_hidden_layers=4, attention_hidden_size=16,
    intermediate_size=16, use_cache=False,
)  # fmt: skip
TDNN = SimpleNamespace(tdnn_dim=(8,), tdnn_kernel=(3,), tdnn_dilation=(1,))
ROUTER = SimpleNamespace(
    num_experts_per_tok=1, num_local_experts=4, hidden_size=8, n_routed_experts=4, zero_expert_num=0,
    routed_scaling_factor=1.0,
)  # fmt: skip
MOBILE = transformers.MobileBertConfig(**SIZES, vocab_size=20, embedding_size=8, true_hidden_size=16)
JAMBA = transformers.JambaConfig(
    **SIZES, vocab_size=20, num_key_value_heads=1, use_mamba_kernels=False, mamba_dt_rank=4, mamba_d_state=4
)
WINDOW, TOKENS, SEVERAL = ([2, 2], [0, 0], 2), torch.randn(1, 3, 16), torch.randn(1, 4, 8)
MAP = torch.randn(1, 3, 8), torch.randn(1, 8, 2, 2)
BUILDS: dict[str, Build] = {
    "MultiheadAttention": one((torch.randn(3, 2, 8),) * 3, 8, 2),
    "ShiftedWindowAttention": one(SEVERAL[None], 8, *WINDOW),
    "ShiftedWindowAttentionV2": one(SEVERAL[None], 8, *WINDOW),
    "ShiftedWindowAttention3d": one(torch.randn(1, 1, 4, 4, 8), 8, [2, 2, 2], [0, 0, 0], 2),
    "AttentionPool2d": one(torch.randn(1, 16, 2, 2), 2, 16, 2, 8),
    "HunyuanDiTAttentionPool": one(TOKENS, 3, 16, 2, 8),
    "Attention": one(SEVERAL, 8, 2, qkv_bias=True),
    "EvaAttention": one(SEVERAL, 8, 2, scale_norm=False),
    "WindowAttention": one(SEVERAL, 8, (2, 2), 2),
    "WavLMAttention": one(TOKENS, 16, 2),
    "TDNNLayer": one(torch.randn(1, 8, 8), TDNN),
    "DabDetrMHAttentionMap": one(MAP, 8, 8, 2),
    **dict.fromkeys(
        ("ConditionalDetrMHAttentionMap", "DetrMHAttentionMap", "MaskFormerDetrMHAttentionMap"), one(MAP, 8, 2)
    ),
    "Gemma3nTextAltUp": altup,
    "MiniMaxH3AudioCausalAttention": one(TOKENS, 16, 8, 2),
    "_AceStepResidualFSQ": one(SEVERAL, 8, [8, 5, 5]),
    "ChannelsProj": one(torch.randn(2, 3, 8), vectors=3, channels=4, d_latent=8),
    "SparseAutoEncoder": one({"sentence_embedding": torch.randn(4, 8)}, 8, 12, k=3, k_aux=4),
    "LongcatFlashTopkRouter": one(SEVERAL, ROUTER),
    "MobileBertLMPredictionHead": one(TOKENS, MOBILE),
    "FalconMambaMixer": inside(partial(tiny, "falcon_mamba", "FalconMambaModel"), "layers.0.mixer"),
    "JambaMambaMixer": one(TOKENS, JAMBA, 0),
    "MambaMixer": one(TOKENS, transformers.MambaConfig(hidden_size=16, state_size=4, time_step_rank=4), 0),
    "BloomAttention": inside(bloom, "h.0.self_attention"),
    "BloomMLP": inside(bloom, "h.0.mlp"),
    "NeoMMEForMaskedLM": inside(neomme, ""),
}
"""How to build and run a module of each class that never calls some layers of its own, by the name of the class."""

SUBCLASS = "torchvision.models.swin_transformer.ShiftedWindowAttentionV2"
BUILT = [name for name in (*PARENTS, SUBCLASS) if class_name(name) in BUILDS]


def seeded(run: Callable[[], Any]) -> list[Tensor]:
    torch.manual_seed(0)  # for dropout
    return [value for value in tree_leaves(run()) if isinstance(value, Tensor) and value.is_floating_point()]


def assert_only_adapters_are_trained(model: nn.Module) -> None:
    grads = {fqn: value.grad for fqn, value in model.named_parameters()}
    assert {fqn for fqn, grad in grads.items() if grad is not None} == {fqn for fqn in grads if "randlora" in fqn}
    assert all(parameter.grad.any() for parameter in randlora.trainable_parameters(model))  # type: ignore[union-attr]


def test_every_class_that_never_calls_a_layer_is_built() -> None:
    never = {name for name, found in PARENTS.items() if any(not (part.when or part.problem) for part in found)}
    assert {name for name in never if not name.endswith("AssistantForCausalLM")} <= {*BUILT}
    assert {class_name(name) for name in BUILT} == BUILDS.keys()


@pytest.mark.parametrize("name", BUILT)
def test_a_layer_that_is_read_acts_and_is_trained_as_if_it_were_merged(name: str) -> None:
    torch.manual_seed(0)
    owner, run = BUILDS[class_name(name)](resolve_name(name))
    root = nn.ModuleDict({"owner": owner})
    names = [f"{parent.__module__}.{parent.__qualname__}" for parent in type(owner).__mro__]
    found = [part for each in names for part in PARENTS.get(each, ()) if part.where(owner) and not part.problem]
    for training in (True, False):
        root.train(training)
        adapt(root, spread=0.3, r=2, targets=[f"owner.{child}" for part in found for child in part.children])
        outputs = seeded(run)
        torch.stack([value.sum() for value in outputs if value.requires_grad]).sum().backward()
        assert not [fqn for fqn, value in root.named_parameters() if "randlora_lambda" in fqn and value.grad is None]
        with torch.no_grad(), randlora.merged(root):
            merged = seeded(run)
        with torch.no_grad(), randlora.disabled(root):
            base = seeded(run)
        for ours, theirs in zip(outputs, merged, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-4 * max(1.0, theirs.abs().max().item()))
        assert any(not torch.allclose(ours, theirs, atol=1e-3) for ours, theirs in zip(outputs, base, strict=True))
        randlora.eject(root)


def test_gemma_clamps_what_it_reads_with_the_update_and_changes_no_frozen_weight() -> None:
    (name,) = (name for name in PARENTS if name.endswith("AltUp"))
    owner, run = altup(resolve_name(name), altup_coef_clip=0.02)
    model = nn.ModuleDict({"up": owner})
    with untouched(adapt(model, spread=0.3, r=2, targets="all-linear")):
        _, corrected = run()
    with torch.no_grad(), randlora.merged(model):
        torch.testing.assert_close(run()[1], corrected)


# Whole models


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


X, IMAGES = drawn(3, 7, 16), drawn(2, 3, 16, 16)
PADDING = torch.zeros(3, 7, dtype=torch.bool)
PADDING[1, 5:] = True


def encoder(**options: Any) -> Any:
    layer = partial(nn.TransformerEncoderLayer, 16, 4, 24, **{"batch_first": True, "dropout": 0.0, **options})
    return reproducible(lambda: nn.TransformerEncoder(layer(), 2, enable_nested_tensor=not options))


def encoded(model: Any) -> list[Tensor]:
    return [model(X), model(X, src_key_padding_mask=PADDING)[~PADDING]]


def own_attention() -> nn.Module:
    return nn.Sequential(reproducible(lambda: library("open_clip").transformer.Attention(16, num_heads=2)))


def swin() -> nn.Module:
    sizes = {"patch_size": [4, 4], "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": [2, 2]}
    return reproducible(lambda: library("torchvision").models.SwinTransformer(**sizes, num_classes=3))


decoder = partial(nn.TransformerDecoderLayer, 16, 4, 24, batch_first=True, dropout=0.0)
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Any], Any, int]] = {
    "clip": (clip, lambda model: model(IMAGES, IDS.repeat(2, 2))[:2], ["in_proj_weight", "c_fc", "c_proj"], 12),
    "clip's own attention": (own_attention, lambda model: model(X), "all-linear", 2),
    "decoder": (partial(reproducible, decoder), lambda model: model(X, X.flip(1)), ["multihead_attn"], 2),
    "torchvision": (torchvision_vit, lambda model: model(IMAGES), "all-linear", 8),
    "encoder's projections": (encoder, encoded, ["in_proj_weight"], 2),
    "encoder's outputs": (encoder, encoded, ["out_proj"], 2),
    "encoder's last layer": (encoder, encoded, ["layers.1.self_attn"], 2),
    "encoder's other layers": (encoder, encoded, ["linear1"], 2),
    "encoder of another order": (partial(encoder, norm_first=True), encoded, None, 8),
}
in_prototype = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype:UserWarning")


@in_prototype
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("in_proj", ["packed", "split"])
def test_a_model_computes_as_one_whose_weights_were_changed_and_is_trained_and_ejected(name: str, in_proj: Any) -> None:
    build, run, targets, count = MODELS[name]
    model, base = build().double(), build().double()
    classes = [type(module) for module in model.modules()]
    assert len(randlora.inject(model, r=4, targets=targets, in_proj=in_proj).targets) == count
    merged = copy.deepcopy(fill(model, spread=0.2))
    randlora.merge(merged)
    for training in (False, True):
        with torch.set_grad_enabled(training):
            found, plain, expected = (seeded(partial(run, each.train(training))) for each in (model, base, merged))
        for ours, own, by in zip(found, plain, expected, strict=True):
            assert (ours - own).abs().max() > 1e-3
            assert_close(ours, by, torch.float64)
    torch.stack([(output * output.roll(1, 0) + output.pow(3)).sum() for output in found]).sum().backward()
    assert_only_adapters_are_trained(model)
    randlora.eject(model)
    assert [type(module) for module in model.modules()] == classes
    assert all_bits(model.state_dict()) == all_bits(base.state_dict())


@in_prototype
@pytest.mark.parametrize("targets", [["linear1"], ["layers.1.self_attn"], None], ids=str)
def test_an_encoder_in_evaluation_gives_gradients_or_torch_says_that_nested_tensors_have_none(targets: Any) -> None:
    model = encoder().double()
    randlora.inject(model, r=4, targets=targets)
    fill(model)
    if targets is not None:
        with pytest.raises(AssertionError, match="does not support NestedTensor outside of its fast path"):
            encoded(model)
        model.use_nested_tensor = False
    encoded(model)[1].square().sum().backward()
    assert_only_adapters_are_trained(model)


def test_layers_of_rwkv_that_it_divides_in_place_are_left_out_and_the_rest_is_merged_as_it_acts() -> None:
    model = rwkv(rescale_every=2)
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
    assert not randlora.inject(rwkv(rescale_every=0), r=2).skipped


# What is refused


def quantize(model: nn.Module, *names: str) -> nn.Module:
    """Replace linear layers, by the ends of their names, by layers with codes, which cannot be read as weights."""
    for fqn, module in [*model.named_modules()]:
        if fqn.endswith(names):
            assert isinstance(module, nn.Linear)
            owner, _, child = fqn.rpartition(".")
            layer = of_4_bits(module.in_features, module.out_features, bias=module.bias is not None)
            setattr(model.get_submodule(owner), child, layer)
    return model


def positions(encoder: str) -> nn.Module:
    (name,) = (name for name in PARENTS if name.endswith(encoder))
    options = {"has_relative_attention_bias": True, "has_spatial_attention_bias": True}
    config = resolve_name(name.replace("modeling", "configuration").replace("Encoder", "Config"))
    return nn.ModuleDict({"encoder": resolve_name(name)(config(**SIZES, **options, max_2d_position_embeddings=16))})


NO_EFFECT = "so an adapter would have no effect"
READ = f"because ShiftedWindowAttention reads its weight, {NO_EFFECT}"
KERNELS = "is not called when the kernels of mamba-ssm are used, because BambaMixer"
V2, PP = "LayoutLMv2Encoder", "PPDocLayoutV2ReadingOrderEncoder"
UNDER = f"has no gradient, because {V2} reads its weight under torch.no_grad"
bamba: Any = partial(tiny, "bamba", "BambaModel")
REFUSED: list[tuple[Callable[[], nn.Module], str, str]] = [
    (lambda: quantize(swin(), "qkv"), "features.1.0.attn.qkv (Linear4bit)", f"is never called, {READ}"),
    (lambda: quantize(bamba(), "out_proj"), "layers.0.mamba.out_proj (Linear4bit)", KERNELS),
    (lambda: positions(V2), "encoder.rel_pos_x_bias (Linear)", UNDER),
    (lambda: positions(PP), "encoder.rel_pos_x_bias (Linear)", f"is never used by {PP}, {NO_EFFECT}"),
    (
        partial(rwkv, rescale_every=2),
        "blocks.2.attention.output (Linear)",
        "is in a RwkvBlock, whose weights the model",
    ),
]


@pytest.mark.parametrize(("build", "layer", "words"), REFUSED, ids=[row[1] for row in REFUSED])
def test_what_cannot_be_adapted_is_refused_and_skipped_by_rules(build: Any, layer: str, words: str) -> None:
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
        model = quantize(nn.Sequential(resolve_name("timm.models.beit.Attention")(8, 2, **options)), "qkv")
        assert "0.qkv" in randlora.inject(model, r=2, targets="all-linear").targets


def test_what_chooses_tokens_runs_without_gradients_and_rules_leave_it_out() -> None:
    kinds = [resolve_name(name) for name in WITHOUT_GRADIENT]
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


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore:.*gemm_4bit")
@pytest.mark.parametrize(("build", "draw"), [(flux, patches), (unet, noise)], ids=["flux", "unet"])
def test_joined_projections_are_adapted_and_joining_adapted_ones_fails_in_the_forward(build: Any, draw: Any) -> None:
    model, given = build().eval(), draw()
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    expected = adapt(model, r=2)(**given).sample
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
    refused = r"\.to_v \(Linear\) is not called, because \w+ calls to_qkv"
    with untouched(model), pytest.raises(TargetError, match=refused):
        randlora.inject(model, r=2, targets=["to_v"])
    report = randlora.inject(model, r=2)
    assert "to_qkv" in {fqn.rpartition(".")[2] for fqn in report.targets}
    left = [why for fqn, why in report.skipped.items() if fqn.endswith(".to_v")]
    assert any(f"calls to_qkv instead, {NO_EFFECT}" in why for why in left)
    output = fill(model)(**given).sample
    output.sum().backward()
    assert_only_adapters_are_trained(model)
    with torch.no_grad(), randlora.merged(model):
        torch.testing.assert_close(model(**given).sample, output, rtol=1e-4, atol=1e-4)
    model.unfuse_qkv_projections()  # which takes apart what is adapted, and in Flux deletes it
    said = r"to_qkv no longer has adapter 'default': the module was replaced"
    if build is unet:
        said = r"to_qkv is adapted and is not called, because Attention calls to_q, t"
    with pytest.raises(AdapterError, match=said):
        model(**given) if build is unet else [*randlora.trainable_parameters(model)]
