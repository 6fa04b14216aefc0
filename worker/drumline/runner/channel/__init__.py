"""Channels between the runner and its ranks: one port, two adapters."""
