"""What a fit prints: lines for the terminal, and the generated page of FIT section 9."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

LIMITATIONS = (
    "The law is an empirical form: its optimum outside the fitted range of N and D' is extrapolation, is "
    "clamped and flagged by `allocate`.",
    "Intervals within a study resample runs inside each molecule; statements about other molecules need the "
    "leave-one-molecule-out intervals.",
    "Energies that sit on a plateau make the residuals bimodal: the Student-t objective bounds their "
    "influence, it does not explain them.",
    "Learning rates and schedules are those of the spec: a size that was tuned worse than another bends the "
    "exponent of N.",
)


def number(value: float | None, digits: int = 4) -> str:
    """A number in `digits` digits, a dash if there is none."""
    return "-" if value is None else f"{value:.{digits}g}"


def interval_text(interval: Sequence[float | None] | None) -> str:
    """`[lo, hi]` in three digits, or that there is none."""
    if interval is None:
        return "not determined"
    low, high = ("unbounded" if v is None else f"{v:.3g}" for v in interval)
    return f"[{low}, {high}]"


def summary_of_fit(fit: Mapping[str, Any]) -> str:
    """Formula, parameters with intervals, objective and certificate on one line."""
    parts = [
        f"{k} not determined" if v is None else f"{k} = {v:.4g} {interval_text(fit['intervals'].get(k))}"
        for k, v in fit["parameters"].items()
    ]
    c = fit["certificate"]
    state = "stationary" if c["stationary"] else "NOT STATIONARY"
    return (
        f"{fit['formula']}: {', '.join(parts)}; {fit['objective_name']} objective {fit['objective']:.8g} "
        f"({state}, {c['starts_agreeing']} of {c['starts']} starts), "
        f"{fit['n_points']} points, {fit['n_runs']} runs"
    )


def summary(result: Mapping[str, Any]) -> str:
    """The headline fits and their optima, one line each, and what was refused."""
    lines = [f"{f['ansatz']} {f['metric']}: {summary_of_fit(f)}" for f in result["fits"] if f["headline"]]
    for block in result["allocation"]:
        if block["status"] == "ok":
            text = f"N* grows as C^{block['exponent_N']:.3f} {interval_text(block['interval_N'])}"
        else:
            text = f"{block['status']}: {block['reason']}"
        lines.append(f"{block['ansatz']} {block['metric']} allocation: {text}")
    lines.append(f"{len(result['fits'])} fits, {len(result['refused'])} refused (reasons in the report)")
    return "\n".join(lines)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Lines of a Markdown table, with an empty line after it."""
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""


def render(result: Mapping[str, Any]) -> str:
    """The page of a study's fits (Markdown)."""
    lines = [f"# Fits of {result['study'] or 'a cube'}", ""]
    lines += [*_data(result), *_definitions(result)]
    for fit in result["fits"]:
        if fit["headline"]:
            lines += _headline(result, fit)
    lines += [*_others(result), *_refused(result), "## Limitations", ""]
    lines += [f"- {text}" for text in LIMITATIONS]
    return "\n".join(lines) + "\n"


def _data(result: Mapping[str, Any]) -> Iterator[str]:
    t, settings = result["table"], result["settings"]
    yield "## Data"
    yield ""
    yield f"Cube `{result.get('cube', '')}`, sha256 `{result.get('cube_sha256', '')}`; {t['points']} points."
    yield ""
    rows = []
    for metric, used in t["used"].items():
        reasons = ", ".join(f"{k} {v}" for k, v in t["excluded"][metric].items()) or "none"
        rows.append([metric, str(used), str(t["censored"][metric]), reasons])
    yield from table(["metric", "used", "of these censored", "excluded, by reason"], rows)
    states = sorted({state for counts in t["by_ansatz"].values() for state in counts})
    yield from table(
        ["ansatz", *states, "failure rate"],
        (
            [a, *(str(c.get(s, 0)) for s in states), number(_failure_rate(c), 2)]
            for a, c in t["by_ansatz"].items()
        ),
    )
    yield f"Hold-outs of the spec, never read by a fit: {settings['hold_outs'] or 'none'}."
    yield ""


