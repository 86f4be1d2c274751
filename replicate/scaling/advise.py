"""`allocate`: what a fit recommends for a molecule and a budget, with intervals and guards (FIT 7)."""

from __future__ import annotations

import itertools
import json
import math
import tomllib
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from replicate import flops
from replicate.scaling import allocate, validate
from replicate.scaling.allocate import Kappa
from replicate.scaling.describe import clean
from replicate.scaling.law import parse_law
from replicate.spec import MoleculeSpec, UserError

#: Relative width step of the ladder of feasible networks between the study's sizes.
LADDER = 400


@dataclass(frozen=True)
class Target:
    """The molecule of the question: n spin-orbitals, M unique flips, |S|, unique samples per step."""

    name: str
    n_spin_orbitals: int
    n_unique_flips: int | None
    search_space: float
    unique_per_step: float
    in_study: bool


@dataclass(frozen=True)
class Network:
    """A feasible network: its parameter counts and the hyper-parameters that give them."""

    n_total: int
    n_modulus: int
    params: dict[str, Any]
    phase: dict[str, int]


def advise(args: Namespace) -> dict[str, Any]:
    """Everything `allocate` prints, as a JSON-able dictionary."""
    if not (args.budget > 0 and math.isfinite(args.budget)):
        raise UserError(f"--budget {args.budget:g}: must be a positive number of FLOP")
    result, path = load_fit(args.fit)
    block = _find(result["allocation"], path, ansatz=args.ansatz, metric=args.metric)
    if args.networks:
        return advise_networks(args, result, block, path)
    entry = next(f for f in result["fits"] if f["id"] == block["fit"])
    target = find_target(args, block, path)
    spec = tomllib.loads(result["spec"])
    out: dict[str, Any] = {
        "molecule": target.name, "ansatz": args.ansatz, "metric": args.metric, "budget": args.budget,
        "flops": args.flops, "fit": entry["id"], "status": block["status"], "reason": block["reason"],
        "in_study": target.in_study,
    }  # fmt: skip
    if block["status"] != "ok":
        return clean(out)
    kappa = find_kappa(args, block, target, spec)
    group, points = load_draws(path, entry["id"])
    p = {k: entry["parameters"][k] for k in ("A0", "A1", "a1", "A2", "a2")}
    best = allocate.optimum(p["A1"], p["a1"], p["A2"], p["a2"], args.budget, target.search_space, kappa)
    covariance = log_covariance(group)
    spread = allocate.spread(p, group, covariance, args.budget, target.search_space, kappa)
    band = allocate.regret_band(**p, budget=args.budget, space=target.search_space, kappa=kappa)
    ranges = {v: (entry["variables"][v]["min"], entry["variables"][v]["max"]) for v in ("N", "D")}
    clamped = allocate.clamp(
        float(best.log_n),
        float(best.log_d),
        ranges["N"],
        ranges["D"],
        args.budget,
        target.search_space,
        kappa,
    )
    flags = list(clamped.flags)
    network = nearest_network(feasible_networks(spec, args.ansatz, target.n_spin_orbitals), clamped.n)
    n_used = clamped.n if network is None else float(network.n_total)
    d_used = clamped.d_prime
    if network is not None and not any("off the budget" in f for f in flags):
        d_used = args.budget / (target.search_space * float(kappa(n_used)))
    fraction = min(1.0, target.unique_per_step / target.search_space)
    steps = max(1, round(d_used / fraction))
    d_used = steps * fraction
    prediction = predict(entry, group, points, target, n_used, d_used)
    arms = None
    if args.arms is not None:
        arms = register_arms(args, result, entry, (group, points), target, kappa, clamped.n, fraction)
    if prediction["unseen_molecule"]:
        flags.append("the molecule is not in the study: its intercept is drawn from the others'")
    return clean(
        out
        | {
            "n_optimal": float(np.exp(best.log_n)),
            "d_prime_optimal": float(np.exp(best.log_d)),
            "exponent_n": float(best.exponent),
            "interval_n": spread.interval,
            "interval_n_delta": spread.delta_interval,
            "interval_d_prime": spread.d_interval,
            "interval_exponent": spread.exponent_interval,
            "sd_log_n": {"draws": spread.sd_draws, "delta": spread.sd_delta},
            "regret_band_n": {"share": allocate.REGRET, "interval": band},
            "n": n_used,
            "network": None if network is None else {"params": network.params, "phase": network.phase},
            "d_prime": d_used,
            "search_fraction": fraction,
            "steps": steps,
            "flop_spent": target.search_space * d_used * float(kappa(n_used)),
            "kappa": {"coefficients": kappa.coefficients, "powers": kappa.powers, "source": kappa.source},
            "prediction": prediction,
            "arms": arms,
            "flags": flags,
        }
    )


