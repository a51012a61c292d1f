"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """A mistake in options, files or data that its reader can mend.

    The message is one line that names what was given, what is allowed and what to do.
    Entry points print it without a traceback and exit with status 2.
    """
