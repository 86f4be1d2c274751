"""Figures and tables: artists' data and cells against values computed from the cube with xarray alone."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from synthetic_cube import DEFAULT_TRUTHS, Truth, Variant, synthetic_cube
from synthetic_cube import CubeOptions as Options
from synthetic_fit import write_fit

import figures.catalogue  # noqa: F401  (registers all)
from figures import cli, compute, style
from figures.costs import mode_cells, short_seconds
from figures.data import DataError, StudyData, load_study, study_from_tree
from figures.effects import pair_variant
from figures.readme import check, sections
from figures.registry import Artefact, MissingData, Plot, Quantity, Sheet, artefacts, gathered, number
from figures.render import Product, build, csv_text, write
from figures.report import report_html
from figures.tables import accuracy
from figures.verdicts import NOT_MEASURED

LAWS = {
    key: {"A0": t.A0, "A1": t.A1, "a1": t.a1, "A2": t.A2, "a2": t.a2} for key, t in DEFAULT_TRUTHS.items()
}
WHOLE: dict[str, object] = {"failed": 0.0, "invalid": 0.0, "missing": 0.0}
HOLDOUT = '[holdout]\nsizes = ["l"]\n'


def options(**changes: object) -> Options:
    base = {
        "molecules": ("H2O", "N2", "O2"),
        "sizes": ("xs", "s", "m", "l"),
        "steps": (250, 1000, 4000),
        "failed": 0.03,
        "invalid": 0.03,
        "missing": 0.03,
        "hold_outs": HOLDOUT,
    }
    return Options(**(base | changes))


@pytest.fixture(scope="module")
def cube() -> xr.DataTree:
    return synthetic_cube(options())


@pytest.fixture(scope="module")
def folder(cube: xr.DataTree, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study")
    cube.to_netcdf(path / "cube.nc", engine="netcdf4")
    sensitivity = [
        {
            "ansatz": "retnet",
            "metric": "v_score",
            "rows": [
                {
                    "what": "objective lad",
                    "parameters": {"a1": 0.5, "a2": 7.0},
                    "intervals": {"a1": [0.4, 0.6]},
                }
            ],
        }
    ]
    scores = [
        {"ansatz": "retnet", "metric": "v_score", "rows": [{"name": "size l", "n": 9, "coverage_90": 0.875}]}
    ]
    write_fit(
        path,
        cube,
        LAWS,
        per_molecule={("transformer", "v_score", m): LAWS["transformer", "v_score"] for m in ("H2O", "N2")},
        allocation={("made", m): "no interior optimum identified" for m in ("v_score", "abs_error")},
        record={"sensitivity": sensitivity, "hold_out": scores, "selection": scores},
    )
    return path


@pytest.fixture(scope="module")
def study(folder: Path) -> StudyData:
    return load_study(folder / "cube.nc", folder / "fit.json")


@pytest.fixture(scope="module")
def products(study: StudyData) -> dict[str, Product]:
    return {product.artefact.name: product for product in build(study)}


def plot(products: dict[str, Product], name: str) -> Plot:
    result = products[name].result
    assert isinstance(result, Plot)
    return result


def sheet(products: dict[str, Product], name: str) -> Sheet:
    result = products[name].result
    assert isinstance(result, Sheet)
    return result


def lines(axis: object, gid: str) -> list[tuple[np.ndarray, np.ndarray]]:
    found = [line for line in axis.get_lines() if line.get_gid() == gid]
    return [(np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)) for line in found]


# -- artists against the cube --


@pytest.mark.parametrize(("name", "x"), [("v_score_vs_n", "n_total"), ("abs_error_vs_d_prime", "d_prime")])
def test_scaling_markers_are_the_runs(
    products: dict[str, Product], cube: xr.DataTree, name: str, x: str
) -> None:
    final = cube["final"].to_dataset()
    metric = name.split("_vs_")[0]
    axes = plot(products, name).figure.axes
    held = "steps" if x == "n_total" else "size"
    top = {"steps": 4000, "size": "l"}[held]
    for i, molecule in enumerate(("H2O", "N2", "O2")):
        for kind in ("made", "transformer", "retnet"):
            cells = final.sel({"molecule": molecule, "ansatz": kind, "variant": "base", held: top})
            good = (cells["status"] == 1).values.ravel()
            want_x = (
                cells[x].broadcast_like(cells[metric]).transpose(*cells[metric].dims).values.ravel()[good]
            )
            want_y = cells[metric].values.ravel()[good]
            # size "l" is held out: its markers are open, in an artist of their own
            drawn = lines(axes[i], f"runs:{kind}:{top}") + lines(axes[i], f"runs:{kind}:{top}:held-out")
            got = sorted((a, b) for xs, ys in drawn for a, b in zip(xs, ys, strict=True))
            np.testing.assert_allclose(got, sorted(zip(want_x, want_y, strict=True)), rtol=1e-12)


def test_held_out_runs_are_open_markers(products: dict[str, Product], cube: xr.DataTree) -> None:
    axis = plot(products, "v_score_vs_n").figure.axes[0]
    (open_x, _), *_ = lines(axis, "runs:retnet:4000:held-out")
    counts = cube["final"]["n_total"].sel(molecule="H2O", ansatz="retnet", variant="base")
    assert set(open_x) == {float(counts.sel(size="l"))}
    full = lines(axis, "runs:retnet:4000")[0][0]
    assert set(full) == {float(v) for v in counts.sel(size=["xs", "s", "m"])}
    artist = next(a for a in axis.get_lines() if a.get_gid() == "runs:retnet:4000:held-out")
    assert artist.get_markerfacecolor() == style.PAPER


def test_collapsed_law_is_the_formula(products: dict[str, Product], folder: Path) -> None:
    record = json.loads((folder / "fit.json").read_text())
    axis = plot(products, "v_score_vs_n").figure.axes[3]
    laws = [line for line in axis.get_lines() if line.get_gid() == "law"]
    for line, kind in zip(laws, ("made", "transformer", "retnet"), strict=True):
        entry = next(f for f in record["fits"] if f["id"] == f"{kind}/v_score/all/additive")
        p, reference = entry["parameters"], entry["variables"]["D"]["geometric_mean"]
        x = np.asarray(line.get_xdata(), float)
        want = p["A0"] + p["A1"] * x ** -p["a1"] + p["A2"] * reference ** -p["a2"]
        np.testing.assert_allclose(line.get_ydata(), want, rtol=1e-12)
        assert x.min() == pytest.approx(entry["variables"]["N"]["min"])


def test_collapsed_points_keep_their_residual(products: dict[str, Product], folder: Path) -> None:
    entry = next(
        f
        for f in json.loads((folder / "fit.json").read_text())["fits"]
        if f["id"] == "retnet/v_score/all/additive"
    )
    p, reference = entry["parameters"], entry["variables"]["D"]["geometric_mean"]
    rows = [
        r
        for r in plot(products, "v_score_vs_n").table.rows
        if r["panel"] == "collapsed" and r["ansatz"] == "retnet"
    ]
    assert len(rows) > 50
    for r in rows:
        n, d = float(r["n_total"]), float(r["d_prime"])
        law = (p["A0"] + p["A1"] * n ** -p["a1"] + p["A2"] * d ** -p["a2"]) * math.exp(
            entry["intercepts"][r["molecule"]]
        )
        target = p["A0"] + p["A1"] * n ** -p["a1"] + p["A2"] * reference ** -p["a2"]
        assert r["drawn"] == pytest.approx(r["v_score"] / law * target, rel=1e-12)


def test_collapse_without_a_fit_removes_the_molecule_level(cube: xr.DataTree) -> None:
    bare = study_from_tree(cube)
    (product,) = build(bare, [a for a in artefacts() if a.name == "v_score_vs_n"])
    assert isinstance(product.result, Plot)
    rows = [r for r in product.result.table.rows if r["panel"] == "collapsed" and r["ansatz"] == "made"]
    final = cube["final"].to_dataset().sel(ansatz="made", variant="base", steps=4000)
    values = np.log(final["v_score"].where(final["status"] == 1))
    shared = np.isfinite(values).any("seed").all("molecule")
    per_cell = values.where(shared)
    level = {str(m): float(per_cell.sel(molecule=m).mean()) for m in per_cell["molecule"].values}
    centre = np.mean(list(level.values()))
    for r in rows:
        want = r["v_score"] * math.exp(centre - level[r["molecule"]])
        assert r["drawn"] == pytest.approx(want, rel=1e-12)


def test_band_is_the_percentile_of_the_draws(
    products: dict[str, Product], study: StudyData, folder: Path
) -> None:
    with xr.open_datatree(folder / "fit.nc", engine="netcdf4") as tree:
        group = tree["retnet/v_score/all/additive"].to_dataset().load()
    draw = {str(name): group["draws"].sel(parameter=name).values for name in group["parameter"].values}
    law = study.fits.get("retnet", "v_score")
    assert law is not None
    low, high = law.band(5000.0, 300.0, "N2")
    curve = draw["A0"] + draw["A1"] * 5000.0 ** -draw["a1"] + draw["A2"] * 300.0 ** -draw["a2"]
    want = np.percentile(curve * np.exp(draw["intercept[N2]"]), [2.5, 97.5])
    np.testing.assert_allclose([low[0], high[0]], want, rtol=1e-12)
    assert products["v_score_vs_n"].result is not None


def test_training_curves_are_the_history(
    products: dict[str, Product], cube: xr.DataTree, study: StudyData
) -> None:
    history, molecule = cube["history"].to_dataset(), cube["molecule"].to_dataset()
    axis = plot(products, "training_curves").figure.axes[1]  # N2
    drawn = [line for line in axis.get_lines() if str(line.get_gid()).startswith("training:")]
    assert drawn
    for line in drawn:
        _, kind, size, steps, variant, seed = str(line.get_gid()).removeprefix("training:").split("/")
        assert (size, steps) == ("l", "4000")
        run = history.sel(molecule="N2", ansatz=kind, size=size, steps=4000, variant=variant, seed=int(seed))
        keep = np.isfinite(run["step"].values)
        np.testing.assert_array_equal(line.get_xdata(), run["step"].values[keep])
        gap = run["energy"].values[keep] - float(molecule["e_fci"].sel(molecule="N2"))
        np.testing.assert_allclose(line.get_ydata(), gap, rtol=1e-12)


def test_reference_levels(products: dict[str, Product], cube: xr.DataTree) -> None:
    molecule = cube["molecule"].to_dataset()
    axis = plot(products, "energy_levels").figure.axes[0]
    levels = [
        float(np.asarray(line.get_ydata())[0])
        for line in axis.get_lines()
        if line.get_gid() == "reference:e_hf"
    ]
    want = abs(molecule["e_hf"] - molecule["e_fci"]).values
    np.testing.assert_allclose(levels, want, rtol=1e-12)


def test_schedules_show_search_fraction(products: dict[str, Product], cube: xr.DataTree) -> None:
    rows = plot(products, "schedules").table.rows
    space = cube["molecule"]["search_space"]
    for r in rows[:20]:
        assert r["search_fraction"] == pytest.approx(r["n_unique"] / float(space.sel(molecule=r["molecule"])))


# -- effects and allocation --


def test_elasticities_are_log_derivatives(products: dict[str, Product], folder: Path) -> None:
    record = json.loads((folder / "fit.json").read_text())
    rows = [r for r in plot(products, "elasticities").table.rows if r["scope"] == "joint"]
    assert len(rows) == 12
    for r in rows:
        entry = next(f for f in record["fits"] if f["id"] == f"{r['ansatz']}/{r['metric']}/all/additive")
        p = entry["parameters"]
        at = [entry["variables"][v]["geometric_mean"] for v in ("N", "D")]

        def log_law(n: float, d: float, p: dict[str, float] = p) -> float:
            return math.log(p["A0"] + p["A1"] * n ** -p["a1"] + p["A2"] * d ** -p["a2"])

        h = 1e-5
        up = [v * math.exp(h * (r["variable"] == name)) for v, name in zip(at, ("N", "D'"), strict=True)]
        down = [v * math.exp(-h * (r["variable"] == name)) for v, name in zip(at, ("N", "D'"), strict=True)]
        value = r["elasticity"]
        assert isinstance(value, Quantity)
        assert value.value == pytest.approx(-(log_law(*up) - log_law(*down)) / (2 * h), abs=1e-8)
        if p["A1"] > 0:
            assert value.low < value.value < value.high


def test_optimum_is_the_brute_force_minimum(study: StudyData, cube: xr.DataTree) -> None:
    law = study.fits.get("transformer", "v_score")
    assert law is not None
    cost = compute.cost_of(study, "N2", "transformer", "flops_estimated")
    budgets = np.array([1e13, 1e14, 1e15])
    n, d = compute.optimum(law, cost, budgets)
    sizes = np.geomspace(1e2, 1e8, 400_001)
    for b, budget in enumerate(budgets):
        values = law.value(sizes, cost.d_prime(budget, sizes))
        assert n[0, b] == pytest.approx(sizes[np.argmin(values)], rel=1e-4)
        spent = cost.space * cost.coefficients[0] * n[0, b] ** cost.powers[0] * d[0, b]
        assert spent == pytest.approx(budget, rel=1e-10)
    # The cost law itself: the cube's FLOPs per |S| D' are 2 N T_tok (M + 3), linear in N.
    m = cube["molecule"].to_dataset().sel(molecule="N2")
    assert cost.powers == pytest.approx((1.0,), abs=1e-6)
    assert cost.misfit < 1e-6
    want = 2 * float(m["n_spin_orbitals"]) / 2 * (float(m["n_unique_flips"]) + 3)
    assert cost.coefficients == pytest.approx((want,), rel=1e-5)


def test_optimum_agrees_with_allocate(study: StudyData) -> None:
    """Every draw, with an attention-like cost: the same N* and D'* as `python -m replicate allocate`."""
    allocate = pytest.importorskip("replicate.scaling.allocate")
    law = study.fits.get("retnet", "abs_error")
    cost = compute.cost_of(study, "N2", "retnet", "flops_estimated")
    cost = dataclasses.replace(cost, coefficients=(9000.0, 4e5), powers=(1.0, 0.5))
    budgets = np.array([1e12, 1e15, 1e18])
    n, d = compute.optimum(law, cost, budgets)
    p = {name: values[:, None] for name, values in law.stacked().items()}
    kappa = allocate.Kappa(cost.coefficients, cost.powers)
    best = allocate.optimum(p["A1"], p["a1"], p["A2"], p["a2"], budgets[None, :], cost.space, kappa)
    np.testing.assert_allclose(np.log(n), best.log_n, atol=1e-10)
    np.testing.assert_allclose(np.log(d), best.log_d, atol=1e-10)