#: Draws pushed through the geometric program, which is solved one by one.
NETWORK_DRAWS = 500


def advise_networks(
    args: Namespace, result: Mapping[str, Any], block: Mapping[str, Any], path: Path
) -> dict[str, Any]:
    """N_mod*, N_ph* and D'* from the law with separate networks (a geometric program, FIT section 7)."""
    split = block.get("modulus_phase")
    if split is None:
        raise UserError(
            f"{path}: no fit with separate networks for {args.ansatz} {args.metric} (see `refused`)"
        )
    entry = next(f for f in result["fits"] if f["id"] == split["fit"])
    out: dict[str, Any] = {
        "molecule": args.molecule, "ansatz": args.ansatz, "metric": args.metric, "budget": args.budget,
        "flops": args.flops, "fit": entry["id"], "status": split["status"], "reason": split["reason"],
    }  # fmt: skip
    if split["status"] != "ok":
        return clean(out)
    if args.molecule not in split["costs"]:
        raise UserError(f"{args.molecule} is not in the study: the costs of its two networks are not known")
    cost = split["costs"][args.molecule].get(f"flops_{args.flops}", {"reason": "no such FLOPs in the cube"})
    if "reason" in cost:
        raise UserError(f"{args.molecule}: {cost['reason']}")
    space = block["flop_models"][args.molecule]["search_space"]
    names = [n for pair in allocate.MODULUS_PHASE_TIME for n in pair]

    def best(p: Mapping[str, float]) -> tuple[float, float, float]:
        law = {n: float(p[n]) for n in names}
        return allocate.modulus_phase_optimum(**law, budget=args.budget, space=space, **cost)

    draws, _ = load_draws(path, entry["id"])
    good = np.all([np.isfinite(draws[n]) & (draws[n] > 0) for n in names], axis=0)
    chosen = np.flatnonzero(good)[:NETWORK_DRAWS]
    cloud = np.exp([best({n: draws[n][i] for n in names}) for i in chosen])
    centre = np.exp(best(entry["parameters"]))
    ends = np.percentile(cloud, [2.5, 97.5], axis=0)
    flags = []
    for i, v in enumerate(("M", "P", "D")):
        low, high = entry["variables"][v]["min"], entry["variables"][v]["max"]
        if not low <= centre[i] <= high:
            flags.append(f"{v}* = {centre[i]:.3g} is outside the fitted range {low:.3g} to {high:.3g}")
    spent = np.array([cost["k_modulus"], cost["k_phase"]]) * centre[:2]
    keys = ("n_modulus", "n_phase", "d_prime")
    return clean(
        out
        | {f"{k}_optimal": centre[i] for i, k in enumerate(keys)}
        | {f"interval_{k}": ends[:, i] for i, k in enumerate(keys)}
        | {"flop_share_phase": spent[1] / spent.sum(), "flags": flags}
    )


