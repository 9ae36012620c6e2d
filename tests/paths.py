"""Where tests find real models and texts, which are too large for the repository.

The folder is $QJAX_TEST_DATA, or shared/data beside the repository where that exists; it holds models/, text/ and tokenizers/.
Models of 10^8 parameters and more stand in $QJAX_TEST_MODELS; tests of them are marked `real`.
"""

import os
from pathlib import Path

import pytest

VARIABLE, MODELS = "QJAX_TEST_DATA", "QJAX_TEST_MODELS"
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


def real_model(name: str) -> Path:
    """A file of the large models; where it is missing the test is skipped."""
    folder = os.environ.get(MODELS)
    if not folder or not (Path(folder) / name).exists():
        pytest.skip(f"no {name}; set {MODELS} to a folder that has it")
    return Path(folder) / name
