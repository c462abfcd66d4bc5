"""Tiny trainings."""

from tiny_training import (
    in_child,
    in_children,
    losses_of,
    make_config,
    metrics_of,
    one_thread,
    token_directory,
    token_files,
)

__all__ = [
    "in_child",
    "in_children",
    "losses_of",
    "make_config",
    "metrics_of",
    "one_thread",
    "token_directory",
    "token_files",
]
