"""A synthetic results cube with a known law: the test bench of `replicate.scaling` and of the figures.

The cube has the groups, dimensions, units and long names of a collected one, and values drawn from

    L = exp(s_molecule + scatter_run) * (A0 + A1 N^-a1 + A2 D'^-a2) * exp(sigma * noise)

so that a fit can be held against the truth (`Truth`). Nothing in it is a measurement.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import xarray as xr

#: name: n (spin-orbitals), n_alpha, n_beta, Pauli terms, unique flips M, E_HF, E_FCI (Ha), E_inf sector,
#: identity
MOLECULES: dict[str, tuple[int, int, int, int, int, float, float, float, float]] = {
    "H2O": (14, 5, 5, 1654, 228, -74.96444758, -75.01553019, -61.10821319, -46.46560078),
    "N2": (20, 7, 7, 2951, 534, -107.49896754, -107.66020642, -86.38468603, -66.29543095),
    "O2": (20, 9, 7, 2951, 534, -147.63194812, -147.75023459, -129.0, -93.0),
    "H2S": (22, 9, 9, 10746, 1830, -394.31137975, -394.35462345, -371.0, -262.0),
    "PH3": (24, 9, 9, 26269, 4781, -338.63411403, -338.69839995, -309.0, -219.0),
    "LiCl": (28, 10, 10, 24279, 4530, -460.82725831, -460.84961818, -421.0, -300.0),
    "Li2O": (30, 7, 7, 20562, 3810, -87.79556721, -87.89269325, -52.18446642, -40.0),
}

#: Size label -> (MADE width; attention model dimension). Hidden layers 2; layers 2; feed-forward 4 d.
SIZES: dict[str, tuple[int, int]] = {
    "xs": (16, 8),
    "s": (32, 16),
    "m": (64, 24),
    "l": (128, 40),
    "xl": (256, 64),
    "xxl": (512, 104),
}


@dataclass(frozen=True)
class Truth:
    """One law `A0 + A1 N^-a1 + A2 D'^-a2` (raw amplitudes) with its log-noise `sigma`."""

    A0: float = 1e-6
    A1: float = 2e-3
    a1: float = 0.4
    A2: float = 6e-4
    a2: float = 0.6
    sigma: float = 0.3

    def __call__(self, n: np.ndarray | float, d_prime: np.ndarray | float) -> np.ndarray:
        n, d_prime = np.asarray(n, float), np.asarray(d_prime, float)
        return self.A0 + self.A1 * n**-self.a1 + self.A2 * d_prime**-self.a2


#: MADE-like truth: no size term at all.
DEFAULT_TRUTHS: dict[tuple[str, str], Truth] = {
    ("made", "v_score"): Truth(A0=0.0, A1=0.0, A2=2e-3, a2=0.5),
    ("made", "abs_error"): Truth(A0=0.0, A1=0.0, A2=2e-2, a2=0.5),
    ("transformer", "v_score"): Truth(),
    ("transformer", "abs_error"): Truth(A0=0.0, A1=5e-2, a1=0.5, A2=1e-2, a2=0.5),
    ("retnet", "v_score"): Truth(A1=1.5e-3, a1=0.38, a2=0.65),
    ("retnet", "abs_error"): Truth(A0=0.0, A1=4e-2, a1=0.48, A2=1.2e-2, a2=0.55),
}


@dataclass(frozen=True)
class Variant:
    """What a variant changes: batch cap and phase-network width, as factors on the base values."""

    batch: float = 1.0
    phase: float = 1.0


BASE: Mapping[str, Variant] = {"base": Variant()}
CROSSED: Mapping[str, Variant] = {
    "base": Variant(),
    "phase_small": Variant(phase=0.3),
    "phase_large": Variant(phase=3.0),
    "batch_small": Variant(batch=0.125),
    "batch_large": Variant(batch=8.0),
}


@dataclass(frozen=True)
class CubeOptions:
    """Axes, truth and damage of a synthetic cube. `failed`, `invalid`, `missing` are fractions of points."""

    molecules: Sequence[str] = ("H2O", "N2", "O2", "H2S")
    ansatze: Sequence[str] = ("made", "transformer", "retnet")
    sizes: Sequence[str] = tuple(SIZES)
    steps: Sequence[int] = (250, 1000, 4000, 16000)
    variants: Mapping[str, Variant] = field(default_factory=lambda: BASE)
    seeds: int = 2
    truths: Mapping[tuple[str, str], Truth] = field(default_factory=lambda: DEFAULT_TRUTHS)
    molecule_spread: float = 0.5
    sigma: float | None = None
    student_nu: float | None = 4.0
    batch_max: int = 4096
    failed: float = 0.0
    invalid: float = 0.0
    missing: float = 0.0
    records: int = 12
    checkpoint_sigma: float = 0.1
    schedule: str = "cosine"
    hold_outs: str = ""
    seed: int = 0


def n_modulus(ansatz: str, size: str, n: int) -> int:
    """Modulus parameter count in closed form (SCIENCE section 1)."""
    width, d = SIZES[size]
    if ansatz == "made":
        return n * width + width + (width * width + width) + 2 * n * width + 2 * n
    per_layer = {
        "transformer": 4 * d * d + 8 * d * d + 9 * d + 4 * d,
        "retnet": 5 * d * d + 8 * d * d + 14 * d,
    }
    return 2 * per_layer[ansatz] + 5 * d + (n // 2) * d + 4 * d + 4


def n_phase(n: int, size: str, factor: float) -> int:
    """Phase network with one hidden layer more than depth 1, width grown with the size label."""
    width = max(4, round(SIZES[size][1] * factor))
    return (n - 2) * width + width + (width * width + width) + 4 * width + 4


def _search_space(n: int, n_alpha: int, n_beta: int) -> int:
    return math.comb(n // 2, n_alpha) * math.comb(n // 2, n_beta)


def synthetic_cube(options: CubeOptions = CubeOptions()) -> xr.DataTree:
    """The cube of `options`; the same options give the same numbers."""
    o = options
    rng = np.random.default_rng(o.seed)
    dims = ("molecule", "ansatz", "size", "steps", "variant", "seed")
    shape = (len(o.molecules), len(o.ansatze), len(o.sizes), len(o.steps), len(o.variants), o.seeds)
    info = [MOLECULES[m] for m in o.molecules]
    space = np.array([_search_space(*row[:3]) for row in info], float)

    count = np.zeros((*shape[:3], shape[4]), np.int64)
    count_phase = np.zeros_like(count)
    for i, row in enumerate(info):
        for j, ansatz in enumerate(o.ansatze):
            for k, size in enumerate(o.sizes):
                for v, variant in enumerate(o.variants.values()):
                    count[i, j, k, v] = n_modulus(ansatz, size, row[0])
                    count_phase[i, j, k, v] = n_phase(row[0], size, variant.phase)
    total = (count + count_phase).astype(float)

    def along(values: Sequence[float] | np.ndarray, axis: int) -> np.ndarray:
        view = [1] * len(shape)
        view[axis] = -1
        return np.asarray(values, float).reshape(view)

    batch = o.batch_max * along([v.batch for v in o.variants.values()], 4)
    unique = np.minimum(batch, along(space, 0)) * np.exp(-0.05 * rng.exponential(size=shape))
    fraction = unique / along(space, 0)
    steps = along(o.steps, 3)
    d_prime = steps * fraction
    size_total = np.broadcast_to(total[:, :, :, None, :, None], shape)

    draw = (
        rng.standard_normal((*shape, 2))
        if o.student_nu is None
        else rng.standard_t(o.student_nu, (*shape, 2))
    )
    spread = o.molecule_spread * rng.standard_normal((shape[0], 2))
    spread -= spread.mean(axis=0)
    values = {}
    for q, metric in enumerate(("v_score", "abs_error")):
        law = np.empty(shape)
        for j, ansatz in enumerate(o.ansatze):
            truth = o.truths[ansatz, metric]
            sigma = truth.sigma if o.sigma is None else o.sigma
            law[:, j] = truth(size_total[:, j], d_prime[:, j]) * np.exp(sigma * draw[:, j, ..., q])
        values[metric] = law * np.exp(along(spread[:, q], 0))
    abs_error, v_score = values["abs_error"], values["v_score"]

    electrons = along([row[1] + row[2] for row in info], 0)
    e_fci, e_inf = along([row[6] for row in info], 0), along([row[7] for row in info], 0)
    energy = e_fci + abs_error
    variance = v_score * (energy - e_inf) ** 2 / electrons
    flips, n_spin = along([row[4] for row in info], 0), along([row[0] for row in info], 0)
    flops = 2.0 * steps * unique * size_total * (n_spin / 2) * (flips + 3)

    status = np.ones(shape, np.int8)
    lottery = rng.random(shape)
    status[lottery < o.failed + o.invalid + o.missing] = 0
    status[lottery < o.failed + o.invalid] = 3
    status[lottery < o.failed] = 2
    collapsed = status == 3
    absent = (status == 0) | (status == 2)
    unique = np.where(collapsed, 1.0, unique)
    variance = np.where(collapsed, 0.0, variance)
    v_score = np.where(collapsed, 0.0, v_score)
    stderr = np.where(along(space, 0) > 20000, 1e-4 * abs_error, 0.0)
    stderr = np.where(collapsed, 1e-12, stderr)

    def put(data: np.ndarray, units: str, long_name: str, over: tuple[str, ...] = dims) -> xr.Variable:
        if over[: len(dims)] == dims:
            gap = absent.reshape(absent.shape + (1,) * (data.ndim - absent.ndim))
            data = np.where(gap, np.nan, np.broadcast_to(data, shape + data.shape[len(shape) :]))
        return xr.Variable(over, data, {"units": units, "long_name": long_name})

    labels = {
        "molecule": ("molecule", list(o.molecules)),
        "ansatz": ("ansatz", list(o.ansatze)),
        "size": ("size", list(o.sizes)),
        "steps": (
            "steps",
            np.asarray(o.steps, np.int64),
            {"units": "1", "long_name": "optimisation steps T"},
        ),
        "variant": ("variant", list(o.variants)),
        "seed": ("seed", np.arange(o.seeds)),
    }
    four = ("molecule", "ansatz", "size", "variant")
    final = xr.Dataset(
        {
            "energy": put(energy, "hartree", "final energy"),
            "energy_stderr": put(stderr, "hartree", "standard error of the final energy"),
            "variance": put(variance, "hartree^2", "variance of the local energy"),
            "v_score": put(v_score, "1", "V-score"),
            "abs_error": put(np.abs(energy - e_fci), "hartree", "absolute error of the energy against FCI"),
            "search_fraction": put(fraction, "1", "mean unique samples per step over the search space, S_F"),
            "d_prime": put(d_prime, "1", "sample-aware training time, T times S_F"),
            "n_unique_mean": put(unique, "1", "mean unique samples per step"),
            "n_samples_total": put(steps * 1e9, "1", "samples drawn in training"),
            "flops_estimated": put(flops, "flop", "training FLOPs, estimated without reuse"),
            "flops_executed": put(0.02 * flops, "flop", "training FLOPs executed"),
            "wall_seconds": put(flops / 1e11, "s", "wall time of training"),
            "peak_memory_bytes": put(np.full(shape, 3e8), "byte", "peak memory"),
            "status": xr.Variable(
                dims,
                status,
                {
                    "units": "1",
                    "long_name": "state of the point",
                    "flag_values": [0, 1, 2, 3],
                    "flag_meanings": "missing done failed invalid",
                },
            ),
        },
        coords=labels
        | {
            "n_modulus": (four, count, {"units": "1", "long_name": "parameters of the modulus network"}),
            "n_phase": (four, count_phase, {"units": "1", "long_name": "parameters of the phase network"}),
            "n_total": (four, count + count_phase, {"units": "1", "long_name": "parameters in all"}),
        },
    )

    grid = np.unique(np.round(np.geomspace(1, max(o.steps), o.records)).astype(int))
    grid = np.concatenate([grid, np.full(o.records - len(grid), -1)])
    step = np.minimum(grid, along(o.steps, 3)[..., None])
    step = np.where(grid < 0, np.nan, np.broadcast_to(step, (*shape, o.records)))
    # Checkpoints follow the law at their own D'; they share the scatter of their run and add a little of
    # their own.
    course = {}
    for metric in ("v_score", "abs_error"):
        ratio = np.empty((*shape, o.records))
        for j, ansatz in enumerate(o.ansatze):
            truth = o.truths[ansatz, metric]
            n_j, d_j = size_total[:, j, ..., None], d_prime[:, j, ..., None]
            ratio[:, j] = truth(n_j, d_j * step[:, j] / steps[0, 0, ..., None]) / truth(n_j, d_j)
        wobble = o.checkpoint_sigma * rng.standard_normal(ratio.shape)
        course[metric] = values[metric][..., None] * ratio * np.exp(wobble)
    path = e_fci[..., None] + course["abs_error"]
    path_variance = course["v_score"] * (path - e_inf[..., None]) ** 2 / electrons[..., None]
    ratio = (step / steps[..., None]) ** -0.5
    past = (*dims, "record")
    history = xr.Dataset(
        {
            "step": put(step, "1", "optimisation step", past),
            "energy": put(path, "hartree", "energy in training", past),
            "variance": put(path_variance, "hartree^2", "variance in training", past),
            "n_unique": put(unique[..., None] * np.ones(o.records), "1", "unique samples of the step", past),
            "n_samples": put(1e4 * (1 + step), "1", "samples of the step", past),
            "learning_rate": put(1e-3 / (1 + step / steps[..., None]), "1", "learning rate", past),
            "grad_norm": put(ratio, "1", "gradient norm before clipping", past),
        },
        coords=labels,
    )

    def per_molecule(column: int, units: str, long_name: str) -> xr.Variable:
        return xr.Variable(
            "molecule", np.array([row[column] for row in info]), {"units": units, "long_name": long_name}
        )

    molecule = xr.Dataset(
        {
            "n_spin_orbitals": per_molecule(0, "1", "spin-orbitals n"),
            "n_alpha": per_molecule(1, "1", "alpha electrons"),
            "n_beta": per_molecule(2, "1", "beta electrons"),
            "search_space": xr.Variable(
                "molecule", space.astype(np.int64), {"units": "1", "long_name": "determinants of the sector"}
            ),
            "n_pauli_terms": per_molecule(3, "1", "Pauli strings"),
            "n_unique_flips": per_molecule(4, "1", "distinct flip patterns M"),
            "e_hf": per_molecule(5, "hartree", "Hartree-Fock energy"),
            "e_ccsd": per_molecule(6, "hartree", "CCSD energy"),
            "e_ccsd_t": per_molecule(6, "hartree", "CCSD(T) energy"),
            "e_fci": per_molecule(6, "hartree", "FCI energy"),
            "e_inf_sector": per_molecule(7, "hartree", "Tr(H) over the sector by its dimension"),
            "e_inf_identity": per_molecule(8, "hartree", "identity coefficient of H"),
            "hamiltonian_sha256": xr.Variable(
                "molecule",
                [f"{'0' * 60}{i:04d}" for i in range(len(info))],
                {"units": "1", "long_name": "content hash of the Hamiltonian"},
            ),
        },
        coords={"molecule": labels["molecule"]},
    )
    spec = "\n".join(
        [
            'study = "synthetic"',
            f"# schedule of every run: {o.schedule}",
            "[train]",
            f'schedule = "{o.schedule}"',
            o.hold_outs,
            "",
        ]
    )
    attributes = {
        "Conventions": "CF-1.11",
        "title": "synthetic cube with a known law (not a measurement)",
        "references": "arXiv:2509.12679",
        "spec": spec,
        "provenance": json.dumps({"synthetic": True, "seed": o.seed}),
        "schema": 1,
    }
    return xr.DataTree.from_dict(
        {"/": xr.Dataset(attrs=attributes), "/final": final, "/history": history, "/molecule": molecule}
    )
