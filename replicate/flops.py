"""Floating-point operations: estimated as the study counts them, and executed as the code really runs.

Estimated (SCIENCE.md section 6, after Kaplan et al. 2020 with the exact attention count): every one of B
unique samples costs one sampling pass, M forward passes of both networks for its local energy and three
forward-like passes for its gradient (one forward, two backward); nothing is reused. `attention=False` leaves
Kaplan's count, from parameters alone. These closed forms take arrays for n and M, too.

Executed: the matrix products of the kernels that ran, from the counts of nodes and determinants
that they ran on (a multiply-add is 2, as in torch's FlopCounterMode). Nothing heavy is
imported: `plan` uses this module.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from replicate.spec import Point

Params = Mapping[str, int | float | str]

# How one sample is drawn: a full pass over the tokens so far for each token, a key-value cache, or RetNet's
# state. First the study's own.
SAMPLING = {
    "made": ("passes",),
    "transformer": ("passes", "cache"),
    "retnet": ("recurrent", "passes", "cache"),
}


def _get(params: Params, *names: str) -> tuple[int, ...]:
    return tuple(int(params[name]) for name in names)


def modulus_parameters(kind: str, params: Params, n_qubits: int) -> int:
    """N_mod by the closed forms of SCIENCE.md sections 1.1-1.3. Raises KeyError for an unknown kind."""
    n = n_qubits
    if kind == "made":
        w, depth = _get(params, "width", "depth")
        return n * w + w + (depth - 1) * (w * w + w) + 2 * n * w + 2 * n
    d, f, layers = _get(params, "d", "ff", "layers")
    embedding_and_head = 5 * d + (n // 2) * d + 4 * d + 4
    square, biases = {"transformer": (4, 9), "retnet": (5, 10)}[kind]
    return layers * (square * d * d + 2 * d * f + biases * d + f) + embedding_and_head


def phase_parameters(width: int, depth: int, n_qubits: int) -> int:
    """N_ph = (n-2)w + w + D(w^2+w) + 4w + 4."""
    return (n_qubits - 2) * width + width + depth * (width * width + width) + 4 * width + 4


def matmul_weights(kind: str, params: Params, n_qubits: int) -> int:
    """N~: weights that multiply an activation. MADE: all of N_mod, as the study counts it."""
    if kind == "made":
        return modulus_parameters(kind, params, n_qubits)
    d, f, layers = _get(params, "d", "ff", "layers")
    square = {"transformer": 4, "retnet": 5}[kind]
    return layers * (square * d * d + 2 * d * f) + 4 * d


def forward_estimate(kind: str, params: Params, n_qubits: int, *, attention: bool = True) -> int:
    """F: one forward pass of the modulus on one determinant (RetNet in its parallel form)."""
    weights = matmul_weights(kind, params, n_qubits)
    if kind == "made":
        return 2 * weights
    tokens = n_qubits // 2
    d, layers = _get(params, "d", "layers")
    return 2 * tokens * weights + attention * 4 * layers * tokens * tokens * d


def recurrent_estimate(params: Params, n_qubits: int, *, attention: bool = True) -> int:
    """One pass of RetNet in its recurrent form: T (2 N~ + 4 L d^2 / h). `attention`: the state's part."""
    d, heads, layers = _get(params, "d", "heads", "layers")
    state = attention * 4 * layers * d * d // heads
    return (n_qubits // 2) * (2 * matmul_weights("retnet", params, n_qubits) + state)


def sampling_estimate(
    kind: str, params: Params, n_qubits: int, *, convention: str | None = None, attention: bool = True
) -> int:
    """S: drawing one sample, by a convention of `SAMPLING` (None: the study's). ValueError for others."""
    convention = convention or SAMPLING[kind][0]
    if convention not in SAMPLING[kind]:
        raise ValueError(f"{kind} samples by {' or '.join(SAMPLING[kind])}, not by {convention}")
    tokens = n_qubits // 2
    if kind == "made":
        return n_qubits * matmul_weights(kind, params, n_qubits)  # T passes
    if convention == "recurrent":
        return recurrent_estimate(params, n_qubits, attention=attention)
    weights = matmul_weights(kind, params, n_qubits)
    d, layers = _get(params, "d", "layers")
    if convention == "cache":
        return 2 * weights * tokens + attention * 2 * layers * d * tokens * (tokens + 1)
    square_sum = tokens * (tokens + 1) * (2 * tokens + 1)
    return weights * tokens * (tokens + 1) + attention * 2 * layers * d * square_sum // 3


def estimate_sample(
    kind: str,
    params: Params,
    phase_width: int,
    phase_depth: int,
    *,
    n_qubits: int,
    n_unique_flips: int,
    sampling: str | None = None,
    attention: bool = True,
) -> dict[str, int]:
    """FLOPs per unique sample and step in named parts: S, M F, M phi, F, phi, 2 F, 2 phi and their total.

    The gradient is a forward pass and a backward pass of twice its cost. RetNet's local energies are counted
    in its recurrent form, its gradient in the parallel one. What attention (or retention) takes of a part is
    the difference to the same with `attention=False`.
    """
    forward = forward_estimate(kind, params, n_qubits, attention=attention)
    local = recurrent_estimate(params, n_qubits, attention=attention) if kind == "retnet" else forward
    phase = 2 * phase_parameters(phase_width, phase_depth, n_qubits)
    parts = {
        "sampling": sampling_estimate(kind, params, n_qubits, convention=sampling, attention=attention),
        "local_energy_modulus": n_unique_flips * local,
        "local_energy_phase": n_unique_flips * phase,
        "forward_modulus": forward,
        "forward_phase": phase,
        "backward_modulus": 2 * forward,
        "backward_phase": 2 * phase,
    }
    return {**parts, "total": sum(parts.values())}


def estimate_step(point: Point, *, n_qubits: int, n_unique_flips: int, batch: int) -> dict[str, int]:
    """`estimate_sample` of a spec's point times `batch` unique samples (of one step, or summed over steps).

    Raises KeyError for an ansatz without closed form (one that another distribution registers).
    """
    parts = estimate_sample(
        point.ansatz.kind,
        point.ansatz.params,
        point.phase.width,
        point.phase.depth,
        n_qubits=n_qubits,
        n_unique_flips=n_unique_flips,
    )
    return {name: batch * value for name, value in parts.items()}


# -- what really runs ---------------------------------------------------------------------------------


def _dense(kind: str, params: Params, n_qubits: int) -> tuple[int, int]:
    """Weights of the products at one position: (those on inputs that are data, the others)."""
    if kind == "made":
        w, depth = _get(params, "width", "depth")
        return n_qubits * w, (depth - 1) * w * w + 2 * n_qubits * w
    return 0, matmul_weights(kind, params, n_qubits) - 4 * int(params["d"])


def tree_forward(
    kind: str,
    params: Params,
    n_qubits: int,
    *,
    nodes: int,
    tips: int,
    block_width: int,
    backward: bool = False,
) -> int:
    """Modulus on a prefix tree, forward or (with `backward`) its gradient's additional products.

    `nodes`, `tips`: the tree's (MADE runs on tips, the others on nodes in attention blocks of
    `block_width`). A product's gradient costs two more of its size, except that inputs which are data need
    none.
    """
    first, other = _dense(kind, params, n_qubits)
    if kind == "made":
        return 2 * tips * (first + 2 * other if backward else first + other)
    d, layers = _get(params, "d", "layers")
    blocks = -(-nodes // block_width)
    keys = n_qubits // 2 - 1 + block_width
    attention = 4 * blocks * block_width * keys * d * layers
    forward = 2 * blocks * block_width * other + 2 * nodes * 4 * d + attention
    return 2 * forward if backward else forward


def flat_forward(kind: str, params: Params, n_qubits: int, *, rows: int, backward: bool = False) -> int:
    """Modulus on whole sequences of `rows` determinants (`flat_logits`), or what its gradient adds.

    The estimate's F without what it adds for MADE's biases (2 each), which are no products.
    """
    first, other = _dense(kind, params, n_qubits)
    if kind == "made":
        return 2 * rows * (first + 2 * other if backward else first + other)
    return (2 if backward else 1) * rows * forward_estimate(kind, params, n_qubits)


def phase_forward(width: int, depth: int, n_qubits: int, *, rows: int, backward: bool = False) -> int:
    """Phase network on `rows` determinants, forward or its gradient's additional products."""
    first, other = (n_qubits - 2) * width, depth * width * width + 4 * width
    return 2 * rows * (first + 2 * other if backward else first + other)


def sampler_forward(kind: str, params: Params, n_qubits: int, *, nodes: Iterable[int]) -> int:
    """Growing a tree with `nodes` open prefixes per level, state carried along (cache, recurrence, units).

    The transformer sums products of queries and keys per head by a product with a (heads, d) matrix, which
    takes `heads` times what q . k does.
    """
    tokens = n_qubits // 2
    total = 0
    for level, count in enumerate(nodes):
        if kind == "made":
            depth = int(params["depth"])
            known = _made_known(params, tokens, level)
            fresh = known - (_made_known(params, tokens, level - 1) if level else 0)
            total += 2 * count * (fresh * (2 * level + (depth - 1) * known) + 4 * known)
        else:
            d, heads, layers = _get(params, "d", "heads", "layers")
            attention, retention = 2 * (level + 1) * d * (heads + 1), 4 * d * d // heads
            mixing = attention if kind == "transformer" else retention
            total += count * (2 * matmul_weights(kind, params, n_qubits) + layers * mixing)
    return total


def _made_known(params: Params, tokens: int, level: int) -> int:
    """Hidden units per layer that `level` tokens determine, for degrees spread evenly over 0..T-2."""
    share, rest = divmod(int(params["width"]), max(tokens - 1, 1))
    return share * level + min(rest, level)
