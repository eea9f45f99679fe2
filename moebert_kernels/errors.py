"""The exception for mistakes that the user can put right."""


class UserError(ValueError):
    """Wrong input, with a message that says what was found and what to do.

    The command line prints the message without a traceback.
    """
