"""Layers whose weight another module reads are adapted so that it reads weight + update, or refused with the reason."""

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers
from torch import Tensor, nn

import randlora
from randlora.errors import TargetError
from randlora.layers.scopes import in_call
from randlora.readers.parents import PARENTS, WITHOUT_GRADIENT, Parent
from tests.kit import fill, same_bits, untouched
from tests.models import clip, image, reproducible
from tests.transformers_zoo import tiny

TRANSFORMERS = "transformers.models"
TDNN = {"tdnn_dim": (8,), "tdnn_kernel": (3,), "tdnn_dilation": (1,)}
SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
STATES: dict[str, Any] = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 4}


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


def altup(kind: Any) -> tuple[nn.Module, Callable[[Any], Any]]:
    owner, streams = kind(transformers.Gemma3nTextConfig(hidden_size=8, altup_num_inputs=3)), torch.randn(3, 1, 2, 8)

    def run(owner: Any) -> Any:
        with in_call():  # that of the decoder layer around it
            return owner.predict(streams), owner.correct(streams, streams[0] + 1)

    return owner, run


def attention(kind: Any) -> tuple[nn.Module, Callable[[Any], Any]]:
    x = torch.randn(3, 2, 8)
    return kind(8, 2), lambda owner: owner(x, x, x)


def sparse(kind: Any) -> tuple[nn.Module, Callable[[Any], Any]]:
    x = torch.randn(4, 8)
    return kind(8, 12, k=3, k_aux=4), lambda owner: owner({"sentence_embedding": x})


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


def neomme() -> Any:
    model: Any = tiny("neomme", "NeoMMEForMaskedLM")
    model.unembedding_projection.weight = nn.Parameter(model.unembedding_projection.weight.detach().clone())  # untied
    return model


OF_ASSISTANTS = {name for name in PARENTS if name.endswith("AssistantForCausalLM")}
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
    "torch.nn.modules.activation.MultiheadAttention": attention,
    "torchvision.models.swin_transformer.ShiftedWindowAttention": one(IMAGE, 8, *WINDOW),
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": one(IMAGE, 8, *WINDOW),
    "torchvision.models.video.swin_transformer.ShiftedWindowAttention3d": one(IMAGE[None], 8, [2, 2, 2], [0, 0, 0], 2),
    "open_clip.modified_resnet.AttentionPool2d": one(torch.randn(1, 16, 2, 2), 2, 16, 2, 8),
    "diffusers.models.embeddings.HunyuanDiTAttentionPool": one(torch.randn(1, 3, 16), 3, 16, 2, 8),
    "timm.models.beit.Attention": one(torch.randn(1, 4, 8), 8, 2, qkv_bias=True),
    "timm.models.eva.EvaAttention": one(torch.randn(1, 4, 8), 8, 2, scale_norm=False),
    "timm.models.swin_transformer_v2.WindowAttention": one(torch.randn(1, 4, 8), 8, (2, 2), 2),
    f"{TRANSFORMERS}.wavlm.modeling_wavlm.WavLMAttention": one(TOKENS, 16, 2),
    **{name: one(torch.randn(1, 8, 8), SimpleNamespace(**TDNN)) for name in PARENTS if name.endswith(".TDNNLayer")},
    **{name: scores(8, 2) for name in PARENTS if name.endswith("DetrMHAttentionMap")},
    f"{TRANSFORMERS}.dab_detr.modeling_dab_detr.DabDetrMHAttentionMap": scores(8, 8, 2),
    f"{TRANSFORMERS}.gemma3n.modeling_gemma3n.Gemma3nTextAltUp": altup,
    "diffusers.models.autoencoders.autoencoder_kl_minimax_h3_audio.MiniMaxH3AudioCausalAttention": one(
        torch.randn(1, 4, 16), 16, 8, 2
    ),
    "diffusers.pipelines.ace_step.modeling_ace_step._AceStepResidualFSQ": one(torch.randn(1, 3, 8), 8, [8, 5, 5]),
    "diffusers.pipelines.shap_e.renderer.ChannelsProj": one(torch.randn(2, 3, 8), vectors=3, channels=4, d_latent=8),
    "sentence_transformers.sparse_encoder.modules.sparse_auto_encoder.SparseAutoEncoder": sparse,
    f"{TRANSFORMERS}.longcat_flash.modeling_longcat_flash.LongcatFlashTopkRouter": one(torch.randn(1, 3, 8), ROUTER),
    f"{TRANSFORMERS}.mobilebert.modeling_mobilebert.MobileBertLMPredictionHead": one(TOKENS, MOBILE),
    f"{TRANSFORMERS}.mamba.modeling_mamba.MambaMixer": one(TOKENS, transformers.MambaConfig(**STATES), 0),
    f"{TRANSFORMERS}.falcon_mamba.modeling_falcon_mamba.FalconMambaMixer": inside(
        lambda: transformers.FalconMambaModel(transformers.FalconMambaConfig(vocab_size=20, **STATES)), "layers.0.mixer"
    ),
    f"{TRANSFORMERS}.jamba.modeling_jamba.JambaMambaMixer": one(TOKENS, JAMBA, 0),
    f"{TRANSFORMERS}.bloom.modeling_bloom.BloomAttention": inside(bloom, "h.0.self_attention"),
    f"{TRANSFORMERS}.bloom.modeling_bloom.BloomMLP": inside(bloom, "h.0.mlp"),
    f"{TRANSFORMERS}.neomme.modeling_neomme.NeoMMEForMaskedLM": inside(neomme, ""),
}
"""How to build and run a module of each class that never calls some layers of its own."""


