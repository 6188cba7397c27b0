"""Measurements of speed, memory and quality beside the peers, in one process and in turn where times are compared.

`python -m benchmarks.step`, `.overhead`, `.model`, `.memory`, `.quantized`, `.startup`, `.decode`, `.merge` and
`.quality` each print a table and write JSON, Markdown and, where there are curves, a picture into `build/benchmarks`.
With `--gate` the exit status says whether the targets are met. `python -m benchmarks` runs the quick set of all but the
last two; `make bench` installs what it needs and does so. `python -m benchmarks --device cuda --gate` is the same on a
GPU, and begins with the laws that a device can break.

Models are adapted, switched and merged by the public API of each library. Some sizes have no public name: what PEFT's
and bitsandbytes' modules hold, what our bases hold, and how often torch's compiler makes a graph.
"""

import randlora.api  # noqa: F401 - whole, so that no measurement has a part in importing it
