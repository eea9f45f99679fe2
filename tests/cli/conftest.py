"""The command, called in the folder that each module of tests fills."""

import pytest


@pytest.fixture
def call(folder, monkeypatch):
    """Run the command in `folder`; the two outputs apart, wide enough for no line to be broken."""
    # Imported here, as a conftest is read on machines without them, too.
    from typer.testing import CliRunner

    from moebert_kernels.cli import app

    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")
    return lambda command: CliRunner().invoke(app, command.split())


@pytest.fixture
def run(call):
    """Run a command that succeeds; what it prints."""

    def run(command):
        result = call(command)
        assert result.exit_code == 0, command + result.output + result.stderr
        return result.stdout

    return run
