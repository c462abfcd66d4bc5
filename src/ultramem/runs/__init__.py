"""A training run as the commands share it: configuration, directory, tokens, checkpoints, tokenizer, results."""
