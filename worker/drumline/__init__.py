"""drumline."""
