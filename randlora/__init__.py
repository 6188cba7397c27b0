"""RandLoRA for PyTorch: full-rank fine-tuning from shared random bases.

>>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64))
>>> report = randlora.inject(model, r=8)
>>> report.trainable_parameters
1152
>>> report = randlora.merge(model)
"""

from importlib.metadata import version as _version

import randlora.layers as _layers  # noqa: F401  (importing it registers every kind of layer)
from randlora.bases.bank import BasisBank as BasisBank
from randlora.bases.basis import Bases as Bases
from randlora.bases.basis import Basis as Basis
from randlora.bases.spec import BasisSpec as BasisSpec
from randlora.checkpoint import load as load
from randlora.checkpoint import save as save
from randlora.checkpoint.save import SaveReport as SaveReport
from randlora.config import RandLoRAConfig as RandLoRAConfig
from randlora.errors import AdapterError as AdapterError
from randlora.errors import CheckpointError as CheckpointError
from randlora.errors import ConfigError as ConfigError
from randlora.errors import MergeError as MergeError
from randlora.errors import RandLoRAError as RandLoRAError
from randlora.errors import TargetError as TargetError
from randlora.files import convert_adapter as convert_adapter
from randlora.files import inspect_adapter as inspect_adapter
from randlora.files import plan_directory as plan_directory
from randlora.files import verify_adapter as verify_adapter
from randlora.files.convert import ConversionReport as ConversionReport
from randlora.files.merge import FileMergeReport as FileMergeReport
from randlora.files.merge import merge_files as merge_files
from randlora.files.summary import AdapterSummary as AdapterSummary
from randlora.files.verify import Verification as Verification
from randlora.layers.base import AdapterLayer as AdapterLayer
from randlora.layers.folding import RoundingLoss as RoundingLoss
from randlora.layers.registry import register_layer as register_layer
from randlora.model.inject import eject as eject
from randlora.model.inject import inject as inject
from randlora.model.inject import plan as plan
from randlora.model.merge import merge as merge
from randlora.model.merge import merged as merged
from randlora.model.merge import unmerge as unmerge
from randlora.model.prepare import PreparationReport as PreparationReport
from randlora.model.prepare import prepare_quantized as prepare_quantized
from randlora.model.switch import AdapterInfo as AdapterInfo
from randlora.model.switch import activate as activate
from randlora.model.switch import adapters as adapters
from randlora.model.switch import delta_weight as delta_weight
from randlora.model.switch import disabled as disabled
from randlora.model.switch import remove as remove
from randlora.model.switch import set_compute as set_compute
from randlora.model.switch import trainable_parameters as trainable_parameters
from randlora.report import MergeReport as MergeReport
from randlora.report import Report as Report
from randlora.targets.select import Target as Target
from randlora.targets.select import find_targets as find_targets

__version__ = _version("randlora")

__all__ = [
    "AdapterError",
    "AdapterInfo",
    "AdapterLayer",
    "AdapterSummary",
    "Bases",
    "Basis",
    "BasisBank",
    "BasisSpec",
    "CheckpointError",
    "ConfigError",
    "ConversionReport",
    "FileMergeReport",
    "MergeError",
    "MergeReport",
    "PreparationReport",
    "RandLoRAConfig",
    "RandLoRAError",
    "Report",
    "RoundingLoss",
    "SaveReport",
    "Target",
    "TargetError",
    "Verification",
    "activate",
    "adapters",
    "convert_adapter",
    "delta_weight",
    "disabled",
    "eject",
    "find_targets",
    "inject",
    "inspect_adapter",
    "load",
    "merge",
    "merge_files",
    "merged",
    "plan",
    "plan_directory",
    "prepare_quantized",
    "register_layer",
    "remove",
    "save",
    "set_compute",
    "trainable_parameters",
    "unmerge",
    "verify_adapter",
]