def test_costs_of_the_fit_file_are_used(folder: Path, tmp_path: Path) -> None:
    record = json.loads((folder / "fit.json").read_text())
    model = {"N2": {"flops_estimated": {"coefficients": [123.0, 4.0, 0.0], "powers": [1.0, 0.5, 0.0]}}}
    for entry in record["allocation"]:
        entry["flop_models"] = model
    (tmp_path / "fit.json").write_text(json.dumps(record))
    loaded = load_study(folder / "cube.nc", tmp_path / "fit.json")
    cost = compute.cost_of(loaded, "N2", "retnet", "flops_estimated")
    assert (cost.coefficients, cost.powers) == ((123.0, 4.0), (1.0, 0.5))
    assert float(cost.d_prime(1e12, np.array(1e4))) == pytest.approx(1e12 / (14400 * (123e4 + 4 * 1e2)))


def test_no_front_where_the_fit_found_no_optimum(products: dict[str, Product]) -> None:
    for name in ("isoflop", "front", "exponent"):
        result = plot(products, name)
        assert {r["ansatz"] for r in result.table.rows} == {"transformer", "retnet"}
        assert result.notes == (
            "made, V-score; made, absolute error: no interior optimum identified (synthetic)",
        )


def test_exponent_is_the_ratio(products: dict[str, Product]) -> None:
    rows = {(r["ansatz"], r["metric"]): r["k"] for r in plot(products, "exponent").table.rows}
    for key, value in rows.items():
        assert isinstance(value, Quantity)
        assert value.value == pytest.approx(LAWS[key]["a1"] / LAWS[key]["a2"])
        assert value.low < value.value < value.high


