"""The one exception type that users see for their own mistakes."""


class UltraMemError(Exception):
    """A mistake of the user or in their input; the message says what is wrong and what to do.

    Commands print it as one line, without a traceback, and exit with status 1.
    """


class ConfigError(UltraMemError, ValueError):
    """An invalid configuration value; the message names the field, the value and what is valid."""


def first_line(error: BaseException) -> str:
    """The first line of another library's error message; the error's type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def system_reason(error: OSError) -> str:
    """The system's description of an error, without the file name where the two are separate."""
    return error.strerror or first_line(error)
