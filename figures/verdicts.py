"""Verdicts on the study's claims and open questions (SCIENCE section 9): statistics, stated
rules, no typed result.

Every rule maps a statistic with its 95 % interval to one of four words: "supported", "not supported",
"undecided"
(the interval does not settle it) and "not yet measured" (the data for the statistic do not exist; the
reason is given).

Equivalence ("similar", "unchanged", "near-linear") needs the whole interval inside a stated band, difference
the whole interval outside it: a wide interval supports neither. A row that picks the most different of
several comparisons carries Bonferroni-corrected intervals; between rows nothing is corrected.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from figures import style
from figures.compute import NEAR_LINEAR, interior
from figures.costs import shares
from figures.data import DIMS, METRICS, StudyData
from figures.effects import changes, pair_variant, usable
from figures.fits import ADDITIVE, ALL, LEVEL, LawFit, summary
from figures.registry import Cell, Column, MissingData, Quantity, Sheet, Table, artefact, number
from figures.scaling import drawable

SUPPORTED, NOT_SUPPORTED, UNDECIDED, NOT_MEASURED = (
    "supported",
    "not supported",
    "undecided",
    "not yet measured",
)
SIMILAR = 0.25  # two elasticities are similar when they differ by at most a quarter of an ansatz's N + D' sum
SAME_ERROR = (0.8, 1.25)  # a ratio in this band is called unchanged (the usual equivalence bounds)
REGISTERED = 10  # registered runs that must have been trained before a verdict (FIT section 7)
COVERED = (0.7, 0.9)  # coverage of 90 % intervals: it must reach the nominal value and rule out the lower one
DOMINANT = 0.5  # a part dominates when it takes more than half


@dataclass(frozen=True)
class Finding:
    """A measured statistic, the verdict its rule gives, and the runs behind it."""

    value: Quantity
    verdict: str
    data: str
    point_ids: tuple[str, ...]


@dataclass(frozen=True)
class Statement:
    """A claim or question with its statistic, rule and measurement (which raises MissingData where it
    cannot be made)."""

    key: str
    source: str
    text: str
    statistic: str
    rule: str
    measure: Callable[[StudyData], Finding]


def positive(value: Quantity) -> str:
    """Supported when the interval lies above 0, not supported when it lies below."""
    if value.low > 0:
        return SUPPORTED
    return NOT_SUPPORTED if value.high < 0 else UNDECIDED


def outside(value: Quantity, low: float, high: float) -> str:
    """Supported when the interval lies wholly outside [low, high]; not supported when wholly inside."""
    if math.isnan(value.low) or math.isnan(value.high):
        return UNDECIDED
    if value.low > high or value.high < low:
        return SUPPORTED
    return NOT_SUPPORTED if low <= value.low and value.high <= high and low < high else UNDECIDED


def inside(value: Quantity, low: float, high: float) -> str:
    """Supported when the interval lies wholly inside [low, high]; not supported when wholly outside."""
    flipped = {SUPPORTED: NOT_SUPPORTED, NOT_SUPPORTED: SUPPORTED, UNDECIDED: UNDECIDED}
    return flipped[outside(value, low, high)]


def _law_data(laws: Sequence[LawFit]) -> str:
    phrases = []
    for law in laws:
        runs = f"{law.record.get('n_runs', '?')} runs"
        where = f"{law.record.get('n_molecules', '?')} molecules" if law.scope == ALL else law.scope
        phrases.append(f"{law.ansatz}, {style.METRIC_NAME[law.metric]}: {runs}, {where}")
    return "; ".join(phrases)


def _decide(words: Sequence[str], every: bool) -> str:
    """One verdict from several: `every` comparison must satisfy the rule, or one is enough."""
    whole, one = (SUPPORTED, NOT_SUPPORTED) if every else (NOT_SUPPORTED, SUPPORTED)
    if one in words:
        return one
    return whole if set(words) == {whole} else UNDECIDED


def _telling(values: Sequence[Quantity], words: Sequence[str], verdict: str) -> int:
    """Position of the comparison to show: the largest one of those that decided the verdict."""
    size = [abs(math.log(v.value)) if v.value > 0 else math.inf for v in values]
    return max((i for i, word in enumerate(words) if word == verdict), key=lambda i: size[i])


def _ids(study: StudyData, laws: Sequence[LawFit]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(i for law in laws for i in study.ids_of(law)))


# -- claim 1 ------------------------------------------------------------------------------------------------


def _size_over_time(kind: str, sign: float) -> Callable[[StudyData], Finding]:
    def measure(study: StudyData) -> Finding:
        law = usable(study.fits, kind, "v_score")
        size, time = law.elasticities(law.at["N"], law.at["D"])
        value = summary(sign * (size - time))
        where = f"; at N = {number(law.at['N'])}, D′ = {number(law.at['D'])}"
        return Finding(value, positive(value), _law_data([law]) + where, _ids(study, [law]))

    return measure


def _size_over_time_range(kind: str, sign: float) -> Callable[[StudyData], Finding]:
    def measure(study: StudyData) -> Finding:
        law = usable(study.fits, kind, "v_score")
        size, time = law.range_effects()
        value = summary(sign * (size - time))
        spans = (
            f"{name} {number(a)} to {number(b)}"
            for name, (a, b) in (("N", law.span("N")), ("D′", law.span("D")))
        )
        return Finding(value, positive(value), f"{_law_data([law])}; {', '.join(spans)}", _ids(study, [law]))

    return measure


# -- claim 2 ------------------------------------------------------------------------------------------------


def _similar(study: StudyData) -> Finding:
    laws = [usable(study.fits, kind, "v_score") for kind in ("transformer", "retnet")]
    n, d = (math.exp(np.mean([math.log(law.at[v]) for law in laws])) for v in ("N", "D"))
    pairs = [law.elasticities(n, d) for law in laws]
    size = min(len(pairs[0][0]), len(pairs[1][0]))
    one, two = ([part[:size] for part in pair] for pair in pairs)
    # A share of the whole, not of the part: two elasticities near 0 are alike, whatever their ratio.
    whole = (sum(one) + sum(two)) / 2
    values = [summary((a - b) / whole, 1 - (1 - LEVEL) / 2) for a, b in zip(one, two, strict=True)]
    words = [inside(value, -SIMILAR, SIMILAR) for value in values]
    verdict = _decide(words, every=True)
    shown = max((i for i in (0, 1) if words[i] == verdict), key=lambda i: abs(values[i].value))
    data = f"{_law_data(laws)}; at N = {number(n)}, D′ = {number(d)}; shown: {('N', 'D′')[shown]}"
    return Finding(values[shown], verdict, data, _ids(study, laws))


# -- claim 3 ------------------------------------------------------------------------------------------------


def _not_linear(kind: str, metric: str) -> Callable[[StudyData], Finding]:
    def measure(study: StudyData) -> Finding:
        law = interior(study, kind, metric)
        value = summary(law.ratio())
        return Finding(value, outside(value, *NEAR_LINEAR), _law_data([law]), _ids(study, [law]))

    return measure


def _differ(study: StudyData, groups: Sequence[Sequence[LawFit]], why: str, what: str) -> Finding:
    """The ratio k_a/k_b of the most different pair of laws within a group; intervals Bonferroni-corrected
    over all pairs. `what`: the attribute of a law in which a pair differs."""
    pairs = [pair for laws in groups for pair in itertools.combinations(laws, 2)]
    if not pairs:
        count = max((len(laws) for laws in groups), default=0)
        raise MissingData(f"{count} law with an interior optimum, two are needed ({why})")
    laws = [law for group in groups if len(group) > 1 for law in group]
    level = 1 - (1 - LEVEL) / len(pairs)
    values = []
    for one, two in pairs:
        first, second = one.ratio(), two.ratio()
        size = min(len(first), len(second))
        values.append(summary(first[:size] / second[:size], level))
    words = [outside(value, *NEAR_LINEAR) for value in values]
    verdict = _decide(words, every=False)
    most = _telling(values, words, verdict)
    names = " / ".join(str(getattr(law, what)) for law in pairs[most])
    return Finding(values[most], verdict, f"{_law_data(laws)}; shown: {names}", _ids(study, laws))


def _collect(study: StudyData, cases: Sequence[tuple[str, str]]) -> tuple[list[LawFit], str]:
    laws, gaps = [], []
    for kind, metric in cases:
        try:
            laws.append(interior(study, kind, metric))
        except MissingData as gap:
            gaps.append(str(gap))
    return laws, "; ".join(gaps) or "none refused"


def _kinds(study: StudyData) -> list[str]:
    return list(dict.fromkeys(law.ansatz for law in study.need_fits().laws))


def _by_ansatz(metric: str) -> Callable[[StudyData], Finding]:
    def measure(study: StudyData) -> Finding:
        laws, why = _collect(study, [(kind, metric) for kind in _kinds(study)])
        return _differ(study, [laws], why, "ansatz")

    return measure


def _by_metric(kind: str) -> Callable[[StudyData], Finding]:
    def measure(study: StudyData) -> Finding:
        study.need_fits()
        laws, why = _collect(study, [(kind, metric) for metric in METRICS])
        return _differ(study, [laws], why, "metric")

    return measure


# -- claim 4 ------------------------------------------------------------------------------------------------


def _local_share(how: str) -> Callable[[StudyData], Finding]:
    def measure(study: StudyData) -> Finding:
        points = study.need_headline()
        found: list[np.ndarray] = []
        used: list[str] = []
        for (molecule, kind), rows in points.groups("molecule", "ansatz"):
            result = shares(study, rows, kind, molecule, how)
            if result is not None:
                found.append(result[0].get("local energy", np.zeros(len(result[1]))))
                used += result[1].ids
        if not found:
            raise MissingData(f"the cube stores no {how} parts of a step")
        values = np.concatenate(found)
        value = Quantity(float(np.median(values)), float(values.min()), float(values.max()))
        verdict = (
            SUPPORTED if value.low > DOMINANT else (NOT_SUPPORTED if value.high < DOMINANT else UNDECIDED)
        )
        return Finding(value, verdict, f"{len(values)} runs", tuple(used))

    return measure


# -- open questions and next checks -------------------------------------------------------------------------


def _modulus_phase(kind: str) -> Callable[[StudyData], Finding]:
    def measure(study: StudyData) -> Finding:
        fits = study.need_fits()
        law = fits.get(kind, "v_score", ALL, "modulus_phase")
        if law is None:
            raise MissingData(f"{kind}: {fits.refusal(kind, 'v_score', ALL, 'modulus_phase')}")
        if not law.stationary:
            raise MissingData(f"{kind}: the modulus/phase fit has no stationary certificate")
        columns = law.stacked()
        if not math.isfinite(columns["a1"][0] - columns["a3"][0]):
            raise MissingData(f"{kind}: the fit finds one term only, no second exponent to compare")
        value = summary(columns["a1"] - columns["a3"])
        return Finding(value, outside(value, -0.1, 0.1), _law_data([law]), _ids(study, [law]))

    return measure


def _variants(study: StudyData, wanted: Callable[[str, object], bool], what: str) -> list[str]:
    names = [
        name
        for name in study.variants
        if name != study.main_variant
        and (c := changes(study, name))
        and all(wanted(k, v) for k, v in c.items())
    ]
    if not names:
        raise MissingData(f"the study has no variant with {what}")
    return names


def _unchanged(
    wanted: Callable[[str, object], bool], what: str, rule: Callable[[Quantity], str], every: bool
) -> Callable[[StudyData], Finding]:
    """The V-score ratio of the most different matching variant; `every`: all must satisfy the
    rule, else one."""

    def measure(study: StudyData) -> Finding:
        names = _variants(study, wanted, what)
        level = 1 - (1 - LEVEL) / len(names)
        pairs = [pair_variant(study, name, "v_score", level) for name in names]
        words = [rule(pair.ratio) for pair in pairs]
        verdict = _decide(words, every)
        most = pairs[_telling([pair.ratio for pair in pairs], words, verdict)]
        data = "; ".join(f"{p.variant}: {p.pairs} pairs" for p in pairs)
        data += f"; shown: {most.variant}" if len(pairs) > 1 else ""
        return Finding(most.ratio, verdict, data, tuple(dict.fromkeys(i for p in pairs for i in p.point_ids)))

    return measure


def _is_sampled(key: str, value: object) -> bool:
    return key == "local_energy" and value == "sampled"


def _is_schedule(key: str, value: object) -> bool:
    return key in {"sampling.schedule", "sampling.n_min", "sampling.n_max", "sampling.growth_fraction"}


def _by_molecule(study: StudyData) -> Finding:
    laws = [
        law
        for law in study.need_fits().laws
        if law.law == ADDITIVE
        and law.metric == "v_score"
        and law.scope != ALL
        and law.stationary
        and law.estimates.get("A1", 0) > 0
        and law.estimates.get("A2", 0) > 0
    ]
    groups = [
        [law for law in laws if law.ansatz == kind] for kind in dict.fromkeys(law.ansatz for law in laws)
    ]
    if all(len(group) < 2 for group in groups):
        raise MissingData("no ansatz has laws of two single molecules with both terms")
    return _differ(study, groups, "single molecules", "scope")


def _beyond_thirty(study: StudyData) -> Finding:
    """Slope of ln(observed) on ln(law without intercept) within a molecule of more than 30 spin-orbitals."""
    large = [m for m, facts in study.molecules.items() if facts["n_spin_orbitals"] > 30]
    rows = study.done.only(variant=study.main_variant)
    rows = drawable(rows.where(np.isin(rows["molecule"], large)), "v_score")
    if not len(rows):
        raise MissingData("no run of a molecule with more than 30 spin-orbitals")
    x, y, group = [], [], []
    used: list[str] = []
    for (molecule, kind), part in rows.groups("molecule", "ansatz"):
        law = usable(study.fits, kind, "v_score")
        curves = np.vstack(
            [
                law.value(part["n_total"], part["d_prime"])[None],
                law.draw_values(part["n_total"], part["d_prime"]),
            ]
        )
        x.append(np.log(curves))
        y.append(np.log(part["v_score"]))
        group += [f"{molecule}/{kind}"] * len(part)
        used += part.ids
    draws = min(len(curves) for curves in x)
    value = _slope(np.hstack([curves[:draws] for curves in x]), np.concatenate(y), np.array(group))
    return Finding(value, inside(value, *SAME_ERROR), f"{len(used)} runs of {', '.join(large)}", tuple(used))


def _slope(x: np.ndarray, y: np.ndarray, groups: np.ndarray) -> Quantity:
    """Slope of y (runs,) on x (1 + B, runs) within groups, the estimate's x first.

    The 95 % interval resamples runs (fixed seed) and takes another draw of the law each time, so that it
    holds the uncertainty of both.
    """
    count = len(y)
    if count < 6 or np.ptp(x[0]) < 1e-6:
        raise MissingData(f"{count} runs that span too little to check the law's shape")
    rng = np.random.default_rng(0)
    resamples = rng.multinomial(count, np.full(count, 1 / count), size=len(x) - 1)
    weights = np.vstack([np.ones(count), resamples])
    top, bottom = np.zeros(len(x)), np.zeros(len(x))
    for name in dict.fromkeys(groups.tolist()):
        mask = groups == name
        w, a, b = weights[:, mask], x[:, mask], np.broadcast_to(y[mask], (len(x), int(mask.sum())))
        total = np.maximum(w.sum(axis=1, keepdims=True), 1)
        a = a - (w * a).sum(axis=1, keepdims=True) / total
        b = b - (w * b).sum(axis=1, keepdims=True) / total
        top += (w * a * b).sum(axis=1)
        bottom += (w * a * a).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return summary(top / bottom)


def _overcounts(study: StudyData) -> Finding:
    points = study.need_headline()
    good = (points["flops_estimated"] > 0) & (points["flops_executed"] > 0)
    points = points.where(good)
    if not len(points):
        raise MissingData("no run has both FLOP counts")
    ratio = points["flops_estimated"] / points["flops_executed"]
    value = Quantity(float(np.exp(np.mean(np.log(ratio)))), float(ratio.min()), float(ratio.max()))
    verdict = (
        SUPPORTED
        if value.low > SAME_ERROR[1]
        else (NOT_SUPPORTED if value.high <= SAME_ERROR[1] else UNDECIDED)
    )
    return Finding(value, verdict, f"{len(points)} runs", tuple(points.ids))


def _registered(chosen: Callable[[str], bool], metric: str, what: str) -> Callable[[StudyData], Finding]:
    """Share of registered predictions of a metric inside their 90 % interval, over the variants `chosen`.

    The fit file registers predictions of held-out runs, sealed by a hash, before it reads their results.
    """

    def measure(study: StudyData) -> Finding:
        place = {
            tuple(map(str, key)): i
            for i, key in enumerate(zip(*(study.points[d] for d in DIMS), strict=True))
        }
        hits: list[bool] = []
        widths: list[float] = []
        used: list[str] = []
        for entry in study.need_fits().record.get("hold_out") or []:
            record = entry.get("registered") or {}
            if entry.get("metric") != metric or not record or not _sealed(record):
                continue
            for point in record.get("points", []):
                row = place.get(tuple(str(point.get(d)) for d in DIMS))
                if row is None or study.points["status"][row] != 1 or not chosen(str(point["variant"])):
                    continue
                low, high = (float(v) for v in point["interval_90"])
                hits.append(low <= float(study.points[metric][row]) <= high)
                widths.append(math.log(high / low) if 0 < low <= high else math.nan)
                used.append(study.points.ids[row])
        if not hits:
            raise MissingData(what)
        value = _wilson(sum(hits), len(hits))
        enough = len(hits) >= REGISTERED and value.low > COVERED[0]
        verdict = NOT_SUPPORTED if value.high < COVERED[1] else (SUPPORTED if enough else UNDECIDED)
        wide = number(math.exp(float(np.median(widths))), 2)
        data = f"{len(hits)} registered runs; the median interval spans a factor of {wide}"
        return Finding(value, verdict, data, tuple(dict.fromkeys(used)))

    return measure


def _sealed(record: Mapping[str, Any]) -> bool:
    """Whether a registered prediction still carries the hash of its own content."""
    content = {key: value for key, value in record.items() if key != "sha256"}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest() == record.get("sha256")


def _wilson(hits: int, count: int) -> Quantity:
    """Share with its Wilson 95 % interval."""
    z, share = 1.959964, hits / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return Quantity(share, centre - half, centre + half)


_PREDICTS = (
    f"supported: {REGISTERED} runs or more, interval above {COVERED[0]:g} and reaches {COVERED[1]:g}; "
    f"not supported: below {COVERED[1]:g}"
)
_ABOVE = "supported: interval above 0; not supported: below 0"
_OUT = f"supported: interval outside [{NEAR_LINEAR[0]:g}, {NEAR_LINEAR[1]:g}]; not supported: inside"
_SAME = f"supported: interval inside [{SAME_ERROR[0]:g}, {SAME_ERROR[1]:g}]; not supported: outside"


def statements() -> list[Statement]:
    """Every claim, question and check of the study, in its order."""
    known = ("made", "transformer", "retnet")
    rows = []
    for kind in ("transformer", "retnet"):
        rows.append(
            Statement(
                f"1-{kind}",
                "claim 1",
                f"Model size moves the V-score more than training time ({kind})",
                "elasticity in N minus elasticity in D′",
                _ABOVE,
                _size_over_time(kind, 1.0),
            )
        )
    rows.append(
        Statement(
            "1-made",
            "claim 1",
            "Training time moves the V-score more than model size (made)",
            "elasticity in D′ minus elasticity in N",
            _ABOVE,
            _size_over_time("made", -1.0),
        )
    )
    for kind, more, less, sign in (
        ("transformer", "Model size", "training time", 1.0),
        ("retnet", "Model size", "training time", 1.0),
        ("made", "Training time", "model size", -1.0),
    ):
        terms = ("N", "D′") if sign > 0 else ("D′", "N")
        rows.append(
            Statement(
                f"1-range-{kind}",
                "claim 1",
                f"{more} moves the V-score more than {less} over the range of the runs ({kind})",
                f"fall of ln V over the range of {terms[0]} minus that over {terms[1]}",
                _ABOVE,
                _size_over_time_range(kind, sign),
            )
        )
    rows.append(
        Statement(
            "2",
            "claim 2",
            "Transformer and RetNet scale similarly",
            "difference of elasticities in N and in D′, over their mean sum, same N and D′ (Bonferroni)",
            f"supported: both intervals inside ±{SIMILAR:g}; not supported: one outside",
            _similar,
        )
    )
    for metric in METRICS:
        for kind in known:
            rows.append(
                Statement(
                    f"3-{kind}-{metric}",
                    "claim 3",
                    f"The optimal D′ : N relation is not near-linear ({kind}, {style.METRIC_NAME[metric]})",
                    "k in D′* ~ N*^k",
                    _OUT,
                    _not_linear(kind, metric),
                )
            )
    for metric in METRICS:
        rows.append(
            Statement(
                f"3-ansatz-{metric}",
                "claim 3",
                f"The optimal relation depends on the ansatz ({style.METRIC_NAME[metric]})",
                "ratio of k, most different pair (Bonferroni)",
                f"supported: one interval outside [{NEAR_LINEAR[0]:g}, {NEAR_LINEAR[1]:g}]; not "
                f"supported: all inside",
                _by_ansatz(metric),
            )
        )
    for kind in known:
        rows.append(
            Statement(
                f"3-metric-{kind}",
                "claim 3",
                f"The optimal relation depends on the metric ({kind})",
                "ratio of k between V-score and absolute error",
                _OUT,
                _by_metric(kind),
            )
        )
    share = f"supported: every run above {DOMINANT:g}; not supported: every run below"
    for how, label in (
        ("estimated", "the study's FLOP accounting"),
        ("executed", "executed FLOPs"),
        ("measured", "measured time"),
    ):
        rows.append(
            Statement(
                f"4-{how}",
                "claim 4",
                f"The local energy dominates the compute ({label})",
                "share of a step: median [lowest, highest run]",
                share,
                _local_share(how),
            )
        )
    for kind in known:
        rows.append(
            Statement(
                f"q1-{kind}",
                "open question 1",
                f"Modulus and phase networks scale differently ({kind}, V-score)",
                "exponent of N_mod minus exponent of N_ph",
                "supported: interval outside ±0.1; not supported: inside",
                _modulus_phase(kind),
            )
        )
    rows += [
        Statement(
            "q2",
            "open question 2",
            "Neglecting unsampled states in the local energy leaves the V-score unchanged",
            "V-score ratio sampled/main, same cells",
            _SAME,
            _unchanged(_is_sampled, 'local_energy = "sampled"', lambda q: inside(q, *SAME_ERROR), True),
        ),
        Statement(
            "q3",
            "open question 3",
            "The Hamiltonian's structure shapes the optimal relation: k differs between molecules",
            "ratio of k, most different pair of molecules (Bonferroni)",
            f"supported: one interval outside [{NEAR_LINEAR[0]:g}, {NEAR_LINEAR[1]:g}]; not supported: "
            f"all inside",
            _by_molecule,
        ),
        Statement(
            "q4",
            "open question 4",
            "The sampling schedule changes the V-score",
            "V-score ratio to main, most different schedule, same cells",
            f"supported: one interval outside [{SAME_ERROR[0]:g}, {SAME_ERROR[1]:g}]; not supported: all "
            f"inside",
            _unchanged(_is_schedule, "another sampling schedule", lambda q: outside(q, *SAME_ERROR), False),
        ),
        Statement(
            "n1",
            "next check",
            "The law's shape holds beyond 30 spin-orbitals",
            "slope of ln V on the law's ln V within a molecule",
            _SAME,
            _beyond_thirty,
        ),
        Statement(
            "n2",
            "next check",
            "Reuse makes the no-reuse FLOP estimate overcount",
            "estimated/executed FLOPs: geometric mean [lowest, highest run]",
            f"supported: every run above {SAME_ERROR[1]:g}; not supported: none",
            _overcounts,
        ),
    ]
    for metric in METRICS:
        rows.append(
            Statement(
                f"n4-{metric}",
                "next check",
                f"The law predicts runs that it was not fitted to ({style.METRIC_NAME[metric]})",
                "share of registered held-out runs inside their 90 % interval (Wilson, runs as independent)",
                _PREDICTS,
                _registered(
                    lambda variant: not variant.startswith("optimum"),
                    metric,
                    "no finished held-out run was registered with the fit",
                ),
            )
        )
    for metric in METRICS:
        rows.append(
            Statement(
                f"n3-{metric}",
                "next check",
                "A run trained at the predicted optimum ends where the law says "
                f"({style.METRIC_NAME[metric]})",
                "share of registered runs inside their 90 % interval (Wilson, runs as independent)",
                _PREDICTS,
                _registered(
                    lambda variant: variant.startswith("optimum"),
                    metric,
                    "no finished run of an optimum variant was registered with the fit",
                ),
            )
        )
    return rows


@artefact(
    "verdicts",
    title="Verdicts",
    question="Do the study's claims hold in these data, and what do they say on its open questions?",
    section="verdicts",
    kind="table",
    needs=("final", "fit", "molecule"),
)
def verdicts(study: StudyData) -> Sheet:
    """One row per claim, open question and next check; nothing here is typed in."""
    if not len(study.points):
        raise MissingData("the cube holds no run")
    rows: list[dict[str, Cell]] = []
    for statement in statements():
        row: dict[str, Cell] = {
            "key": statement.key,
            "source": statement.source,
            "statement": statement.text,
            "statistic": statement.statistic,
            "rule": statement.rule,
        }
        try:
            finding = statement.measure(study)
        except MissingData as gap:
            row |= {"value": None, "verdict": NOT_MEASURED, "data": str(gap), "point_ids": ""}
        else:
            row |= {
                "value": finding.value,
                "verdict": finding.verdict,
                "data": finding.data,
                "point_ids": " ".join(finding.point_ids),
            }
        rows.append(row)
    columns = (
        Column("statement", "statement"),
        Column("verdict", "verdict"),
        Column("value", "value"),
        Column("statistic", "statistic"),
        Column("rule", "rule", under="statistic"),
        Column("data", "data, or why there is no value"),
        Column("source", "source", under="statement"),
        Column("key", "key", csv_only=True),
        Column("point_ids", "point ids", csv_only=True),
    )
    tally = {
        word: sum(row["verdict"] == word for row in rows)
        for word in (SUPPORTED, NOT_SUPPORTED, UNDECIDED, NOT_MEASURED)
    }
    drawn = len(rows) - tally[NOT_MEASURED]
    caption = (
        "Verdicts computed from the statistics and rules shown; brackets: 95 % intervals unless the "
        "statistic says otherwise. "
        "Rows that pick the most different of several comparisons are Bonferroni-corrected; between rows "
        f"nothing is corrected, so of {drawn} measured rows a few may be decided by chance. "
        "They speak of this replication's runs only. "
        + ", ".join(f"{count} {word}" for word, count in tally.items())
        + "."
    )
    return Sheet(Table(columns, tuple(rows)), caption, (study.stale_fit,) if study.stale_fit else ())
