"""Training runs, as all commands use them: configuration, directory, tokens, checkpoints, tokenizer, results."""
