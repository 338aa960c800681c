"""Importing the package is quick, and leaves its heavy parts for when they are used."""

import subprocess
import sys

import osrm_peft

HEAVY = ("torch", "transformers", "peft", "numpy", "datasets", "matplotlib")


def loaded_after(statement):
    """Which of the heavy packages a fresh interpreter has imported after the statement."""
    program = f"{statement}\nimport sys\nprint(*(name for name in {HEAVY} if name in sys.modules))"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()


def test_importing_the_package_imports_nothing_heavy():
    assert loaded_after("import osrm_peft; dir(osrm_peft); osrm_peft.__version__") == []


def test_the_command_s_help_needs_nothing_heavy():
    assert loaded_after("import osrm_peft.cli.main") == []


def test_a_public_name_is_imported_when_it_is_used():
    assert "torch" in loaded_after("import osrm_peft; osrm_peft.TaskFeatures")
    assert {"merge_adapters", "OSRMLoraConfig", "LeastSquares", "register"} <= set(osrm_peft.__all__)
