"""A tiny run whose checkpoint is evaluated."""

from tiny_run import byte_tokenizer, run, shared_run, untrained_model

__all__ = ["byte_tokenizer", "run", "shared_run", "untrained_model"]
