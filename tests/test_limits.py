"""What docs/limits.md says of code that does not know of adapters, and what to do instead."""

import ast
import contextlib
import copy
import importlib
import pickle
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao import quantization
from torch.nn import functional as F
from torch.nn.utils import fusion, prune

import randlora
from randlora.errors import AdapterError
from tests.kit import adapt, same_bits
from tests.models import llama
from tests.pages import DOCS, ROOT

PROOFS: dict[str, str] = {
    "compiled code in a": "test_serving_routed::test_a_block_runs_uncompiled_compiles_nothing_and_exports_nothing",
    "`torch.compile` in torch 2.6": "torch's, at 2.6",
    "`combine` of": "test_serving_combine::test_what_no_such_adapter_could_have_is_refused_and_changes_nothing",
    "`train_rows` of a table": (
        "test_model_rows::test_a_table_is_adapted_or_trained_in_one_way_by_all_adapters "
        "distributed/test_tensor_parallel::test_rows_of_a_table_that_is_split_are_refused"
    ),
    "`resize_token_embeddings` after": "test_model_rows::test_a_table_and_what_it_is_tied_to_may_not_change",
    "a copy of the table": "test_model_rows::test_code_that_reads_the_table_or_has_its_own_forward_gets_the_rows_too",
    "`train_rows` in PEFT": "test_model_rows::test_files_are_merged_and_converted_as_in_memory",
    "renaming": "no function renames",
    "changing a model": "a race, which no test can hold",
    "spawning": (
        "test_serving_processes::test_a_process_that_is_started_in_a_block_routes_or_is_refused "
        "test_serving_processes::test_a_copy_that_is_made_in_a_block_is_inactive_and_this_is_said"
    ),
    "`backward` of": (
        "test_serving_rows::test_what_backward_computes_again_is_refused_while_threads_are_in_different_blocks"
    ),
    "transforms of": "test_functional::test_transforms_of_gradients_are_those_of_each_member_and_differentiated_too",
    "Opacus": "other_trainers/test_long_runs::test_opacus_has_no_gradients_of_an_adapter_and_says_so_at_its_step",
    "`routed` with adapted experts": "test_serving_routed::test_what_has_no_rows_is_an_error",
    "`routed` inside `generate`": "test_serving_rows::test_rows_that_a_model_repeats_itself_in_generate_are_an_error",
    "`routed` with kernels": (
        "test_serving_rows::test_rows_that_cannot_be_known_are_an_error_at_every_length "
        "test_serving_rows::test_what_is_made_of_items_is_taken_for_the_row_that_it_is_put_into"
    ),
    "`routed` with several": "test_serving_rows::test_sequences_that_are_packed_into_one_row_are_of_one_adapter",
    "`routed` with `train_also`": (
        "test_serving_pool::test_what_routed_cannot_take_is_used_by_other_means "
        "distributed/test_tensor_parallel::test_the_code_of_the_page_splits_and_adapts"
    ),
    "`routed` of an `nn.Multi": (
        "test_serving_routed::test_attention_of_which_the_output_projection_alone_is_adapted_is_refused"
    ),
    "`routed` of a model": (
        "test_serving_rows::test_only_the_first_call_of_a_kind_is_followed "
        "test_serving_check_rows::test_the_first_layer_whose_rows_moved_differently_is_named"
    ),
    "`routed` with batch": "test_serving_rows::test_rows_that_cannot_be_known_are_an_error_at_every_length",
    "`encode`": "test_serving_rows::test_sentences_of_which_each_has_its_adapter",
    "sparse inputs": (
        "in a block: test_serving_routed::test_what_has_no_rows_is_an_error; the compiler's errors are torch's"
    ),
    "`torch.compile` before": "torch's, before 2.11 and 2.9: tests/laws.py skips there",
    "computing with an adapted": (
        "test_readers_modules::test_code_around_a_module_reads_the_updates_and_code_outside_and_another_thread_the_parameter"
    ),
    "computing with such": (
        "test_limits::test_after_an_interrupt_or_an_end_within_a_call_its_thread_goes_on_reading_updates "
        "test_readers_modules::test_a_call_that_raises_ends_the_scope"
    ),
    "`get_parameter`": (
        "test_readers_modules::test_code_around_a_module_reads_the_updates_and_code_outside_and_another_thread_the_parameter"
    ),
    "setting `forward`": (
        "test_limits::test_a_forward_set_on_an_adapted_layer_adds_updates_only_if_it_calls_the_one_that_was_there"
    ),
    "`torch.ao": "test_limits::test_adapted_layers_are_not_quantized_until_they_are_merged",
    "whole models pickled": "needs an installed 0.1",
    "`torch.jit": "test_limits::test_a_merged_model_is_scripted_and_an_adapted_one_is_not",
    "restoring": (
        "test_limits::test_flags_come_back_to_parameters_that_kept_their_names_and_are_in_no_other_adapted_model"
    ),
    "adapting a model that": (
        "test_targets_find::test_a_pattern_that_means_nothing_is_refused_with_what_was_meant "
        "test_model_inject::test_what_cannot_work_is_refused_before_anything_changes"
    ),
    "copying or": "test_limits::test_a_layer_with_its_own_pickling_is_copied_once_it_is_ejected",
    "adapting a model under": "test_modes::test_fake_tensors_are_refused_and_the_model_stays_as_it_was",
    "fusing": (
        "test_limits::test_a_layer_is_fused_with_a_norm_without_its_update_until_it_is_merged "
        "test_limits::test_timm_makes_layers_for_inference_without_updates_until_they_are_merged"
    ),
    "pruning": (
        "test_readers_kinds::test_a_weight_that_is_computed_is_refused_also_one_that_is_computed_since "
        "test_readers_modules::test_a_plain_tensor_in_the_place_of_a_weight_lacks_the_updates_which_is_said"
    ),
    "converting a part": "test_limits::test_a_conversion_of_a_part_alone_does_not_round_what_is_held_aside",
    "converting a shallow": "test_model_replaced::test_no_conversion_of_a_copy_is_one_of_a_different_model",
    "`resize_token_embeddings` of": (
        "test_limits::test_a_resized_head_of_a_model_in_16_bits_is_float32_until_it_is_converted"
    ),
    "code that replaces": (
        "test_model_replaced::test_a_forward_that_would_miss_an_adapter_is_refused_wherever_the_layer_was_and_no_other"
    ),
    "training a model with MX": (
        "test_quantized_training::test_experts_in_mxfp4_are_refused_and_no_layer_before_them_is_trained_through_them "
        "test_quantized_training::test_layers_in_nvfp4_are_refused"
    ),
    "merging into layers": "test_quantized_libraries::test_merging_is_refused_with_what_to_do_and_changes_nothing",
    "4-bit": "test_quantized_bnb::test_what_bitsandbytes_repacks_is_known_by_its_private_names_and_refused",
    "`files.convert`": "test_files_refused::test_a_call_that_cannot_be_meant_writes_nothing",
    "`files.plan`": (
        "test_files_inspect::test_a_plan_of_files_is_of_the_class_that_they_name_and_one_of_a_model_on_meta_of_any"
    ),
    "`files.verify`": "test_load_model::test_a_new_head_is_loaded",
    "`files.merge` into 8": (
        "test_files_merge::test_what_is_no_float_keeps_its_dtype_and_neither_codes_nor_8_bit_floats_are_merged_into"
    ),
    "`files.merge` of adapted": "test_files_merge::test_what_is_converted_as_it_is_loaded_is_not_merged_on_disk",
    "`files.merge` of an": "test_load_model::test_a_new_head_is_loaded",
    "`files.merge` into a": "test_files_inspect::test_a_quantized_model_is_planned_and_not_merged_into",
    "`merge` and": (
        "test_offloaded::test_an_offloaded_model_computes_trains_and_saves_as_one_that_is_not_and_is_not_merged_into"
    ),
    "`train_also` of parameters": (
        "test_offloaded::test_copies_that_are_offloaded_after_that_are_refused_until_the_hooks_are_removed "
        "test_offloaded::test_backward_raises_nothing_and_gives_copies_that_were_offloaded_no_gradients"
    ),
    "refusing to merge": "test_limits::test_what_reads_past_the_attribute_is_merged_into_and_named_by_check",
    "`save_pretrained`": "test_swap::test_while_merged_nothing_is_written",
    "offloading": (
        "test_offloaded::test_a_model_that_is_offloaded_while_it_is_merged_raises_an_error_until_it_is_unmerged"
    ),
    "adapters in a model": "distributed/test_ranks::test_meshes_without_one_that_has_all_processes_are_refused",
    "an error of one": "a wait until a time-out",
    "calls in several": "an order of threads, which no test can hold",
    "checkpoints of": (
        "of saving: distributed/test_faults::test_a_flattened_model_is_refused_in_all_processes_but_for_what_is_whole"
    ),
    "training in a": "DeepSpeed's, silent",
    "forwards without": (
        "DeepSpeed's error; the way out: "
        "distributed/test_routed::test_adapters_of_an_engine_of_zero_3_are_switched_once_all_of_them_have_run"
    ),
    "[`MergedSource`]": (
        "other_trainers/test_vllm::test_a_model_with_several_parameters_in_one_tensor_of_its_files_and_a_disabled_adapter_are_refused"
    ),
    "`receive_adapter`": "other libraries'; DeepSpeed's parameters",
    "with [verl": (
        "other_trainers/test_verl::test_a_run_whose_adapter_would_train_nothing_or_reach_no_rollout_is_refused "
        "other_trainers/test_verl::test_shards_which_are_of_the_first_policy_are_not_sent"
    ),
    "ending": (
        "a wait; the way out: "
        "distributed/test_faults::test_a_consumer_of_merged_tensors_that_fails_in_one_process_is_told_to_all"
    ),
    "a `merged` block": "test_model_merge::test_one_block_of_merged_is_open_at_a_time",
    "loading while": "test_checkpoint_read::test_files_replaced_while_they_are_read_are_refused",
    "a warning": (
        "test_peft::test_an_adapter_beside_its_base_is_loaded_with_it_by_transformers_and_nothing_warns_of_that"
    ),
    "a note": "distributed/test_faults::test_one_process_writes_and_all_learn_of_errors",
    "TRL's": "TRL's: its signature has a name alone",
    "`pipeline_tag`": (
        "test_checkpoint_hub::test_the_hubs_own_library_reads_the_front_matter_which_has_no_path_of_this_machine"
    ),
    "`check` of": (
        "test_model_check::test_what_does_not_run_in_training_mode_is_judged_by_the_other_and_what_runs_there_alone_is_not"
    ),
    "`training_memory` exact": "test_model_memory::test_the_sum_is_within_15_percent_of_a_real_step",
    "`training_memory` under": "test_model_memory::test_what_cannot_be_planned_is_refused",
}
"""Rows of docs/limits.md by how they begin, with the tests that hold them, or why there is none."""


