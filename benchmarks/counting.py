"""What really ran: torch operators, matrix FLOPs, and network evaluations, counted from outside the code.

The trainer's own `flops_executed` is computed from its tree; these counts come from torch and from the calls
that the networks received, so that work which the accounting does not know of shows up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from replicate.ansatz import WaveFunction


class OperatorCount(TorchDispatchMode):
    """Counts dispatched operators: about the launches on a GPU, though views launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.total += 1
        return func(*args, **(kwargs or {}))


class Transfers(TorchDispatchMode):
    """Lists the operators that make the host wait for the device, as `name` or `name x n` in `seen`.

    On a CPU tensor `tolist` moves no data and is not dispatched, so the tensor method is watched too.
    """

    WAITS = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "equal.default", "bincount")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if any(part in name for part in self.WAITS):
            self.seen.append(name)
        if "_to_copy" in name and str((kwargs or {}).get("device")) == "cpu":
            self.seen.append(name)
        if "repeat_interleave" in name and (kwargs or {}).get("output_size") is None:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


class Lists(TorchFunctionMode):
    """Counts `tolist` and `numpy`, which the dispatcher does not see."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.tolist, torch.Tensor.numpy):
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


def count_transfers(work: Callable[[], Any]) -> list[str]:
    """Operators in `work` that a GPU would make the host wait for, in order."""
    with Transfers() as transfers, Lists(transfers.seen):
        work()
    return transfers.seen


def _product(a: Any, b: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """2 m k n of a dense product, 2 nnz n of a sparse one (which torch's formula takes for dense)."""
    pairs = a.values().shape[0] if a.layout == torch.sparse_csr else a.shape[0] * a.shape[1]
    return int(2 * pairs * b.shape[1])


_product._get_raw = True  # type: ignore[attr-defined]  # asks the counter for tensors instead of shapes


def count_flops(work: Callable[[], Any]) -> int:
    """FLOPs of the matrix products in `work` (a multiply-add is 2); element-wise operations are left out."""
    # The counter knows no fused attention on a CPU: attention is spelled out.
    products = {torch.ops.aten.mm: _product}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=products) as counter:
        work()
    return int(counter.get_total_flops())


def count_operators(work: Callable[[], Any]) -> int:
    """Torch operators that `work` dispatches, backward included."""
    with OperatorCount() as counter:
        work()
    return counter.total


@dataclass
class Evaluations:
    """`prefixes`: rows of logits asked of the modulus. `determinants`: phases asked of the phase network."""

    prefixes: int = 0
    determinants: int = 0
    depth: int = 0  # a method may call another: only the outermost call counts


@contextmanager
def watch(wave: WaveFunction) -> Iterator[Evaluations]:
    """Count the evaluations of both networks while the context is open."""
    seen = Evaluations()

    def logits(rows: Callable[[Any], int], method: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            seen.depth += 1
            out = method(*args, **kwargs)
            seen.depth -= 1
            seen.prefixes += 0 if seen.depth else rows(out)
            return out

        return wrapped

    def phases(*args: Any) -> Any:
        out = evaluate(*args)
        seen.determinants += out.shape[0]
        return out

    modulus: nn.Module = wave.modulus
    evaluate = wave.phase.evaluate
    # Instance attributes hide the methods; deleting them brings the methods back.
    hidden: dict[str, Callable[..., Any]] = {
        "tree_logits": logits(lambda out: out.shape[0], wave.network.tree_logits),
        "flat_logits": logits(lambda out: out.shape[0] * out.shape[1], wave.network.flat_logits),
        "advance": logits(lambda out: out[0].shape[0], wave.network.advance),
    }
    for name, method in hidden.items():
        object.__setattr__(modulus, name, method)
    object.__setattr__(wave.phase, "evaluate", phases)
    try:
        yield seen
    finally:
        for name in hidden:
            object.__delattr__(modulus, name)
        object.__delattr__(wave.phase, "evaluate")
