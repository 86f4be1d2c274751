"""The acceptance numbers of the fits as tests; `python tests/fit_acceptance.py` prints the same figures."""

from __future__ import annotations

from pathlib import Path

import fit_acceptance
import pytest

QUICK = ("gradients", "refusals", "allocation")


def _check(section: str) -> None:
    figures = list(fit_acceptance.SECTIONS[section]())
    print(*figures, sep="\n")
    assert figures
    assert [str(f) for f in figures if not f.passes] == []


@pytest.mark.parametrize("section", QUICK)
def test_section(section: str) -> None:
    _check(section)


# Times want a machine to themselves: `make test-slow` takes them after the tests.
@pytest.mark.slow
@pytest.mark.parametrize("section", [s for s in fit_acceptance.SECTIONS if s not in (*QUICK, "speed")])
def test_slow_section(section: str) -> None:
    _check(section)


def test_a_figure_outside_its_bounds_fails() -> None:
    assert fit_acceptance.Figure("x", 0.5, low=0.4, high=0.6).passes
    assert not fit_acceptance.Figure("x", 0.39, low=0.4, high=0.6).passes
    assert not fit_acceptance.Figure("x", float("nan"), high=1.0).passes
    assert "FAIL" in str(fit_acceptance.Figure("x", 0.7, high=0.6))


def test_recorded_figures_keep_other_sections_and_replace_their_own(tmp_path: Path) -> None:
    figure = fit_acceptance.Figure
    fit_acceptance.record(tmp_path, "recovery", [figure("error", 1e-3, high=1e-10), figure("other", 2.0)])
    fit_acceptance.record(tmp_path, "speed", [figure("cold fit", 9.5, high=10)])
    fit_acceptance.record(tmp_path, "recovery", [figure("error", 1e-14, high=1e-10)])
    lines = (tmp_path / "acceptance.csv").read_text().splitlines()
    assert [line.split(",")[:6] for line in lines[1:]] == [
        ["recovery", "error", "1e-14", "", "1e-10", "met"],
        ["speed", "cold fit", "9.5", "", "10", "met"],
    ]
    page = (tmp_path / "README.md").read_text()
    assert "| cold fit | 9.5 | <= 10 | met |" in page
    assert "0.001" not in page
