"""The one exception type that users see for their own mistakes."""

LONGEST_MESSAGE = 1000  # characters


class UltraMemError(Exception):
    """A mistake of the user or in their input; the message says what is wrong and what to do.

    Commands print it as one line, without a traceback, and exit with status 1. What cannot be printed, such as line
    breaks and halves of characters, is escaped, and the middle of a very long message left out.
    """

    def __str__(self) -> str:
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in super().__str__())
        return text if len(text) <= LONGEST_MESSAGE else f"{text[:900]} ... {text[-100:]}"


class ConfigError(UltraMemError, ValueError):
    """An invalid configuration value; the message names the field, the value and what is valid."""


def first_line(error: BaseException) -> str:
    """The first line of another library's error message; the error's type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def system_reason(error: OSError) -> str:
    """The system's description of an error, without the file name where the two are separate."""
    return error.strerror or first_line(error)
