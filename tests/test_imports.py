"""Modules import only from those above them (DESIGN section 1), and what must stay light stays light."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "replicate"

# Top to bottom; a package is one name. Helpers of a module stand just above it.
ORDER = [
    "provenance",
    "spec",
    "sector",
    "fcidump",
    "pauli",
    "scf",
    "molecule",
    "patterns",
    "hamiltonian",
    "tree",
    "capture",
    "ansatz",
    "ranks",
    "sampler",
    "energy",
    "flops",
    "executed",
    "schedules",
    "regime",
    "memory",
    "trainer",
    "records",
    "store",
    "plan",
    "run",
    "verify",
    "engine",
    "cube",
    "scaling",
    "cli",
    "__main__",
]

# What a module may load when it is imported, beyond the standard library and numpy.
ONLY_IN = {
    "pydantic": {"spec"},
    "pyscf": {"scf"},
}
NEVER_AT_IMPORT = {
    "torch": {"provenance", "spec", "flops", "records", "store", "plan", "engine", "cube", "scaling", "cli"},
    "xarray": {"provenance", "spec", "flops", "records", "store", "plan", "engine", "cli"},
    "pyscf": set(ORDER) - {"scf"},
    "openfermion": set(ORDER),
}


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if name != "__init__":
            yield name, ast.parse(path.read_text(encoding="utf-8"))


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "absolute imports only"
        module = node.module or ""
        # `from replicate import flops` names the module in its aliases
        return [f"replicate.{alias.name}" for alias in node.names] if module == "replicate" else [module]
    return []


def at_import(tree: ast.Module) -> Iterator[ast.AST]:
    """Nodes that run when the module is imported: no function bodies, no TYPE_CHECKING blocks."""
    queue: list[ast.AST] = list(tree.body)
    while queue:
        node = queue.pop()
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            queue += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            queue += ast.iter_child_nodes(node)


def test_every_module_has_its_place() -> None:
    assert {name for name, _ in modules()} <= set(ORDER)


def test_imports_run_upwards_only() -> None:
    wrong = []
    for name, tree in modules():
        for target in (t for node in ast.walk(tree) for t in imported(node)):
            parts = target.split(".")
            if parts[0] == "figures":
                wrong.append(f"{name} imports {target}")
            if parts[0] != "replicate" or len(parts) == 1 or parts[1] in ("__version__", name):
                continue
            if ORDER.index(parts[1]) > ORDER.index(name):
                wrong.append(f"{name} imports {target}, which is below it")
    assert not wrong


@pytest.mark.parametrize("package", ONLY_IN)
def test_package_lives_in_one_place(package: str) -> None:
    users = {
        name
        for name, tree in modules()
        for node in ast.walk(tree)
        for target in imported(node)
        if target.split(".")[0] == package
    }
    assert users == ONLY_IN[package]


@pytest.mark.parametrize("package", NEVER_AT_IMPORT)
def test_heavy_packages_load_late(package: str) -> None:
    users = {
        name
        for name, tree in modules()
        for node in at_import(tree)
        for target in imported(node)
        if target.split(".")[0] == package
    }
    assert not users & NEVER_AT_IMPORT[package]


def test_figures_read_cubes_and_fits_only() -> None:
    """Figures may use closed forms, never the physics or the training (DESIGN section 1)."""
    heavy = {
        "replicate.trainer",
        "replicate.run",
        "replicate.molecule",
        "replicate.hamiltonian",
        "replicate.ansatz",
    }
    for path in sorted((ROOT.parent / "figures").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {target for node in ast.walk(tree) for target in imported(node)}
        assert not {n for n in names if any(n == h or n.startswith(h + ".") for h in heavy)}, path.name
