"""The exception that means "the user can fix this". Its text is what the user reads, whole."""


class UserError(Exception):
    """A mistake in flags or files: one line that says what is wrong and what to do about it."""


class NotFiniteError(UserError):
    """A chain of a schedule made numbers that are none, or infinite ones; others' need not."""


def one_line(error: BaseException) -> str:
    """What an error of another library says, short and on one line; its kind where it says
    nothing."""
    return " ".join(str(error).split())[:200] or type(error).__name__