def test_paired_variant(tmp_path: Path) -> None:
    tree = synthetic_cube(
        options(variants={"base": Variant(), "other": Variant()}, failed=0, invalid=0, missing=0)
    )
    final = tree["final"].to_dataset()
    log_n = np.log(final["n_total"].sel(variant="base"))
    factor = 3.0 * np.exp(
        0.2 * (log_n - log_n.mean(["size"]))
    )  # slope +0.2 in ln N within every molecule and ansatz
    base = final["v_score"].sel(variant="base")
    final["v_score"].loc[{"variant": "other"}] = (base * factor).transpose(*base.dims)
    tree["final"] = xr.DataTree(final)
    found = pair_variant(study_from_tree(tree), "other", "v_score")
    assert found.pairs == base.size
    assert found.ratio.value == pytest.approx(3.0, rel=1e-12)
    assert found.shift_n.value == pytest.approx(-0.2, abs=1e-10)
    assert found.shift_d.value == pytest.approx(0.0, abs=1e-10)
    assert found.ratio.low <= 3.0 <= found.ratio.high


# -- tables --


def test_coefficient_cells_are_the_fit(products: dict[str, Product], folder: Path) -> None:
    record = json.loads((folder / "fit.json").read_text())
    rows = sheet(products, "coefficients").table.rows
    assert len(rows) == len([f for f in record["fits"] if f["law"] == "additive"]) == 8
    row = next(r for r in rows if r["ansatz"] == "RetNet" and r["metric"] == "V-score")
    entry = next(f for f in record["fits"] if f["id"] == "retnet/v_score/all/additive")
    for name in ("A0", "A1", "a1", "A2", "a2"):
        assert row[name] == Quantity(entry["parameters"][name], *entry["intervals"][name])
    assert row["n_runs"] == entry["n_runs"] == len(str(row["point_ids"]).split())


def test_uncertified_fit_is_called_out(cube: xr.DataTree, tmp_path: Path) -> None:
    cube.to_netcdf(tmp_path / "cube.nc", engine="netcdf4")
    write_fit(tmp_path, cube, {("made", "v_score"): LAWS["made", "v_score"]}, stationary=False)
    loaded = load_study(tmp_path / "cube.nc", tmp_path / "fit.json")
    (product,) = build(loaded, [a for a in artefacts() if a.name == "coefficients"])
    assert isinstance(product.result, Sheet)
    assert product.result.table.rows[0]["certificate"] == "NOT stationary"
    assert any("do not use" in note for note in product.result.notes)


def test_fit_of_another_cube_is_called_out(folder: Path, tmp_path: Path) -> None:
    for digest, warned in (
        (hashlib.sha256((folder / "cube.nc").read_bytes()).hexdigest(), False),
        ("0" * 64, True),
    ):
        record = json.loads((folder / "fit.json").read_text()) | {"cube_sha256": digest}
        (tmp_path / "fit.json").write_text(json.dumps(record))
        loaded = load_study(folder / "cube.nc", tmp_path / "fit.json")
        for product in build(loaded, [a for a in artefacts() if a.name in ("coefficients", "verdicts")]):
            assert any("another cube" in note for note in product.missing) == warned


def test_flop_cells(products: dict[str, Product], cube: xr.DataTree) -> None:
    final = cube["final"].to_dataset().sel(variant="base")
    for r in sheet(products, "flops").table.rows:
        kind = str(r["ansatz"]).lower()
        cells = final.sel(molecule=r["molecule"], ansatz=kind)
        done = cells["status"] == 1
        per_step = np.log((cells["flops_estimated"] / cells["steps"]).where(done))
        assert r["estimated"] == pytest.approx(math.exp(float(per_step.mean())), rel=1e-10)
        assert r["ratio"] == pytest.approx(50.0)
        assert r["runs"] == int(done.sum())


def test_runs_table_has_every_run_and_state(products: dict[str, Product], cube: xr.DataTree) -> None:
    status = cube["final"]["status"].values
    rows = sheet(products, "runs").table.rows
    assert len(rows) == int(np.sum(status != 0))
    for word, code in (("done", 1), ("failed", 2), ("invalid", 3)):
        assert sum(r["status"] == word for r in rows) == int(np.sum(status == code)) > 0
    caption = sheet(products, "runs").caption
    assert f"{int(np.sum(status == 0))} missing" in caption


def test_invalid_runs_are_counted_in_captions_and_not_drawn(
    products: dict[str, Product], cube: xr.DataTree
) -> None:
    status = cube["final"]["status"].values
    result = plot(products, "v_score_vs_n")
    assert f"{int(np.sum(status == 3))} invalid" in result.caption
    gone = {r["point_id"] for r in sheet(products, "runs").table.rows if r["status"] != "done"}
    assert gone
    assert not gone & {r["point_id"] for r in result.table.rows}


def test_residuals_and_held_out(products: dict[str, Product], cube: xr.DataTree, folder: Path) -> None:
    record = json.loads((folder / "fit.json").read_text())
    rows = [
        r
        for r in plot(products, "held_out").table.rows
        if r["metric"] == "v_score" and r["ansatz"] == "retnet"
    ]
    final = cube["final"].to_dataset().sel(variant="base", ansatz="retnet", size="l")
    assert len(rows) == int((final["status"] == 1).sum())
    entry = next(f for f in record["fits"] if f["id"] == "retnet/v_score/all/additive")
    p = entry["parameters"]
    for r in rows:
        cell = final.sel(molecule=r["molecule"], steps=r["steps"], seed=r["seed"])
        n, d = float(cell["n_total"]), float(cell["d_prime"])
        want = (p["A0"] + p["A1"] * n ** -p["a1"] + p["A2"] * d ** -p["a2"]) * math.exp(
            entry["intercepts"][r["molecule"]]
        )
        value = r["predicted"]
        assert isinstance(value, Quantity)
        assert value.value == pytest.approx(want, rel=1e-12)
        assert r["covered"] == (value.low <= float(cell["v_score"]) <= value.high)
    sample = plot(products, "residuals_v_score").table.rows[7]
    cell = (
        cube["final"]
        .to_dataset()
        .sel({k: sample[k] for k in ("molecule", "ansatz", "size", "steps", "variant", "seed")})
    )
    assert sample["residual"] == pytest.approx(math.log(float(cell["v_score"]) / float(sample["fitted"])))


