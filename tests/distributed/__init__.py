"""Tests on several processes, which are started once and kept for all of them."""
