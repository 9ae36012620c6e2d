"""Where tests find real models and texts, which are too large for the repository.

The folder is $QJAX_TEST_DATA, or shared/data beside the repository where that exists; it holds models/, text/ and tokenizers/.
"""

import os
from pathlib import Path

import pytest

VARIABLE = "QJAX_TEST_DATA"
REPOSITORY = Path(__file__).resolve().parents[1]
BESIDE = REPOSITORY.parent / "shared" / "data"


def real_data(path: str) -> Path:
    """A file or folder of the real data; where it is missing the test is skipped, and fails if the variable names no folder."""
    named = os.environ.get(VARIABLE)
    folder = Path(named) if named else BESIDE
    if named and not folder.is_dir():
        pytest.fail(f"{VARIABLE}={named} is no folder")
    if not (folder / path).exists():
        pytest.skip(f"no {path} in the real data; set {VARIABLE} to a folder that has it")
    return folder / path
