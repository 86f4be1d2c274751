from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from synthetic_cube import CROSSED, CubeOptions, Truth, Variant, synthetic_cube

from replicate.scaling import study, validate
from replicate.scaling.commands import to_json
from replicate.scaling.law import LAWS
from replicate.scaling.report import render
from replicate.scaling.select import CANDIDATES
from replicate.scaling.study import Options, fit_rows
from replicate.scaling.table import rows_of
from replicate.spec import UserError, VScoreSpec

CLEAR = Truth(A0=0.0, A1=4e-3, a1=0.5, A2=8e-4, a2=0.55)
TRUTHS = {
    ("transformer", "v_score"): CLEAR,
    ("transformer", "abs_error"): Truth(A0=0.0, A1=4e-2, a1=0.45, A2=8e-3, a2=0.5),
    ("made", "v_score"): Truth(A0=0.0, A1=0.0, A2=2e-3, a2=0.5),
    ("made", "abs_error"): Truth(A0=0.0, A1=0.0, A2=2e-2, a2=0.5),
}
HOLD_OUTS = '[holdout]\nsizes = ["xxl"]\nmolecules = ["H2S"]\nreason = "test"'
SMALL = CubeOptions(
    molecules=("H2O", "N2", "O2", "H2S"), ansatze=("transformer", "made"), steps=(250, 1000, 4000),
    truths=TRUTHS,
    failed=0.03, invalid=0.03, missing=0.03, sigma=0.15, molecule_spread=0.2, hold_outs=HOLD_OUTS, records=6,
)  # fmt: skip
QUICK = Options(bootstrap=60, test_replicates=19, selection=False)


def _fit(options: CubeOptions, how: Options = QUICK, **read: Any) -> tuple[dict[str, Any], xr.DataTree]:
    rows, truth = rows_of(synthetic_cube(options), **read)
    return fit_rows(rows, truth, how)


@pytest.fixture(scope="module")
def fitted() -> tuple[dict[str, Any], xr.DataTree]:
    return _fit(SMALL, replace(QUICK, selection=True, bootstrap=200))


def _head(result: dict[str, Any], ansatz: str, metric: str = "v_score") -> dict[str, Any]:
    return next(f for f in result["fits"] if f["headline"] and (f["ansatz"], f["metric"]) == (ansatz, metric))


def test_every_ansatz_and_metric_jointly_and_by_molecule(fitted: tuple[dict[str, Any], xr.DataTree]) -> None:
    result, _ = fitted
    done = {(f["ansatz"], f["metric"], f["scope"], f["law"]) for f in result["fits"]}
    for ansatz in ("transformer", "made"):
        for metric in ("v_score", "abs_error"):
            for scope in ("all", "H2O", "N2", "O2"):
                assert (ansatz, metric, scope, "additive") in done
            assert (ansatz, metric, "all", "steps_fraction") in done
    assert all(f["certificate"]["stationary"] for f in result["fits"])


def test_the_truth_is_recovered(fitted: tuple[dict[str, Any], xr.DataTree]) -> None:
    head = _head(fitted[0], "transformer")
    for name in ("a1", "a2"):
        low, high = head["intervals"][name]
        assert low - 0.05 < getattr(CLEAR, name) < high + 0.05
        assert head["parameters"][name] == pytest.approx(getattr(CLEAR, name), abs=0.15)
    assert sum(head["intercepts"].values()) == pytest.approx(0, abs=1e-12)
    assert head["tests"]["size_matters"]["p_value"] == pytest.approx(1 / 20)


def test_made_has_no_interior_optimum_and_the_transformer_has(
    fitted: tuple[dict[str, Any], xr.DataTree],
) -> None:
    blocks = {(b["ansatz"], b["metric"]): b for b in fitted[0]["allocation"]}
    assert blocks["made", "v_score"]["status"] == "no interior optimum identified"
    assert blocks["made", "v_score"]["exponent_N"] is None
    good = blocks["transformer", "v_score"]
    assert good["status"] == "ok"
    low, high = good["interval_N"]
    assert low < CLEAR.a2 / (CLEAR.a1 + CLEAR.a2) < high


def test_counts_and_reasons_of_exclusion(fitted: tuple[dict[str, Any], xr.DataTree]) -> None:
    cube = synthetic_cube(SMALL)
    status = cube["final"]["status"].values
    table = fitted[0]["table"]
    for code, word in enumerate(("missing", "done", "failed", "invalid")):
        assert sum(c[word] for c in table["by_ansatz"].values()) == int((status == code).sum())
    excluded = table["excluded"]["v_score"]
    assert excluded["failed"] == int((status == 2).sum())
    assert excluded["invalid"] == int((status == 3).sum())
    assert table["used"]["v_score"] + sum(excluded.values()) == status.size


