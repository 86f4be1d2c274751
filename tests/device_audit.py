"""The step's tensor work on fake accelerator tensors: a tensor left on the CPU raises. Run by test_device.py.

    python tests/device_audit.py cuda|mockgpu

FakeTensorMode accepts device "cuda" in a CPU build, but autograd and Python's indexing ask the missing CUDA
runtime for a device guard. So "cuda" audits everything without gradients, indexing routed to its operators,
and "mockgpu", a backend registered here whose guard is plain Python, the same with backward and optimiser.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Any

import torch
from chemistry import molecule, spec
from networks import KINDS, PARAMS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from replicate.ansatz.transformer import BLOCK_WIDTH
from replicate.energy import amplitudes, local_from_product
from replicate.spec import AnsatzSpec, PhaseSpec, Point
from replicate.trainer import Training, train
from replicate.tree import Blocks, PrefixTree, Tips


class PlainIndexing(TorchFunctionMode):
    """`x[...]` and `~x` as the operators that they stand for, past the bindings' device guard."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__invert__:
            return torch.bitwise_not(args[0])
        if func is not torch.Tensor.__getitem__:
            return func(*args, **(kwargs or {}))
        x, keys = args
        dim = 0
        for key in keys if isinstance(keys, tuple) else (keys,):
            if isinstance(key, slice):
                x = torch.ops.aten.slice(x, dim, key.start, key.stop, key.step or 1)
                dim += 1
            elif isinstance(key, int):
                x = torch.select(x, dim, key)
            else:
                x = torch.ops.aten.index(x, [None] * dim + [key])
                dim += 1
        return x


def moved(device: str, value: Any) -> Any:
    """A fake tensor of the same shape and type on `device`; anything else as it is."""
    if isinstance(value, torch.Tensor):
        return torch.zeros(value.shape, dtype=value.dtype, device=device)
    return value


def move_module(module: torch.nn.Module, device: str, requires_grad: bool) -> None:
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, torch.nn.Parameter(moved(device, parameter), requires_grad))
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, moved(device, buffer))


def move_tree(tree: PrefixTree, device: str, blocks: Blocks, tips: Tips) -> PrefixTree:
    """Blocks and tips have sizes that depend on data; a run makes them once, outside the step."""
    names = list(PrefixTree.__dataclass_fields__)
    out = PrefixTree(**{name: moved(device, getattr(tree, name)) for name in names})
    out.__dict__["_blocks"] = {
        BLOCK_WIDTH: Blocks(
            BLOCK_WIDTH,
            *(moved(device, getattr(blocks, name)) for name in ("symbol", "level", "path", "mask")),
        )
    }
    out.__dict__["tips"] = Tips(moved(device, tips.keys), moved(device, tips.slot))
    return out


def audit(run: Training, device: str, *, gradients: bool) -> str:
    """One step on fake tensors. Returns the device its energy came out on."""
    batch = run.batch
    blocks, tips = batch.tree.blocks(BLOCK_WIDTH), batch.tree.tips
    limits = nullcontext() if gradients else torch.no_grad()
    with FakeTensorMode(), PlainIndexing(), limits:
        move_module(run.wave, device, gradients)
        run.weights = dict(run.wave.named_weights())
        tree = move_tree(batch.tree, device, blocks, tips)
        bits, first_token = (moved(device, x) for x in batch.phase_inputs)
        log_prob = run.wave.log_prob(tree)
        phase = run.wave.phase.evaluate(bits, first_token)
        with torch.no_grad():
            weights = log_prob.exp()
            weights = weights / weights.sum()
            psi = amplitudes(log_prob, phase)
            local = local_from_product(psi, psi.flip(0))  # the sparse product has no fake kernel
            outcome = run._outcome(local, weights, weights)
        if gradients:
            run._backward(log_prob, phase, local, weights, outcome, 0.1, (weights * log_prob).sum())
            parameters = list(run.weights.values())
            assert all(p.grad is not None and p.grad.device.type == device for p in parameters)
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
            torch.optim.Adam(parameters, foreach=True).step()
            outcome = torch.cat([outcome, norm.to(torch.float64).view(1)])
        return outcome.device.type


def main(device: str) -> None:
    gradients = device != "cuda"
    if gradients:
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

        _setup_privateuseone_for_python_backend(device)
    for kind in KINDS:
        point = Point(
            molecule=spec("LiH"),
            ansatz=AnsatzSpec(kind=kind, params=PARAMS[kind]),
            phase=PhaseSpec(width=8, depth=1),
            steps=1,
        )
        found = audit(train(point, molecule("LiH")), device, gradients=gradients)
        assert found == device, found
        sys.stdout.write(f"{kind}: every tensor of the step on {found}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
