"""The public functions for a model in memory."""
