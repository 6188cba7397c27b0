"""The frozen random bases: what is drawn (`spec`), from where (`torch_stream`, `portable_stream`), how it is kept."""
