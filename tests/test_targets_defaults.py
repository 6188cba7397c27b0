"""What is adapted by default, by presets and by names, in models that transformers and diffusers ship."""

import inspect
import re
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as THEIR_TARGETS
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

import randlora
from randlora.errors import TargetError
from randlora.targets.census import Census
from randlora.targets.select import HEAD_NAMES, TARGET_PRESETS, Selection, select
from tests.further import further
from tests.models import library
from tests.transformers_zoo import every_type, on_meta

TYPES = {
    "canine": "query value",
    "deepseek_v3": "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj",
    "distilbert": "q_lin v_lin",
    "kyutai_speech_to_text": "q_proj.linear v_proj.linear",
    "longt5": "q v",
    "modernbert": "Wqkv",
    "phi3": "qkv_proj",
    "qwen3_5": "q_proj v_proj in_proj_qkv",
    "sam": "q_proj v_proj qkv",
}
"""The last components of what is adapted, by type: types that have all the names between them."""

NO_ATTENTION = """
bit convnext convnextv2 dac dinov3_convnext edgetam_vision_model efficientnet encodec focalnet gemma3n_vision
glm_image_vqmodel hgnet_v2 mobilenet_v1 mobilenet_v2 muse_spark_audio poolformer pp_lcnet pp_lcnet_v3 pp_lcnet_v4
pp_ocrv5_mobile_det pp_ocrv6_small_det pp_ocrv6_tiny_rec regnet resnet rt_detr_resnet superpoint textnet timm_wrapper
univnet upernet uvdoc uvdoc_backbone vibevoice_acoustic_tokenizer wavtokenizer vibevoice_acoustic_tokenizer_decoder
vibevoice_acoustic_tokenizer_encoder falcon_mamba mamba mamba2 slanet wavtokenizer_encoder bamba granitemoehybrid zamba
zamba2 fnet ibert mobilevitv2 patchtsmixer squeezebert swiftformer xlnet
"""
"""Types without linear query and value projections: most have convolutions or states. All linear layers are adapted."""

ELSEWHERE = {"phi", "rwkv", "pp_doclayout_v4", "sam3", "sam3_lite_text", "sam3_video", "xlstm"}
"""Of which some layers outside attention are adapted: by PEFT's preset, in a head that scores pairs, in cells."""
ENCODERS = {"blip", "idefics", "llama4", "pp_formulanet", "t5gemma2"}
"""Which write text, and whose encoders of images or sound no name or module tells from the rest."""


def chosen(model: nn.Module) -> Selection:
    return select(Census.of(model), None, None)


def is_attention(model: nn.Module, fqn: str) -> bool:
    said, module = list[str](), model
    for part in fqn.split(".")[:-1]:
        module = module.get_submodule(part)
        said += [part, type(module).__name__]
    return any(re.search(r"attention|attn|(^|_)att$|(^|_)mh.?a$", name.lower()) for name in said)


def default_of(model_type: str, names: list[str]) -> tuple[Any, Selection | None]:
    model = None
    for model in on_meta(model_type, names):
        with suppress(TargetError):  # no linear layer at all
            if not (selection := chosen(model)).rule.startswith("all linear layers"):
                return model, selection
    return model, None


