"""`randlora.check`: whether adapted weights do what adapters are for, found by running the model."""