def register_arms(
    args: Namespace,
    result: Mapping[str, Any],
    entry: Mapping[str, Any],
    cloud: tuple[dict[str, np.ndarray], np.ndarray],
    target: Target,
    kappa: Kappa,
    n: float,
    fraction: float,
) -> dict[str, Any]:
    """The test of the prediction, to be registered before anything is trained (FIT section 7):
    arms N*/f, N*, N* f on one IsoFLOP curve, what is predicted for each, and the seeds that the
    neighbours need to be told apart."""
    p, factor = entry["parameters"], float(args.arms)
    if not factor > 1 or not math.isfinite(factor):
        raise UserError(f"--arms {args.arms:g}: the factor must be above 1 (4 to 16 are sensible)")
    arms = []
    for size in (n / factor, n, n * factor):
        d_prime = args.budget / (target.search_space * float(kappa(size)))
        low, high = entry["variables"]["N"]["min"], entry["variables"]["N"]["max"]
        arms.append(
            {
                "n": size,
                "d_prime": d_prime,
                "steps": max(1, round(d_prime / fraction)),
                "inside_fitted_range": bool(low <= size <= high),
                "prediction": predict(entry, *cloud, target, size, d_prime),
            }
        )
    sigma = float(np.std(cloud[1], ddof=1))
    values = [arm["prediction"]["value"] for arm in arms]
    share = p["A0"] / float(parse_law(entry["formula"], ("N", "D"))(p, {"N": n, "D": arms[1]["d_prime"]}))
    content = {
        "fit": entry["id"],
        "cube_sha256": result["cube_sha256"],
        "molecule": target.name,
        "budget": args.budget,
        "flops": args.flops,
        "factor": factor,
        "arms": arms,
        "both_neighbours_worse": bool(values[1] < min(values[0], values[2])),
        "seeds_per_arm": validate.seeds_needed(sigma, p["a1"], p["a2"], factor, floor_share=share),
    }
    return validate.register(clean(content))


def load_fit(path: Path) -> tuple[dict[str, Any], Path]:
    """fit.json, given itself, its folder, or the fit.nc beside it."""
    file = (
        path / "fit.json" if path.is_dir() else path.with_name("fit.json") if path.suffix == ".nc" else path
    )
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{file}: not a fit: {error}") from None
    if not isinstance(result, dict) or result.get("kind") != "cube" or result.get("schema") != 1:
        raise UserError(f"{file}: not the fit of a cube (schema 1)")
    return result, file


def _find(blocks: list[dict[str, Any]], path: Path, **wanted: str) -> dict[str, Any]:
    for block in blocks:
        if all(block[k] == v for k, v in wanted.items()):
            return block
    have = sorted({f"{b['ansatz']} {b['metric']}" for b in blocks})
    raise UserError(
        f"{path}: no allocation for {' '.join(wanted.values())}; there is {', '.join(have) or 'none'}"
    )


