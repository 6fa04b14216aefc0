"""A real Kubernetes on this machine, for the end-to-end tests: ``python -m e2e.cluster --help``, and ``e2e/README.md``."""