def test_every_row_of_the_page_is_held_by_tests_that_exist_or_says_why_none_can() -> None:
    page = (DOCS / "limits.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| what \| why \| instead \|\n\|---\|---\|---\|\n((?:\|.*\n)+)", page, re.MULTILINE)
    rows = [row.removeprefix("| ") for row in table.splitlines()]
    assert [row for row in rows if sum(map(row.startswith, PROOFS)) != 1] == []
    assert [begin for begin in PROOFS if sum(row.startswith(begin) for row in rows) != 1] == []
    named = {test for proof in PROOFS.values() for test in re.findall(r"[\w/]+::\w+", proof)}
    defined = {
        f"{file}::{node.name}"
        for file in {test.split("::")[0] for test in named}
        for node in ast.walk(ast.parse((ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    assert named - defined == set()


X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def two(first: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8) if first is None else first, nn.Linear(8, 8))


OF_TORCH = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::DeprecationWarning"
)  # torch.ao and jit warn of all


@OF_TORCH
def test_adapted_layers_are_not_quantized_until_they_are_merged() -> None:
    qat, model = quantization.get_default_qat_qconfig("x86"), two().train()
    model.qconfig = qat
    prepared = quantization.prepare_qat(model)
    for each, targets in ((model, ["0"]), (prepared, ["1"])):
        adapt(each, r=2, targets=targets)

    def quantized() -> list[bool]:
        made = quantization.quantize_dynamic(model, {nn.Linear}), quantization.convert(copy.deepcopy(prepared).eval())
        return [isinstance(layer, nn.Linear) for each in made for layer in each]

    assert quantized() == [True, False, False, True]
    for each in (model, prepared):
        randlora.merge(each)
    assert not any(quantized())


@OF_TORCH
def test_a_merged_model_is_scripted_and_an_adapted_one_is_not() -> None:
    model = adapt(two(), r=2, targets=["0"])
    expected = model(X)
    with pytest.raises(ValueError, match="Unknown type annotation"):
        torch.jit.script(model)
    randlora.merge(model)
    torch.testing.assert_close(torch.jit.script(model)(X), expected)


NORMED: dict[str, tuple[Callable[[], list[nn.Module]], Callable[[Any, Any], nn.Module], Tensor]] = {
    "Linear": (lambda: [nn.Linear(8, 4), nn.BatchNorm1d(4)], fusion.fuse_linear_bn_eval, X),
    "Conv2d": (lambda: [nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4)], fusion.fuse_conv_bn_eval, X[None, None]),
}


@pytest.mark.parametrize("kind", NORMED)
def test_a_layer_is_fused_with_a_norm_without_its_update_until_it_is_merged(kind: str) -> None:
    build, fuse, x = NORMED[kind]
    layer, norm = build()
    norm.get_buffer("running_var").fill_(9)
    model = adapt(nn.Sequential(layer, norm).eval(), spread=0.5, r=2, targets=["0"])
    expected = model(x)
    assert not torch.allclose(fuse(layer, norm)(x), expected, rtol=0.1, atol=0.1)
    randlora.merge(model)
    torch.testing.assert_close(fuse(layer, norm)(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["byobnet.RepVggBlock", "repvit.ConvNorm"])
def test_timm_makes_layers_for_inference_without_updates_until_they_are_merged(name: str) -> None:
    from timm.utils.model import reparameterize_model

    file, _, kind = name.partition(".")
    block = getattr(importlib.import_module(f"timm.models.{file}"), kind)
    torch.manual_seed(0)
    x, model = torch.randn(2, 4, 5, 5), adapt(nn.Sequential(block(4, 4)).eval(), spread=0.5, r=2, targets="all")
    with randlora.disabled(model):
        plain = model(x)
    expected = model(x)
    assert not torch.allclose(plain, expected, rtol=0.1, atol=0.1)
    made: Any = reparameterize_model(model)
    torch.testing.assert_close(made[0](x), plain, rtol=1e-4, atol=1e-4)
    with pytest.raises(AdapterError, match="no longer has adapter"):
        made(x)
    randlora.merge(model)
    torch.testing.assert_close(reparameterize_model(model)(x), expected, rtol=1e-4, atol=1e-4)


def test_a_forward_set_on_an_adapted_layer_adds_updates_only_if_it_calls_the_one_that_was_there() -> None:
    model: Any = adapt(two(), r=2, targets=["0"])
    layer, expected = model[0], model(X)
    with randlora.disabled(model):
        plain = model(X)
    before = layer.forward
    layer.forward = lambda x: before(x)  # noqa: PLW0108  # it is another one
    assert same_bits(model(X), expected)
    layer.forward = partial(nn.Linear.forward, layer)
    assert same_bits(model(X), plain)
    assert not same_bits(plain, expected)


class Past(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self._parameters["weight"], self.bias)  # type: ignore[arg-type]


def test_what_reads_past_the_attribute_is_merged_into_and_named_by_check() -> None:
    model = adapt(two(Past(8, 8)), r=2, targets=["0"])
    before = model(X)
    (problem,) = randlora.check(model, X).problems
    assert (problem.fqn, problem.fault) == ("0", "read past")
    assert randlora.merge(model).notes == ()
    assert not torch.allclose(model(X), before, atol=0.1)


class OwnPickling(nn.Linear):
    def __reduce__(self) -> Any:
        return OwnPickling, (self.in_features, self.out_features)


def test_a_layer_with_its_own_pickling_is_copied_once_it_is_ejected() -> None:
    model = adapt(two(OwnPickling(8, 8)), r=2, targets=["0"])
    copies: tuple[Callable[[object], object], ...] = copy.deepcopy, pickle.dumps
    for copied in copies:
        with pytest.raises(TypeError, match="OwnPickling defines its own pickling: eject its adapters first"):
            copied(model)
    randlora.eject(model)
    for copied in copies:
        copied(model)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(5, 8), nn.Identity()

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.inner(self.table(ids)), self.table.weight)


def interrupt(_: nn.Module) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("end", [interrupt, randlora.merge, randlora.eject])
def test_after_an_interrupt_or_an_end_within_a_call_its_thread_goes_on_reading_updates(end: Any) -> None:
    model, other = (adapt(Tied(), r=2, targets=["table"]) for _ in range(2))
    model.get_submodule("inner").register_forward_hook(lambda *_: (end(model), None)[1])
    parameter = other.get_parameter("table.weight")

    def call() -> tuple[bool, bool]:
        with contextlib.suppress(KeyboardInterrupt):
            model(torch.tensor([1]))
        return other.table.weight is parameter, dict(other.named_parameters())["table.weight"] is parameter

    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(call).result() == (False, True)
    assert other.table.weight is parameter


def share(model: nn.Sequential) -> nn.Module:
    randlora.inject(other := nn.Sequential(nn.Linear(8, 8), model[1]), r=2, targets=["0"])
    return other


CHANGED: dict[str, tuple[Callable[[Any], Any], set[str]]] = {
    "not at all": (lambda _: None, set()),
    "pruned": (lambda model: prune.identity(model[1], "weight"), {"1.weight_orig"}),
    "moved": (lambda model: model.add_module("moved", model._modules.pop("1")), {"moved.weight", "moved.bias"}),
    "shared": (share, {"1.weight", "1.bias"}),
}


@pytest.mark.parametrize("how", CHANGED)
def test_flags_come_back_to_parameters_that_kept_their_names_and_are_in_no_other_adapted_model(how: str) -> None:
    change, frozen = CHANGED[how]
    model = two()
    randlora.inject(model, r=2, targets=["0"])
    other = change(model)
    randlora.eject(model)
    if how == "shared":
        randlora.eject(other)
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == frozen


@pytest.mark.parametrize("is_whole", [True, False], ids=["model", "part"])
def test_a_conversion_of_a_part_alone_does_not_round_what_is_held_aside(is_whole: bool) -> None:
    model: Any = two()
    own = model[1].weight.detach().clone()
    randlora.inject(model, r=2, targets=["0"], train_also=["1"])
    (model if is_whole else model[1]).half().float()
    randlora.eject(model)
    assert same_bits(model[1].weight, own.half().float() if is_whole else own)


def test_a_resized_head_of_a_model_in_16_bits_is_float32_until_it_is_converted() -> None:
    model: Any = llama(vocab_size=40, num_hidden_layers=1).bfloat16()
    ids = torch.arange(5)[None]
    randlora.inject(model, r=2, targets=["q_proj"], train_also=["lm_head"])
    model.resize_token_embeddings(44, mean_resizing=False)
    assert model.lm_head.weight.dtype == torch.float32
    with pytest.raises(RuntimeError, match="same dtype"):
        model(ids)
    model.lm_head.to(torch.bfloat16)
    assert model(ids).logits.shape == (1, 5, 44)
