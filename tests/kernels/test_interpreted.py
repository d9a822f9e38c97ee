"""Starts the tests of kernels in Triton's interpreter, each file in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"
SLOW = ("test_training.py", "test_training_layouts.py")
FILES = [
    pytest.param(path.name, marks=[pytest.mark.slow] if path.name in SLOW else [])
    for path in sorted(FOLDER.glob("test_*.py"))
]


@pytest.mark.parametrize("name", FILES)
def test_kernels_are_their_definitions_in_the_interpreter(name: str, tmp_path: Path) -> None:
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    env = {key: value for key, value in env.items() if not key.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'base'}"]
    command.append(str(FOLDER / name))
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=850, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