def test_cost_shares_sum_to_one(products: dict[str, Product]) -> None:
    rows = plot(products, "cost_shares").table.rows
    totals: dict[tuple[object, object], float] = {}
    for r in rows:
        assert isinstance(r["share"], Quantity)
        totals[r["molecule"], r["ansatz"]] = totals.get((r["molecule"], r["ansatz"]), 0.0) + r["share"].value
    assert len(totals) == 9
    assert all(total == pytest.approx(1.0) for total in totals.values())
    # MADE at leading order: M 2 of rho n + 2 (M + 3); H2O: n = 14, M = 228.
    local = next(
        r["share"] for r in rows if (r["molecule"], r["ansatz"], r["part"]) == ("H2O", "made", "local energy")
    )
    assert isinstance(local, Quantity)
    assert 2 * 228 / (14 + 2 * 231) < local.value < 2 * 228 / (2 * 231)


def test_recorded_parts_are_preferred(cube: xr.DataTree) -> None:
    tree = cube.copy()
    final = cube["final"].to_dataset()
    dims = final["status"].dims
    ones = np.ones(final["status"].shape)
    tree["parts"] = xr.DataTree(
        xr.Dataset(
            {"wall_part_seconds": ((*dims, "wall_part"), np.stack([3 * ones, ones, 4 * ones], axis=-1))},
            coords={"wall_part": ["forward_and_sampling", "gradient", "local_energy"]},
        )
    )
    (product,) = build(study_from_tree(tree), [a for a in artefacts() if a.name == "cost_shares"])
    assert isinstance(product.result, Plot)
    shares = {
        r["part"]: r["share"].value
        for r in product.result.table.rows
        if r["accounting"] == "measured" and r["molecule"] == "H2O" and r["ansatz"] == "made"
    }
    assert shares == pytest.approx({"sampling": 3 / 8, "local energy": 0.5, "gradient": 1 / 8})


# -- the modes of the local energy --

ESTIMATED = ("sampling", "local_energy_modulus", "local_energy_phase", "forward_modulus", "backward_modulus")
RAN = ("sampling", "forward", "local_energy", "backward")


def with_parts(tree: xr.DataTree, seed: int = 0) -> xr.DataTree:
    """The cube with random parts of every step in all three accountings."""
    status = tree["final"]["status"]
    rng = np.random.default_rng(seed)

    def of(axis: str, names: tuple[str, ...]) -> tuple[tuple[object, ...], np.ndarray]:
        return (*status.dims, axis), rng.uniform(0.5, 2.0, (*status.shape, len(names)))

    parts = {
        "flops_estimated_part": of("flop_part", ESTIMATED),
        "flops_executed_part": of("executed_part", RAN),
        "wall_part_seconds": of("wall_part", RAN),
    }
    made = tree.copy()
    coordinates = {str(dim): tree["final"][dim].values for dim in status.dims}
    coordinates |= {"flop_part": list(ESTIMATED), "executed_part": list(RAN), "wall_part": list(RAN)}
    made["parts"] = xr.DataTree(xr.Dataset(parts, coords=coordinates))
    return made


@pytest.fixture(scope="module")
def modes_cube() -> xr.DataTree:
    """Runs in three modes: `base` is `exact`, another variant is, too, and must not be mixed with it."""
    axes: dict[str, object] = {
        "molecules": ("H2O", "N2", "Li2O"),
        "sizes": ("s",),
        "steps": (250,),
        "seeds": 1,
    }
    variants = {"base": Variant(), "small": Variant(batch=0.1), "some": Variant(), "paper": Variant()}
    tree = with_parts(synthetic_cube(options(**(WHOLE | axes), variants=variants)))
    tree.attrs["spec"] = (
        'study = "modes"\n[variants.small]\nsampling.batch_max = 9\n'
        '[variants.some]\nlocal_energy = "sampled"\n[variants.paper]\nlocal_energy = "paper"\n'
    )
    return tree


@pytest.fixture(scope="module")
def mode_products(modes_cube: xr.DataTree) -> dict[str, Product]:
    chosen = [a for a in artefacts() if a.name in ("mode_shares", "modes", "flops", "cost_per_step")]
    return {product.artefact.name: product for product in build(study_from_tree(modes_cube), chosen)}


VARIANT_OF = {"paper": "paper", "exact": "base", "sampled": "some"}


def shares_of(tree: xr.DataTree, variable: str, axis: str, **where: object) -> dict[str, float]:
    """Shares of the parts of one run, by name."""
    values = tree["parts"][variable].sel(where).squeeze()
    return {str(name): float(v) for name, v in zip(values[axis].values, values / values.sum(), strict=True)}


def test_mode_bars_are_the_recorded_shares(
    mode_products: dict[str, Product], modes_cube: xr.DataTree
) -> None:
    panels = plot(mode_products, "mode_shares").figure.axes
    cells = itertools.product(("H2O", "N2", "Li2O"), ("made", "transformer", "retnet"))
    groups = {"backward": "gradient", "forward": "forward pass", "local_energy": "local energy"}
    for axis, (molecule, kind) in zip(panels, cells, strict=True):
        drawn = {str(bar.get_gid()): bar.get_width() for bar in axis.patches}
        for mode, variant in VARIANT_OF.items():
            where = {"molecule": molecule, "ansatz": kind, "variant": variant}
            ran = shares_of(modes_cube, "flops_executed_part", "executed_part", **where)
            clock = shares_of(modes_cube, "wall_part_seconds", "wall_part", **where)
            for how, want in (("executed", ran), ("measured", clock)):
                for part, share in want.items():
                    assert drawn[f"{how}:{mode}:{groups.get(part, part)}"] == pytest.approx(share)
        (largest,) = {gid.split(":")[1] for gid in drawn if gid.startswith("estimated")}  # one bar
        where = {"molecule": molecule, "ansatz": kind, "variant": VARIANT_OF[largest]}
        want = shares_of(modes_cube, "flops_estimated_part", "flop_part", **where)
        local = want["local_energy_modulus"] + want["local_energy_phase"]
        assert drawn[f"estimated:{largest}:local energy"] == pytest.approx(local)


def test_mode_table_is_the_cube(mode_products: dict[str, Product], modes_cube: xr.DataTree) -> None:
    """Seconds per step are those of the steps' parts, not of the whole training."""
    rows = sheet(mode_products, "modes").table.rows
    assert len(rows) == 27
    labels = {"MADE": "made", "Transformer": "transformer", "RetNet": "retnet"}
    final = modes_cube["final"].to_dataset()
    for r in rows:
        where = {"molecule": r["molecule"], "ansatz": labels[str(r["ansatz"])]}
        where["variant"] = VARIANT_OF[str(r["mode"])]
        cell = final.sel(where).squeeze()
        seconds = float(modes_cube["parts"]["wall_part_seconds"].sel(where).sum()) / 250
        assert r["seconds"] == pytest.approx(seconds)
        assert r["seconds"] != pytest.approx(float(cell["wall_seconds"]) / 250)
        assert r["executed"] == pytest.approx(float(cell["flops_executed"]) / 250)
        assert r["rate"] == pytest.approx(float(cell["flops_executed"]) / 250 / seconds)
        assert r["ratio"] == pytest.approx(float(cell["flops_estimated"] / cell["flops_executed"]))
        assert r["unique"] == pytest.approx(float(cell["n_unique_mean"]))
        ran = shares_of(modes_cube, "flops_executed_part", "executed_part", **where)
        assert r["local_energy_executed"] == pytest.approx(ran["local_energy"])
        assert r["gradient_executed"] == pytest.approx(ran["forward"] + ran["backward"])
        for how in ("estimated", "executed", "measured"):
            total = sum(float(str(r[f"{name}_{how}"])) for name in ("local_energy", "sampling", "gradient"))
            assert total == pytest.approx(1.0)
        assert str(r["local energy"]).split(" / ")[1] == number(100 * ran["local_energy"])


