"""The one exception type that users see for their own mistakes."""


class UltraMemError(Exception):
    """A mistake of the user's or of their input, worded for them: what is wrong and what to do.

    Commands print it as one line, without a traceback, and exit with status 1.
    """


class ConfigError(UltraMemError, ValueError):
    """A configuration value that cannot work; names the field, the value and what would be right."""
