"""The `randlora` command: one file a command, each of which parses, calls a verb on files, and prints.

It needs typer and rich, the extra ``cli``; nothing else of the library imports them.
"""
