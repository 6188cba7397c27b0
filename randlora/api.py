"""The public names of the package: all that this file imports, which `randlora` does when one is first used."""

from importlib.util import find_spec as _find_spec

import randlora.layers as _layers  # noqa: F401  (importing it registers every kind of layer)
from randlora import errors as errors
from randlora import files as files
from randlora.checkpoint.contents import adapter_state as adapter_state
from randlora.checkpoint.load import load as load
from randlora.checkpoint.load import load_all as load_all
from randlora.checkpoint.load import swap as swap
from randlora.checkpoint.save import save as save
from randlora.checkpoint.save import save_all as save_all
from randlora.config import RandLoRAConfig as RandLoRAConfig
from randlora.model.check import check as check
from randlora.model.inject import eject as eject
from randlora.model.inject import inject as inject
from randlora.model.inject import plan as plan
from randlora.model.listing import adapters as adapters
from randlora.model.listing import set_trainable as set_trainable
from randlora.model.listing import trainable_parameters as trainable_parameters
from randlora.model.memory import training_memory as training_memory
from randlora.model.merge import merge as merge
from randlora.model.merge import merged as merged
from randlora.model.merge import unmerge as unmerge
from randlora.model.merged_tensors import merged_tensors as merged_tensors
from randlora.model.switch import activate as activate
from randlora.model.switch import disabled as disabled
from randlora.model.switch import remove as remove
from randlora.model.switch import set_compute as set_compute
from randlora.model.updates import delta_weight as delta_weight
from randlora.model.updates import limit_norms as limit_norms
from randlora.model.updates import update_norms as update_norms
from randlora.targets.options import equivalent_alpha as equivalent_alpha
from randlora.targets.select import find_targets as find_targets

if _find_spec("randlora.quantized") is not None:  # a feature, which could be deleted
    from randlora.quantized.prepare import prepare_quantized as prepare_quantized
if _find_spec("randlora.serving") is not None:
    from randlora import serving as serving
if _find_spec("randlora.sharded") is not None:
    from randlora.sharded.check_ranks import check_ranks as check_ranks