def _failure_rate(counts: Mapping[str, int]) -> float | None:
    tried = sum(v for k, v in counts.items() if k != "missing")
    return (counts.get("failed", 0) + counts.get("invalid", 0)) / tried if tried else None


def _definitions(result: Mapping[str, Any]) -> Iterator[str]:
    spec = tomllib.loads(result["spec"])
    train, evaluation, sampling = (spec.get(k, {}) for k in ("train", "evaluation", "sampling"))
    v = result["settings"]["v_score"]
    yield "## Definitions"
    yield ""
    yield "- N = n_total = N_mod + N_ph, all parameters, embeddings included; M = n_modulus, P = n_phase."
    yield "- T = optimisation steps; S_F = mean unique samples per step over |S|; D = D' = T S_F."
    yield "- |S| = determinants of the (n_alpha, n_beta) sector; B = unique samples per step = S_F |S|."
    yield f"- V-score = N_dof Var / (E - E_inf)^2 with N_dof = {v['n_dof']}, E_inf = {v['e_inf']}."
    yield "- L = the metric of the final, independent evaluation; natural logarithms throughout."
    yield f"- Precision of the networks: {spec.get('precision', 'float32')}; energies float64."
    yield (
        f"- Schedule: {train.get('schedule', 'constant')}, "
        f"learning rate {train.get('learning_rate', 'default')}; "
        "every point is the end of its own schedule."
    )
    yield f"- Sampling: {sampling or 'defaults'}; final evaluation: {evaluation or 'defaults'}."
    yield "- FLOPs: estimated = the study's accounting without reuse; executed = counted on what ran."
    yield ""


def _headline(result: Mapping[str, Any], fit: Mapping[str, Any]) -> Iterator[str]:
    where = {"ansatz": fit["ansatz"], "metric": fit["metric"]}
    c = fit["certificate"]
    yield f"## {fit['ansatz']}, {fit['metric']}"
    yield ""
    yield (
        f"`{fit['formula']}`, amplitudes >= 0, exponents in [0, 10], objective {fit['objective_name']} = "
        f"{fit['objective']!r} on {fit['n_points']} points of {fit['n_runs']} runs "
        f"({fit['n_censored']} censored), {fit['n_molecules']} molecules."
    )
    yield (
        f"Certificate: {'stationary' if c['stationary'] else 'NOT STATIONARY'}, scaled gradient "
        f"{c['scaled_gradient']:.1e}, {c['starts_agreeing']} of {c['starts']} starts agree, smallest scaled "
        f"Hessian eigenvalue {c['smallest_hessian_eigenvalue']:.2e}, "
        f"at a bound: {', '.join(c['active_bounds']) or 'none'}, "
        f"undetermined: {', '.join(c['undetermined']) or 'none'}. "
        f"Condition number {number(fit['condition_number'], 3)}, scale {number(fit['scale'], 3)}."
    )
    yield ""
    kinds = ("bootstrap", "sandwich", "profile")
    yield from table(
        [
            "parameter",
            "value",
            "standard error",
            "95 % interval",
            *kinds,
            "conservative",
            "share at the centre",
        ],
        (
            [
                name,
                "-" if value is None else repr(value),
                number(fit["standard_errors"].get(name), 3),
                interval_text(fit["intervals"].get(name)),
                *(interval_text((fit["intervals_by_kind"].get(k) or {}).get(name)) for k in kinds),
                interval_text(fit["conservative"][name]) if name in fit["conservative"] else "-",
                number(fit["term_shares"].get(name), 2),
            ]
            for name, value in fit["parameters"].items()
        ),
    )
    yield "Covariance (clustered sandwich, raw parameters):"
    yield ""
    names = fit["covariance"]["names"]
    yield from table(
        ["", *names],
        (
            [n, *(number(v, 4) for v in row)]
            for n, row in zip(names, fit["covariance"]["matrix"], strict=True)
        ),
    )
    if fit["intercepts"]:
        yield "Intercepts: " + ", ".join(f"{m} {v:+.3f}" for m, v in fit["intercepts"].items()) + "."
        yield ""
    yield from _tests(fit)
    yield from _right_variable(result, fit)
    yield from _flops_ratio(result, where)
    yield from _sensitivity(_block(result["sensitivity"], where))
    yield from _selection(_block(result["selection"], where))
    yield from _hold_outs(_block(result["hold_out"], where))
    yield from _optimum(_block(result["allocation"], where))
    yield from (f"- Warning: {w}" for w in fit["warnings"])
    yield ""


