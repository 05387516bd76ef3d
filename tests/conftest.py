"""What several test files use."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture(scope="session")
def papermill():
    """Run `papermill NOTEBOOK -p name value …` as a user types it, in the root of the repository."""

    def run(notebook, **parameters):
        given = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
        return subprocess.run(
            [sys.executable, "-m", "papermill", str(notebook), "--no-progress-bar", *given],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )

    return run
