"""What a model needs on N GPUs under each strategy, from its configuration: no weights, no torch, no GPU."""
