"""Measurements of speed, memory and quality beside the peers, all in one process and taken in turn.

`python -m benchmarks.step`, `.model`, `.memory`, `.startup`, `.decode` and `.quality` each print a table of ratios and
write JSON, Markdown and a picture into `build/benchmarks`. With `--gate` the exit status says whether the targets are
met. `python -m benchmarks` runs the quick set of all but the last; `make bench` installs what it needs and does so.
Only the public API of each library is used.
"""
