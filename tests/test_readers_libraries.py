"""Every place where libraries read a weight of a linear layer is known: in `PARENTS`, or with a reason given here."""

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from randlora.readers.parents import PARENTS

pytestmark = pytest.mark.slow  # it reads the code of all libraries

LIBRARIES = "diffusers", "open_clip", "sentence_transformers", "timm", "torchvision", "transformers", "trl"
WEIGHTS = "weight", "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"
DESCRIPTIONS = re.compile(
    "data_ptr|device|dim|dtype|element_size|is_floating_point|is_meta|itemsize|layout|ndim|new_(empty|full|ones|zeros)"
    "|new_tensor|numel|requires_grad|shape|size"
)
"""What is read of a weight without its values."""

READ_RIGHTLY = re.compile(r"Embedding|Conv\w*\(|Norm|Parameter\(|LSTM|GRU")
"""What children are made of whose weight is adapted as it is read, or that have no matrix to adapt."""

LINEAR = re.compile(r"Linear|Conv1D")
MADE = re.compile(r"self\.(\w+)(?::[^=\n]*)? = (.*)")
NO_CHILD = frozenset({"self", "cls", "nn", "init", "torch"})
BEFORE_USE = re.compile(r"_init|^init_|^reset|tie_|resize|convert|set_(in|out)put_embeddings|prune|unload|load_|from_")
"""Names of functions that run before a model computes, or that make another one."""

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
    r"\.Fir(Down|Up)sample2D\.forward$|\.causal_conv1d_forward$": (
        "the weight of a convolution, which is adapted as it is read"
    ),
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


class Read(NamedTuple):
    place: str
    where: str
    what: str
    child: str


def files_of(library: str) -> Iterator[tuple[Path, str]]:
    found = importlib.util.find_spec(library)
    assert found is not None
    assert found.origin is not None
    root = Path(found.origin).parent
    for path in sorted(root.rglob("*.py")):
        if not path.name.startswith(("convert_", "modular_")):  # the second are what files beside are generated from
            yield path.relative_to(root.parent), path.read_text(encoding="utf-8", errors="replace")


def _read(node: ast.AST) -> ast.expr | None:
    match node:
        case ast.Attribute(value=owner, attr=name) if name in WEIGHTS:
            return owner
        case ast.Call(func=ast.Name(id="getattr"), args=[owner, ast.Constant(value=str(name)), *_]) if name in WEIGHTS:
            return owner
    return None


def reads_of(text: str, path: Path) -> Iterator[Read]:
    module = ".".join(path.with_suffix("").parts)
    made: dict[str, bool] = {}
    for name, value in MADE.findall(text):
        made[name] = made.get(name, True) and READ_RIGHTLY.search(value) is not None and not LINEAR.search(value)

    def is_harmless(owner: ast.expr, parent: ast.AST | None, scope: tuple[str, ...]) -> bool:
        if isinstance(parent, ast.Attribute) and DESCRIPTIONS.fullmatch(parent.attr):
            return True
        if isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name) and parent.func.id == "isinstance":
            return True
        if any(BEFORE_USE.search(name) for name in scope if name[0].islower() or name[0] == "_"):
            return True
        if isinstance(owner, ast.Name):
            return owner.id in NO_CHILD
        return isinstance(owner, ast.Attribute) and (made.get(owner.attr, False) or owner.attr.endswith("norm"))

    def go(node: ast.AST, parent: ast.AST | None, scope: tuple[str, ...]) -> Iterator[Read]:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            scope = (*scope, node.name)
        owner = _read(node)
        if owner is not None and not is_harmless(owner, parent, scope):
            name = ast.unparse(owner).removeprefix("self.")
            yield Read(f"{path}:{owner.lineno}", ".".join((module, *scope)), ast.unparse(node), name)
        for child in ast.iter_child_nodes(node):
            yield from go(child, node, scope)

    yield from go(ast.parse(text), None, ())


def is_in_table(read: Read) -> bool:
    other = next((name for function, name in BY_OTHERS.items() if re.search(function, read.where)), None)
    if other is not None:
        return any(name.endswith(f".{other}") for name in PARENTS)
    known = [found for name, found in PARENTS.items() if read.where.startswith(f"{name}.")]
    children = {child for found in known for reading in found for child in reading.children}
    return bool(known) and (read.child in children or not read.what.startswith(("self.", "getattr(self.")))


def test_every_weight_that_is_read_is_known() -> None:
    files = ((path, text) for library in LIBRARIES for path, text in files_of(library) if "weight" in text)
    reads = [read for path, text in files for read in reads_of(text, path)]
    left = [read for read in reads if not any(re.search(known, read.where) for known in HARMLESS)]
    unknown = [f"{read.place}: {read.where} reads {read.what}" for read in left if not is_in_table(read)]
    assert not unknown, "\n".join(unknown)
    assert not [known for known in (*HARMLESS, *BY_OTHERS) if not any(re.search(known, read.where) for read in reads)]
