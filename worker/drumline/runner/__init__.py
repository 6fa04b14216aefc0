"""The runner: starts a group of ranks, gives them requests, watches them, restarts them."""
