"""The verbs on a model in memory."""
