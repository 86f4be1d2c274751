"""RetNet's recurrent against its parallel form: FLOPs, and the clock beside them.

    python -m benchmarks.retention [--rows 1024] [--repeats 5] [-o artifacts/cost]

In FLOPs the recurrent form is the cheaper one exactly where a sequence has more tokens than a head has
channels, n/2 > d/h: retention is 4 T^2 d in parallel and 4 T d^2/h with a state. Measured are both forms of
the layer-by-layer pass over full sequences without gradient (one layer, ff = 4 d), and of retention alone;
one thread, the forms in turns, the best of the repeats. Writes retention.csv and retention.md.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from replicate import flops, provenance
from replicate.ansatz.retnet import RetNet
from replicate.sector import Sector

D = 32
TOKENS = (2, 4, 6, 7, 8, 10, 12, 15, 20, 24, 31)  # n/2; H2O has 7, N2 10, Li2O 15
HEADS = (8, 4, 2, 1)
FORMS = ("parallel", "recurrent")


@dataclass(frozen=True)
class Row:
    """One shape. FLOPs: one sequence, a multiply-add is 2. Seconds: `rows` sequences, the best repeat.

    `retention_*`: what attention would be, without the linear layers around it; `pass_*`: all of the network.
    """

    tokens: int
    d_head: int
    rows: int
    retention_flops_parallel: int
    retention_flops_recurrent: int
    pass_flops_parallel: int
    pass_flops_recurrent: int
    retention_seconds_parallel: float
    retention_seconds_recurrent: float
    pass_seconds_parallel: float
    pass_seconds_recurrent: float

    def gain(self, what: str) -> float:
        """Parallel over recurrent: above 1 the recurrent form is the cheaper one."""
        return float(getattr(self, f"{what}_parallel") / getattr(self, f"{what}_recurrent"))


def best_seconds(ways: dict[str, Callable[[], Tensor]], repeats: int) -> dict[str, float]:
    """Least wall time of each way; they take turns, so that a disturbance meets both."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(repeats + 1):  # one more: the first turn warms up
        for name, call in ways.items():
            began = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - began)
    return best


@torch.no_grad()
def measure(tokens: int, heads: int, rows: int, repeats: int, d: int = D) -> Row:
    """Both forms at one shape, on `rows` random sequences."""
    params = {"d": d, "heads": heads, "ff": 4 * d, "layers": 1}
    sector = Sector(tokens, (tokens + 1) // 2, tokens // 2)
    network = RetNet(sector, **params)
    x = torch.randn(rows, tokens, d, generator=torch.Generator().manual_seed(0))
    qkv = network.layers[0].get_submodule("qkv")(x)
    retain = {"parallel": network._retain_parallel, "recurrent": network._retain_recurrent}
    alone = best_seconds({form: partial(retain[form], qkv) for form in FORMS}, repeats)
    whole = best_seconds({form: partial(network.sequence_logits, x, form) for form in FORMS}, repeats)
    n = 2 * tokens
    parallel = flops.forward_estimate("retnet", params, n)
    recurrent = flops.recurrent_estimate(params, n)
    rest = flops.forward_estimate("retnet", params, n, attention=False)
    return Row(
        tokens=tokens,
        d_head=d // heads,
        rows=rows,
        retention_flops_parallel=parallel - rest,
        retention_flops_recurrent=recurrent - rest,
        pass_flops_parallel=parallel,
        pass_flops_recurrent=recurrent,
        **{f"retention_seconds_{form}": alone[form] for form in FORMS},
        **{f"pass_seconds_{form}": whole[form] for form in FORMS},
    )


def crossing(rows: Sequence[Row], what: str) -> str:
    """From how many tokens on the recurrent form is the cheaper one, at every longer measured length too."""
    ordered = sorted(rows, key=lambda row: row.tokens)
    wins = [row.tokens for i, row in enumerate(ordered) if all(r.gain(what) > 1 for r in ordered[i:])]
    return str(wins[0]) if wins else f"none up to {ordered[-1].tokens}"


def markdown(rows: Sequence[Row], machine: str) -> Iterator[str]:
    """The tables of retention.md, line by line."""
    shapes = sorted({row.d_head for row in rows})
    yield "# RetNet: recurrent against parallel"
    yield ""
    yield (
        f"Parallel over recurrent, d = {D}, one layer, ff = {4 * D}, {rows[0].rows} sequences: above 1 the "
        "recurrent form is the cheaper one. Made by `python -m benchmarks.retention`."
    )
    yield ""
    head = ["tokens n/2", "d/h", "retention, FLOP", "retention, time", "whole pass, FLOP", "whole pass, time"]
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---:|" * len(head)
    columns = ("retention_flops", "retention_seconds", "pass_flops", "pass_seconds")
    for row in rows:
        gains = [f"{row.gain(what):.2f}" for what in columns]
        yield "| " + " | ".join([str(row.tokens), str(row.d_head), *gains]) + " |"
    yield ""
    yield "Tokens from which on the recurrent form is the cheaper one, of those measured:"
    yield ""
    yield "| d/h | FLOP | retention, time | whole pass, time |"
    yield "|---:|---:|---:|---:|"
    for d_head in shapes:
        own = [row for row in rows if row.d_head == d_head]
        found = [crossing(own, what) for what in ("pass_flops", "retention_seconds", "pass_seconds")]
        yield "| " + " | ".join([str(d_head), *found]) + " |"
    yield ""
    yield machine


def where() -> str:
    """What the seconds were measured on."""
    about = provenance.collect()
    code = about["code"]
    commit = f"commit {code['commit'][:12]}" if code["commit"] else ""
    commit += " with changes" if code["dirty"] else ""
    parts = [about["hardware"]["cpu"], "one thread", f"torch {about['versions']['torch']}", commit]
    return "Measured on: " + ", ".join(filter(None, parts)) + "."


def main(argv: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.retention", description="RetNet's recurrent against its parallel form."
    )
    made.add_argument("--rows", type=int, default=1024, help="sequences per pass (default: 1024)")
    made.add_argument("--repeats", type=int, default=5, help="of which the best counts (default: 5)")
    made.add_argument("-o", "--output", type=Path, default=Path("artifacts/cost"), metavar="DIR")
    arguments = made.parse_args(argv)
    torch.set_num_threads(1)
    rows = []
    for heads in HEADS:
        for tokens in TOKENS:
            rows.append(measure(tokens, heads, arguments.rows, arguments.repeats))
            sys.stdout.write(
                f"T {tokens}, d/h {rows[-1].d_head}: FLOP x{rows[-1].gain('pass_flops'):.2f}, "
                f"time x{rows[-1].gain('pass_seconds'):.2f}\n"
            )
            sys.stdout.flush()
    arguments.output.mkdir(parents=True, exist_ok=True)
    with (arguments.output / "retention.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(Row.__dataclass_fields__), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    text = "\n".join(markdown(rows, where())) + "\n"
    (arguments.output / "retention.md").write_text(text, encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
