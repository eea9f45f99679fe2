"""The exceptions for mistakes that the user can put right."""


class UserError(ValueError):
    """Wrong input, with a message that says what was found and what to do.

    The command line prints the message without a traceback.
    """


class ArgumentError(UserError):
    """An argument has a value that does not do; the command line names the option in its place.

    Args:
        argument: its name in Python.
        problem: goes on after the name: "must be at least 1, got 0".
    """

    def __init__(self, argument: str, problem: str):
        super().__init__(f"{argument} {problem}")
        self.argument = argument
        self.problem = problem


class OutputError(UserError):
    """Results cannot be written where they should go, as things are.

    Nothing is wrong with the input: when there is room, or nobody else at work there, the same call succeeds.
    """
