"""The command as a whole: what it lists, its version, and what it loads."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from typing import Any

import pytest
from typer.testing import CliRunner

import ultramem
from ultramem.cli import app

COMMANDS = [
    "tokenize", "write-facts", "train", "evaluate", "generate", "report", "export", "finetune", "import-olmo",
    "import-flags",
]  # fmt: skip
# Runs the command and prints what it has loaded of what it must do without.
PROGRAM = """
import sys
from ultramem.cli import main

sys.argv = ["ultramem", *sys.argv[2:]]
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
unwanted = LIST
print("loaded:", *(name for name in unwanted if name in sys.modules))
"""


def loaded(unwanted: list[str], *arguments: object) -> list[str]:
    """Which of these modules a command has loaded when it ends, in a process of its own."""
    command = [sys.executable, "-c", PROGRAM.replace("LIST", repr(unwanted)), "-", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1].split()[1:]


def test_commands_are_listed_in_the_order_in_which_one_meets_them() -> None:
    printed = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output
    places = [printed.index(f"│ {name} ") for name in COMMANDS]
    assert places == sorted(places)


def test_version() -> None:
    assert ultramem.__version__ == metadata.version("ultramem")
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"ultramem {ultramem.__version__}\n")


def test_the_module_is_a_command() -> None:
    result = subprocess.run([sys.executable, "-m", "ultramem.cli", "--version"], capture_output=True, text=True)
    assert result.stdout == f"ultramem {ultramem.__version__}\n", result.stderr


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_loads_no_heavy_package(arguments: list[str]) -> None:
    assert loaded(["torch", "numpy", "olmo_core", "transformers", "matplotlib"], *arguments) == []


@pytest.mark.parametrize("arguments", [["--help"], ["RUN", "import", "--max-new-tokens", "2", "--device", "cpu"]])
def test_generate_loads_no_trainer(run: Any, arguments: list[str]) -> None:
    unwanted = ["olmo_core.train", "ultramem.training", "ultramem.convert", "transformers"]
    assert loaded(unwanted, "generate", *(argument.replace("RUN", str(run.path)) for argument in arguments)) == []


def test_evaluate_loads_no_trainer(run: Any) -> None:
    unwanted = ["olmo_core.train", "ultramem.training", "ultramem.convert", "transformers"]
    assert loaded(unwanted, "evaluate", run.path, "--device", "cpu") == []
