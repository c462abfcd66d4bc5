"""The one exception type that users see for their own mistakes."""


class UltraMemError(Exception):
    """A mistake of the user's or of their input, worded for them: what is wrong and what to do.

    Commands print it as one line, without a traceback, and exit with status 1.
    """


class ConfigError(UltraMemError, ValueError):
    """A configuration value that cannot work; names the field, the value and what would be right."""


def first_line(error: BaseException) -> str:
    """What an error of another library says, on one line; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def system_reason(error: OSError) -> str:
    """What the system says of an error, without the name of the file; not every one has both apart."""
    return error.strerror or first_line(error)
