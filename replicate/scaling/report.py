"""What a fit prints: one line per law on the terminal, and the generated page (FIT section 9)."""

from __future__ import annotations

from typing import Any


def interval_text(interval: list[float] | None) -> str:
    return "not determined" if interval is None else f"[{interval[0]:.3g}, {interval[1]:.3g}]"


def summary_of_fit(fit: dict[str, Any]) -> str:
    """`A1 = 1.2e-3 [.., ..]  a1 = .. (..)` with the certificate in words."""
    parts = [
        f"{k} = {v:.4g} {interval_text(fit['intervals'].get(k))}" if v is not None else f"{k} not determined"
        for k, v in fit["parameters"].items()
    ]
    c = fit["certificate"]
    state = "stationary" if c["stationary"] else "NOT STATIONARY"
    return (
        f"{fit['formula']}: "
        + ", ".join(parts)
        + f"; objective {fit['objective']:.6g} ({state}, {c['starts_agreeing']}/{c['starts']} starts), {fit['n_points']} points, {fit['n_runs']} runs"
    )


def summary(result: dict[str, Any]) -> str:
    lines = [f"{f['id']}: {summary_of_fit(f)}" for f in result["fits"]]
    lines += [
        f"{r['ansatz']}/{r['metric']}/{r['scope']}/{r['law']}: refused: {r['reason']}"
        for r in result["refused"]
    ]
    return "\n".join(lines)


def render(result: dict[str, Any]) -> str:
    """The page of a study."""
    return "# Fits of " + result["study"] + "\n\n" + summary(result) + "\n"