def test_the_result_is_json_without_nan_and_full_precision(
    fitted: tuple[dict[str, Any], xr.DataTree],
) -> None:
    result, _ = fitted
    again = json.loads(to_json(result))
    assert again == result


def test_draws_and_estimates_in_the_tree_agree_with_the_json(
    fitted: tuple[dict[str, Any], xr.DataTree],
) -> None:
    result, tree = fitted
    for fit in result["fits"]:
        group = tree[fit["id"]].to_dataset()
        names = group["parameter"].values.tolist()
        estimate = dict(zip(names, group["estimate"].values, strict=True))
        for k, v in fit["parameters"].items():
            assert math.isnan(estimate[k]) if v is None else estimate[k] == v
        law = LAWS[fit["law"]]
        variables = {v: group[fit["variables"][v]["column"]].values for v in law.variables}
        shift = np.array([fit["intercepts"].get(m, 0.0) for m in group["molecule"].values])
        again = law(
            {k: np.nan if v is None else v for k, v in fit["parameters"].items()}, variables
        ) * np.exp(shift)
        assert again == pytest.approx(group["fitted"].values, rel=1e-8)
        assert np.log(group["observed"].values / group["fitted"].values) == pytest.approx(
            group["residual"].values
        )
        assert all("units" in group[v].attrs and "long_name" in group[v].attrs for v in group.data_vars)


def test_the_tree_survives_a_file(fitted: tuple[dict[str, Any], xr.DataTree], tmp_path: Path) -> None:
    from replicate.scaling.commands import write_tree

    write_tree(tmp_path / "fit.nc", fitted[1])
    with xr.open_datatree(tmp_path / "fit.nc", engine="netcdf4") as again:
        for fit in fitted[0]["fits"]:
            read, made = again[fit["id"]].to_dataset().load(), fitted[1][fit["id"]].to_dataset()
            xr.testing.assert_identical(read.drop_vars("draws"), made.drop_vars("draws"))
            np.testing.assert_allclose(read["draws"], made["draws"], rtol=1e-6)  # kept to seven digits
            assert read["draws"].attrs.items() >= made["draws"].attrs.items()
    assert [p.name for p in tmp_path.iterdir()] == ["fit.nc"]


def test_same_cube_same_bytes() -> None:
    one = replace(SMALL, molecules=("H2O", "N2"), ansatze=("transformer",), hold_outs="")
    texts = {to_json(_fit(one)[0]) for _ in range(2)}
    assert len(texts) == 1


def test_the_page_holds_what_fit_section_9_asks_for(fitted: tuple[dict[str, Any], xr.DataTree]) -> None:
    result, _ = fitted
    page = render(result | {"cube": "cube.nc", "cube_sha256": "f" * 64})
    for words in (
        "sha256", "excluded, by reason", "failure rate", "embeddings included", "S_F = mean unique",
        "E_inf = sector", "float64", "Schedule", "amplitudes >= 0", "Certificate: stationary", "Covariance",
        "bootstrap", "sandwich", "profile", "without intercepts", "without floor", "objective huber:0.001",
        "N = modulus parameters only", "V-score with qubits, E_inf zero", "Condition number", "Rival laws",
        "share at the centre", "Hold-outs", "no interior optimum", "executed / estimated", "## Limitations",
    ):  # fmt: skip
        assert words in page, words
    assert repr(_head(result, "transformer")["parameters"]["a1"]) in page
    assert not re.search(r"\bnan\b|\binf\b", page, re.IGNORECASE)


def test_selection_scores_every_candidate(fitted: tuple[dict[str, Any], xr.DataTree]) -> None:
    for block in fitted[0]["selection"]:
        rows = block["rows"]
        assert {r["law"] for r in rows} == set(CANDIDATES)
        scored = [r for r in rows if "refused" not in r]
        complete = [r for r in scored if len(r["scores"]) == 3]
        crps = [r["mean_crps"] for r in complete]
        assert crps == sorted(crps)
        assert rows[: len(complete)] == complete
        assert {"additive", "additive_no_floor", "time_only", "size_only"} <= {r["law"] for r in complete}
        for r in scored:
            assert set(r["scores"]) <= {"molecule", "largest N", "largest D'"}
            assert all(0 <= s["coverage_90"] <= 1 and s["crps"] > 0 for s in r["scores"].values())
    best = {(b["ansatz"], b["metric"]): b["rows"] for b in fitted[0]["selection"]}
    rank = {r["law"]: r["rank"] for r in best["transformer", "v_score"]}
    # The truth has both terms: dropping either must predict worse.
    assert rank["additive_no_floor"] < rank["time_only"]
    assert rank["additive_no_floor"] < rank["size_only"]


