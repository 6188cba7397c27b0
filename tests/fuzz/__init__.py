"""Fuzzing of everything that reads what others wrote: files, options and command lines.

A target takes bytes and raises if a promise is broken. `python -m tests.fuzz NAME` runs one under atheris, and the
tests run all of them over the committed corpus without it.
"""
