"""Support for trainers and engines of other libraries: a module each, which imports its library; `rollouts` none."""