def test_hold_outs_are_scored_after_a_registered_prediction(
    fitted: tuple[dict[str, Any], xr.DataTree],
) -> None:
    block = next(b for b in fitted[0]["hold_out"] if (b["ansatz"], b["metric"]) == ("transformer", "v_score"))
    names = [r["name"] for r in block["rows"]]
    assert names == ["all hold-outs", "molecule H2S", "size xxl"]
    assert validate.is_intact(block["registered"])
    broken = json.loads(json.dumps(block["registered"]))
    broken["points"][0]["prediction"] *= 1.0001
    assert not validate.is_intact(broken)
    # The size of known molecules; an unknown molecule's intercept is whatever it is.
    assert block["rows"][2]["median_abs_log_error"] < 0.3


def test_hold_outs_cannot_reach_a_fit() -> None:
    """Whatever stands in the held-out cells, every fitted number is the same."""
    one = replace(SMALL, ansatze=("transformer",))
    results = []
    for factor in (1.0, 7.0):
        cube = synthetic_cube(one)
        final = cube["final"].to_dataset()
        for where in ({"size": "xxl"}, {"molecule": "H2S"}):
            for v in ("variance", "v_score", "abs_error"):
                final[v].loc[where] = final[v].loc[where] * factor
            e_fci = cube["molecule"]["e_fci"]
            moved = (e_fci + (final["energy"] - e_fci) * factor).transpose(*final["energy"].dims)
            final["energy"].loc[where] = moved.loc[where]
        changed = xr.DataTree.from_dict(
            {"/": cube.to_dataset(), "/final": final, "/molecule": cube["molecule"].to_dataset()}
        )
        rows, truth = rows_of(changed)
        result, _ = fit_rows(rows, truth, QUICK)
        results.append(result)
    assert results[0]["fits"] == results[1]["fits"]
    assert results[0]["hold_out"][0]["registered"] == results[1]["hold_out"][0]["registered"]
    assert results[0]["hold_out"][0]["rows"] != results[1]["hold_out"][0]["rows"]


def test_a_selection_with_hold_outs_is_refused() -> None:
    rows, _ = rows_of(synthetic_cube(SMALL))
    assert np.all(np.isnan(rows.value["v_score"][rows.held_out]))
    with pytest.raises(UserError, match="hold-outs: a fit must not read them"):
        study.design_of(rows, rows.labels["ansatz"] == "transformer", "v_score", LAWS["additive"])


def test_hold_out_cells_are_read_from_the_spec() -> None:
    cells = '[[holdout.cells]]\nmolecules = ["N2"]\nsteps = [4000]\n'
    cells += '[[holdout.cells]]\nseeds = [1]\nsizes = ["xs"]'
    rows, _ = rows_of(synthetic_cube(replace(SMALL, hold_outs=cells)))
    expected = ((rows.labels["molecule"] == "N2") & (rows.labels["steps"] == 4000)) | (
        (rows.labels["seed"] == 1) & (rows.labels["size"] == "xs")
    )
    assert np.array_equal(rows.held_out, expected)


def test_one_molecule_has_no_intercepts_and_says_so() -> None:
    result, _ = _fit(replace(SMALL, molecules=("N2",), ansatze=("transformer",), hold_outs=""))
    head = _head(result, "transformer")
    assert head["intercepts"] == {}
    assert any("one molecule" in w for w in head["warnings"])
    assert [f["scope"] for f in result["fits"] if f["law"] == "additive" and f["metric"] == "v_score"] == [
        "all"
    ]


def test_one_seed_is_enough() -> None:
    result, _ = _fit(replace(SMALL, seeds=1, ansatze=("transformer",), hold_outs=""))
    assert _head(result, "transformer")["certificate"]["stationary"]


def test_too_few_points_are_refused_with_the_numbers() -> None:
    few = replace(
        SMALL, molecules=("N2",), ansatze=("made",), sizes=("xs", "m", "xl"), steps=(250, 4000), seeds=1
    )
    with pytest.raises(UserError, match=r"too few points, \d+ runs for 5 parameters, at least 15 are needed"):
        _fit(replace(few, hold_outs=""))


