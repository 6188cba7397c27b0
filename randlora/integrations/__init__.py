"""Support for trainers and engines of other libraries: one module for each, which imports its library; `rollouts` none."""
