"""Learning: points of the laptop study reach the accuracy that the README promises (minutes: marked slow)."""

from __future__ import annotations

from pathlib import Path

import pytest
from chemistry import molecule
from networks import KINDS

from replicate.spec import Point, load_study
from replicate.trainer import train

LAPTOP = load_study(Path(__file__).parents[1] / "specs" / "laptop.toml")


def largest_run(name: str, kind: str) -> Point:
    points = [p for p in LAPTOP.points if p.molecule.name == name and p.ansatz.kind == kind]
    return max(points, key=lambda p: (p.steps, p.size == "l"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "most"), [("H2O", 0.5e-3), ("LiH", 0.05e-3)])
def test_error_of_the_largest_run(name: str, kind: str, most: float) -> None:
    """Hartree above FCI, exact over the sector; never below it by more than rounding."""
    mol = molecule(name)
    run = train(largest_run(name, kind), mol)
    for _ in run:
        pass
    error = run.evaluate().energy - mol.e_fci
    assert -1e-8 < error <= most
