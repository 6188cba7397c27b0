"""A hook of MkDocs: the old addresses of pages and sections that have moved lead to where they are now."""

import json
import logging
import posixpath
import re
from pathlib import Path
from typing import Any

MOVED = {
    "architecture_calls.md": "architecture.md#sites-adapted-in-place",
    "architecture_calls.md#what-happens-in-inject": "architecture.md#what-happens-in-inject",
    "architecture_calls.md#what-happens-in-randlorafilesmerge": "architecture.md#what-happens-in-randlorafilesmerge",
    "architecture_calls.md#what-happens-in-a-forward-pass": "architecture.md#what-happens-in-a-forward-pass",
    "architecture.md#four-ideas": "architecture.md#words",
    "architecture.md#three-ideas": "architecture.md#words",
    "benchmarks.md#accuracy-against-drift": "results.md#how-it-was-measured",
    "benchmarks_memory.md": "benchmarks.md#memory",
    "benchmarks_memory.md#experts": "benchmarks_more.md#experts",
    "benchmarks_memory.md#quantized-layers": "benchmarks_more.md#quantized-layers",
    "benchmarks_memory.md#starting": "benchmarks_more.md#starting",
    "benchmarks_serving.md": "benchmarks.md",
    "benchmarks_serving.md#a-lora-of-an-adapter": "benchmarks_more.md#a-lora-of-an-adapter",
    "benchmarks_serving.md#loading-removing-and-swapping-adapters": "serving.md#more-adapters-than-fit",
    "benchmarks_more.md#loading-removing-and-swapping-adapters": "serving.md#more-adapters-than-fit",
    "benchmarks_targets.md": "benchmarks_more.md",
    "measured_elsewhere.md#time-on-gpus": "benchmarks.md#on-gpus-by-others",
    "cli.md#the-other-commands": "cli.md",
    "cli.md#demo": "quickstart.md",
    "cli_files.md": "cli.md",
    "cli_plan.md": "cli.md#plan",
    "measured_elsewhere.md": "results.md#larger-models-measured-by-others",
    "measured_elsewhere.md#supervised-fine-tuning": "results.md#supervised-fine-tuning",
    "measured_elsewhere.md#reinforcement-learning": "results.md#reinforcement-learning",
    "measured_elsewhere.md#learning-rates": "learning_rate.md#what-it-rests-on",
    "method.md#bases": "method.md#kinds-of-bases",
    "method_bases.md": "method.md#kinds-of-bases",
    "method_bases.md#streams": "method.md#streams",
    "results.md#new-classes-for-a-vision-transformer": "results_runs.md#tasks",
    "results.md#film-reviews-and-tweets": "results_runs.md#tasks",
    "results.md#word-problems": "results_runs.md#tasks",
    "results_details.md": "results_runs.md#matrices-of-known-spectrum",
    "results_details.md#other-bases": "results_runs.md#bases",
    "results_details.md#features-like-those-of-full-fine-tuning": "results_runs.md",
    "results_runs.md#features": "results_runs.md",
    "results_rates.md": "results_runs.md",
    "results_rates.md#film-reviews": "results_runs.md#tasks",
    "results_rates.md#tweets": "results_runs.md#tasks",
    "results_regimes.md": "results_runs.md#rewards",
    "results_regimes.md#facts": "results_runs.md#facts",
    "results_regimes.md#one-matrix": "results_runs.md#facts",
    "results_regimes.md#a-language-model": "results_runs.md#facts",
    "results_regimes.md#where": "results_runs.md#where",
    "results_regimes.md#kradapter": "results_runs.md#bases",
    "results_regimes.md#what-predicts-the-better-one": "results.md#the-answer",
    "results_settings.md": "results_runs.md",
    "learning_rate.md#a-rate-for-gamma-alone": "results_runs.md#tried-and-no-better",
    "results_settings.md#a-learning-rate-for-gamma-alone": "results_runs.md#tried-and-no-better",
    "results_settings.md#attention": "results_runs.md#where",
    "trust_figures.md": "trust.md#campaigns",
    "trust_figures.md#the-same-bytes": "trust.md#the-same-bytes",
    "training_details.md": "checking.md",
    "training_details.md#the-size-of-the-update": "checking.md#the-size-of-the-update",
    "checking.md#how-it-is-done": "checking.md#does-every-adapter-have-an-effect",
    "layers.md#linear-layers": "layers.md#layers-that-can-be-adapted",
    "layers.md#attention-and-experts": "layers.md#attention",
    "layers.md#files": "layers.md#layers-that-can-be-adapted",
    "layers_attention.md": "layers.md#attention",
    "layers_experts.md": "layers.md#experts",
    "quantized.md#how-it-computes": "quantized.md#training",
    "quantized.md#memory": "recipes/quantized.md#what-fits",
    "quantized.md#the-dtype-of-plain-layers": "quantized.md#merging-codes-or-plain-layers",
    "quantized.md#what-bitsandbytes-050-does-on-a-cpu": "quantized.md#bitsandbytes-on-a-cpu",
    "quantized.md#limits": "quantized.md#bitsandbytes-on-a-cpu",
    "quantized_others.md": "quantized.md",
    "scale.md#launching": "distributed.md#distributeddataparallel",
    "saving.md#base-and-adapter-in-one-call": "saving.md#the-base-model",
    "saving_files.md": "saving.md#the-two-files",
    "saving_files.md#while-save-runs": "saving.md#the-two-files",
    "saving_files.md#seed-or-stored-bases": "saving.md#seed-or-stored-bases",
    "saving_files.md#sizes": "saving.md#sizes",
    "saving_files.md#errors": "saving.md#what-load-refuses",
    "peft_files.md": "from_peft.md#files",
    "peft_files.md#adapters-that-peft-trained-under-torch-211-or-older": (
        "from_peft.md#adapters-from-torch-211-or-older"
    ),
    "choosing.md#dropout-and-targets": "targets.md",
    "choosing.md#basis-and-stream": "choosing.md#basis-the-kind-of-random-bases",
    "choosing_bases.md": "choosing.md#basis-the-kind-of-random-bases",
    "choosing_bases.md#stream-the-random-stream-of-the-bases": "choosing.md#stream-the-random-stream-of-the-bases",
    "merging.md#layers-with-a-custom-forward": "merging.md#permanently",
    "merging.md#half-precision": "merging.md#permanently",
    "merging.md#memory": "merging.md#permanently",
    "merging.md#on-disk-and-for-a-rollout-engine": "merging.md#on-disk",
    "merging_disk.md": "merging.md#on-disk",
    "adapters.md#adapters-of-other-libraries": "adapters.md#threads-copies-dtypes",
    "adapters.md#wrappers-copies-dtypes": "adapters.md#threads-copies-dtypes",
    "combining.md": "adapters.md#combining-adapters",
    "many_adapters.md": "serving.md",
    "serving.md#an-adapter-in-memory": "adapters.md#an-adapter-in-memory",
    "serving.md#one-adapter-merged": "serving.md#serving",
    "serving.md#many-adapters-routed": "serving.md#a-row-each",
    "serving.md#what-another-adapter-costs": "serving.md#serving",
    "deepspeed.md": "accelerate.md#deepspeed",
    "pipeline.md": "tensor_parallel.md#pipeline-every-process-has-some-of-the-layers",
    "pipeline.md#context-parallel-every-process-has-a-part-of-each-sequence": (
        "tensor_parallel.md#context-parallel-every-process-has-a-part-of-each-sequence"
    ),
    "lightning.md": "other_trainers.md#lightning",
    "other_trainers.md#axolotl": "recipes/axolotl.md",
    "recipes/dpo.md": "recipes/preferences.md#dpo",
    "recipes/dpo.md#after-fine-tuning": "recipes/preferences.md#after-fine-tuning",
    "recipes/grpo.md": "recipes/preferences.md#grpo",
    "recipes/grpo.md#sampling-with-vllm": "recipes/preferences.md#sampling-with-vllm",
    "converting.md#gguf-and-mlx": "converting.md#ollama-and-llamacpp",
    "index.md#when-randlora-helps": "index.md#when",
    "index.md#why-this-library": "index.md#why",
    "troubleshooting.md#the-loss-barely-falls": "troubleshooting.md#the-loss-does-not-decrease",
    "troubleshooting.md#the-adapters-are-merged": "merging.md",
    "other_trainers.md#what-this-was-tested-with": "other_trainers.md#ms-swift",
    "compiling.md#switching-adapters": "compiling.md#compiling-and-exporting",
    "quickstart.md#choose-the-layers": "targets.md",
    "index.md#what-it-does-not-do-yet": "limits.md",
    "api/inject.md": "api/model.md",
    "api/training.md": "api/model.md",
    "api/adapters.md": "api/model.md",
    "api/merging.md": "api/model.md",
    "api/saving.md": "api/model.md",
    "api/layers.md": "api/files.md",
    "api/errors.md": "api/files.md",
    "api/files.md#reports": "api/files.md",
}
"""Pages that are gone and where they lead, and sections that are elsewhere now.

An anchor of a page that is gone and has no entry is kept if the page leads to a whole page.
"""