def test_seconds_per_step_are_those_of_the_steps(
    mode_products: dict[str, Product],
    products: dict[str, Product],
    cube: xr.DataTree,
    modes_cube: xr.DataTree,
) -> None:
    """Where the parts are recorded; else the whole training stands in."""
    rows = plot(mode_products, "cost_per_step").table.rows
    parts = modes_cube["parts"]["wall_part_seconds"].sum("wall_part")
    for r in rows:
        cell = parts.sel(molecule=r["molecule"], ansatz=r["ansatz"], variant="base").squeeze()
        assert r["seconds_per_step"] == pytest.approx(float(cell) / 250)
    assert sheet(mode_products, "flops").table.rows[0]["seconds"] == pytest.approx(
        rows[0]["seconds_per_step"]
    )
    for r in plot(products, "cost_per_step").table.rows[:20]:
        labels = {dim: r[dim] for dim in ("molecule", "ansatz", "size", "steps", "seed")}
        whole = cube["final"]["wall_seconds"].sel(labels | {"variant": "base"})
        assert r["seconds_per_step"] == pytest.approx(float(whole) / int(str(r["steps"])))


def test_one_mode_has_nothing_to_compare(products: dict[str, Product], modes_cube: xr.DataTree) -> None:
    for name in ("mode_shares", "modes"):
        assert products[name].result is None
        assert "no molecule ran in two modes" in products[name].reason
    bare = modes_cube.copy()
    del bare["parts"]
    (product,) = build(study_from_tree(bare), [a for a in artefacts() if a.name == "modes"])
    assert product.reason == "executed shares: the cube stores no parts of a step"


def test_times_are_short() -> None:
    assert [short_seconds(s) for s in (0.00191, 0.0996, 0.24, 12.0)] == ["1.9 ms", "100 ms", "0.24 s", "12 s"]


# -- every number leads to point ids --


def test_csv_rows_lead_to_point_ids(
    products: dict[str, Product], mode_products: dict[str, Product], study: StudyData, modes_cube: xr.DataTree
) -> None:
    known = set(study.points.ids) | set(study_from_tree(modes_cube).points.ids)
    for name, product in [*products.items(), *mode_products.items()]:
        if product.result is None:
            continue
        text = csv_text(product.result.table)
        rows = list(csv.DictReader(text.splitlines()))
        assert rows, name
        key = "point_id" if "point_id" in rows[0] else "point_ids"
        for row in rows:
            ids = row[key].split()
            assert ids or row.get("verdict") == "not yet measured", f"{name}: {row}"
            assert set(ids) <= known


def test_csv_is_full_precision(products: dict[str, Product], cube: xr.DataTree) -> None:
    rows = list(csv.DictReader(csv_text(sheet(products, "runs").table).splitlines()))
    row = next(r for r in rows if r["status"] == "done")
    cell = (
        cube["final"]
        .to_dataset()
        .sel(molecule=row["molecule"], ansatz=row["ansatz"], size=row["size"], steps=int(row["steps"]))
        .sel(variant=row["variant"], seed=int(row["seed"]))
    )
    assert float(row["energy"]) == float(cell["energy"])
    assert float(row["v_score"]) == float(cell["v_score"])


# -- how it looks --


def test_text_is_at_least_seven_points_and_nothing_overlaps(
    products: dict[str, Product], mode_products: dict[str, Product]
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    for name, product in [*products.items(), *mode_products.items()]:
        if not isinstance(product.result, Plot):
            continue
        figure = product.result.figure
        with style.house_style():
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            renderer = canvas.get_renderer()
        assert figure.get_figwidth() <= style.DOUBLE
        for text in figure.findobj(Text):
            if text.get_visible() and text.get_text().strip():
                assert text.get_fontsize() >= 7, f"{name}: {text.get_text()!r}"
        for axis in figure.axes:
            # a legend stands in a panel only where that panel holds no data
            assert axis.get_legend() is None or not (axis.axison or axis.get_lines()), name
            for side in (axis.xaxis, axis.yaxis):
                boxes = [
                    label.get_window_extent(renderer)
                    for label in side.get_ticklabels()
                    if label.get_visible() and label.get_text()
                ]
                low, high = sorted(axis.transAxes.transform([(0, 0), (1, 1)])[:, int(side is axis.yaxis)])
                centre = "y" if side is axis.yaxis else "x"
                boxes = [
                    b
                    for b in boxes
                    if low - 1 <= (b.y0 + b.y1 if centre == "y" else b.x0 + b.x1) / 2 <= high + 1
                ]
                for one, two in itertools.pairwise(boxes):
                    assert not one.overlaps(two), f"{name}: tick labels overlap"
        for legend in figure.legends:
            box = legend.get_window_extent(renderer)
            assert box.x0 >= -2, f"{name}: legend cut off"
            assert box.x1 <= figure.bbox.x1 + 2, f"{name}: legend cut off"
            for axis in figure.axes:
                assert not box.overlaps(axis.get_tightbbox(renderer)), f"{name}: the legend covers a panel"


def test_every_axis_has_a_unit_and_readable_ticks(
    products: dict[str, Product], mode_products: dict[str, Product]
) -> None:
    for name, product in [*products.items(), *mode_products.items()]:
        if not isinstance(product.result, Plot):
            continue
        figure = product.result.figure
        shared = [text.get_text() for text in (figure._supxlabel, figure._supylabel) if text is not None]
        labels = [label for axis in figure.axes for label in (axis.get_xlabel(), axis.get_ylabel())]
        for label in [*shared, *labels]:
            if label:
                assert re.search(r"\(.+\)|^molecule$|same unit", label), f"{name}: {label!r} has no unit"
        for axis in figure.axes:
            if axis.get_xscale() == "log":
                low, high = axis.get_xlim()
                assert sum(low <= tick <= high for tick in axis.get_xticks()) >= 1, name


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, two: str) -> float:
    high, low = sorted((_luminance(one), _luminance(two)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_in_light_and_dark() -> None:
    template = (Path(cli.__file__).parent / "templates" / "report.html.j2").read_text(encoding="utf-8")
    light, dark = re.findall(r":root \{[^}]*--ground[^}]*\}", template)
    for block in (light, dark):
        colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block)) or {}
        for ground in ("ground", "card", "tint"):
            for ink in ("ink", "soft", "accent", "good", "bad", "open"):
                assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground, block)
        for name in ("blue", "vermillion", "green"):
            assert contrast(colours[name], colours["card"]) >= 3.0, (name, block)
    for kind in ("made", "transformer", "retnet"):
        assert contrast(style.ansatz_style(kind).color, "#ffffff") >= 3.0, kind


def test_ansatz_styles_differ_in_colour_marker_and_line() -> None:
    kinds = ["made", "transformer", "retnet", "mine", "yours"]
    looks = [style.ansatz_style(kind, kinds) for kind in kinds]
    for attribute in ("color", "marker", "line"):
        assert len({str(getattr(look, attribute)) for look in looks}) == len(kinds)


