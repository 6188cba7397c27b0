"""Accuracy against forgetting: every contestant on every task, at several learning rates and seeds.

One learning rate says little about a method, and accuracy says little about what a model has lost. So each contestant
is trained at several learning rates, until the best of them is neither the lowest nor the highest, and each run is a
point: how well the model does the new task, and how far it has drifted on other data. `python -m benchmarks.quality
--full` makes the runs that are missing and sums all up.

Alike for all contestants of a task: pretrained weights, data, order of the batches, number of steps, AdamW without
weight decay, a learning rate that rises over the first tenth of the steps and then falls linearly to zero, gradients
clipped to a norm of 1. A seed decides the data, the batches, the bases and whatever else is drawn.

`tasks` lists the tasks, `contestants` who takes part, `training` makes one run, `runs` keeps it in a file, and
`summary` makes tables and figures of the files.
"""
