"""From a model and a pattern to the layers that adapters go on; nothing here does arithmetic."""