def readings(owner: nn.Module, *, is_right: bool = True) -> list[Parent]:
    """Return what the table says of a module."""
    names = [f"{parent.__module__}.{parent.__qualname__}" for parent in type(owner).__mro__]
    found = [reading for name in names for reading in PARENTS.get(name, ()) if reading.where(owner)]
    return [reading for reading in found if bool(reading.problem) is not is_right]


def values_of(output: Any) -> list[Tensor]:
    """Return the floating tensors of what a module returns."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    parts = output.values() if hasattr(output, "values") else output if isinstance(output, tuple | list) else ()
    return [value for part in parts for value in values_of(part)]


def test_every_class_that_never_calls_a_layer_is_built() -> None:
    never = {name for name, found in PARENTS.items() if any(not (part.when or part.problem) for part in found)}
    assert never <= BUILDS.keys() | OF_ASSISTANTS


@pytest.mark.parametrize("name", BUILDS)
def test_a_layer_that_is_read_acts_and_is_trained_as_if_it_were_merged(name: str) -> None:
    torch.manual_seed(0)
    owner, run = BUILDS[name](named(name))
    root = nn.ModuleDict({"owner": owner})

    def computed() -> list[Tensor]:
        torch.manual_seed(0)  # for dropout
        return values_of(run(owner))

    for training in (True, False):
        root.train(training)
        children = [child for reading in readings(owner) for child in reading.children]
        randlora.inject(root, r=2, targets=[f"owner.{child}" for child in children])
        fill(root, spread=0.3)
        found = computed()
        torch.stack([value.sum() for value in found if value.requires_grad]).sum().backward()
        assert [fqn for fqn, value in root.named_parameters() if "randlora_lambda" in fqn and value.grad is None] == []
        with torch.no_grad(), randlora.merged(root):
            merged = computed()
        with torch.no_grad(), randlora.disabled(root):
            base = computed()
        for ours, theirs in zip(found, merged, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-4 * max(1.0, theirs.abs().max().item()))
        assert any(not torch.allclose(ours, theirs, atol=1e-3) for ours, theirs in zip(found, base, strict=True))
        randlora.eject(root)


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
    config = transformers.Mamba2Config(
        vocab_size=20, hidden_size=32, state_size=4, num_hidden_layers=1, num_heads=8, head_dim=8, n_groups=1
    )
    return transformers.Mamba2Model(config)  # type: ignore[no-any-return]


def pool() -> nn.Module:
    return nn.ModuleDict({"pool": named("open_clip.modified_resnet.AttentionPool2d")(2, 16, 2, 8)})


@pytest.mark.parametrize(
    ("build", "names", "targets", "message"),
    [
        (
            swin,
            ("qkv",),
            ["qkv"],
            r"features\.1\.0\.attn\.qkv \(Linear4bit\) is never called, because ShiftedWindowAttent",
        ),
        (pool, ("_proj",), "all-linear", r"pool\.q_proj \(is never called, because AttentionPool2d reads"),
        (
            mamba2,
            ("out_proj",),
            ["out_proj"],
            "is not called when the kernels of mamba-ssm are used, because M",
        ),
        (swin, (), ["qkv"], r"attn\.qkv is a weight that other code reads, and dropout=0.1 cannot reach"),
    ],
    ids=["named", "nothing else", "at times", "dropout"],
)
def test_quantized_and_named_or_with_dropout_they_are_refused(
    build: Callable[[], nn.Module], names: tuple[str, ...], targets: Any, message: str
) -> None:
    with pytest.raises(TargetError, match=message):
        randlora.inject(quantize(build(), *names), r=2, targets=targets, dropout=0.0 if names else 0.1)


@pytest.mark.parametrize("targets", ["all", "all-linear", None])
def test_rules_skip_quantized_ones_with_the_reason(targets: str | None) -> None:
    report = randlora.inject(quantize(swin("V2"), "attn.qkv", "attn.proj"), r=2, targets=targets)
    reason = "is never called, because ShiftedWindowAttentionV2 reads its weight, so an adapter would have no effect"
    places = [f"features.{i}.{j}.attn.{child}" for i in (1, 3) for j in (0, 1) for child in ("qkv", "proj")]
    assert {fqn: why for fqn, why in report.skipped.items() if "attn" in fqn} == dict.fromkeys(places, reason)
    assert report.targets
    assert not {*places} & {*report.targets}
    if targets is None:  # a default that finds nothing adapts all linear layers
        report = randlora.inject(quantize(wavlm(), "q_proj", "k_proj", "v_proj", "out_proj"), r=2)
        assert "all linear layers" in report.rule
        assert report.targets
        assert report.skipped["encoder.layers.0.attention.q_proj"].startswith("is never called")


def test_gemma_clamps_what_it_reads_with_the_update_and_changes_no_frozen_weight() -> None:
    config = transformers.Gemma3nTextConfig(hidden_size=8, altup_num_inputs=3, altup_coef_clip=0.02)
    model = nn.ModuleDict({"up": named(f"{TRANSFORMERS}.gemma3n.modeling_gemma3n.Gemma3nTextAltUp")(config)})
    randlora.inject(model, r=2, targets="all-linear")
    fill(model, spread=0.3)
    before, up, streams = model.state_dict(), model["up"], torch.randn(3, 1, 2, 8)
    before = {name: value.clone() for name, value in before.items()}
    assert isinstance(up, nn.Module)
    with in_call():
        found = up.correct(streams, streams[0] + 1)  # type: ignore[operator]
        up.predict(streams)  # type: ignore[operator]
    assert all(same_bits(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad(), randlora.merged(model):
        torch.testing.assert_close(up.correct(streams, streams[0] + 1), found)  # type: ignore[operator]


# Layers of which no adapter would be right


def rwkv(rescale_every: int = 2) -> Any:
    config = transformers.RwkvConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=4, attention_hidden_size=16, intermediate_size=16,
        rescale_every=rescale_every, use_cache=False,
    )  # fmt: skip
    return reproducible(lambda: transformers.RwkvModel(config))


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
            adapted, base = model(IDS)[0], without(model)(IDS)[0]
            with randlora.merged(model):
                torch.testing.assert_close(model(IDS)[0], adapted, rtol=1e-4, atol=1e-4)
        effects.append(adapted - base)
    torch.testing.assert_close(*effects, rtol=1e-3, atol=1e-3)
    with pytest.raises(TargetError, match=r"blocks\.2\.attention\.output \(Linear\) is in a RwkvBlock, whose weights"):
        randlora.inject(rwkv(), r=2, targets=["blocks.2"])
    assert not randlora.inject(rwkv(0), r=2).skipped


def without(model: Any) -> Callable[[Tensor], Any]:
    """Return a call of a model without its adapters."""

    def call(ids: Tensor) -> Any:
        with randlora.disabled(model):
            return model(ids)

    return call


def positions(module: str, name: str) -> nn.Module:
    """Build an encoder of documents, whose biases of positions are read without gradients or not at all."""
    kind = {"layoutlmv2": "LayoutLMv2Config", "layoutlmv3": "LayoutLMv3Config"}.get(module, "ReadingOrderConfig")
    code = importlib.import_module(f"{TRANSFORMERS}.{module}.configuration_{module}")
    made = next(value for key, value in vars(code).items() if key.endswith(kind))
    config = made(
        **SIZES, max_2d_position_embeddings=16, has_relative_attention_bias=True, has_spatial_attention_bias=True
    )
    return nn.ModuleDict({"encoder": named(f"{TRANSFORMERS}.{module}.modeling_{module}.{name}")(config)})


PP = "pp_doclayout_v2", "PPDocLayoutV2ReadingOrderEncoder"


@pytest.mark.parametrize(
    ("module", "name", "child", "words"),
    [
        ("layoutlmv2", "LayoutLMv2Encoder", "rel_pos_bias", "reads its weight under torch.no_grad"),
        ("layoutlmv3", "LayoutLMv3Encoder", "rel_pos_x_bias", "under torch.no_grad, so an adapter"),
        (*PP, "rel_pos_bias", "has no gradient, because"),
        (*PP, "rel_pos_x_bias", "is never used by"),
    ],
)
def test_what_cannot_be_adapted_is_refused_with_the_reason(module: str, name: str, child: str, words: str) -> None:
    model = positions(module, name)
    with untouched(model), pytest.raises(TargetError, match=rf"encoder\.{child} \(Linear\) .*{words}"):
        randlora.inject(model, r=2, targets=[child])
    report = randlora.inject(model, r=2, targets="all-linear")
    assert words in report.skipped[f"encoder.{child}"]
    assert f"encoder.{child}" not in report.targets


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


@pytest.mark.parametrize("options", [{"qkv_bias": False}, {"qkv_bias": True, "qkv_bias_separate": True}])
def test_a_module_that_calls_them_with_its_options_is_adapted(options: dict[str, bool]) -> None:
    model = nn.Sequential(named("timm.models.beit.Attention")(8, 2, **options))
    assert "0.qkv" in randlora.inject(model, r=2, targets="all-linear").targets


# No adapter is a silent no-op


IDS = torch.tensor([[1, 2, 3, 4]])
PIXELS = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Any]]] = {
    "clip": (clip, lambda model: model(image()["x"][:1], IDS.repeat(1, 2))),
    "swin": (swin, lambda model: model(PIXELS)),
    "swin v2": (lambda: swin("V2"), lambda model: model(PIXELS)),
    "wavlm": (wavlm, lambda model: model(torch.randn(1, 200))),
}


READ = {
    "clip": ["out_proj"],
    "swin": ["attn.qkv", "attn.proj"],
    "swin v2": ["attn.qkv", "attn.proj"],
    "wavlm": ["q_proj", "k_proj", "v_proj", "out_proj"],
}
"""Layers of whole models that are read and never called."""


@pytest.mark.parametrize(
    ("name", "targets"), [*((name, "all-linear") for name in MODELS), *READ.items()], ids=lambda value: str(value)[:12]
)
def test_whatever_is_adapted_in_a_whole_model_is_used_trained_and_equals_its_merged_model(
    name: str, targets: Any
) -> None:
    build, run = MODELS[name]
    model = build().eval()

    def outputs() -> Tensor:
        torch.manual_seed(0)  # for an input that is drawn
        return torch.cat([value.flatten() for value in values_of(run(model))])

    before = outputs().detach()
    fqns = randlora.inject(model, r=2, targets=targets).targets
    assert same_bits(outputs(), before) or targets == "all-linear"
    fill(model, spread=0.3)
    started = outputs()
    (started * torch.randn_like(started)).sum().backward()
    unused = {name for name, value in model.named_parameters() if "randlora_lambda" in name and value.grad is None}
    assert unused == set()
    torch.optim.SGD(randlora.trainable_parameters(model), lr=0.01).step()
    with torch.no_grad():
        found = outputs()
        with randlora.merged(model):
            torch.testing.assert_close(outputs(), found, rtol=1e-3, atol=1e-3)
        with randlora.disabled(model):
            torch.testing.assert_close(outputs(), before)
    assert not same_bits(found, started)
    for fqn in fqns if targets != "all-linear" else ():
        assert model.get_submodule(fqn).weight is model.get_parameter(f"{fqn}.weight")
