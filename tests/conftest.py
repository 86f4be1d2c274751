"""One thread everywhere, molecules computed once for all workers, and a tiny study to write specs from."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"  # for the processes that tests start: bits must not depend on the machine's cores

MOLECULES = (
    "NQS_TEST_MOLECULES"  # a folder; chemistry.py and the workers of this run find it in the environment
)
_made_here: list[str] = []


def pytest_configure() -> None:
    """Before the workers start, which inherit it; a folder that the caller named is kept."""
    if MOLECULES not in os.environ:
        _made_here.append(tempfile.mkdtemp(prefix="nqs-molecules-"))
        os.environ[MOLECULES] = _made_here[0]


def pytest_unconfigure() -> None:
    for folder in _made_here:
        shutil.rmtree(folder, ignore_errors=True)
        del os.environ[MOLECULES]
    _made_here.clear()


# One point (H2, MADE, 3 steps), with more molecules, ansatze and sizes to choose from.
TINY_SPEC = """\
study = "tiny"
molecules = ["H2"]
ansatze = ["made"]
sizes = ["xs"]
seeds = [0]

[molecule.H2]
atoms = [["H", 0.0, 0.0, 0.0], ["H", 0.0, 0.0, 1.5]]

[molecule.LiH]
atoms = [["Li", 3.0, 0.0, 0.0], ["H", 2.0, 0.0, 0.0]]

[train]
steps = [3]
learning_rate = 1e-2

[phase]
width = 4

[ansatz.made.sizes]
xs = { width = 4 }
s = { width = 8 }

[ansatz.transformer.sizes]
xs = { d = 4, heads = 2, ff = 8, layers = 1 }
s = { d = 8, heads = 2, ff = 8, layers = 1 }

[ansatz.retnet.sizes]
xs = { d = 4, heads = 2, ff = 8, layers = 1 }
s = { d = 8, heads = 2, ff = 8, layers = 1 }
"""


@pytest.fixture
def write_spec(tmp_path: Path) -> Callable[..., Path]:
    """write_spec(("old", "new"), ..., add="text at the end"): the tiny spec with changes, as a file."""

    def write(*changes: tuple[str, str], add: str = "", name: str = "tiny.toml") -> Path:
        text = TINY_SPEC
        for old, new in changes:
            assert old in text, f"the tiny spec has no {old!r}"
            text = text.replace(old, new)
        path = tmp_path / name
        path.write_text(text + add, encoding="utf-8")
        return path

    return write
