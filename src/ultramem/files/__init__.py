"""Atomic writes of files and directories, and locks."""
