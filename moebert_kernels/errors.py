"""The exceptions for mistakes that the user can put right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager


class UserError(ValueError):
    """Wrong input, with a message that says what was found and what to do.

    The command line prints the message without a traceback.
    """

    def told(self, name_of: Callable[[str], str]) -> str:
        """The message to one who knows the arguments by other names: the options of the command line."""
        return str(self)


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

    def told(self, name_of: Callable[[str], str]) -> str:
        """See `UserError`."""
        return f"{name_of(self.argument)} {self.problem}"


class SourceError(UserError):
    """The file or folder that an argument names does not do: "teacher_dir: there is no folder x".

    Args:
        argument: its name in Python.
        cause: says what is wrong with the file or folder.
    """

    def __init__(self, argument: str, cause: UserError):
        super().__init__(f"{argument}: {cause}")
        self.argument = argument
        self.cause = cause

    def told(self, name_of: Callable[[str], str]) -> str:
        """See `UserError`."""
        return f"{name_of(self.argument)}: {self.cause.told(name_of)}"


class ColumnsError(UserError):
    """A table lacks columns that arguments name.

    Args:
        source: the table.
        missing: the names of the columns by the arguments', in Python, that give them.
        columns: those that the table has.
    """

    def __init__(self, source: str, missing: Mapping[str, str], columns: Sequence[str]):
        self.missing = dict(missing)
        self.problem = (
            f"{source} has {' and '.join(f'no column {name!r}' for name in missing.values())}; "
            f"its columns are {', '.join(columns)}"
        )
        super().__init__(self.told(str))

    def told(self, name_of: Callable[[str], str]) -> str:
        """See `UserError`."""
        return f"{self.problem}; choose from them by {', '.join(map(name_of, self.missing))}"


class OutputError(UserError):
    """Results cannot be written where they should go, as things are.

    Nothing is wrong with the input: when there is room, or nobody else at work there, the same call succeeds.
    """


@contextmanager
def naming(argument: str) -> Iterator[None]:
    """Let what is wrong with a file or folder be told by the argument that names it, as a `SourceError`.

    Errors that name an argument already and an `OutputError` stay as they are.
    """
    try:
        yield
    except (ArgumentError, SourceError, OutputError):
        raise
    except UserError as error:
        raise SourceError(argument, error) from error
