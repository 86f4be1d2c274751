"""The tables: the law's coefficients, FLOPs, molecules, and every run behind the figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from figures import style
from figures.data import METRICS, StudyData
from figures.fits import ADDITIVE, ALL, PARAMETERS, LawFit
from figures.registry import Cell, Column, MissingData, Sheet, Table, artefact

_LABELS = {"A0": "A₀", "A1": "A₁", "a1": "α₁", "A2": "A₂", "a2": "α₂"}


def certificate_phrase(law: LawFit) -> str:
    """The solver's certificate in a few words; "not stationary" means that the fit must not be used."""
    certificate = law.record.get("certificate") or {}
    if not law.stationary:
        return "NOT stationary"
    phrase = f"stationary ({float(certificate.get('scaled_gradient', math.nan)):.0e})"
    bounds = certificate.get("active_bounds") or []
    return phrase + (f", {' '.join(map(str, bounds))} at bound" if bounds else "")


@artefact(
    "coefficients",
    title="Coefficients of the fitted law",
    question="What are the coefficients of L = A₀ + A₁ N^−α₁ + A₂ D′^−α₂ in this replication (counterpart "
    "of Table 3)?",
    section="law",
    kind="table",
    needs=("fit",),
)
def coefficients(study: StudyData) -> Sheet:
    """A0, A1, a1, A2, a2 with 95 % intervals per ansatz and metric, joint over molecules and per molecule."""
    fits = study.need_fits()
    laws = [law for law in fits.laws if law.law == ADDITIVE]
    if not laws:
        raise MissingData("the fit holds no additive law")
    kinds = list(dict.fromkeys(law.ansatz for law in laws))
    order = {ALL: -1} | {name: i for i, name in enumerate(study.molecules)}
    laws.sort(key=lambda law: (METRICS.index(law.metric), kinds.index(law.ansatz), order.get(law.scope, 99)))
    rows: list[dict[str, Cell]] = []
    notes = []
    for law in laws:
        if not law.stationary:
            notes.append(f"{law.ansatz}, {law.metric}, {law.scope}: no stationary certificate; do not use")
        row: dict[str, Cell] = {
            "metric": style.METRIC_NAME[law.metric],
            "ansatz": style.ansatz_style(law.ansatz, kinds).label,
            "scope": "joint" if law.scope == ALL else law.scope,
            "n_runs": int(law.record.get("n_runs", 0)),
            "n_points": int(law.record.get("n_points", 0)),
            "certificate": certificate_phrase(law),
            "warnings": "; ".join(map(str, law.record.get("warnings") or [])),
            "point_ids": " ".join(study.ids_of(law)),
        }
        rows.append(row | {name: law.quantity(name) for name in PARAMETERS})
    refused: dict[str, list[tuple[str, str, str]]] = {}
    for item in fits.record.get("refused", []):
        if item.get("law") == ADDITIVE:
            metric = style.METRIC_NAME.get(str(item.get("metric")), str(item.get("metric")))
            scope = "joint" if item.get("scope") == ALL else str(item.get("scope"))
            refused.setdefault(str(item.get("reason")), []).append((str(item.get("ansatz")), metric, scope))
    notes += [f"no law for {_cases(cases)}: {reason}" for reason, cases in refused.items()]
    columns = (
        Column("metric", "metric"),
        Column("ansatz", "ansatz"),
        Column("scope", "molecules"),
        *(Column(name, _LABELS[name]) for name in PARAMETERS),
        Column("n_runs", "runs"),
        Column("n_points", "points", csv_only=True),
        Column("certificate", "certificate"),
        Column("warnings", "warnings", csv_only=True),
        Column("point_ids", "point ids", csv_only=True),
    )
    gone = _excluded(fits.record.get("table") or {})
    caption = (
        "This replication's coefficients, raw units (V-score dimensionless, error in hartree, N in "
        "parameters, D′ in "
        "steps), with 95 % intervals in brackets (run-clustered bootstrap; one-sided where a term is at "
        "its bound). "
        f"Runs excluded from the fits: {gone}. These are not the paper's Table 3 values, which are not "
        f"available here."
    )
    notes += [study.stale_fit] if study.stale_fit else []
    return Sheet(Table(columns, tuple(rows)), caption, tuple(notes))


def _cases(cases: Sequence[tuple[str, str, str]]) -> str:
    """Cases in words: each axis once where every combination occurs, else one by one."""
    axes = [list(dict.fromkeys(labels)) for labels in zip(*cases, strict=True)]
    if len(cases) == math.prod(map(len, axes)) and len(cases) > 1:
        return f"any of {' × '.join('(' + ', '.join(labels) + ')' for labels in axes)}"
    return "; ".join(", ".join(case) for case in cases)


