"""Bytes on disk and on the Hub: safetensors files, atomic replacement, downloads and uploads; nothing of RandLoRA."""
