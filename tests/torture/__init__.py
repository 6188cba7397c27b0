"""Campaigns of minutes against the library, whose figures docs/trust.md quotes; `make torture` runs them all."""
