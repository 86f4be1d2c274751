"""Which of the trainer's two regimes a point runs in, by cost (DESIGN.md section 2)."""

from __future__ import annotations

import math

from replicate import flops
from replicate.sector import Sector
from replicate.spec import Point

SPARSE_BYTES = 12  # per matrix element: float64 value, int32 column
# Seconds per matrix element, for choosing a regime: product with a stored matrix, and finding a connected
# determinant anew (element, sort, look-up). Seconds per FLOP of a forward pass. Measured on one CPU core;
# only their ratios matter, and either choice is right.
PRODUCT_SECONDS, CONNECT_SECONDS, FLOP_SECONDS = 1.5e-9, 1.5e-7, 4e-11


def connectivity(sector: Sector, n_unique_flips: int) -> int:
    """Upper bound on nonzero elements per row: singles and doubles of a determinant, at most M."""
    a, b = sector.n_alpha, sector.n_beta
    va, vb = sector.n_orbitals - a, sector.n_orbitals - b
    doubles = math.comb(a, 2) * math.comb(va, 2) + math.comb(b, 2) * math.comb(vb, 2) + a * va * b * vb
    return min(n_unique_flips, 1 + a * va + b * vb + doubles)


def choose_regime(point: Point, sector: Sector, n_unique_flips: int) -> str:
    """`whole` or `tree` by the cost model above, unless the spec says which."""
    if point.sampling.regime != "auto":
        return point.sampling.regime
    if point.local_energy == "paper":
        return "tree"
    size, batch = sector.size, min(sector.size, point.sampling.batch_max)
    degree = connectivity(sector, n_unique_flips)
    if SPARSE_BYTES * size * degree > point.memory_budget_mb * 2**20:
        return "tree"
    kind, params = point.ansatz.kind, point.ansatz.params
    try:
        per_node = FLOP_SECONDS * flops.forward_estimate(kind, params, sector.n_qubits) / sector.n_orbitals
    except KeyError:  # an ansatz from outside has no closed form; a middling network's cost
        per_node = 2e-6
    connected = min(size, batch * degree) if point.local_energy == "exact" else batch
    whole = 3 * per_node * size + PRODUCT_SECONDS * size * degree
    tree = (connected + 4 * batch) * per_node + CONNECT_SECONDS * batch * degree
    return "whole" if whole <= tree else "tree"