def _excluded(table: Mapping[str, Any]) -> str:
    """Excluded runs by reason; the fit counts them per metric, and they may differ."""
    phrases = []
    for key, value in (table.get("excluded") or {}).items():
        if isinstance(value, Mapping):
            inner = ", ".join(f"{count} {reason}" for reason, count in value.items() if count) or "none"
            phrases.append(f"{style.METRIC_NAME.get(key, key)}: {inner}")
        elif value:
            phrases.append(f"{value} {key}")
    return "; ".join(phrases) or "none"


@artefact(
    "flops",
    title="Compute per run, estimated beside executed",
    question="How much compute does a run take by the study's accounting, and how much was really "
    "executed (counterpart of Table 1)?",
    section="cost",
    kind="table",
)
def flops(study: StudyData) -> Sheet:
    """Per molecule and ansatz: FLOPs per step estimated and executed, their ratio, seconds per step,
    FLOP/s."""
    points = study.need_headline()
    rows: list[dict[str, Cell]] = []
    for (molecule, kind), part in points.groups("molecule", "ansatz"):
        steps = part["steps"].astype(float)
        estimated, executed = part["flops_estimated"], part["flops_executed"]
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = estimated / executed
            rate = executed / steps / study.step_seconds(part)
        facts = study.molecules.get(molecule, {})
        rows.append(
            {
                "molecule": molecule,
                "ansatz": style.ansatz_style(kind, points.unique("ansatz")).label,
                "unique_flips": int(facts["n_unique_flips"]) if "n_unique_flips" in facts else None,
                "n_min": int(part["n_total"].min()),
                "n_max": int(part["n_total"].max()),
                "estimated": _geometric(estimated / steps),
                "executed": _geometric(executed / steps),
                "ratio": _geometric(ratio),
                "ratio_min": _finite(ratio, np.min),
                "ratio_max": _finite(ratio, np.max),
                "seconds": _geometric(study.step_seconds(part)),
                "rate": _geometric(rate),
                "runs": len(part),
                "point_ids": " ".join(part.ids),
            }
        )
    columns = (
        Column("molecule", "molecule"),
        Column("ansatz", "ansatz"),
        Column("unique_flips", "M"),
        Column("n_min", "N min"),
        Column("n_max", "N max"),
        Column("estimated", "estimated FLOP/step"),
        Column("executed", "executed FLOP/step"),
        Column("ratio", "estimated/executed"),
        Column("ratio_min", "lowest"),
        Column("ratio_max", "highest"),
        Column("seconds", "s/step"),
        Column("rate", "FLOP/s achieved"),
        Column("runs", "runs"),
        Column("point_ids", "point ids", csv_only=True),
    )
    caption = (
        "Geometric means over the runs of each molecule and ansatz. Estimated: the study's accounting, "
        "B·[S + (M+3)(F+φ)] "
        "without reuse. Executed: counted on what ran. Seconds are wall time per optimisation step on the "
        "machine in the "
        f"provenance. {study.exclusions()}."
    )
    return Sheet(Table(columns, tuple(rows)), caption)


def _geometric(values: np.ndarray) -> float:
    good = values[np.isfinite(values) & (values > 0)]
    return float(np.exp(np.mean(np.log(good)))) if len(good) else math.nan


def _finite(values: np.ndarray, how: object) -> float:
    good = values[np.isfinite(values)]
    return float(how(good)) if len(good) and callable(how) else math.nan


@artefact(
    "molecules",
    title="Molecules",
    question="Which problems are solved, how large are they, and what are their reference energies?",
    section="data",
    kind="table",
    needs=("molecule",),
)
def molecules(study: StudyData) -> Sheet:
    """Size of each problem, reference energies, and runs by state."""
    rows: list[dict[str, Cell]] = []
    for name, facts in study.molecules.items():
        own = study.points.only(molecule=name)
        whole: dict[str, Cell] = {
            key: int(facts[key]) if facts[key] >= 0 else None  # -1: no run yet that would know
            for key in ("n_spin_orbitals", "n_alpha", "n_beta", "search_space", "n_unique_flips")
        }
        energies: dict[str, Cell] = {
            key: facts.get(key, math.nan) for key in ("e_hf", "e_ccsd", "e_ccsd_t", "e_fci")
        }
        states: dict[str, Cell] = {
            label: int(np.sum(own["status"] == code))
            for label, code in (("done", 1), ("failed", 2), ("invalid", 3))
        }
        rows.append({"molecule": name, **whole, **energies, **states, "point_ids": " ".join(own.ids)})
    columns = (
        Column("molecule", "molecule"),
        Column("n_spin_orbitals", "spin-orbitals n"),
        Column("n_alpha", "α electrons"),
        Column("n_beta", "β electrons"),
        Column("search_space", "sector size |S|"),
        Column("n_unique_flips", "flip patterns M"),
        Column("e_hf", "HF (Ha)", 9),
        Column("e_ccsd", "CCSD (Ha)", 9),
        Column("e_ccsd_t", "CCSD(T) (Ha)", 9),
        Column("e_fci", "FCI (Ha)", 9),
        Column("done", "runs done"),
        Column("failed", "failed"),
        Column("invalid", "invalid"),
        Column("point_ids", "point ids", csv_only=True),
    )
    caption = (
        "Problems of the study: STO-3G, all electrons, Jordan–Wigner. |S| counts determinants with "
        "the right (α, β)."
    )
    return Sheet(Table(columns, tuple(rows)), caption)


