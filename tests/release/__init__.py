"""What `make lock` and `make release-check` run: a lock file, an audit, a bill of materials, equal builds."""
