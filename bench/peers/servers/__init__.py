"""One program per server that is compared; each runs in that server's own environment."""
