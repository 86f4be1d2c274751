from __future__ import annotations

import numpy as np
import pytest
from scaling_tables import ADDITIVE, grid_table, random_table
from scipy import stats

from replicate.scaling import infer
from replicate.scaling.law import LAWS, make_design
from replicate.scaling.objective import Objective, parse_objective
from replicate.scaling.solve import make_layout, solve
from replicate.spec import UserError


def test_cluster_weights_keep_runs_whole_and_molecules_present() -> None:
    cluster, stratum = np.repeat(np.arange(12), 5), np.repeat([0, 1, 2], 20)
    w = infer.cluster_weights(cluster, stratum, 500, np.random.default_rng(0))
    assert w.shape == (500, 60)
    by_run = w.reshape(500, 12, 5)
    assert np.all(by_run == by_run[:, :, :1])
    for s in range(3):
        assert np.all(w[:, stratum == s].sum(axis=1) == 20)
    assert w.mean() == pytest.approx(1.0, abs=0.02)


def test_clusters_over_several_molecules_stay_whole() -> None:
    cluster, stratum = np.repeat(np.arange(10), 6), np.tile([0, 1], 30)
    w = infer.cluster_weights(cluster, stratum, 50, np.random.default_rng(0)).reshape(50, 10, 6)
    assert np.all(w == w[:, :, :1])
    assert np.all(w[:, :, 0].sum(axis=1) == 10)


def test_sandwich_of_gaussian_least_squares_is_the_textbook_one() -> None:
    """With every point its own cluster: (J'J)^-1 J' diag(r^2) J (J'J)^-1 up to the second-order term of H."""
    table = grid_table(0, sigma=0.02)
    solution = solve(table.design(), Objective("l2-log"))
    cov = infer.covariance(solution)
    p = solution.p
    base = solution.layout.model(p[None])[0]
    columns = []
    for i in range(p.size):
        step = np.zeros(p.size)
        step[i] = 1e-6
        columns.append((solution.layout.model((p + step)[None])[0] - base) / 1e-6)
    j = np.array(columns).T
    bread = np.linalg.inv(j.T @ j)
    r = np.log(solution.layout.design.value) - base
    meat = (j * r[:, None] ** 2).T @ j
    expected = 240 / 239 * 239 / 235 * bread @ meat @ bread
    assert np.sqrt(np.diagonal(cov.sandwich)) == pytest.approx(np.sqrt(np.diagonal(expected)), rel=0.05)


def test_bootstrap_and_sandwich_agree_where_both_hold() -> None:
    solution = solve(grid_table(1, sigma=0.05).design(), Objective("t"))
    errors, _ = infer.sandwich_intervals(solution, infer.covariance(solution))
    draws = infer.bootstrap(solution, 2000, 0)
    for name in ("a1", "a2"):
        assert float(draws.raw[name].std()) == pytest.approx(errors[name], rel=0.1)


def test_clusters_widen_the_sandwich_of_correlated_points() -> None:
    table = grid_table(2)
    cluster = np.repeat(np.arange(60), 4)
    order = np.lexsort((table.variables["D"], table.variables["N"]))
    rng = np.random.default_rng(0)
    shared = np.repeat(rng.standard_normal(60), 4) * 0.3
    value = np.empty(240)
    value[order] = ADDITIVE(table.truth, {k: v[order] for k, v in table.variables.items()}) * np.exp(shared)
    labels = np.empty(240, int)
    labels[order] = cluster
    wide = solve(make_design(ADDITIVE, table.variables, value, cluster=labels), Objective("t"))
    narrow = infer.covariance(wide, cluster=np.arange(240))
    j = wide.layout.names.index("a1")
    assert infer.covariance(wide).sandwich[j, j] > 2.5 * narrow.sandwich[j, j]


def test_profile_of_a_quadratic_objective_is_the_t_interval() -> None:
    solution = solve(grid_table(3, sigma=0.01).design(), Objective("l2-log"))
    cov = infer.covariance(solution)
    ends = infer.profile_intervals(solution, cov, ["a1", "a2"])
    t = stats.t.ppf(0.975, cov.degrees)
    for name in ("a1", "a2"):
        j = solution.layout.names.index(name)
        half = t * np.sqrt(cov.sandwich[j, j])
        interval = ends[name]
        assert interval is not None
        assert interval == pytest.approx((solution.p[j] - half, solution.p[j] + half), abs=0.1 * half)


def test_no_percentile_interval_for_what_half_the_draws_do_not_have() -> None:
    solution = solve(grid_table(0, c=(0.0, 0.0, 1.0)).design(), Objective("t"))
    draws = infer.bootstrap(solution, 400, 0)
    assert np.mean(draws.raw["A1"] == 0) > 0.1
    assert np.array_equal(np.isnan(draws.raw["a1"]), draws.raw["A1"] == 0)
    assert infer.percentile_intervals(draws)["a1"] is None


def test_floor_upper_bound_holds_zero_floors_and_not_much_more() -> None:
    bounds = []
    for seed in range(20):
        table = grid_table(seed, c=(0.0, 0.5, 0.5), sigma=0.1)
        test = infer.floor_test(solve(table.design(), Objective("t")))
        assert test is not None
        assert test.upper is not None
        assert test.upper > 0
        bounds.append(test.upper / float(np.median(table.value)))
    assert np.median(bounds) < 0.3