def load_draws(path: Path, fit_id: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Bootstrap draws by parameter name, (B,) each, and the log residuals of the fit."""
    file = path.with_name("fit.nc")
    try:
        with xr.open_datatree(file, engine="netcdf4") as tree:
            group = tree[fit_id].to_dataset().load()
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{file}: no draws of {fit_id}: {error}") from None
    if group.sizes["replicate"] == 0:
        raise UserError(f"{file}: the fit was made without bootstrap; run fit again with --bootstrap")
    draws = {str(n): group["draws"].sel(parameter=n).values for n in group["parameter"].values}
    residual = group["residual"].values[~group["censored"].values.astype(bool)]
    return draws, residual


def log_covariance(draws: Mapping[str, np.ndarray]) -> np.ndarray:
    """(4, 4) covariance of (ln A1, a1, ln A2, a2) over the draws."""
    columns = [draws[k] for k in ("A1", "a1", "A2", "a2")]
    good = np.all([np.isfinite(c) & (c > 0) for c in columns], axis=0)
    a, e, b, f = (c[good] for c in columns)
    return np.cov(np.stack([np.log(a), e, np.log(b), f]))


def find_target(args: Namespace, block: Mapping[str, Any], path: Path) -> Target:
    """The molecule from the study, from --n --M --S, or from the table of molecules."""
    models = block["flop_models"]
    typical = float(np.median([m["unique_per_step"] for m in models.values()]))
    if args.batch is not None and args.batch < 1:
        raise UserError(f"--batch {args.batch}: must be at least 1")
    if args.molecule in models:
        m = models[args.molecule]
        unique = m["unique_per_step"] if args.batch is None else min(args.batch, m["search_space"])
        return Target(
            args.molecule,
            int(m["n_spin_orbitals"]),
            int(m["n_unique_flips"]),
            m["search_space"],
            unique,
            True,
        )
    n, flips, space = args.n, args.unique_flips, args.search_space
    if None in (n, flips, space):
        table = _molecule_table(args)
        n = table.n_spin_orbitals if n is None else n
        flips = table.unique_flips if flips is None else flips
        space = table.search_space if space is None else space
    missing = [o for o, v in (("--n", n), ("--M", flips), ("--S", space)) if v is None]
    if missing:
        raise UserError(f"{args.molecule}: give {', '.join(missing)} (see `molecule {args.molecule}`)")
    if min(n, flips, space) < 1 or n % 2:
        raise UserError(f"{args.molecule}: n = {n} (even), M = {flips} and |S| = {space} must be positive")
    batch = typical if args.batch is None else float(args.batch)
    return Target(args.molecule, n, flips, float(space), min(batch, float(space)), False)


def _molecule_table(args: Namespace) -> MoleculeSpec:
    try:
        tables = tomllib.loads(args.molecules.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(
            f"{args.molecule} is not in the study and {args.molecules} cannot be read: give --n, --M and --S"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{args.molecules}: not valid TOML: {error}") from None
    if args.molecule not in tables:
        raise UserError(
            f"{args.molecule} is neither in the study nor in {args.molecules}: give --n, --M and --S"
        )
    try:
        return MoleculeSpec(**{**tables[args.molecule], "name": args.molecule})
    except ValueError as error:
        raise UserError(f"{args.molecules}: {args.molecule}: {error}".splitlines()[0]) from None


def find_kappa(args: Namespace, block: Mapping[str, Any], target: Target, spec: Mapping[str, Any]) -> Kappa:
    """FLOP per unique sample as a function of N: from the study's own points, or from the closed forms."""
    key = f"flops_{args.flops}"
    if target.in_study:
        model = block["flop_models"][target.name].get(key, {"reason": f"the cube has no {key}"})
        if "reason" in model:
            raise UserError(f"{target.name}: no FLOP model: {model['reason']}")
        return Kappa(tuple(model["coefficients"]), tuple(model["powers"]), model["source"])
    if args.flops == "executed":
        raise UserError(
            f"{target.name} is not in the study: nothing was executed on it; use --flops estimated"
        )
    networks = _sizes(spec, args.ansatz, target.n_spin_orbitals)
    kind = _kind(spec, args.ansatz)
    assert target.n_unique_flips is not None
    if not networks:
        return allocate.linear_kappa(kind, target.n_spin_orbitals, target.n_unique_flips, 0.5)
    cost = [
        flops.estimate_sample(
            kind, net.params, net.phase["width"], net.phase["depth"],
            n_qubits=target.n_spin_orbitals, n_unique_flips=target.n_unique_flips,
        )["total"]
        for net in networks
    ]  # fmt: skip
    n = np.array([net.n_total for net in networks], float)
    return allocate.fitted_kappa(
        n, np.array(cost, float), 1.0, np.ones(n.size), f"closed forms at the study's sizes, {kind}"
    )


def _kind(spec: Mapping[str, Any], ansatz: str) -> str:
    return str(spec.get("ansatz", {}).get(ansatz, {}).get("kind", ansatz))


def _sizes(spec: Mapping[str, Any], ansatz: str, n_qubits: int) -> list[Network]:
    """The study's networks of the base variant on n qubits, by size."""
    table, phase = spec.get("ansatz", {}).get(ansatz, {}), spec.get("phase", {})
    kind = _kind(spec, ansatz)
    common = {k: v for k, v in table.items() if k not in ("sizes", "kind")}
    out = []
    for label, cell in table.get("sizes", {}).items():
        params = {"depth": 1} | common | cell if kind == "made" else common | cell
        own = (
            {"depth": 1}
            | {k: v for k, v in phase.items() if k != "sizes"}
            | phase.get("sizes", {}).get(label, {})
        )
        try:
            out.append(_network(kind, params, int(own["width"]), int(own["depth"]), n_qubits))
        except (KeyError, TypeError, ValueError):
            return []
    return sorted(out, key=lambda net: net.n_total)


def _network(kind: str, params: Mapping[str, Any], width: int, depth: int, n_qubits: int) -> Network:
    modulus = flops.modulus_parameters(kind, params, n_qubits)
    phase = flops.phase_parameters(width, depth, n_qubits)
    return Network(modulus + phase, modulus, dict(params), {"width": width, "depth": depth})


def feasible_networks(spec: Mapping[str, Any], ansatz: str, n_qubits: int) -> list[Network]:
    """Networks with whole widths between the study's sizes, widths interpolated in log, d
    divided by heads."""
    kind, sizes = _kind(spec, ansatz), _sizes(spec, ansatz, n_qubits)
    found: dict[int, Network] = {net.n_total: net for net in sizes}
    for low, high in itertools.pairwise(sizes):
        for t in np.linspace(0, 1, LADDER // max(len(sizes) - 1, 1)):
            params = dict(low.params)
            for key in ("width", "d", "ff", "depth", "layers"):
                if key in params:
                    a, b = float(low.params[key]), float(high.params[key])
                    params[key] = max(1, round(math.exp((1 - t) * math.log(a) + t * math.log(b))))
            if "heads" in params:
                unit = int(params["heads"]) * (2 if kind == "retnet" else 1)
                params["d"] = max(unit, unit * round(params["d"] / unit))
            a, b = low.phase["width"], high.phase["width"]
            width = max(1, round(math.exp((1 - t) * math.log(a) + t * math.log(b))))
            net = _network(kind, params, width, low.phase["depth"], n_qubits)
            found.setdefault(net.n_total, net)
    return sorted(found.values(), key=lambda net: net.n_total)


def nearest_network(networks: list[Network], n: float) -> Network | None:
    """The feasible network nearest to n in log."""
    return min(networks, key=lambda net: abs(math.log(net.n_total / n))) if networks else None


def predict(
    entry: Mapping[str, Any],
    draws: Mapping[str, np.ndarray],
    residual: np.ndarray,
    target: Target,
    n: float,
    d: float,
) -> dict[str, Any]:
    """Predicted metric at (N, D'): the law's value, its 95 % interval, and the 90 % interval of a new run."""
    law = parse_law(entry["formula"], ("N", "D"))
    rng = np.random.default_rng(0)
    intercepts = {k: v for k, v in draws.items() if k.startswith("intercept[")}
    key = f"intercept[{target.name}]"
    size = len(draws["A1"])
    shift: np.ndarray | float = 0.0
    centre = 0.0
    unseen = bool(intercepts) and key not in intercepts
    if key in intercepts:
        shift, centre = intercepts[key], entry["intercepts"][target.name]
    elif unseen:
        g = len(intercepts)
        table = np.stack(list(intercepts.values()), axis=1)
        shift = math.sqrt((g + 1) / (g - 1)) * table[np.arange(size), rng.integers(g, size=size)]
    cloud = np.log(law({k: draws[k] for k in law.parameters}, {"N": n, "D": d})) + shift
    value = float(law(entry["parameters"], {"N": n, "D": d})) * math.exp(centre)
    spent = len(entry["parameters"]) + max(0, len(intercepts) - 1)
    noise = residual[rng.integers(residual.size, size=size)] * math.sqrt(
        residual.size / max(residual.size - spent, 1)
    )
    return {
        "value": value,
        "interval_95": np.exp(np.percentile(cloud, [2.5, 97.5])).tolist(),
        "new_run_90": np.exp(np.percentile(cloud + noise, [5, 95])).tolist(),
        "unseen_molecule": unseen or (not intercepts and not target.in_study),
    }


def render_advice(advice: Mapping[str, Any]) -> str:
    """The answer in a dozen lines."""
    head = f"{advice['molecule']}, {advice['ansatz']}, {advice['metric']}: "
    head += f"{advice['budget']:.3g} FLOP ({advice['flops']})"
    if advice["status"] != "ok":
        return f"{head}\n{advice['status']}: {advice['reason']}"
    if "n_modulus_optimal" in advice:
        rows = (("N_mod*", "n_modulus"), ("N_ph*", "n_phase"), ("D'*", "d_prime"))
        lines = [
            f"{name:<7} {advice[f'{k}_optimal']:.4g} "
            f"[{advice[f'interval_{k}'][0]:.3g}, {advice[f'interval_{k}'][1]:.3g}]"
            for name, k in rows
        ]
        lines.append(f"the phase network takes {100 * advice['flop_share_phase']:.1f} % of the FLOPs")
        return "\n".join([head, *lines, *(f"caution {flag}" for flag in advice["flags"])])
    low, high = advice["interval_n"]
    share = advice["regret_band_n"]["share"]
    band = advice["regret_band_n"]["interval"]
    d_low, d_high = advice["interval_d_prime"]
    prediction = advice["prediction"]
    lines = [
        head,
        f"optimum     N* = {advice['n_optimal']:.4g} [{low:.3g}, {high:.3g}] (delta method "
        f"[{advice['interval_n_delta'][0]:.3g}, {advice['interval_n_delta'][1]:.3g}])",
        f"            D'* = {advice['d_prime_optimal']:.4g} [{d_low:.3g}, {d_high:.3g}]",
        f"            N* grows as C^{advice['exponent_n']:.3f} "
        f"[{advice['interval_exponent'][0]:.3f}, {advice['interval_exponent'][1]:.3f}]",
        f"regret band within {100 * share:.0f} % of the best: N = {band[0]:.3g} to {band[1]:.3g}",
        f"to train    N = {advice['n']:.0f}, T* = {advice['steps']} steps "
        f"at S_F = {advice['search_fraction']:.3g} "
        f"(D' = {advice['d_prime']:.4g}), {advice['flop_spent']:.3g} FLOP",
    ]
    if advice["network"] is not None:
        widths = ", ".join(f"{k} {v}" for k, v in advice["network"]["params"].items())
        lines.append(f"            network: {widths}; phase width {advice['network']['phase']['width']}")
    lines.append(
        f"predicted   {prediction['value']:.3g} "
        f"[{prediction['interval_95'][0]:.3g}, {prediction['interval_95'][1]:.3g}]; "
        f"a new run falls in [{prediction['new_run_90'][0]:.3g}, {prediction['new_run_90'][1]:.3g}] (90 %)"
    )
    if advice["arms"] is not None:
        lines += _arm_lines(advice["arms"])
    lines += [f"caution     {flag}" for flag in advice["flags"]]
    return "\n".join(lines)


def _arm_lines(record: Mapping[str, Any]) -> list[str]:
    lines = [
        f"arms        x{record['factor']:g}, {record['seeds_per_arm']} seeds each (80 % power), "
        f"sha256 {record['sha256'][:16]}"
    ]
    for arm in record["arms"]:
        low, high = arm["prediction"]["new_run_90"]
        note = "" if arm["inside_fitted_range"] else ", outside the fitted range"
        lines.append(
            f"            N = {arm['n']:.4g}, T = {arm['steps']}: "
            f"{arm['prediction']['value']:.3g}, a new run in [{low:.3g}, {high:.3g}]{note}"
        )
    return lines