@pytest.mark.parametrize(("model_type", "names"), TYPES.items(), ids=TYPES)
def test_the_query_and_value_projections_of_a_type_are_adapted(model_type: str, names: str) -> None:
    endings = tuple(f".{ending}" for ending in names.split())
    for model in on_meta(model_type, every_type()[model_type][:1]):
        fqns = [site.fqn for site in chosen(model).sites]
        if all(any(fqn.endswith(ending) for fqn in fqns) for ending in endings):
            break
    else:
        pytest.fail("no config gives the type all of them")
    assert all(is_attention(model, fqn) for fqn in fqns)
    within = "language_model" if model_type == "qwen3_5" else ""  # its encoder has layers of these names too
    linear = [fqn for fqn, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    assert fqns == [fqn for fqn in linear if fqn.endswith(endings) and within in fqn]


@pytest.mark.slow
def test_attention_is_adapted_in_every_type_that_has_linear_projections() -> None:
    writers = modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    without, elsewhere, heads, encoded = (set[str]() for _ in range(4))
    covered = set[str]()
    for model_type, names in every_type().items():
        model, selection = default_of(model_type, names)
        if model is None or selection is None:
            without |= set() if model is None else {model_type}
            continue
        covered.add(model_type)
        fqns = [site.fqn for site in selection.sites]
        if not all(is_attention(model, fqn) for fqn in fqns):
            elsewhere.add(model_type)
        if any(site.owner is model.get_output_embeddings() for site in selection.sites):
            heads.add(model_type)
        within = [model.get_encoder(modality=kind) for kind in ("image", "audio")] if model_type in writers else []
        inside = [name for name, each in model.named_modules() if name and any(each is encoder for encoder in within)]
        if any(fqn.startswith(f"{name}.") for fqn in fqns for name in inside):
            encoded.add(model_type)
    assert without <= {*NO_ATTENTION.split()}
    assert covered.isdisjoint(NO_ATTENTION.split())
    assert elsewhere == ELSEWHERE
    assert encoded == ENCODERS
    assert not heads
    assert len(covered) >= 550


def test_names_mean_linear_layers_of_the_language_model_where_there_is_one() -> None:
    def by_default(model_type: str | None, **layers: nn.Module) -> tuple[list[str], str, set[str]]:
        model = nn.ModuleDict(layers)
        model.__dict__["config"] = SimpleNamespace(model_type=model_type)
        selection = chosen(model)
        left = {fqn for group in selection.left_out for fqn in group.fqns}
        return [site.fqn for site in selection.sites], selection.rule.partition(" (no output")[0], left

    v, mixer = (nn.ModuleDict({name: nn.Linear(2, 2)}) for name in ("v_proj", "mixer"))
    tower, linear, conv = nn.ModuleDict({"v_proj": nn.Linear(2, 2)}), nn.Linear(2, 2), nn.Conv1d(2, 2, 1)
    everything, values = "all linear layers", "the query and value projections (value)"
    for model_type in ("clip", "unheard-of"):
        fqns, rule, _ = by_default(model_type, language_model=v, vision_tower=tower)
        assert (fqns, rule) == (["language_model.v_proj"], "the query and value projections of language_model (v_proj)")
        fqns, rule, _ = by_default(model_type, language_model=mixer, vision_tower=tower)
        assert (len(fqns), rule) == (2, everything)  # its encoder is not adapted alone
    assert by_default(None, policy=linear, value=nn.Linear(2, 2))[1:] == (everything, set())  # of another library
    assert by_default("unheard-of", value=linear, query=conv) == (["value"], values, {"query"})
    assert by_default("unheard-of", policy=linear, value=conv, query=nn.Embedding(2, 2))[1] == everything
    assert by_default("llama", q_proj=conv, v_proj=linear)[::2] == (["v_proj"], {"q_proj"})  # not left out silently


DIFFUSERS = {
    "SD3Transformer2DModel": "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out",
    "UNet2DConditionModel": "to_q to_k to_v to_out.0",
}
"""What is adapted in the best known classes: what their training scripts name."""


def diffusers_model(name: str) -> Any:
    model_class = getattr(library("diffusers"), name)
    known = inspect.signature(model_class).parameters
    with torch.device("meta"):
        return model_class(**{key: 2 for key in ("num_layers", "num_single_layers", "depth") if key in known})


@pytest.mark.parametrize(("name", "names"), DIFFUSERS.items(), ids=DIFFUSERS)
def test_the_attention_of_a_diffusion_model_is_adapted(name: str, names: str) -> None:
    model = diffusers_model(name)
    endings = tuple(f".{ending}" for ending in names.split())
    selection = chosen(model)
    assert selection.rule.startswith("the attention projections (to_q, to_k, to_v, to_out")
    assert [site.fqn for site in selection.sites] == [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.endswith(endings)
    ]


@pytest.mark.slow
def test_attention_alone_is_adapted_in_every_model_of_diffusers() -> None:
    """No output head and nothing that embeds the time."""
    without, models = set[str](), dict[str, Any]()
    for name in filter(
        re.compile(r".*(Transformer(\dD)?(Model)?$|UNet|DiT|ControlNet)").match, dir(library("diffusers"))
    ):
        with suppress(Exception):  # what is no model, and some have no defaults
            models[name] = diffusers_model(name)
    for name, model in models.items():
        selection = chosen(model)
        fqns = [site.fqn for site in selection.sites]
        if selection.rule.startswith("all linear layers"):
            without.add(name)
        else:
            assert [fqn for fqn in fqns if not is_attention(model, fqn)] == []
            assert [fqn for fqn in fqns if re.search(r"time|proj_out|norm_out|conv_out", fqn)] == []
    assert without == {"SanaWMTransformer3DModel"}  # with other names for two kinds of attention
    assert len(models) >= 81


NOT_IN_TRANSFORMERS = {"RefinedWeb", "RefinedWebModel", "btlm", "chatglm", "rwkv7"}
"""Types whose code comes with the checkpoint."""

BUILDABLE = sorted(TARGET_PRESETS.keys() - NOT_IN_TRANSFORMERS)
OF_EACH_FORM = ("bert", "blip-2", "gemma4", "gpt2", "phi")
"""Types whose presets are one name, several, some that only a variant has, and a regex. PEFT has most of the others."""

HEADS = {"bert": "MaskedLM", "rwkv": "CausalLM", "t5": "Seq2SeqLM", "electra": "SequenceClassification"}
HEADS |= {"wav2vec2": "AudioClassification"}
"""Language models, whose heads the models tell, and classifiers, whose heads have names."""


def build(model_type: str, task: str = "") -> Any:
    options = {"pad_token_id": 1} if model_type in {"idefics3", "smolvlm"} else {}  # theirs is not in the vocabulary
    config = transformers.AutoConfig.for_model(model_type, **options)
    config.architectures = []  # the first class of a type with several
    with torch.device("meta"):
        return getattr(transformers, f"AutoModel{task and 'For'}{task}").from_config(config)


@pytest.mark.parametrize("model_type", [each if each in OF_EACH_FORM else further(each) for each in BUILDABLE])
def test_a_preset_finds_the_layers_it_names(model_type: str) -> None:
    model = build(model_type)
    preset = TARGET_PRESETS[model_type]
    report = randlora.plan(model, r=8)
    assert report.rule.startswith(f"the preset of model_type {model_type!r}")
    if isinstance(preset, str):
        assert all(re.fullmatch(preset, fqn) for fqn in report.targets)
    else:
        found = {target.fqn.rsplit(".", 1)[-1] for target in randlora.find_targets(model)}
        # the language model inside of blip-2 is an OPT or a T5
        assert found <= set(preset) if model_type == "blip-2" else found == set(preset)


def test_presets_are_of_known_types_and_the_choice_of_peft_where_peft_has_one() -> None:
    assert TARGET_PRESETS.keys() - set(CONFIG_MAPPING) == NOT_IN_TRANSFORMERS
    ours = {name: TARGET_PRESETS[name] for name in THEIR_TARGETS}
    assert {name: own if isinstance(own, str) else list(own) for name, own in ours.items()} == THEIR_TARGETS


@pytest.mark.parametrize("model_type", HEADS)
def test_all_linear_leaves_out_the_output_head(model_type: str) -> None:
    model = build(model_type, HEADS[model_type])
    report = randlora.plan(model, r=8, targets="all-linear")
    skipped = {fqn: why for fqn, why in report.skipped.items() if "rescale_every=0" not in why}  # of RWKV
    assert report.targets
    assert set(skipped.values()) == {"the output head"}
    if (head := model.get_output_embeddings()) is not None:
        assert [*skipped] == [fqn for fqn, module in model.named_modules() if module is head]
    else:
        assert {fqn.split(".")[0] for fqn in skipped} <= HEAD_NAMES
