"""Runs single benchmarks of one checkout for the gate: requests and replies are lines of JSON.

    python -m benchmarks.worker          in the checkout's root

    {"do": "list"}                             -> {"benchmarks": {id: kind}, "versions": .., "package": path}
    {"do": "track", "id": ..}                  -> {"value": ..}
    {"do": "time", "id": .., "seconds": 0.1}   -> {"wall": .., "cpu": ..}, best calls, seconds
A failure is {"error": one line, "type": name of the exception}. Ids read module.Class.method(parameters).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import itertools
import json
import os
import pkgutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import benchmarks
import replicate
from benchmarks.cases import Suite, load

PACKAGES = ("torch", "numpy", "pyscf")
KINDS = ("track", "time")


class Cases(dict[str, Any]):
    """What `Suite.setup_cache` returns, each molecule made when it is first asked for."""

    def __missing__(self, name: str) -> Any:
        self[name] = load(name)
        return self[name]


def suites() -> Iterator[tuple[str, type[Suite]]]:
    """Benchmark classes of the package's bench_ modules, with their dotted names."""
    for found in pkgutil.iter_modules(benchmarks.__path__):
        if not found.name.startswith("bench_"):
            continue
        module = importlib.import_module(f"benchmarks.{found.name}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, Suite) and value.__module__ == module.__name__:
                yield f"{found.name.removeprefix('bench_')}.{value.__name__}", value


def quick_benchmarks() -> dict[str, tuple[str, type[Suite], str, tuple[str, ...]]]:
    """id -> (kind, class, method, parameters) of the quick subset."""
    found = {}
    for dotted, suite in suites():
        for method, parameters in itertools.product(dir(suite), suite.quick):
            kind = method.split("_")[0]
            if kind in KINDS and (kind != "time" or suite.timed(parameters)):
                found[f"{dotted}.{method}({', '.join(parameters)})"] = (kind, suite, method, parameters)
    return found


class Worker:
    """Answers requests. The benchmark that was timed last stays set up, for the next round."""

    def __init__(self) -> None:
        self.known = quick_benchmarks()
        self.cases = Cases()
        self.ready: tuple[str, Callable[[], Any]] | None = None

    def prepare(self, name: str) -> Callable[[], Any]:
        """A freshly set up benchmark: counts must not depend on what ran before."""
        self.ready = None  # frees the last one's memory first
        _, suite, method, parameters = self.known[name]
        instance = suite()
        if hasattr(instance, "setup"):
            instance.setup(self.cases, *parameters)
        return lambda: getattr(instance, method)(self.cases, *parameters)

    def list(self) -> dict[str, Any]:
        return {
            "benchmarks": {name: entry[0] for name, entry in self.known.items()},
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
            "package": replicate.__file__,
        }

    def track(self, name: str) -> dict[str, Any]:
        return {"value": self.prepare(name)()}

    def time(self, name: str, seconds: float) -> dict[str, Any]:
        if self.ready is None or self.ready[0] != name:
            self.ready = (name, self.prepare(name))
            self.ready[1]()  # warm-up
        call, wall, cpu = self.ready[1], float("inf"), float("inf")
        end = time.perf_counter() + seconds
        while True:
            began, began_cpu = time.perf_counter(), time.process_time()
            call()
            done_cpu, done = time.process_time(), time.perf_counter()
            wall, cpu = min(wall, done - began), min(cpu, done_cpu - began_cpu)
            if done >= end:
                return {"wall": wall, "cpu": cpu}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            match request["do"]:
                case "list":
                    return self.list()
                case "track":
                    return self.track(request["id"])
                case _:
                    return self.time(request["id"], request["seconds"])
        except Exception as error:  # a broken benchmark is an answer too: the gate says which one it was
            traceback.print_exc()
            lines = str(error).strip().splitlines() or [""]
            return {"error": f"{type(error).__name__}: {lines[0]}"[:300], "type": type(error).__name__}


def main() -> None:
    """Serve until the input ends."""
    # Replies have the real standard output to themselves; what benchmarks print goes to standard error.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as replies:
        os.dup2(2, 1)
        worker = Worker()
        for line in sys.stdin:
            replies.write(json.dumps(worker.answer(json.loads(line))) + "\n")
            replies.flush()


if __name__ == "__main__":
    main()
