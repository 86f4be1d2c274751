"""Coverage of the intervals, from a simulated cube to `fit`: how often they hold the truth (FIT section 8).

    python tests/coverage_study.py --sets 200 --out artifacts/coverage

simulates cubes whose runs carry correlated checkpoints, reads each one as `fit` does, fits the additive law
with intercepts, and writes coverage.csv (nominal level against actual coverage, by kind of interval) and its
figure.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
from scipy import stats
from synthetic_cube import CubeOptions, Truth, synthetic_cube

from replicate.scaling import infer
from replicate.scaling.law import LAWS
from replicate.scaling.objective import Objective
from replicate.scaling.solve import solve
from replicate.scaling.study import design_of
from replicate.scaling.table import rows_of

TRUTH = Truth(A0=4e-6, A1=4e-3, a1=0.5, A2=8e-4, a2=0.55, sigma=0.2)
LEVELS = (0.5, 0.68, 0.8, 0.9, 0.95, 0.99)
KINDS = ("bootstrap, points", "bootstrap, runs", "sandwich, runs", "profile, runs")
QUANTITIES = ("a1", "a2", "exponent")


def truth_of(quantity: str) -> float:
    return {"a1": TRUTH.a1, "a2": TRUTH.a2, "exponent": TRUTH.a2 / (TRUTH.a1 + TRUTH.a2)}[quantity]


def one_set(
    seed: int, replicates: int, levels: tuple[float, ...] = LEVELS
) -> dict[tuple[str, str, float], bool]:
    """(quantity, kind, level) -> does the interval hold the truth, for one simulated cube."""
    options = CubeOptions(
        molecules=("H2O", "N2", "O2"),
        ansatze=("transformer",),
        steps=(250, 1000, 4000, 16000),
        seeds=2,
        truths={("transformer", "v_score"): TRUTH, ("transformer", "abs_error"): TRUTH},
        student_nu=None,
        checkpoint_sigma=0.05,
        schedule="constant",
        records=14,
        seed=seed,
    )
    rows, _ = rows_of(synthetic_cube(options), checkpoints=True)
    # The first steps of a run are another regime in practice, and would only add clustered leverage here.
    mask = rows.usable("v_score") & (rows.variables["T"] >= 50)
    design = design_of(rows, mask, "v_score", LAWS["additive"])
    solution = solve(design, Objective("t"))
    cov = infer.covariance(solution)
    held: dict[tuple[str, str, float], bool] = {}

    def note(quantity: str, kind: str, level: float, ends: tuple[float, float] | None) -> None:
        held[quantity, kind, level] = ends is not None and ends[0] <= truth_of(quantity) <= ends[1]

    for kind, cluster in ((KINDS[0], np.arange(design.n_points)), (KINDS[1], design.cluster)):
        draws = infer.bootstrap(solution, replicates, seed, cluster=cluster)
        a1, a2 = draws.raw["a1"], draws.raw["a2"]
        for quantity, values in (("a1", a1), ("a2", a2), ("exponent", a2 / (a1 + a2))):
            for level in levels:
                tail = 50 * (1 - level)
                ends = np.nanpercentile(values, [tail, 100 - tail])
                note(quantity, kind, level, (float(ends[0]), float(ends[1])))
    raw = solution.raw()
    j1, j2 = solution.layout.names.index("a1"), solution.layout.names.index("a2")
    for level in levels:
        _, ends_of = infer.sandwich_intervals(solution, cov, level)
        note("a1", KINDS[2], level, ends_of["a1"])
        note("a2", KINDS[2], level, ends_of["a2"])
        total = raw["a1"] + raw["a2"]
        slope = np.array([-raw["a2"], raw["a1"]]) / total**2
        half = np.sqrt(slope @ cov.sandwich[np.ix_([j1, j2], [j1, j2])] @ slope)
        half *= stats.t.ppf(0.5 + level / 2, cov.degrees)
        note("exponent", KINDS[2], level, (raw["a2"] / total - half, raw["a2"] / total + half))
        profile = infer.profile_intervals(solution, cov, ["a1", "a2"], level)
        note("a1", KINDS[3], level, profile["a1"])
        note("a2", KINDS[3], level, profile["a2"])
    return held


def study(sets: int, replicates: int, first: int = 0) -> list[dict[str, object]]:
    """Rows (quantity, kind, nominal, actual, sets)."""
    counts: dict[tuple[str, str, float], int] = {}
    for seed in range(first, first + sets):
        for key, inside in one_set(seed, replicates).items():
            counts[key] = counts.get(key, 0) + inside
    return [
        {"quantity": q, "kind": k, "nominal": level, "actual": n / sets, "sets": sets}
        for (q, k, level), n in sorted(counts.items())
    ]


def figure(rows: list[dict[str, object]], path: Path) -> None:
    """Nominal against actual coverage, one panel per quantity."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "coverage"
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(1, 3, figsize=(9.5, 3.4), sharey=True, layout="constrained")
    looks = (("#D55E00", "v"), ("#0072B2", "o"), ("#009E73", "s"), ("#CC79A7", "^"))
    styles = dict(zip(KINDS, looks, strict=True))
    titles = {"a1": "exponent of N, a1", "a2": "exponent of D', a2", "exponent": "dlnN*/dlnC = a2/(a1+a2)"}
    for axis, quantity in zip(axes, QUANTITIES, strict=True):
        axis.plot([0.45, 1], [0.45, 1], color="0.6", lw=1, label="exact")
        for kind in KINDS:
            mine = [r for r in rows if r["quantity"] == quantity and r["kind"] == kind]
            if mine:
                color, marker = styles[kind]
                x, y = [float(str(r["nominal"])) for r in mine], [float(str(r["actual"])) for r in mine]
                n = int(str(mine[0]["sets"]))
                error = [1.96 * np.sqrt(max(v * (1 - v), 0.25 / n) / n) for v in y]
                axis.errorbar(x, y, error, color=color, marker=marker, ms=4, lw=1.2, capsize=2, label=kind)
        axis.set(title=titles[quantity], xlabel="nominal coverage", xlim=(0.45, 1.01), ylim=(0, 1.03))
    axes[0].set_ylabel("actual coverage")
    axes[1].legend(frameon=False, fontsize=8, loc="lower right")  # every kind covers well there
    fig.suptitle(f"{rows[0]['sets']} simulated cubes, runs with correlated checkpoints", fontsize=10)
    fig.savefig(path, metadata={"Date": None})
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", type=int, default=200)
    parser.add_argument("--replicates", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("artifacts/coverage"))
    args = parser.parse_args()
    rows = study(args.sets, args.replicates)
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "coverage.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    figure(rows, args.out / "coverage.svg")


if __name__ == "__main__":
    main()
