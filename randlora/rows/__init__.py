"""Following the rows of a batch through a forward: which row each entry of a tensor belongs to."""
