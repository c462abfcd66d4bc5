"""A tiny model to fine-tune."""

from tiny_finetuning import files, tokenizer

__all__ = ["files", "tokenizer"]