LOG = logging.getLogger("mkdocs.hooks.moved")
STUB = """<!doctype html>
<html lang="en">
  <head>
    <meta charset="utf-8">
    <title>Moved</title>
    <meta name="robots" content="noindex">
    <link rel="canonical" href="{address}">
    <noscript><meta http-equiv="refresh" content="0; url={address}"></noscript>
    <script>location.replace({sections}[location.hash] ?? "{address}"{anchor})</script>
  </head>
  <body><a href="{address}">This page has moved</a></body>
</html>
"""
SCRIPT = "<script>{{ const there = {sections}[location.hash]; if (there) location.replace(there); }}</script>"


def folder(page: str) -> str:
    """Return where a page is on the site: ``api/index.md`` is in ``api``, and ``cli.md`` in ``cli``."""
    return re.sub(r"(^|/)index$", "", page.removesuffix(".md"))


def address(target: str, start: str) -> str:
    """Return the address of a page or a section relative to a page."""
    page, mark, anchor = target.partition("#")
    return f"{posixpath.relpath(folder(page) or '.', folder(start) or '.')}/{mark}{anchor}"


def sections(page: str) -> str:
    """Return the new addresses of a page's sections by their anchors, for JavaScript."""
    own = {old.partition("#")[2]: new for old, new in MOVED.items() if old.startswith(f"{page}#")}
    return json.dumps({f"#{anchor}": address(new, page) for anchor, new in own.items()})


