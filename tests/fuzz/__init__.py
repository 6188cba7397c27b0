"""Fuzzing of everything that reads what others wrote: files, options and command lines; see CONTRIBUTING.md."""
