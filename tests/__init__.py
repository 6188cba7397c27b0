"""The tests: one file per module, laws as properties, and an oracle that shares no code with the library."""
