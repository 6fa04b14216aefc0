"""Workers, models and helpers for tests, examples and benches; installed, so that rank processes can import them."""
