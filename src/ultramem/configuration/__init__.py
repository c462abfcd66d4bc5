"""Conversion between YAML and configuration dataclasses, and type checks of their values."""