def test_an_empty_cube_says_so() -> None:
    with pytest.raises(UserError, match="no usable point"):
        _fit(replace(SMALL, missing=1.0, failed=0.0, invalid=0.0))


def test_modulus_and_phase_in_one_ratio_are_refused_and_crossed_ones_fitted() -> None:
    one = replace(SMALL, molecules=("N2", "H2O"), ansatze=("transformer",), hold_outs="", seeds=1)
    result, _ = _fit(one)
    reasons = [r["reason"] for r in result["refused"] if r["law"] == "modulus_phase"]
    assert len(reasons) == 2
    assert all("cannot be told apart (condition number" in r for r in reasons)
    crossed, _ = _fit(replace(one, variants=CROSSED))
    fit = next(f for f in crossed["fits"] if f["law"] == "modulus_phase")
    assert fit["condition_number"] < 100
    assert not [r for r in crossed["refused"] if r["law"] == "modulus_phase"]


def test_checkpoints_of_decayed_schedules_need_the_flag_and_carry_a_label() -> None:
    one = replace(SMALL, ansatze=("transformer",), molecules=("N2", "O2"), hold_outs="")
    with pytest.raises(UserError, match=r"decay the learning rate .schedule cosine.*--decayed-checkpoints"):
        rows_of(synthetic_cube(one), checkpoints=True)
    rows, truth = rows_of(synthetic_cube(one), checkpoints=True, allow_decayed=True)
    result, _ = fit_rows(rows, truth, replace(QUICK, checkpoints=True, allow_decayed=True))
    head = _head(result, "transformer")
    assert any("DECAYED CHECKPOINTS" in w for w in head["warnings"])
    assert head["n_points"] > 2 * head["n_runs"]
    constant, _ = rows_of(synthetic_cube(replace(one, schedule="constant")), checkpoints=True)
    plain, _ = rows_of(synthetic_cube(one))
    assert len(constant) > len(plain)
    assert set(constant.run) == set(plain.run)


def test_variants_that_change_more_than_a_covariate_stay_out() -> None:
    spec = '[variants.phase_small.phase]\nwidth = 3\n[variants.phase_large]\nlocal_energy = "sampled"\n'
    spec += '[variants.batch_small]\n"sampling.batch_max" = 100\n[variants.batch_large.sampling]\n'
    spec += 'schedule = "constant"'
    cube = synthetic_cube(replace(SMALL, variants=CROSSED, hold_outs=spec))
    rows, _ = rows_of(cube)
    used = set(rows.labels["variant"][rows.usable("v_score")])
    assert used == {"base", "phase_small", "batch_small"}
    chosen, _ = rows_of(cube, variants=("phase_large",))
    assert set(chosen.labels["variant"][chosen.usable("v_score")]) == {"phase_large"}
    with pytest.raises(UserError, match="no variant nonsense; there are base"):
        rows_of(cube, variants=("nonsense",))


def test_v_score_follows_the_convention_of_the_spec() -> None:
    cube = synthetic_cube(replace(SMALL, hold_outs='[v_score]\nn_dof = "qubits"\ne_inf = "identity"'))
    rows, _ = rows_of(cube)
    stored = np.where(rows.usable("v_score"), cube["final"]["v_score"].values.ravel(), np.nan)
    back = rows.with_v_score(VScoreSpec()).value["v_score"]
    assert back[rows.usable("v_score")] == pytest.approx(stored[rows.usable("v_score")], rel=1e-9)
    info = rows.molecules["N2"]
    here = rows.usable("v_score") & (rows.labels["molecule"] == "N2")
    energy = rows.energies["energy"][here]
    factor = info["n_spin_orbitals"] / (info["n_alpha"] + info["n_beta"])
    factor = factor * ((energy - info["e_inf_sector"]) / (energy - info["e_inf_identity"])) ** 2
    assert rows.value["v_score"][here] == pytest.approx(stored[here] * factor, rel=1e-9)


