"""The program, called as from a shell."""

import sys

import pytest

from minegan_fast.cli import app


@pytest.fixture
def call(monkeypatch, capsys):
    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["minegan-fast", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as stopped:
            app.main()
        out, err = capsys.readouterr()
        return stopped.value.code or 0, out, err

    return run


@pytest.fixture
def transfer(run_settings):
    """Command line of a tiny run."""
    settings = {**run_settings}
    arguments = ["transfer", settings.pop("source"), settings.pop("images")]
    settings.pop("progress")
    settings.pop("report")
    for name, value in settings.items():
        arguments += [f"--{name.replace('_', '-')}", value]
    return [*map(str, arguments), "--no-report"]