def on_post_page(output: str, *, page: Any, **_: object) -> str:
    """Let a page that is still there lead on to its sections that are not."""
    found = sections(page.file.src_uri)
    return output.replace("</body>", SCRIPT.format(sections=found) + "</body>") if found != "{}" else output


def on_post_build(*, config: Any, **_: object) -> None:
    """Write a page in place of each that is gone, and warn of what leads nowhere, or is still there."""
    site = Path(config["site_dir"])
    was_there = {old: is_there(site, old) for old in MOVED}
    for old, new in MOVED.items():
        if was_there[old]:
            LOG.warning("%s has moved to %s, and is still there", old, new)
        if not is_there(site, new):
            LOG.warning("%s has moved to %s, which does not exist", old, new)
        if "#" not in old:
            stub = site / folder(old) / "index.html"
            kept = "" if "#" in new else " + location.hash"
            stub.parent.mkdir(parents=True, exist_ok=True)
            stub.write_text(
                STUB.format(address=address(new, old), sections=sections(old), anchor=kept), encoding="utf-8"
            )


def is_there(site: Path, target: str) -> bool:
    """Return whether the site that was built has a page, or a page with a section."""
    page, _mark, anchor = target.partition("#")
    file = site / folder(page) / "index.html"
    return file.is_file() and (not anchor or f'id="{anchor}"' in file.read_text(encoding="utf-8"))
