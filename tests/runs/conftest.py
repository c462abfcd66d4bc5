"""A tiny run as training leaves it, and configurations of runs that have not begun."""

from tiny_run import run
from tiny_training import make_config, one_thread, token_directory, token_files

__all__ = ["make_config", "one_thread", "run", "token_directory", "token_files"]
