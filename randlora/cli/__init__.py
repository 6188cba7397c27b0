"""The `randlora` command: each verb on files is a command, whose help is the verb's own docstring.

It needs typer and rich, the extra ``cli``, which no other room imports.
"""