@artefact(
    "accuracy",
    title="Chemical accuracy",
    question="Which ansatz comes how close to FCI on which molecule, and which of its sizes are accurate?",
    section="data",
    kind="table",
    needs=("final",),
)
def accuracy(study: StudyData) -> Sheet:
    """Per molecule and ansatz, over the main variant's runs: the best error and the sizes within 1.6 mHa."""
    own = study.done.only(variant=study.main_variant)
    own = own.where(np.isfinite(own["abs_error"]))
    if not len(own):
        raise MissingData("no finished run has a known error")
    rows: list[dict[str, Cell]] = []
    for (molecule, ansatz), cell in own.groups("molecule", "ansatz"):
        best = int(np.argmin(cell["abs_error"]))
        near = cell.where(cell["abs_error"] <= style.CHEMICAL_ACCURACY)
        rows.append(
            {
                "molecule": molecule,
                "ansatz": ansatz,
                "runs": len(cell),
                "near": len(near),
                "sizes": " ".join(map(str, near.unique("size"))) or "none",
                "error": 1e3 * float(cell["abs_error"][best]),
                "size": str(cell["size"][best]),
                "steps": int(cell["steps"][best]),
                "seed": int(cell["seed"][best]),
                "point_ids": cell.ids[best],
            }
        )
    columns = (
        Column("molecule", "molecule"),
        Column("ansatz", "ansatz"),
        Column("runs", "runs"),
        Column("near", "chemically accurate"),
        Column("sizes", "in sizes"),
        Column("error", "lowest error (mHa)", 3),
        Column("size", "its size"),
        Column("steps", "T"),
        Column("seed", "seed"),
        Column("point_ids", "point id", csv_only=True),
    )
    caption = (
        f"Runs of the main variant, held-out ones included. Chemically accurate: |E − E_FCI| ≤ "
        f"{1e3 * style.CHEMICAL_ACCURACY:g} mHa. The lowest of many runs flatters: it is what was reached, "
        "not what to expect."
    )
    return Sheet(Table(columns, tuple(rows)), caption)


@artefact(
    "runs",
    title="Every run",
    question="Which run does a number come from?",
    section="data",
    kind="table",
)
def runs(study: StudyData) -> Sheet:
    """One row per run of any state and variant, with its point id."""
    points = study.points
    if not len(points):
        raise MissingData("the cube holds no run")
    state = {1: "done", 2: "failed", 3: "invalid"}
    names = ("molecule", "ansatz", "size", "variant")
    numbers = ("energy", "energy_stderr", "variance", "v_score", "abs_error", "search_fraction", "d_prime")
    costs = ("n_unique_mean", "n_samples_total", "flops_estimated", "flops_executed", "wall_seconds")
    rows: list[dict[str, Cell]] = []
    for i in range(len(points)):
        row: dict[str, Cell] = {"point_id": points.ids[i], **{name: str(points[name][i]) for name in names}}
        row |= {"steps": int(points["steps"][i]), "seed": int(points["seed"][i])}
        row |= {"status": state.get(int(points["status"][i]), "unknown")}
        row |= {name: int(points[name][i]) for name in ("n_modulus", "n_phase", "n_total")}
        row |= {name: float(points[name][i]) for name in (*numbers, *costs)}
        rows.append(row)
    shown = {"energy": 9, "v_score": 3, "abs_error": 3, "d_prime": 3}
    columns = (
        Column("point_id", "point id"),
        *(Column(name, name) for name in names),
        Column("steps", "T"),
        Column("seed", "seed"),
        Column("status", "status"),
        Column("n_modulus", "N mod", csv_only=True),
        Column("n_phase", "N ph", csv_only=True),
        Column("n_total", "N"),
        *(
            Column(name, _RUN_LABELS.get(name, name), shown.get(name, 3), name not in shown)
            for name in numbers
        ),
        *(Column(name, name, csv_only=True) for name in costs),
    )
    states = study.counts()
    caption = (
        "All runs of the cube: " + ", ".join(f"{count} {state}" for state, count in states.items()) + "."
    )
    return Sheet(Table(columns, tuple(rows)), caption)


_RUN_LABELS = {"energy": "E (Ha)", "v_score": "V-score", "abs_error": "|E − FCI| (Ha)", "d_prime": "D′"}