def test_collapsed_samplers_and_errors_under_the_noise() -> None:
    cube = synthetic_cube(replace(SMALL, failed=0.0, invalid=0.0, missing=0.0, hold_outs=""))
    final = cube["final"].to_dataset()
    n2 = {"molecule": "N2", "ansatz": "made", "variant": "base", "seed": 0, "steps": 250}
    e_fci = float(cube["molecule"]["e_fci"].sel(molecule="N2"))
    final["energy_stderr"].loc[n2] = 1e-5
    final["n_unique_mean"].loc[n2 | {"size": "xs"}] = 7.0
    final["energy"].loc[n2 | {"size": "s"}] = e_fci + 1e-5
    final["energy"].loc[n2 | {"size": "m"}] = e_fci - 2e-5
    final["energy"].loc[n2 | {"size": "l"}] = e_fci - 1e-2
    final["variance"].loc[n2 | {"size": "xl"}] = 0.0
    changed = xr.DataTree.from_dict(
        {"/": cube.to_dataset(), "/final": final, "/molecule": cube["molecule"].to_dataset()}
    )
    rows, _ = rows_of(changed)

    def at(size: str) -> int:
        chosen = rows.labels["size"] == size
        for k, v in n2.items():
            chosen = chosen & (rows.labels[k] == v)
        return int(np.flatnonzero(chosen)[0])

    assert rows.reason["v_score"][at("xs")] == "fewer than 30 unique samples"
    assert rows.reason["v_score"][at("xl")] == "zero variance"
    assert rows.reason["abs_error"][at("l")] == "energy below the reference"
    for size in ("s", "m"):
        assert rows.censored["abs_error"][at(size)]
        assert rows.value["abs_error"][at(size)] == pytest.approx(3e-5)
    assert not rows.censored["abs_error"][at("xxl")]


def test_files_that_are_no_cubes() -> None:
    with pytest.raises(UserError, match="no group /final, /molecule"):
        rows_of(xr.DataTree(xr.Dataset(attrs={"spec": ""})), "x.nc")
    cube = synthetic_cube(SMALL)
    final = cube["final"].to_dataset().drop_vars(["variance", "n_total"])
    partial = xr.DataTree.from_dict({"/final": final, "/molecule": cube["molecule"].to_dataset()})
    with pytest.raises(UserError, match="/final lacks variance, n_total"):
        rows_of(partial, "x.nc")


@pytest.mark.parametrize("law", list(LAWS))
def test_every_named_law_goes_through(law: str) -> None:
    how = replace(QUICK, laws=(law,), metrics=("v_score",), bootstrap=40, test_replicates=9)
    one = replace(
        SMALL, ansatze=("transformer",), molecules=("N2", "O2"), variants=CROSSED, seeds=1, hold_outs=""
    )
    result, _ = _fit(one, how)
    head = _head(result, "transformer")
    assert head["law"] == law
    assert head["certificate"]["stationary"]
    with_test = {"additive", "additive_no_floor", "size_only", "steps_fraction", "interaction", "kaplan"}
    assert ("size_matters" in head["tests"]) == (law in with_test)
    assert (result["allocation"][0]["status"] == "ok") <= (law in ("additive", "additive_no_floor"))


ISO = {"base": Variant(), "few": Variant(batch=0.25), "many": Variant(batch=4.0)}


@pytest.mark.parametrize(("tilt", "significant"), [(0.0, False), (0.15, True)])
def test_iso_d_prime_runs_show_whether_t_matters_beyond_d_prime(tilt: float, significant: bool) -> None:
    one = replace(
        SMALL, ansatze=("transformer",), molecules=("N2", "PH3"), variants=ISO, hold_outs="", batch_max=1000,
        failed=0.0, invalid=0.0, missing=0.0,
    )  # fmt: skip
    cube = synthetic_cube(one)
    final = cube["final"].to_dataset()
    final["variance"] = final["variance"] * (final["steps"] / 1000.0) ** tilt
    final["variance"] = final["variance"].transpose(*final["status"].dims)
    groups = {"/": cube.to_dataset(), "/final": final, "/molecule": cube["molecule"].to_dataset()}
    rows, truth = rows_of(xr.DataTree.from_dict(groups))
    result, _ = fit_rows(rows, truth, replace(QUICK, metrics=("v_score",)))
    iso = _head(result, "transformer")["tests"]["iso_d_prime"]
    assert iso["groups"] > 10
    assert iso["low"] < iso["slope"] < iso["high"]
    assert (iso["p_value"] < 0.01) == significant
    page = render(result)
    assert "Iso-D' (" in page
    assert "exponent of T minus exponent of S_F" in page


def test_without_iso_d_prime_runs_nothing_is_said_of_them(fitted: tuple[dict[str, Any], xr.DataTree]) -> None:
    assert "iso_d_prime" not in _head(fitted[0], "transformer")["tests"]
    assert "Iso-D'" not in render(fitted[0])
