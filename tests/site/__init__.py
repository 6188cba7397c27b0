"""Tests of the built site in Chromium, which `make site-test` runs and `make test` does not."""
