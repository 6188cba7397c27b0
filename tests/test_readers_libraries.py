"""Every place where libraries read a weight of a linear layer is known: in `PARENTS`, or with a reason given here."""

import re

import pytest

from randlora.readers.parents import PARENTS
from tests.weight_reads import LIBRARIES, Read, reads_in

pytestmark = pytest.mark.medium

BY_OTHERS = {
    r"MiniMaxH3AudioAttnProcessor\.__call__$": "MiniMaxH3AudioCausalAttention",
    r"RwkvModel\._rescale_layers$": "RwkvBlock",
    r"RwkvModel\._bnb_4bit_dequantize_and_rescale$": "RwkvBlock",
    r"\.ShiftedWindowAttentionV2\.forward$": "ShiftedWindowAttention",
    r"sparse_auto_encoder\.TiedTranspose\.": "SparseAutoEncoder",
}
"""Functions that read weights of a module of another class, and its name in the table."""

HARMLESS = {
    r"\.fuse_projections$": "randlora.readers.parents refuses the layers that are not called afterwards",
    r"\.(un)?freeze_batch_norm_2d$|\.replace_batch_norm$": "norms are not adapted",
    r"^diffusers\.(loaders|models\.lora|utils\.peft_utils)\b": "adapters of another kind, which inject refuses",
    r"^(diffusers\.quantizers|transformers\.(quantizers|integrations))\..*quantize": "before a model is adapted",
    r"^diffusers\.quantizers\..*\.create_quantized_param$": "before a model is adapted",
    r"\.replace_with_bnb_linear$|\._process_model_after_weight_loading$|\._build_encoder$": "before a model is adapted",
    r"^diffusers\.pipelines\.cosmos\.mixed_precision\.": "weights of float8, which are refused",
    r"\.StableDiffusionModelEditingPipeline\.edit_model$": "puts another base weight there, to which updates add",
    r"\.Fir(Down|Up)sample2D\.forward$": "the weight of a convolution, which is adapted as it is read",
    r"\.Mxfp4GptOssMLP\.forward$": "the router has a parameter of its own and is no linear layer",
    r"\.Deberta(V2)?LMPredictionHead\.forward$|\.PerceiverEmbeddingDecoder\.forward$": "the table of an embedding",
    r"\.Sam(HQ)?PromptEncoder\._embed_|\.OneFormer\w+\.(encode_text|forward)$": "the table of an embedding",
    r"\.RelativePositionBiasBase\.forward$": "the table of an embedding",
    r"\.DisentangledSelfAttention\.forward$": "it is never given query_states, with which its shapes would not fit",
    r"\.MMGroundingDinoModel\.forward$|\.MLCDVisionEmbeddings\.": "the class has no module of this name",
    r"^timm\.(models|layers)\.\w+\.(\w+\.)?_?(fuse|reparameterize|switch_to_deploy|merge_pre_bn|set_input_size)": (
        "makes a layer for inference of some layers that are trained: merge first"
    ),
    r"^open_clip\.utils\.replace_linear$": "before a model is adapted",
    r"^trl\..*\.(_fused_forward|_compute_loss)$": "output heads are adapted as they are read, whatever reads them",
}
"""Functions, and what they read, with the reason why adapters act all the same."""


def is_in_table(read: Read) -> bool:
    """Whether the table has the class whose code reads a weight, and the name of the module, if its code has that."""
    other = next((name for function, name in BY_OTHERS.items() if re.search(function, read.where)), None)
    if other is not None:
        return any(name.endswith(f".{other}") for name in PARENTS)
    known = [found for name, found in PARENTS.items() if read.where.startswith(f"{name}.")]
    children = {child for found in known for reading in found for child in reading.children}
    return bool(known) and (read.child in children or not read.is_of_self)


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_weight_that_is_read_is_known(library: str) -> None:
    left = [read for read in reads_in(library) if not any(re.search(known, read.where) for known in HARMLESS)]
    unknown = [f"{read.place}: {read.where} reads {read.what}" for read in left if not is_in_table(read)]
    assert not unknown, "\n".join(unknown)


def test_the_code_of_every_class_of_the_table_reads_the_weights() -> None:
    found = {(read.where.rpartition(".")[0], read.child) for library in LIBRARIES for read in reads_in(library)}
    by_others = {name for name in PARENTS if name.rpartition(".")[2] in BY_OTHERS.values()}
    missing = [
        (name, child)
        for name, readings in PARENTS.items()
        for reading in readings
        for child in reading.children
        if (name, child) not in found and (name, "bias") not in found and name not in by_others
        if not name.startswith("torch.")
    ]
    assert not missing


def test_what_is_said_to_be_harmless_is_there() -> None:
    names = {read.where for library in LIBRARIES for read in reads_in(library)}
    assert not [known for known in (*HARMLESS, *BY_OTHERS) if not any(re.search(known, name) for name in names)]
