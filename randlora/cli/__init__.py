"""The `randlora` command: each verb on files is a command, with the verb's docstring as its help.

It needs typer and rich (the extra ``cli``), which no other room imports.
"""
