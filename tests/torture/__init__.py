"""Campaigns of minutes against the library, with the figures in docs/trust_figures.md; `make torture` runs them all."""
