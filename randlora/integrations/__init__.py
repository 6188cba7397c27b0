"""Support for trainers of other libraries: one module for each, which imports its library. Nothing imports them."""
