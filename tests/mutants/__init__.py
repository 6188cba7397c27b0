"""Measuring the tests: the share of small faults, written into the package one at a time, that they catch."""