# -- the report --


class Page(HTMLParser):
    """Collects what the checks need: tags with attributes in order, ids, text by tag."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.errors: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "link", "br", "img", "path", "use", "rect", "line", "hr", "input"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()
        elif tag in self.open:
            self.errors.append(f"</{tag}> closes {self.open[-1]}")
            while self.open.pop() != tag:
                pass

    def of(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


@pytest.fixture(scope="module")
def html(study: StudyData, products: dict[str, Product]) -> str:
    return report_html(study, list(products.values()))


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    parsed = Page()
    parsed.feed(html)
    return parsed


def test_report_makes_no_request(html: str, page: Page) -> None:
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "img", "image", "base"}, tag
        for name, value in attributes.items():
            if name in {"src", "srcset", "href", "xlink:href", "action", "data", "poster", "background"}:
                assert value is not None
                assert value.startswith("#"), f"{tag} {name}={value}"
            assert not name.startswith("on"), f"{tag} {name}"
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(\s*['\"]?([^)'\"]+)", html))
    assert "http" not in re.sub(r"<pre.*?</pre>|<dd>.*?</dd>", "", html, flags=re.DOTALL)


def test_report_landmarks_headings_and_links(page: Page) -> None:
    assert page.errors == []
    for landmark in ("header", "nav", "main", "footer", "h1", "title"):
        # every inlined figure has a <title> of its own
        assert len(page.of(landmark)) == 1 or landmark == "title"
    assert page.of("html")[0]["lang"] == "en"
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    targets = set(ids)
    for _, attributes in page.tags:
        for name in ("href", "xlink:href"):
            if name in attributes:
                assert str(attributes[name])[1:] in targets, attributes[name]
        for name in ("aria-labelledby", "aria-describedby"):
            if name in attributes:
                assert set(str(attributes[name]).split()) <= targets
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    assert page.of("a")[0] == {"class": "skip", "href": "#content"}


def test_report_figures_and_tables_are_accessible(page: Page, products: dict[str, Product]) -> None:
    drawn = [p for p in products.values() if isinstance(p.result, Plot)]
    svgs = page.of("svg")
    assert len(svgs) == len(drawn) == len(page.of("figure")) == len(page.of("figcaption"))
    for svg in svgs:
        assert svg["role"] == "img"
        assert svg["aria-labelledby"]
    for svg in svgs:  # 7 pt text never shrinks below 9 px: a narrow screen scrolls (the parser lowers names)
        least = re.search(r"min-width: (\d+)px", str(svg["style"]))
        assert least is not None
        assert int(least[1]) >= 9 / 7 * float(str(svg["viewbox"]).split()[2])
    drawings = [a for a in page.of("div") if a.get("class") == "drawing"]
    assert len(drawings) == len(svgs)
    assert all(a["tabindex"] == "0" and a["role"] == "region" and a["aria-labelledby"] for a in drawings)
    tables = [p for p in products.values() if isinstance(p.result, Sheet)]
    assert len(page.of("table")) == len(page.of("caption")) == len(tables)
    assert all(attributes.get("scope") in ("col", "row") for attributes in page.of("th"))
    focusable = [a for a in page.of("div") if "scroll" in str(a.get("class"))]
    assert len(focusable) == len(tables)
    assert all(a["tabindex"] == "0" and a["role"] == "region" for a in focusable)


def test_report_themes_its_figures(html: str) -> None:
    assert "prefers-color-scheme: dark" in html
    figures_only = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    assert "currentColor" in figures_only
    for fixed in (style.INK, style.SOFT, style.GRID, style.PAPER, "#000000", "#ffffff"):
        assert fixed not in figures_only, fixed


def test_report_names_commits_and_dirt(cube: xr.DataTree) -> None:
    origins = [{"points": 3, "code": {"commit": "abc123", "dirty": True}}, {"code": {"commit": "def456"}}]
    tree = cube.copy()
    tree.attrs = {**cube.attrs, "provenance": json.dumps({"origins": origins})}
    text = report_html(study_from_tree(tree), [])
    assert "abc123, def456 (with uncommitted changes)" in text
    assert "<dt>origins 1 points</dt><dd>3</dd>" in text


def test_needs_are_true() -> None:
    """What needs only the fit is missing without one; what needs no fit is drawn, or lacks something else."""
    for product in build(study_from_tree(synthetic_cube(options(molecules=("H2O",), ansatze=("made",))))):
        needs = product.artefact.needs
        if needs == ("fit",):
            assert product.reason.startswith("no fit was given"), product.artefact.name
        if "fit" not in needs:
            assert "no fit" not in product.reason, product.artefact.name


def test_report_escapes_what_it_shows(cube: xr.DataTree) -> None:
    tree = cube.copy()
    tree.attrs = {**cube.attrs, "title": "<script>alert(1)</script>", "study": "a<b"}
    bare = study_from_tree(tree)
    text = report_html(bare, build(bare, [a for a in artefacts() if a.name == "molecules"]))
    assert "<script>" not in text
    assert "&lt;script&gt;" in text


def test_report_lists_what_is_missing(cube: xr.DataTree) -> None:
    bare = study_from_tree(cube)
    text = report_html(bare, build(bare, [a for a in artefacts() if a.name in ("coefficients", "molecules")]))
    assert "What is missing from this page" in text
    assert "no fit was given" in text


# -- the command --


SMALL: dict[str, object] = {"molecules": ("H2O", "N2"), "sizes": ("xs", "s", "m"), "steps": (250, 1000)}


def small(folder: Path, **changes: object) -> Path:
    tree = synthetic_cube(options(**(SMALL | changes)))
    folder.mkdir(parents=True, exist_ok=True)
    tree.to_netcdf(folder / "cube.nc", engine="netcdf4")
    return folder / "cube.nc"


def test_second_run_writes_the_same_bytes(
    products: dict[str, Product], html: str, folder: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    write(list(products.values()), one, ("svg",))
    (one / "report.html").write_text(html, encoding="utf-8", newline="\n")
    # A process of its own: other hash seeds and another clock must not show.
    environment = os.environ | {"PYTHONHASHSEED": "1", "SOURCE_DATE_EPOCH": "1000000000"}
    command = [sys.executable, "-m", "figures", str(folder / "cube.nc"), "-o", str(two), "--format", "svg"]
    root = Path(cli.__file__).parent.parent
    subprocess.run(command, check=True, cwd=root, env=environment, capture_output=True)
    for out in (one, two):
        names = ["--only", "exponent,cost_shares", "--format", "pdf,png"]
        assert cli.main([str(folder / "cube.nc"), "-o", str(out), *names]) == 0
    first, second = ({p.name: p.read_bytes() for p in sorted(out.iterdir())} for out in (one, two))
    assert first.keys() == second.keys()
    assert {"report.html", "verdicts.md", "v_score_vs_n.svg", "exponent.pdf", "exponent.png"} <= first.keys()
    assert [name for name in first if first[name] != second[name]] == []


@pytest.mark.parametrize(
    "changes",
    [
        {"molecules": ("H2O",)},
        {"seeds": 1},
        {"ansatze": ("made",)},
        {
            "molecules": ("H2O",),
            "seeds": 1,
            "sizes": ("s",),
            "steps": (250,),
            "failed": 0,
            "invalid": 0,
            "missing": 0,
        },
        {"failed": 0.5, "invalid": 0.2, "missing": 0.2},
    ],
    ids=["one molecule", "one seed", "one ansatz", "one run each", "mostly damaged"],
)
def test_degraded_cubes_are_drawn_as_far_as_possible(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object]
) -> None:
    path = small(tmp_path, **changes)
    names = "v_score_vs_n,abs_error_vs_d_prime,training_curves,flops,molecules,runs,"
    names += "verdicts,coefficients,energy_levels"
    assert cli.main([str(path), "-o", str(tmp_path / "out"), "--format", "svg", "--only", names]) == 0
    out = capsys.readouterr().out
    assert "missing: coefficients: no fit was given" in out
    for name in names.split(",")[:6]:
        assert (tmp_path / "out" / f"{name}.csv").stat().st_size > 50, name


def test_cube_without_a_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = small(tmp_path, failed=1.0, invalid=0.0, missing=0.0)
    assert cli.main([str(path), "-o", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "the cube holds no finished, valid run" in out
    assert (tmp_path / "out" / "runs.csv").is_file()
    assert not (tmp_path / "out" / "v_score_vs_n.svg").exists()
    assert "no finished, valid run" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_fit_without_its_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = small(tmp_path)
    write_fit(
        tmp_path,
        synthetic_cube(options(molecules=("H2O", "N2"), sizes=("xs", "s", "m"), steps=(250, 1000))),
        LAWS,
    )
    (tmp_path / "fit.nc").unlink()
    names = "v_score_vs_n,coefficients,elasticities,exponent,residuals_v_score"
    assert cli.main([str(path), "-o", str(tmp_path / "out"), "--format", "svg", "--only", names]) == 0
    out = capsys.readouterr().out
    assert "missing: residuals_v_score: the fit's draws file" in out
    rows = list(csv.DictReader((tmp_path / "out" / "exponent.csv").read_text().splitlines()))
    assert rows
    assert all(row["k"] for row in rows)
    assert not any(row.get("k_low") for row in rows)


def test_stale_outputs_are_removed(tmp_path: Path) -> None:
    path = small(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "coefficients.csv").write_text("old")
    assert cli.main([str(path), "-o", str(out), "--only", "coefficients"]) == 0
    assert not (out / "coefficients.csv").exists()


def damaged(tmp_path: Path, how: str) -> list[str]:
    path = small(tmp_path)
    if how == "missing":
        return [str(tmp_path / "nothing.nc")]
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    elif how == "text":
        path.write_text("not a cube")
    elif how == "no groups":
        path.unlink()
        xr.Dataset({"a": 1}).to_netcdf(path)
    elif how == "other schema":
        tree = synthetic_cube(options(molecules=("H2O",)))
        tree.attrs["schema"] = 99
        path.unlink()
        tree.to_netcdf(path, engine="netcdf4")
    elif how == "no variable":
        tree = synthetic_cube(options(molecules=("H2O",)))
        tree["final"] = xr.DataTree(tree["final"].to_dataset().drop_vars("d_prime"))
        path.unlink()
        tree.to_netcdf(path, engine="netcdf4")
    elif how == "bad fit":
        (tmp_path / "fit.json").write_text('{"fits": [{}]}')
    elif how == "fit of a table":
        (tmp_path / "fit.json").write_text('{"parameters": {}}')
    elif how == "no such fit":
        return [str(path), "--fit", str(tmp_path / "other.json")]
    elif how == "unknown figure":
        return [str(path), "--only", "v_score_vs_m"]
    elif how == "unknown format":
        return [str(path), "--format", "svg,jpeg"]
    return [str(path)]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("missing", "no such file"),
        ("truncated", "not a readable NetCDF cube"),
        ("text", "not a readable NetCDF cube"),
        ("no groups", "not a replicate cube"),
        ("other schema", "cube of schema 99"),
        ("no variable", "/final lacks d_prime"),
        ("bad fit", "not a fit of a cube"),
        ("fit of a table", "not a fit of a cube"),
        ("no such fit", "no such file"),
        ("unknown figure", 'did you mean "v_score_vs_n"?'),
        ("unknown format", "jpeg: choose from"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str, words: str
) -> None:
    arguments = damaged(tmp_path, how)
    assert cli.main([*arguments, "-o", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1
    assert words in captured.err
    assert not (tmp_path / "out").exists()


def test_unwritable_output_is_exit_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = small(tmp_path)
    (tmp_path / "out").write_text("a file where the folder should be")
    assert cli.main([str(path), "-o", str(tmp_path / "out"), "--only", "molecules"]) == 1
    assert "cannot write" in capsys.readouterr().err


# -- the README --


def test_readme_sections(tmp_path: Path) -> None:
    path = small(tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text(
        "before\n<!-- figures:numbers -->\nold 123\n<!-- /figures:numbers -->\nbetween\n"
        "<!-- figures:first-figure --><!-- /figures:first-figure -->\nafter\n"
    )
    arguments = [str(path), "-o", str(tmp_path / "figures"), "--format", "svg", "--readme", str(readme)]
    assert cli.main([*arguments, "--only", "v_score_vs_n"]) == 0
    text = readme.read_text()
    assert "old 123" not in text
    assert "2 molecules (H2O, N2), 3 ansatze (MADE, Transformer, RetNet)" in text
    assert "](figures/v_score_vs_n.svg)" in text
    assert text.startswith("before\n")
    assert "\nbetween\n" in text
    assert text.endswith("after\n")
    assert cli.main([*arguments, "--only", "v_score_vs_n"]) == 0
    assert readme.read_text() == text
    # a section that --only leaves out keeps its text
    kept = text + "<!-- figures:verdicts -->\nkept\n<!-- /figures:verdicts -->\n"
    readme.write_text(kept)
    assert cli.main([*arguments, "--only", "molecules"]) == 0
    assert readme.read_text() == kept


@pytest.mark.parametrize(
    "body", ["<!-- figures:nonsense -->\n<!-- /figures:nonsense -->", "<!-- figures:numbers -->"]
)
def test_bad_readme_markers(tmp_path: Path, capsys: pytest.CaptureFixture[str], body: str) -> None:
    path = small(tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text(body)
    assert (
        cli.main([str(path), "-o", str(tmp_path / "o"), "--only", "molecules", "--readme", str(readme)]) == 2
    )
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert readme.read_text() == body


# -- numbers --


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0.0, 3, "0"),
        (1234.5, 3, "1230"),
        (0.0123456, 3, "0.0123"),
        (0.99999, 3, "1.00"),
        (1.5e-7, 2, "1.5e−7"),
        (-2.5, 3, "−2.50"),
        (math.inf, 3, "∞"),
        (math.nan, 3, "–"),
        (-75.01553019, 9, "−75.0155302"),
    ],
)
def test_numbers(value: float, digits: int, text: str) -> None:
    assert number(value, digits) == text


def test_quantities_print_their_interval() -> None:
    assert str(Quantity(0.4, 0.35, 0.45)) == "0.400 [0.350, 0.450]"
    assert str(Quantity(0.0, 0.0, math.inf)) == "0 [0, ∞]"
    assert str(Quantity(2.0)) == "2.00"
    assert str(Quantity(math.nan)) == "–"


def test_legend_entries_read_row_by_row() -> None:
    """matplotlib splits the entries into columns, the first ones longer: read across, they are in order."""
    for count, columns in ((7, 5), (4, 2), (5, 3), (3, 3), (1, 1)):
        filled = np.array_split(np.array(style.row_by_row(count, columns)), columns)
        rows = [[int(c[r]) for c in filled if r < len(c)] for r in range(len(filled[0]))]
        assert [i for row in rows for i in row] == list(range(count))


def test_log_ticks_are_inside_and_round() -> None:
    assert style.log_ticks(0.6, 3.2, 6) == pytest.approx([0.7, 1.0, 1.5, 2.0, 3.0])
    assert style.log_ticks(1e-4, 10.0, 3) == pytest.approx([1e-3, 1e-1, 10.0])
    assert style.log_ticks(90.0, 1100.0, 6) == pytest.approx([100.0, 1000.0])


def test_notes_of_one_reason_are_gathered() -> None:
    assert gathered(["a, x: too few", "b: none", "a, y: too few"]) == ["a, x; a, y: too few", "b: none"]


def test_truth_is_what_the_cube_was_made_with() -> None:
    assert Truth()(1.0, 1.0) == pytest.approx(1e-6 + 2e-3 + 6e-4)


def test_unreadable_study_raises_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load_study(tmp_path / "cube.nc")


# -- the committed results --

ARTIFACTS = Path(cli.__file__).parent.parent / "artifacts"
LAPTOP, CPU, COST = ARTIFACTS / "laptop", ARTIFACTS / "cpu", ARTIFACTS / "cost"


@pytest.fixture(scope="module")
def laptop() -> StudyData:
    return load_study(LAPTOP / "cube.nc", LAPTOP / "fit.json")


@pytest.fixture(scope="module")
def cpu() -> StudyData:
    return load_study(CPU / "cube.nc", CPU / "fit.json")


@pytest.fixture(scope="module")
def cost() -> StudyData:
    return load_study(COST / "cube.nc")


def assert_in_step(readme: Path, study: StudyData, names: Iterable[str], link: str) -> None:
    """Writing the marked sections of `readme` again would change nothing."""
    check(readme)
    text = readme.read_text(encoding="utf-8")
    with style.house_style():
        products = [Product(a, a.build(study)) for a in artefacts() if a.name in names]
    found = sections(study, products, link)
    marked = re.findall(r"<!-- figures:([\w-]+) -->", text)
    assert set(marked) <= found.keys()
    for name in marked:
        assert f"<!-- figures:{name} -->\n{found[name].rstrip()}\n<!-- /figures:{name} -->" in text, name


def test_readmes_are_in_step_with_the_committed_results(cpu: StudyData, cost: StudyData) -> None:
    """Each README's own `python -m figures ... --readme` would change nothing."""
    names = ("v_score_vs_n", "verdicts", "coefficients", "flops")
    assert_in_step(ARTIFACTS.parent / "README.md", cpu, names, "artifacts/cpu/figures")
    assert_in_step(CPU / "README.md", cpu, ("accuracy", "verdicts", "variant_effects"), "figures")
    assert_in_step(COST / "README.md", cost, ("modes", "flops"), "figures")
    pilot, gpu = (load_study(ARTIFACTS / name / "cube.nc") for name in ("pilot", "gpu"))
    assert_in_step(ARTIFACTS / "pilot" / "README.md", pilot, ("learning_rate_choice", "plateaus"), "figures")
    assert_in_step(ARTIFACTS / "gpu" / "README.md", gpu, ("accuracy",), "figures")


