"""The choice of learning rates and the count of runs on a plateau, against cubes where both are known."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import xarray as xr
from synthetic_cube import CubeOptions, Variant, synthetic_cube

from figures.data import StudyData, study_from_tree
from figures.pilot import (
    choose_rates,
    learning_rate_choice,
    learning_rates,
    plateaus,
    rate_runs,
    rate_variants,
)
from figures.registry import MissingData
from figures.tables import accuracy

RATES = {"base": 5e-3, "low": 1e-3, "high": 2e-2}
SPEC = """
study = "pilot"
[train]
learning_rate = 5e-3
[variants.low]
train.learning_rate = 1e-3
[variants.high]
train.learning_rate = 2e-2
[variants.clip]
train.clip = 0.1
"""


def pilot(best: dict[str, float], *, invalid: str = "", spec: str = SPEC) -> StudyData:
    """Errors of a parabola in ln(rate) around `best` of each size; the given variant has one invalid run."""
    names = [*RATES, "clip"]
    options = CubeOptions(
        molecules=("H2O", "N2"),
        ansatze=("made", "retnet"),
        sizes=tuple(best),
        steps=(400, 1600),
        variants={name: Variant() for name in names},
        seeds=2,
    )
    tree = synthetic_cube(options)
    final = tree["final"].to_dataset()
    error = final["abs_error"].copy()
    for i, size in enumerate(best):
        for v, name in enumerate(names):
            distance = math.log(RATES.get(name, 5e-3) / best[size])
            error[:, :, i, :, v, :] = 1e-3 * math.exp(distance**2)
    status = final["status"].copy()
    if invalid:
        status[0, 0, 0, 0, names.index(invalid), 1] = 3
    changed = final.assign(abs_error=error, status=status)
    groups = {
        "/final": changed,
        "/history": tree["history"].to_dataset(),
        "/molecule": tree["molecule"].to_dataset(),
    }
    return study_from_tree(
        xr.DataTree.from_dict({"/": xr.Dataset(attrs=tree.attrs | {"spec": spec}), **groups})
    )


def test_rates_are_those_of_variants_that_change_nothing_else() -> None:
    assert rate_variants(pilot({"s": 5e-3})) == RATES
    with pytest.raises(MissingData, match="no grid of learning rates"):
        rate_variants(pilot({"s": 5e-3}, spec='study = "pilot"\n[train]\nlearning_rate = 1e-3\n'))


@pytest.mark.parametrize("best", [1e-3, 5e-3, 2e-2])
def test_the_rate_with_the_lowest_error_is_chosen(best: float) -> None:
    choices = choose_rates(pilot({"s": best, "m": best}))
    assert [(c.ansatz, c.size) for c in choices] == [(a, s) for a in ("made", "retnet") for s in ("s", "m")]
    assert {c.rate for c in choices} == {best}
    expected = math.log(1e-3) + math.log(RATES["low"] / best) ** 2
    assert choices[0].scores[1e-3] == pytest.approx(expected)


def test_a_size_outvotes_one_neighbour_but_not_two_strong_ones() -> None:
    choices = {
        c.size: c for c in choose_rates(pilot({"s": 1e-3, "m": 2e-2, "l": 1e-3})) if c.ansatz == "made"
    }
    own, near = choices["m"].scores, choices["s"].scores
    for rate, value in choices["m"].smooth.items():
        assert value == pytest.approx((2 * own[rate] + 2 * near[rate]) / 4)
    assert choices["s"].rate == min(choices["s"].smooth, key=choices["s"].smooth.__getitem__)


def test_a_rate_with_an_invalid_run_is_out() -> None:
    choices = choose_rates(pilot({"s": 2e-2}, invalid="high"))
    assert {c.ansatz: c.rate for c in choices} == {"made": 5e-3, "retnet": 2e-2}
    sheet = learning_rate_choice(pilot({"s": 2e-2}, invalid="high"))
    made = sheet.table.rows[0]
    assert made["rate"] == 5e-3
    assert made["higher"] is None  # the higher rate has no score
    assert made["lower"] == pytest.approx(math.exp(math.log(1e-3 / 2e-2) ** 2 - math.log(5e-3 / 2e-2) ** 2))


def test_the_figure_draws_geometric_means_and_marks_the_choice() -> None:
    study = pilot({"s": 5e-3, "m": 5e-3})
    plot = learning_rates(study)
    assert len(plot.figure.axes) == 2 * 2 * 2
    rows = [
        r for r in plot.table.rows if r["ansatz"] == "made" and r["size"] == "s" and r["molecule"] == "N2"
    ]
    assert [r["rate"] for r in rows if r["steps"] == 400] == sorted(RATES.values())
    assert {r["rate"] for r in plot.table.rows if r["chosen"]} == {5e-3}
    drawn = [line for line in plot.figure.axes[0].get_lines() if line.get_gid() == "rates:made:s"]
    np.testing.assert_allclose(
        drawn[0].get_ydata(), [1e-3 * math.exp(math.log(r / 5e-3) ** 2) for r in sorted(RATES.values())]
    )


def test_runs_at_hartree_fock_are_counted() -> None:
    study = pilot({"s": 5e-3})
    facts = study.molecules["H2O"]
    energy = np.array(study.points["energy"])
    error = np.array(study.points["abs_error"])
    here = (study.points["molecule"] == "H2O") & (study.points["variant"] == "clip")
    first, second, third = np.flatnonzero(here)[:3]
    gap = facts["e_hf"] - facts["e_fci"]
    for row, share in ((first, 0.0), (second, 0.6), (third, 1 - 1e-3 / gap)):
        energy[row] = facts["e_hf"] - share * gap
        error[row] = energy[row] - facts["e_fci"]
    points = study.points.with_column("energy", energy).with_column("abs_error", error)
    rows = plateaus(dataclasses.replace(study, points=points)).table.rows
    row = next(r for r in rows if (r["molecule"], r["variant"], r["ansatz"]) == ("H2O", "clip", "made"))
    assert row["stuck"] >= 1
    assert study.points.ids[first] in str(row["point_ids"]).split()
    assert row["between"] >= 1
    assert row["stuck"] + row["between"] + row["accurate"] == row["runs"]


def test_what_was_reached_is_the_lowest_error_of_the_main_variant() -> None:
    study = pilot({"s": 5e-3, "m": 5e-3})
    error = np.full(len(study.points), 0.1)
    own = np.flatnonzero((study.points["molecule"] == "H2O") & (study.points["ansatz"] == "made"))
    main = [i for i in own if study.points["variant"][i] == study.main_variant]
    other = next(i for i in own if study.points["variant"][i] != study.main_variant)
    error[main[0]], error[main[1]], error[other] = 1.5e-3, 1.7e-3, 1e-6
    points = study.points.with_column("abs_error", error)
    rows = accuracy(dataclasses.replace(study, points=points)).table.rows
    row = next(r for r in rows if (r["molecule"], r["ansatz"]) == ("H2O", "made"))
    assert (row["runs"], row["near"], row["error"]) == (len(main), 1, pytest.approx(1.5))
    assert row["sizes"] == row["size"] == study.points["size"][main[0]]
    assert {r["sizes"] for r in rows if r is not row} == {"none"}


def test_the_rate_is_the_lowest_that_noise_cannot_tell_from_the_best() -> None:
    """Seeds half an e-fold apart: the next lower rate, 5 % worse, is taken; where they agree, it is not."""
    study = pilot({"s": 5e-3, "m": 5e-3})
    rows = rate_runs(study)
    shift = {1e-3: 0.05, 5e-3: 0.0, 2e-2: 1.0}
    seeds = rows.unique("seed")
    assert len(seeds) == 2
    wanted = {}
    for noise, chosen in ((0.5, 1e-3), (0.01, 5e-3)):
        log_error = [
            shift[rate] + (noise if seed == seeds[0] else 0.0)
            for rate, seed in zip(rows["rate"], rows["seed"], strict=True)
        ]
        error = np.array(study.points["abs_error"])
        place = {point: i for i, point in enumerate(study.points.ids)}
        error[[place[point] for point in rows.ids]] = 1e-3 * np.exp(log_error)
        points = study.points.with_column("abs_error", error)
        wanted[chosen] = {c.rate for c in choose_rates(dataclasses.replace(study, points=points))}
    assert all(found == {chosen} for chosen, found in wanted.items()), wanted


def test_each_ansatz_has_a_grid_of_its_own() -> None:
    study = pilot({"s": 1e-3, "m": 1e-3})
    points = study.points
    absent = (points["ansatz"] == "made") & (points["variant"] == "low")
    only_retnet = dataclasses.replace(study, points=points.where(~absent))
    chosen = {c.ansatz: c for c in choose_rates(only_retnet)}
    assert set(chosen["retnet"].scores) == set(RATES.values())
    assert set(chosen["made"].scores) == {5e-3, 2e-2}
    # A cell that lacks a rate which its ansatz has elsewhere is left out: it would favour that rate.
    hole = (points["ansatz"] == "made") & (points["variant"] == "low") & (points["size"] == "m")
    cells = rate_runs(dataclasses.replace(study, points=points.where(~hole)))
    assert cells.only(ansatz="made").unique("size") == ["s"]
