"""A state machine of every verb on a model in memory, held step by step against a float64 model of the truth."""