def test_readme_lists_what_is_not_measured_apart(laptop: StudyData) -> None:
    item = next(a for a in artefacts() if a.name == "verdicts")
    sheet = item.build(laptop)
    text = sections(laptop, [Product(item, sheet)], "figures")["verdicts"]
    table, _, rest = text.partition("<details>")
    open_statements = re.findall(r"^- (.+)$", rest, re.MULTILINE)
    rows = sheet.table.rows
    assert open_statements == [row["statement"] for row in rows if row["verdict"] == NOT_MEASURED]
    assert open_statements
    assert table.count("\n| ") == len(rows) - len(open_statements)
    assert f"| {NOT_MEASURED} |" not in table


def assert_committed(item: Artefact, study: StudyData, path: Path) -> None:
    """The committed CSV holds what the present code computes, up to the last bits of a logarithm."""
    try:
        with style.house_style():
            table = item.build(study).table
    except MissingData:
        assert not path.exists(), item.name
        return
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == table.csv_header(), item.name
    assert len(rows) == len(table.rows), item.name
    for got, want in zip(rows, table.csv_rows(), strict=True):
        for column, a, b in zip(header, got, want, strict=True):
            assert a == b or float(a) == pytest.approx(float(b), rel=1e-9), (item.name, column)


def test_committed_figures_are_in_step_with_the_committed_results(
    laptop: StudyData, cpu: StudyData, cost: StudyData
) -> None:
    for item in artefacts():
        assert_committed(item, laptop, LAPTOP / "figures" / f"{item.name}.csv")
        assert_committed(item, cpu, CPU / "figures" / f"{item.name}.csv")
        if item.name in ("mode_shares", "modes", "flops"):
            assert_committed(item, cost, COST / "figures" / f"{item.name}.csv")


