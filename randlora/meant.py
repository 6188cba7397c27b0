"""What callers mean by names of other libraries: options, calls, and reports that are taken for models."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

_BY_PATTERN = 'use {}=, which takes a mapping from patterns: {}={{"q_proj": 64, ".*": 16}}'
_BIASES = 'use train_also=, which takes the names of biases: train_also=r".*\\.bias"'
_WHOLE_NAMES = "use targets=, which takes names and regexes of whole layers"
_NOTHING_LIKE_IT = "leave it out: it is for another method, and has no counterpart here"
_RECORDED = "leave it out: it says nothing about the adapter that the file does not say"

ADVICE = {
    "adapter_name": "use name=",
    "alpha_pattern": _BY_PATTERN.format("alpha", "alpha"),
    "auto_mapping": _RECORDED,
    "autocast_adapter_dtype": "leave it out: Λ and Γ are float32 whatever the model's dtype is",
    "base_model_name_or_path": _RECORDED,
    "bias": _BIASES,
    "ensure_weight_tying": "leave it out: tied parameters stay tied",
    "fan_in_fan_out": "leave it out: layers that store their weight transposed are recognized",
    "inference_mode": "use trainable=False",
    "init_lora_weights": 'use init="lambda" or init="gamma"',
    "init_weights": 'use init="lambda" or init="gamma"',
    "layers_pattern": _WHOLE_NAMES,
    "layers_to_transform": _WHOLE_NAMES,
    "lora_bias": _BIASES,
    "low_cpu_mem_usage": "leave it out: bases are drawn once, and shared by all layers",
    "peft_type": "leave it out: every adapter is one of RandLoRA",
    "peft_version": _RECORDED,
    "rank": "use r=, the rank of one basis: a smaller r trains more parameters",
    "rank_pattern": _BY_PATTERN.format("r", "r"),
    "revision": "leave it out, and give it to randlora.load",
    "save_projection": 'use the argument bases="stored" of save()',
    "sparse": 'use basis="sparse"',
    "target_parameters": "use targets=, which takes names of weights too",
    "task_type": "leave it out: the model is changed in place, and stays one for its task",
    "trainable_token_indices": "use train_also=, with the whole embedding, or targets= with it",
    "use_dora": "leave it out: an update is of full rank already",
    "use_rslora": "leave it out, and give alpha=: randlora.equivalent_alpha(…, use_rslora=True) computes it",
    "very_sparse": 'use basis="very_sparse"',
    **dict.fromkeys(
        (
            *("alora_invocation_tokens", "arrow_config", "corda_config", "eva_config", "kasa_config"),
            *("layer_replication", "loftq_config", "lora_ga_config", "megatron_config", "megatron_core"),
            *("monteclora_config", "qalora_group_size", "runtime_config", "use_bdlora", "use_qalora", "velora_config"),
        ),
        _NOTHING_LIKE_IT,
    ),
}
"""What to do about options of PEFT and other libraries that have no entry of the table here."""

_LOAD_MODEL = "randlora.files.load_model(directory)"

CALLS = {
    "AutoPeftModel": _LOAD_MODEL,
    "AutoPeftModelForCausalLM": _LOAD_MODEL,
    "AutoPeftModelForSequenceClassification": _LOAD_MODEL,
    "LoraConfig": "randlora.inject(model, r=32, targets=…), or randlora.RandLoRAConfig",
    "PeftModel": "randlora.load(model, directory)",
    "RandLoraConfig": "randlora.inject(model, r=32, targets=…), or randlora.RandLoRAConfig",
    "TaskType": "randlora.inject(model), which needs no type of task",
    "add_adapter": "randlora.inject(model, name=…)",
    "add_weighted_adapter": "randlora.serving.combine(model, {…: 0.5, …: 0.5}, name=…)",
    "delete_adapter": "randlora.remove(model, name)",
    "disable_adapter": "with randlora.disabled(model):",
    "disable_adapters": "with randlora.disabled(model):",
    "from_pretrained": "randlora.load(model, directory)",
    "get_peft_model": "randlora.inject(model), which changes the model in place and returns a report",
    "get_peft_model_state_dict": "randlora.adapter_state(model)",
    "hotswap_adapter": "randlora.swap(model, source)",
    "inject_adapter_in_model": "randlora.inject(model)",
    "load_adapter": "randlora.load(model, directory)",
    "load_peft_weights": "randlora.load(model, directory)",
    "merge_adapter": "randlora.merge(model, reversible=True)",
    "merge_and_unload": "randlora.merge(model), which changes the model in place and returns a report",
    "prepare_model_for_kbit_training": "randlora.prepare_quantized(model)",
    "print_trainable_parameters": "print(report) with what inject returns, or print(*randlora.adapters(model))",
    "push_to_hub": "randlora.save(model, directory, push_to_hub=…)",
    "save_pretrained": "randlora.save(model, directory)",
    "set_adapter": "randlora.activate(model, name)",
    "set_peft_model_state_dict": "randlora.swap(model, state)",
    "set_requires_grad": "randlora.set_trainable(model, name)",
    "unload": "randlora.eject(model)",
    "unmerge_adapter": "randlora.unmerge(model)",
}
"""The calls that are meant by names that this library does not have, and PEFT has."""

IN_PLACE = (
    "calls of randlora change the model itself and return a report: write randlora.inject(model), not model = "
    "randlora.inject(model)"
)


class NotTheModel:
    """Base class of reports of calls that change a model: one that is used as the model says where that is."""

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:  # noqa: ARG002  # of the model
        """Raise a `TypeError` that says what is meant."""
        raise TypeError(f"a {type(self).__name__} cannot be called: {IN_PLACE}")

    if not TYPE_CHECKING:  # to which every name would then be one

        def __getattr__(self, name):
            """Raise an `AttributeError` that says what is meant."""
            advice = "" if name.startswith("_") else f": {IN_PLACE}"
            raise AttributeError(f"a {type(self).__name__} has no {name!r}{advice}")