def _block(blocks: Sequence[Mapping[str, Any]], where: Mapping[str, str]) -> Mapping[str, Any]:
    return next((b for b in blocks if all(b[k] == v for k, v in where.items())), {})


def _tests(fit: Mapping[str, Any]) -> Iterator[str]:
    tests = fit["tests"]
    if "floor" in tests:
        t = tests["floor"]
        yield (
            f"- A0 = 0 against A0 > 0: LR {number(t['statistic'], 3)}, p = {number(t['p_value'], 2)} "
            f"(1/2 chi2_0 + 1/2 chi2_1); one-sided 95 % upper bound of A0: {number(t['upper'], 3)}."
        )
    if "size_matters" in tests:
        t = tests["size_matters"]
        yield (
            f"- Does N matter: LR {number(t['statistic'], 4)}, p = {number(t['p_value'], 2)} from "
            f"{t['replicates']} simulations (5 % cut {number(t['critical'], 3)}; "
            f"chi2 with {t['degrees']}: p = {number(t['p_chi2'], 2)})."
        )
    jackknife = fit.get("leave_one_molecule_out", {}).get("intervals", {})
    if jackknife:
        text = ", ".join(f"{k} {interval_text(v)}" for k, v in jackknife.items())
        yield f"- Between molecules (leave one out, t with {fit['n_molecules'] - 1}): {text}."
    yield ""


def _right_variable(result: Mapping[str, Any], fit: Mapping[str, Any]) -> Iterator[str]:
    """Is D' = T S_F the right variable?"""
    apart = next(
        (
            f["tests"]["steps_equal_fraction"]
            for f in result["fits"]
            if "steps_equal_fraction" in f["tests"]
            and all(f[k] == fit[k] for k in ("ansatz", "metric", "scope"))
        ),
        None,
    )
    iso = fit["tests"].get("iso_d_prime")
    if apart is not None:
        yield (
            f"- D' = T S_F: exponent of T minus exponent of S_F {number(apart['difference'], 3)} "
            f"{interval_text((apart['low'], apart['high']))}, p = {number(apart['p_value'], 2)}."
        )
    if iso is not None:
        yield (
            f"- Iso-D' ({iso['runs']} runs in {iso['groups']} groups of equal D' by other T): slope of ln L "
            f"on ln T {number(iso['slope'], 3)} {interval_text((iso['low'], iso['high']))}, "
            f"p = {number(iso['p_value'], 2)}."
        )
    if apart is not None or iso is not None:
        yield ""


def _flops_ratio(result: Mapping[str, Any], where: Mapping[str, str]) -> Iterator[str]:
    models = _block(result["allocation"], where).get("flop_models", {})
    rows = []
    for molecule, m in models.items():
        ratio = m.get("executed_over_estimated")
        cells = [_kappa_text(m.get(k)) for k in ("flops_estimated", "flops_executed")]
        rows.append([molecule, *cells, number(ratio, 3)])
    if rows:
        yield "FLOP per unique sample, kappa(N):"
        yield ""
        yield from table(["molecule", "estimated", "executed", "executed / estimated"], rows)


def _kappa_text(model: Mapping[str, Any] | None) -> str:
    if model is None or "reason" in model:
        return "-" if model is None else str(model["reason"])
    pairs = zip(model["coefficients"], model["powers"], strict=True)
    return " + ".join(f"{k:.4g} N^{p:g}" for k, p in pairs if k) or "-"


