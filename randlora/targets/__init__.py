"""Selecting the layers of a model to adapt."""
