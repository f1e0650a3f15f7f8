"""The one exception that means "the user can fix this". Its text is what the user reads, whole."""


class UserError(Exception):
    """A mistake in flags or files: one line that says what is wrong and what to do about it."""
