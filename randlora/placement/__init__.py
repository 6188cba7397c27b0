"""Where the values of a parameter are when they are not simply its own, as when it is sharded over processes."""