def test_committed_cpu_study_is_what_was_promised(cpu: StudyData) -> None:
    """At least 95 % valid; each ansatz chemically accurate in one size up to 3 136 determinants, one on N2;
    all from committed code."""
    counts = cpu.counts()
    assert counts["missing"] == 0
    assert counts["done"] >= 0.95 * sum(counts.values())
    origins = cpu.provenance["origins"]
    assert all(origin["code"]["dirty"] is False for origin in origins)
    rows = accuracy(cpu).table.rows
    small = {name for name, facts in cpu.molecules.items() if facts["search_space"] <= 3136}
    assert len(small) >= 6
    reached = {(r["molecule"], r["ansatz"]) for r in rows if r["error"] <= 1.6}
    assert set(itertools.product(small, ("made", "transformer", "retnet"))) <= reached
    assert any(molecule == "N2" for molecule, _ in reached)


def test_committed_costs_are_of_every_mode_and_molecule(cost: StudyData) -> None:
    """What issue and README promise of artifacts/cost: three modes of three molecules, seven in `exact`."""
    assert cost.counts() == {"done": 39, "failed": 0, "invalid": 0, "missing": 0}
    cells = {(c.molecule, c.ansatz, c.mode) for c in mode_cells(cost)}
    kinds, modes = ("made", "transformer", "retnet"), ("paper", "exact", "sampled")
    assert cells == set(itertools.product(("H2O", "N2", "Li2O"), kinds, modes))
    seven = ("H2O", "N2", "O2", "H2S", "PH3", "LiCl", "Li2O")
    assert {key for key, _ in cost.headline.groups("molecule", "ansatz")} == set(
        itertools.product(seven, kinds)
    )
    (origin,) = cost.provenance["origins"]
    assert origin["code"]["dirty"] is False
    there = {path.name for path in (COST / "figures").iterdir()}
    endings = {"mode_shares": ("csv", "pdf", "svg"), "modes": ("csv", "md"), "flops": ("csv", "md")}
    assert there == {f"{name}.{ending}" for name, ends in endings.items() for ending in ends}


@pytest.mark.parametrize("folder", [LAPTOP, CPU])
def test_committed_figures_are_whole(folder: Path) -> None:
    """A figure has its PDF, SVG and CSV; a table its Markdown and CSV; the report names this cube and fit."""
    there = {path.name for path in (folder / "figures").iterdir()}
    wanted = {"report.html"}
    for item in artefacts():
        if f"{item.name}.csv" in there:
            endings = ("csv", "pdf", "svg") if item.kind == "figure" else ("csv", "md")
            wanted |= {f"{item.name}.{ending}" for ending in endings}
    assert there == wanted
    report = (folder / "figures" / "report.html").read_text(encoding="utf-8")
    for digest in load_study(folder / "cube.nc", folder / "fit.json").sources.values():
        assert digest in report
