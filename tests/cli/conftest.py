"""A tiny run, and configurations of others to train."""

from tiny_run import run, shared_run
from tiny_training import make_config, one_thread, token_directory

__all__ = ["make_config", "one_thread", "run", "shared_run", "token_directory"]
