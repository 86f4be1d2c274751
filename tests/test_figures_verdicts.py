"""Every verdict: data in which it must be `supported`, and data in which it must not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from synthetic_cube import CubeOptions, Variant, synthetic_cube
from synthetic_fit import write_fit

import figures.catalogue  # noqa: F401  (registers all)
from figures.data import StudyData, load_study, study_from_tree
from figures.fits import summary
from figures.registry import Quantity
from figures.verdicts import (
    NOT_MEASURED,
    NOT_SUPPORTED,
    SUPPORTED,
    UNDECIDED,
    inside,
    outside,
    positive,
    statements,
    verdicts,
)

Law = dict[str, float]
Laws = dict[tuple[str, str], Law]
METRICS = ("v_score", "abs_error")
KINDS = ("made", "transformer", "retnet")


def law(a1: float = 0.4, a2: float = 0.8, size: float = 2e-3, time: float = 6e-4) -> Law:
    return {"A0": 0.0, "A1": size, "a1": a1, "A2": time, "a2": a2}


SIZE_LED = law(a1=0.4, a2=0.2, size=5e-3, time=1e-5)
TIME_LED = law(a1=0.2, a2=0.5, size=1e-6, time=5e-3)


def cube(**changes: Any) -> xr.DataTree:
    base = {"molecules": ("H2O", "N2"), "sizes": ("xs", "s", "m"), "steps": (250, 1000, 4000), "records": 4}
    return synthetic_cube(CubeOptions(**(base | changes)))


def with_fit(
    folder: Path, laws: Mapping[tuple[str, str], Law], tree: xr.DataTree | None = None, **more: Any
) -> StudyData:
    tree = cube() if tree is None else tree
    tree.to_netcdf(folder / "cube.nc", engine="netcdf4")
    write_fit(folder, tree, laws, **more)
    return load_study(folder / "cube.nc", folder / "fit.json")


def everywhere(laws: Mapping[str, Law]) -> Laws:
    return {(kind, metric): p for kind, p in laws.items() for metric in METRICS}


_ROWS: dict[int, tuple[StudyData, Any]] = {}  # the table of a study that several tests read


def verdict(study: StudyData, key: str) -> dict[str, Any]:
    if id(study) not in _ROWS:
        _ROWS[id(study)] = (study, verdicts(study).table.rows)
    rows = [row for row in _ROWS[id(study)][1] if row["key"] == key]
    assert len(rows) == 1
    return dict(rows[0])


def changed(tree: xr.DataTree, group: str, edit: Callable[[xr.Dataset], None]) -> xr.DataTree:
    dataset = tree[group].to_dataset().copy(deep=True)
    edit(dataset)
    tree[group] = xr.DataTree(dataset)
    return tree


Case = Callable[[Path], StudyData]


_STUDIES: dict[str, StudyData] = {}  # many claims are read from one fit: it is written once


def fitted(laws: Laws, **more: Any) -> Case:
    def make(folder: Path) -> StudyData:
        key = repr((sorted(laws.items()), sorted(more.items())))
        if key not in _STUDIES:
            _STUDIES[key] = with_fit(folder, laws, **more)
        return _STUDIES[key]

    return make


def molecule_fits(k: tuple[float, float]) -> Case:
    own = {
        ("transformer", "v_score", m): law(a1=0.5 * v, a2=0.5) for m, v in zip(("H2O", "N2"), k, strict=True)
    }
    return fitted(alike(law()), per_molecule=own)


def phase_fits(a3: float) -> Case:
    terms = {(kind, "v_score", "modulus_phase"): law() | {"A3": 1e-3, "a3": a3} for kind in KINDS}
    return fitted(alike(law()), extra_laws=terms)


def flips(count: int) -> Case:
    def make(folder: Path) -> StudyData:
        def edit(molecule: xr.Dataset) -> None:
            molecule["n_unique_flips"][:] = count

        return study_from_tree(changed(cube(), "molecule", edit))

    return make


def parts(family: str, axis: str, local: float) -> Case:
    def make(folder: Path) -> StudyData:
        tree = cube()
        final = tree["final"]["status"]
        ones = np.ones(final.shape)
        values = np.stack([local * ones, (1 - local) * ones], axis=-1)
        tree["parts"] = xr.DataTree(
            xr.Dataset({family: ((*final.dims, axis), values)}, coords={axis: ["local_energy", "sampling"]})
        )
        return study_from_tree(tree)

    return make


def variant(table: str, factor: float) -> Case:
    def make(folder: Path) -> StudyData:
        tree = cube(variants={"base": Variant(), "other": Variant()}, hold_outs=f"[variants.other]\n{table}")

        def edit(final: xr.Dataset) -> None:
            base = final["v_score"].sel(variant="base")
            final["v_score"].loc[{"variant": "other"}] = factor * base

        return study_from_tree(changed(tree, "final", edit))

    return make


def executed(ratio: float) -> Case:
    def make(folder: Path) -> StudyData:
        def edit(final: xr.Dataset) -> None:
            final["flops_executed"] = final["flops_estimated"] / ratio

        return study_from_tree(changed(cube(), "final", edit))

    return make


def beyond_thirty(slope: float) -> Case:
    def make(folder: Path) -> StudyData:
        p = law()
        tree = cube()

        def larger(molecule: xr.Dataset) -> None:
            molecule["n_spin_orbitals"].loc[{"molecule": "N2"}] = 36

        def follow(final: xr.Dataset) -> None:
            value = p["A1"] * final["n_total"] ** -p["a1"] + p["A2"] * final["d_prime"] ** -p["a2"]
            final["v_score"] = (7.0 * value**slope).transpose(*final["v_score"].dims)

        tree = changed(changed(tree, "molecule", larger), "final", follow)
        return with_fit(folder, alike(p), tree)

    return make


def registered(
    name: str, hit: bool, count: int = 12, sealed: bool = True, metric: str = "v_score", misses: int = 0
) -> Case:
    def make(folder: Path) -> StudyData:
        tree = cube(variants={"base": Variant(), "optimum": Variant()})
        final = tree["final"].to_dataset()
        points = []
        for size in ("xs", "s", "m"):
            for steps in (250, 1000):
                for seed in (0, 1):
                    labels = {"molecule": "N2", "ansatz": "retnet", "size": size, "steps": steps}
                    labels |= {"variant": name, "seed": seed}
                    value = float(final[metric].sel(labels))
                    low, high = (0.5, 2.0) if hit and len(points) >= misses else (2.0, 3.0)
                    prediction = {"prediction": value, "interval_90": [low * value, high * value]}
                    points.append({k: str(v) for k, v in labels.items()} | prediction)
        record: dict[str, Any] = {"fit": f"retnet/{metric}/all/additive", "points": points[:count]}
        canonical = json.dumps(record, sort_keys=True, separators=(",", ":"))
        record["sha256"] = hashlib.sha256(canonical.encode()).hexdigest() if sealed else "0" * 64
        hold_out = [{"ansatz": "retnet", "metric": metric, "rows": [], "registered": record}]
        return with_fit(folder, alike(law()), tree, record={"hold_out": hold_out})

    return make


def alike(p: Law) -> Laws:
    return everywhere(dict.fromkeys(KINDS, p))


def by_ansatz(a2: tuple[float, float, float]) -> Laws:
    return everywhere({kind: law(a1=0.5, a2=v) for kind, v in zip(KINDS, a2, strict=True)})


def by_metric(v_score: float, abs_error: float) -> Laws:
    return {
        (kind, metric): law(a1=0.5, a2=a2)
        for kind in KINDS
        for metric, a2 in zip(METRICS, (v_score, abs_error), strict=True)
    }


CASES: dict[str, tuple[Case, Case]] = {
    "1-transformer": (fitted(alike(SIZE_LED)), fitted(alike(TIME_LED))),
    "1-retnet": (fitted(alike(SIZE_LED)), fitted(alike(TIME_LED))),
    "1-made": (fitted(alike(TIME_LED)), fitted(alike(SIZE_LED))),
    "1-range-transformer": (fitted(alike(SIZE_LED)), fitted(alike(TIME_LED))),
    "1-range-retnet": (fitted(alike(SIZE_LED)), fitted(alike(TIME_LED))),
    "1-range-made": (fitted(alike(TIME_LED)), fitted(alike(SIZE_LED))),
    "2": (
        fitted(alike(law()), spread=0.005),
        fitted(everywhere({"transformer": law(a1=0.6), "retnet": law(a1=0.1)}), spread=0.005),
    ),
    **{
        f"3-{kind}-{metric}": (fitted(by_ansatz((1.0, 1.0, 1.0))), fitted(by_ansatz((0.5, 0.5, 0.5))))
        for kind in KINDS
        for metric in METRICS
    },
    **{
        f"3-ansatz-{metric}": (fitted(by_ansatz((0.5, 0.5, 1.0))), fitted(by_ansatz((0.5, 0.5, 0.5))))
        for metric in METRICS
    },
    **{f"3-metric-{kind}": (fitted(by_metric(0.5, 1.0)), fitted(by_metric(0.7, 0.7))) for kind in KINDS},
    "4-estimated": (flips(500), flips(1)),
    "4-executed": (
        parts("flops_executed_part", "executed_part", 0.8),
        parts("flops_executed_part", "executed_part", 0.2),
    ),
    "4-measured": (
        parts("wall_part_seconds", "wall_part", 0.8),
        parts("wall_part_seconds", "wall_part", 0.2),
    ),
    **{f"q1-{kind}": (phase_fits(0.9), phase_fits(0.4)) for kind in KINDS},
    "q2": (variant('local_energy = "sampled"', 1.05), variant('local_energy = "sampled"', 3.0)),
    "q3": (molecule_fits((0.5, 2.0)), molecule_fits((1.0, 1.0))),
    "q4": (variant('sampling.schedule = "constant"', 3.0), variant('sampling.schedule = "constant"', 1.05)),
    "n1": (beyond_thirty(1.0), beyond_thirty(0.3)),
    "n2": (executed(40.0), executed(1.0)),
    **{
        f"{key}-{metric}": (registered(name, True, metric=metric), registered(name, False, metric=metric))
        for key, name in (("n3", "optimum"), ("n4", "base"))
        for metric in METRICS
    },
}


def test_every_statement_has_its_cases() -> None:
    assert {statement.key for statement in statements()} == set(CASES)


@pytest.mark.parametrize("key", CASES)
def test_supported(tmp_path: Path, key: str) -> None:
    row = verdict(CASES[key][0](tmp_path), key)
    assert row["verdict"] == SUPPORTED, row
    assert isinstance(row["value"], Quantity)
    assert row["point_ids"]


@pytest.mark.parametrize("key", CASES)
def test_not_supported(tmp_path: Path, key: str) -> None:
    row = verdict(CASES[key][1](tmp_path), key)
    assert row["verdict"] == NOT_SUPPORTED, row
    assert row["point_ids"]


@pytest.mark.parametrize(
    "key", ["1-transformer", "2", "3-retnet-v_score", "3-ansatz-v_score", "q1-made", "q3"]
)
def test_wide_intervals_leave_it_undecided(tmp_path: Path, key: str) -> None:
    laws = everywhere(dict.fromkeys(KINDS, law(a1=0.5, a2=0.5, size=1e-3, time=1e-4)))
    own = {("transformer", "v_score", m): law(a1=0.5, a2=0.5) for m in ("H2O", "N2")}
    terms = {(kind, "v_score", "modulus_phase"): law(a1=0.5) | {"A3": 1e-3, "a3": 0.45} for kind in KINDS}
    study = fitted(laws, spread=0.6, per_molecule=own, extra_laws=terms)(tmp_path)
    assert verdict(study, key)["verdict"] == UNDECIDED


def test_nothing_is_claimed_without_a_fit() -> None:
    rows = verdicts(study_from_tree(cube())).table.rows
    measured = {row["key"] for row in rows if row["verdict"] != NOT_MEASURED}
    assert measured == {"4-estimated", "n2"}  # what the cube alone can say
    for row in rows:
        if row["key"] not in measured:
            assert row["value"] is None
            assert str(row["data"])


def test_uncertified_fits_measure_nothing(tmp_path: Path) -> None:
    study = with_fit(tmp_path, alike(SIZE_LED), stationary=False)
    for key in ("1-transformer", "2", "3-made-v_score"):
        row = verdict(study, key)
        assert row["verdict"] == NOT_MEASURED
        assert "certificate" in row["data"]


def test_no_interior_optimum_measures_no_exponent(tmp_path: Path) -> None:
    refused = {("made", "v_score"): "no interior optimum identified"}
    study = with_fit(tmp_path, alike(law()), allocation=refused)
    row = verdict(study, "3-made-v_score")
    assert row["verdict"] == NOT_MEASURED
    assert "no interior optimum identified" in row["data"]


def test_broken_seal_is_no_registration(tmp_path: Path) -> None:
    row = verdict(registered("base", True, sealed=False)(tmp_path), "n4-v_score")
    assert row["verdict"] == NOT_MEASURED


def test_few_registered_runs_are_undecided(tmp_path: Path) -> None:
    assert verdict(registered("optimum", True, count=4)(tmp_path), "n3-v_score")["verdict"] == UNDECIDED


def test_coverage_that_may_be_poor_is_undecided(tmp_path: Path) -> None:
    """10 of 12 inside: the Wilson interval [.55, .95] holds the nominal .9, but cannot rule out .7."""
    row = verdict(registered("base", True, misses=2)(tmp_path), "n4-v_score")
    assert row["verdict"] == UNDECIDED
    assert row["value"].value == pytest.approx(10 / 12)
    assert (row["value"].low, row["value"].high) == pytest.approx((0.5520, 0.9530), abs=1e-4)


def test_metrics_of_one_run_are_not_counted_as_two(tmp_path: Path) -> None:
    study = registered("base", True)(tmp_path)
    assert str(verdict(study, "n4-v_score")["data"]).startswith("12 registered runs")
    assert verdict(study, "n4-abs_error")["verdict"] == NOT_MEASURED


def test_similar_compares_with_the_whole_elasticity(tmp_path: Path) -> None:
    """Size effects of 1 % and 3 % of the time effect are alike, though one is thrice the other."""
    p = {
        kind: law(a1=0.4, a2=0.5, size=size, time=5e-3)
        for kind, size in zip(KINDS, (1e-4, 1e-4, 3e-4), strict=True)
    }
    assert verdict(fitted(everywhere(p), spread=0.005)(tmp_path), "2")["verdict"] == SUPPORTED


def test_range_effect_is_the_fall_over_the_fitted_range(tmp_path: Path) -> None:
    study = fitted(alike(SIZE_LED))(tmp_path)
    assert study.fits is not None
    record = study.fits.get("retnet", "v_score")
    assert record is not None
    p, variables = SIZE_LED, record.record["variables"]

    def log_law(n: float, d: float) -> float:
        return float(np.log(p["A1"] * n ** -p["a1"] + p["A2"] * d ** -p["a2"]))

    n, d = variables["N"], variables["D"]
    size = log_law(n["min"], d["geometric_mean"]) - log_law(n["max"], d["geometric_mean"])
    time = log_law(n["geometric_mean"], d["min"]) - log_law(n["geometric_mean"], d["max"])
    assert verdict(study, "1-range-retnet")["value"].value == pytest.approx(size - time, rel=1e-12)


def test_the_most_different_of_several_is_corrected_and_named(tmp_path: Path) -> None:
    """Of three pairs of ansatze one differs: its interval is that of level 1 - 0.05/3."""
    study = fitted(by_ansatz((0.5, 0.5, 1.0)))(tmp_path)
    row = verdict(study, "3-ansatz-v_score")
    assert study.fits is not None
    ks = {}
    for kind in KINDS:
        fit = study.fits.get(kind, "v_score")
        assert fit is not None
        ks[kind] = fit.draws["a1"] / fit.draws["a2"]
    pair = str(row["data"]).split("shown: ")[1].split(" / ")
    assert "retnet" in pair
    want = np.percentile(ks[pair[0]] / ks[pair[1]], [50 * 0.05 / 3, 100 - 50 * 0.05 / 3])
    assert (row["value"].low, row["value"].high) == pytest.approx(tuple(want), rel=1e-12)


def test_undefined_draws_leave_no_interval() -> None:
    values = np.concatenate([[1.0], np.linspace(0.9, 1.1, 1000)])
    assert np.isfinite(summary(values).low)
    values[1:31] = np.nan  # 3 % of the draws: more than a tail
    assert np.isnan(summary(values).low)
    assert np.isnan(summary(values[:200], 1 - 0.05 / 100).low)  # less than one draw in a tail


def test_seal_is_that_of_the_fit() -> None:
    validate = pytest.importorskip("replicate.scaling.validate")
    from figures.verdicts import _sealed

    record = validate.register({"fit": "a", "points": [{"prediction": 1.5, "interval_90": [1.0, 2.0]}]})
    assert _sealed(record)
    assert not _sealed(record | {"fit": "b"})


def test_share_statistic_is_the_closed_form() -> None:
    """MADE, one run: M 2 / (rho n + 2 (M + 3)) with rho = N_mod/N (SCIENCE section 7)."""
    tree = cube(molecules=("H2O",), ansatze=("made",), sizes=("s",), steps=(250,), seeds=1)
    row = verdict(study_from_tree(tree), "4-estimated")
    final = tree["final"].to_dataset()
    rho = float(final["n_modulus"].squeeze()) / float(final["n_total"].squeeze())
    assert row["value"].value == pytest.approx(2 * 228 / (rho * 14 + 2 * (228 + 3)))


@pytest.mark.parametrize(
    ("quantity", "above", "out", "within"),
    [
        (Quantity(1.0, 0.5, 1.5), SUPPORTED, UNDECIDED, UNDECIDED),
        (Quantity(-1.0, -1.5, -0.5), NOT_SUPPORTED, SUPPORTED, NOT_SUPPORTED),
        (Quantity(0.1, -0.5, 1.0), UNDECIDED, UNDECIDED, UNDECIDED),
        (Quantity(1.0, 0.9, 1.1), SUPPORTED, NOT_SUPPORTED, SUPPORTED),
        (Quantity(2.0, 1.5, 2.5), SUPPORTED, SUPPORTED, NOT_SUPPORTED),
        (Quantity(2.0), UNDECIDED, UNDECIDED, UNDECIDED),
    ],
)
def test_rules(quantity: Quantity, above: str, out: str, within: str) -> None:
    assert positive(quantity) == above
    assert outside(quantity, 0.8, 1.25) == out
    assert inside(quantity, 0.8, 1.25) == within
