"""Bytes on disk and on the Hub: safetensors files, atomic replacement, downloads, uploads. Not specific to RandLoRA."""
