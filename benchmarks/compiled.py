"""What torch.compile does for log p, forward and backward, and what compiling costs.

    python -m benchmarks.compiled [--device cpu] [--only REGEX] [--csv artifacts/speed/compiled.csv]

Called and compiled in turns, best of three medians, one thread on a CPU. `whole`: the tree of a sector, the
same in every step. `changing`: trees of 2 000 determinants of Li2O, another one in each step, as samples
give; shapes are left to the compiler to generalise. `compile_s`: until the third call has returned. A run
gains where it has more than `repaid_after` steps (of this molecule, ansatz and size, on this machine).
"""

from __future__ import annotations

import argparse
import csv
import itertools
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from replicate.sector import Sector
from replicate.trainer import train
from replicate.tree import PrefixTree, build_tree

from .acceptance import timed
from .cases import ANSATZE, ROOT, batch_keys, load, point

CHANGING = 2000  # determinants per tree
TREES = 8


@dataclass(frozen=True)
class Row:
    """One case. `gain`: called over compiled."""

    molecule: str
    ansatz: str
    size: str
    trees: str
    device: str
    called_ms: float
    compiled_ms: float
    gain: float
    compile_s: float
    repaid_after: float


def cases() -> Iterator[tuple[str, str, str, str]]:
    for ansatz in ANSATZE:
        yield "H2O", ansatz, "small", "whole"
        yield "N2", ansatz, "small", "whole"
        yield "N2", ansatz, "large", "whole"
        yield "Li2O", ansatz, "small", "changing"


def some_trees(sector: Sector, keys: Tensor) -> list[PrefixTree]:
    """Trees of half of the `keys` each, drawn anew."""
    generator = torch.Generator(keys.device).manual_seed(0)
    drawn = (torch.randperm(len(keys), generator=generator, device=keys.device) for _ in range(TREES))
    return [build_tree(keys[order[: len(keys) // 2].sort().values], sector) for order in drawn]


def measure(molecule: str, ansatz: str, size: str, trees: str, device: str) -> Row:
    torch.compiler.reset()
    run = train(point(molecule, ansatz, size), load(molecule), device=device)
    if trees == "whole":
        batches, repeats = [run.batch.tree], 200 if molecule == "H2O" else 12
    else:
        keys = batch_keys(run.kernel, 2 * CHANGING).to(device)
        batches, repeats = some_trees(run.sector, keys), 2 * TREES
    network = run.wave.network

    def both(logits: Callable[[PrefixTree], Tensor], turn: Iterator[PrefixTree]) -> None:
        logits(next(turn)).sum().backward()
        run.wave.zero_grad(set_to_none=True)
        if device != "cpu":
            torch.cuda.synchronize()

    compiled = torch.compile(network.tree_logits)
    began = time.perf_counter()
    turn = itertools.cycle(batches)
    for _ in range(3):
        both(compiled, turn)
    compile_s = time.perf_counter() - began
    seconds: dict[str, list[float]] = {"called": [], "compiled": []}
    for _ in range(3):
        for way, logits in (("called", network.tree_logits), ("compiled", compiled)):
            seconds[way].append(timed(lambda logits=logits: both(logits, turn), repeats).wall)  # type: ignore[misc]
    called, fast = (1e3 * min(seconds[way]) for way in ("called", "compiled"))
    saved = (called - fast) / 1e3
    name = torch.cuda.get_device_name() if device != "cpu" else "CPU, one thread"
    repaid = compile_s / saved if saved > 0 else float("inf")
    return Row(molecule, ansatz, size, trees, name, called, fast, called / fast, compile_s, repaid)


def main(argv: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description=__doc__.splitlines()[0])
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--only", metavar="REGEX", default="", help="cases, such as 'N2 .* small'")
    made.add_argument("--csv", type=Path, default=ROOT / "artifacts" / "speed" / "compiled.csv")
    arguments = made.parse_args(argv)
    torch.compiler.config.force_disable_caches = True  # on disk, from earlier calls: they would hide the cost
    rows = []
    for case in cases():
        if not re.search(arguments.only, " ".join(case)):
            continue
        rows.append(measure(*case, arguments.device))
        last = rows[-1]
        sys.stdout.write(
            f"{' '.join(case):<34} called {last.called_ms:8.3f} ms, compiled {last.compiled_ms:8.3f} ms "
            f"(x{last.gain:.2f}), compiling {last.compile_s:.0f} s, repaid after {last.repaid_after:.0f}\n"
        )
        sys.stdout.flush()
    with arguments.csv.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(Row.__dataclass_fields__), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
