"""A seeded random driver that breaks a real server in every way it knows, and checks every answer against a model."""