def _sensitivity(block: Mapping[str, Any]) -> Iterator[str]:
    rows = block.get("rows", [])
    names = list(dict.fromkeys(n for r in rows for n in (r["parameters"] or {})))
    if not rows:
        return
    yield "Sensitivity (sandwich intervals of the exponents in fit.json):"
    yield ""
    yield from table(
        ["choice", *names],
        (
            [r["what"], *(number(r["parameters"].get(n)) for n in names)]
            if r["parameters"]
            else [r["what"], r["reason"], *[""] * (len(names) - 1)]
            for r in rows
        ),
    )


def _selection(block: Mapping[str, Any]) -> Iterator[str]:
    rows = block.get("rows", [])
    if not rows:
        return
    folds = list(dict.fromkeys(f for r in rows for f in r.get("scores", {})))
    yield "Rival laws, best prediction first (CRPS of ln L left out; AICc and BIC with n = runs break ties):"
    yield ""
    yield from table(
        [
            "law",
            "parameters",
            "AICc",
            "BIC",
            *(f"CRPS, {f} left out" for f in folds),
            "90 % coverage",
            "residuals",
        ],
        (_selection_row(r, folds) for r in rows),
    )


def _selection_row(row: Mapping[str, Any], folds: Sequence[str]) -> list[str]:
    if "refused" in row:
        return [row["law"], row["refused"], *[""] * (len(folds) + 4)]
    scores = row["scores"]
    coverage = [s["coverage_90"] for s in scores.values()]
    worst = min(row["residual_tests"].items(), key=lambda item: item[1]["p_value"], default=None)
    return [
        row["law"],
        str(row["parameters"]),
        number(row.get("aicc"), 5),
        number(row.get("bic"), 5),
        *(number(scores[f]["crps"], 3) if f in scores else "-" for f in folds),
        number(sum(coverage) / len(coverage), 2) if coverage else "-",
        "-" if worst is None else f"{worst[0]}: p = {number(worst[1]['p_value'], 2)}",
    ]


def _hold_outs(block: Mapping[str, Any]) -> Iterator[str]:
    rows = block.get("rows", [])
    if not rows:
        return
    yield f"Hold-outs, predicted before they were read (record sha256 `{block['registered']['sha256']}`):"
    yield ""
    yield from table(
        ["hold-out", "points", "median abs ln error", "CRPS", "coverage of the 90 % PI", "width (ln)"],
        (
            [
                r["name"],
                str(r["n"]),
                *(number(r[k], 3) for k in ("median_abs_log_error", "crps", "coverage_90", "width_90")),
            ]
            for r in rows
        ),
    )


def _optimum(block: Mapping[str, Any]) -> Iterator[str]:
    if not block:
        return
    if block["status"] != "ok":
        yield f"Optimum: {block['status']}: {block['reason']}."
    else:
        yield (
            f"Optimum at linear cost: N* ~ C^{number(block['exponent_N'], 3)} "
            f"{interval_text(block['interval_N'])}, "
            f"D'* ~ C^{number(block['exponent_D'], 3)}; for a budget, its regret band and clamps: `allocate`."
        )
    yield ""


def _others(result: Mapping[str, Any]) -> Iterator[str]:
    others = [f for f in result["fits"] if not f["headline"]]
    if not others:
        return
    yield "## Other fits"
    yield ""
    yield from table(
        ["fit", "parameters", "runs", "certificate"],
        (
            [
                f["id"],
                ", ".join(
                    f"{k} = {number(v)} {interval_text(f['intervals'].get(k))}"
                    for k, v in f["parameters"].items()
                ),
                str(f["n_runs"]),
                "stationary" if f["certificate"]["stationary"] else "NOT STATIONARY",
            ]
            for f in others
        ),
    )


def _refused(result: Mapping[str, Any]) -> Iterator[str]:
    if not result["refused"]:
        return
    yield "## Refused"
    yield ""
    for r in result["refused"]:
        yield f"- {r['ansatz']} {r['metric']} {r['scope']} {r['law']}: {r['reason']}"
    yield ""