def test_floor_upper_bound_covers_the_true_floor() -> None:
    held = 0
    for seed in range(60):
        table = grid_table(seed, c=(0.15, 0.5, 0.5), sigma=0.2)
        test = infer.floor_test(solve(table.design(), Objective("t")))
        assert test is not None
        held += test.upper is not None and test.upper >= table.truth["A0"]
    # 95 % of 60: 57 expected, 51 is six of them (more than three standard errors) too few
    assert held >= 51


def test_a_clear_floor_is_detected_and_a_clear_size_effect_too() -> None:
    solution = solve(grid_table(0, c=(0.6, 0.3, 0.3), sigma=0.1).design(), Objective("t"))
    floor = infer.floor_test(solution)
    assert floor is not None
    assert floor.p_value < 1e-3
    test = infer.variable_test(solution, "N", 99, 0)
    assert test.p_value == pytest.approx(0.01)
    assert test.p_chi2 < 1e-6
    assert test.degrees == 2


def test_size_effect_is_not_seen_where_there_is_none() -> None:
    p = [
        infer.variable_test(solve(grid_table(s, c=(0.2, 0.0, 0.8)).design(), Objective("t")), "N", 99,
        s).p_value for s in range(8)
    ]  # fmt: skip
    assert min(p) > 0.01
    assert np.mean(np.array(p) > 0.05) >= 0.75


def test_simulated_critical_value_is_near_chi2() -> None:
    solution = solve(grid_table(1, c=(0.2, 0.0, 0.8), nu=4.0).design(), Objective("t"))
    test = infer.variable_test(solution, "N", 400, 0)
    assert 2.5 < test.critical < 7.5


def test_a_variable_without_terms_of_its_own_cannot_be_dropped() -> None:
    with pytest.raises(UserError, match="cannot be dropped"):
        infer.drop_variable(LAWS["size_only"], "D")


def test_leave_one_molecule_out_needs_three_and_finds_the_odd_one() -> None:
    table = grid_table(0, sigma=0.05)
    group = np.array(["a", "b", "c", "d"])[np.arange(240) // 60]
    value = np.where(group == "d", table.value * (table.variables["D"] / 100) ** -0.3, table.value)
    # Least squares: the robust objective would hardly notice one odd molecule of four.
    solution = solve(make_design(ADDITIVE, table.variables, value, group=group), Objective("l2-log"))
    refits, intervals = infer.leave_one_group_out(solution)
    a2 = {k: v["a2"] for k, v in refits.items()}
    assert set(refits) == {"a", "b", "c", "d"}
    assert max(abs(a2["d"] - a2[k]) for k in "abc") > 3 * max(abs(a2["a"] - a2[k]) for k in "bc")
    low, high = intervals["a2"]
    assert low < solution.raw()["a2"] < high
    two = make_design(ADDITIVE, table.variables, value, group=np.where(group == "d", "c", "b"))
    assert infer.leave_one_group_out(solve(two, Objective("t"))) == ({}, {})


def test_intercepts_are_not_optional() -> None:
    """Molecule effects of 0.5 in ln L: without intercepts a2 scatters several times more (FIT section 1)."""
    pooled, joint = [], []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        table = grid_table(seed, c=(0.0, 0.5, 0.5))
        group = np.arange(240) % 6
        # |S| differs between molecules, so D' and the molecule go together.
        d = table.variables["D"] * 3.0 ** (group - 2.5)
        value = ADDITIVE(table.truth, {"N": table.variables["N"], "D": d})
        value = value * np.exp(0.5 * rng.standard_normal(6)[group] + 0.3 * rng.standard_normal(240))
        columns = {"N": table.variables["N"], "D": d}
        pooled.append(solve(make_design(ADDITIVE, columns, value), Objective("t")).raw()["a2"] - 0.5)
        joint.append(
            solve(make_design(ADDITIVE, columns, value, group=group), Objective("t")).raw()["a2"] - 0.5
        )
    assert np.sqrt(np.mean(np.square(joint))) < 0.6 * np.sqrt(np.mean(np.square(pooled)))


def test_fixed_ratio_of_the_networks_is_ill_conditioned_and_crossed_ratios_are_not() -> None:
    rng = np.random.default_rng(0)
    m, r, t = (
        a.ravel() for a in np.meshgrid(np.geomspace(2e3, 2e5, 6), [0.1, 1.0, 10.0], np.geomspace(30, 2000, 4))
    )
    law = LAWS["modulus_phase"]
    value = np.exp(rng.standard_normal(m.size))
    fixed = make_design(law, {"M": m, "P": 0.3 * m, "D": t}, value)
    crossed = make_design(law, {"M": m, "P": r * m, "D": t}, value)
    assert infer.design_condition(fixed) > 1e4
    assert infer.design_condition(crossed) < 100


def test_bootstrap_without_groups_resamples_points() -> None:
    table = random_table(ADDITIVE, 0, sigma=0.1)
    layout = make_layout(table.design(), parse_objective("t"))
    assert layout.design.n_clusters == 240
    assert layout.contrasts.shape == (0, 240)
