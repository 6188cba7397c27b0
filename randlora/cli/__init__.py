"""The `randlora` command, one file per command, each of which parses, calls a verb on files, and prints.

It needs typer and rich, the extra ``cli``, which no other room imports.
"""
