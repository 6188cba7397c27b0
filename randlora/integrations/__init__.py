"""What trainers of other libraries need, in one module for each, which imports it; nothing in the library does."""
