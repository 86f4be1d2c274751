"""The cube against arithmetic done by hand on the point files that it was made from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from math import comb
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from replicate import cube
from replicate.run import run_point
from replicate.spec import Point, Study, UserError, load_study
from replicate.store import Store

WriteSpec = Callable[..., Path]

CHANGES = [
    ('molecules = ["H2"]', 'molecules = ["H2", "LiH"]'),
    ('ansatze = ["made"]', 'ansatze = ["made", "transformer"]'),
    ('sizes = ["xs"]', 'sizes = ["s", "xs"]'),
    ("steps = [3]", "steps = [12, 3]"),
    ("[phase]\n", "[sampling]\nbatch_max = 60\nn_min = 1e2\nn_max = 1e4\n\n[phase]\n"),
]
VARIANT = '\n[variants.wide]\nphase.width = 9\nonly = { steps = [3] }\n[holdout]\nsizes = ["s"]\n'


@pytest.fixture
def study(write_spec: WriteSpec) -> Study:
    return load_study(write_spec(*CHANGES, add=VARIANT))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("molecules")


@pytest.fixture
def store(study: Study, tmp_path: Path, cache: Path) -> Store:
    """All points of the study trained, but one failed and one missing."""
    made = Store.of(study, tmp_path / "artifacts")
    made.prepare()
    *done, failed, missing = study.points
    for point in done:
        run_point(point, made, cache=cache)
    made.write_error(failed, FloatingPointError("step 2: energy nan"))
    assert not made.point_path(missing.id).exists()
    return made


def labels(point: Point) -> dict[str, object]:
    return {
        "molecule": point.molecule.name,
        "ansatz": point.ansatz.name,
        "size": point.size,
        "steps": point.steps,
        "variant": point.variant,
        "seed": point.seed,
    }


def test_every_number_is_in_the_cell_of_its_labels(study: Study, store: Store) -> None:
    tree = cube.collect(study, store)
    final, parts, history, molecules = (tree[name].to_dataset() for name in tree.children)
    for point in study.points[:-2]:
        data = store.read_point(point.id)
        assert data is not None
        cell, info = final.sel(labels(point)), molecules.sel(molecule=point.molecule.name)
        assert str(cell.point_id.item()) == point.id
        for name in cube.COPIED:
            assert cell[name].item() == float(data[name]), name
        energy, variance = float(data["energy"]), float(data["variance"])
        n, alpha, beta = (int(info[name]) for name in ("n_spin_orbitals", "n_alpha", "n_beta"))
        space = comb(n // 2, alpha) * comb(n // 2, beta)
        assert cell.search_fraction.item() == float(data["n_unique"].mean()) / space
        assert cell.d_prime.item() == pytest.approx(
            point.steps * float(data["n_unique"].mean()) / space, rel=1e-15
        )
        assert cell.abs_error.item() == abs(energy - float(info.e_fci))
        v_score = (alpha + beta) * variance / (energy - float(info.e_inf_sector)) ** 2
        assert cell.v_score.item() == pytest.approx(v_score, rel=1e-14)
        assert cell.n_total.item() == int(data["n_modulus"]) + int(data["n_phase"])
        split = parts.sel(labels(point))
        assert sum(json.loads(data.attrs["flops_executed_parts"]).values()) == float(data["flops_executed"])
        for name, attribute, variable in (
            ("flop", "flops_estimated_parts", "flops_estimated_part"),
            ("executed", "flops_executed_parts", "flops_executed_part"),
            ("wall", "wall_parts", "wall_part_seconds"),
        ):
            stored = json.loads(data.attrs[attribute])
            found = dict(
                zip(split[f"{name}_part"].values.tolist(), split[variable].values.tolist(), strict=True)
            )
            assert found == {key: value for key, value in stored.items() if key != "total"}
        past = history.sel(labels(point))
        length = data.sizes["record"]
        for name in ("step", "energy", "variance", "n_unique", "n_samples", "learning_rate", "grad_norm"):
            np.testing.assert_array_equal(past[name].values[:length], data[f"history_{name}"].values)
            assert np.isnan(past[name].values[length:]).all()


def test_status_of_every_cell(study: Study, store: Store) -> None:
    final = cube.collect(study, store)["final"].to_dataset()
    expected = xr.full_like(final["status"], 0)
    for point in study.points[:-2]:
        expected.loc[labels(point)] = 1
    expected.loc[labels(study.points[-2])] = 2
    np.testing.assert_array_equal(final["status"].values, expected.values)
    assert int(final["planned"].sum()) == len(study.points)
    assert np.isnan(final["energy"].values[final["status"].values != 1]).all()
    assert (final["planned"].sel(variant="wide", steps=12).values == 0).all()
    np.testing.assert_array_equal(
        final["held_out"].sel(size="s").values, final["planned"].sel(size="s").values
    )
    assert int(final["held_out"].sel(size="xs").sum()) == 0
    # Parameters of planned cells are known whether or not they have run.
    counts = final["n_total"].where(final["planned"].any(["steps", "seed"]), 0)
    assert (counts >= 0).all()


def test_invalid_points_keep_their_numbers_and_say_so(study: Study, store: Store) -> None:
    point = study.points[0]
    data = store.read_point(point.id)
    assert data is not None
    store.point_path(point.id).unlink()
    store.write_point(point.id, data.assign(valid=data["valid"] * 0))
    cell = cube.collect(study, store)["final"].to_dataset().sel(labels(point))
    assert cell.status.item() == 3
    assert cell.energy.item() == float(data["energy"])


def test_every_variable_has_units_and_a_long_name(study: Study, store: Store, tmp_path: Path) -> None:
    path = tmp_path / "cube.nc"
    cube.write_cube(cube.collect(study, store), path)
    with xr.open_datatree(path, engine="netcdf4") as tree:
        assert set(tree.children) == {"final", "parts", "history", "molecule"}
        for group in tree.children:
            for name, variable in tree[group].to_dataset().variables.items():
                assert {"units", "long_name"} <= set(variable.attrs), f"/{group}/{name}"
        assert {"Conventions", "title", "references", "spec", "provenance", "schema"} <= set(tree.attrs)
        assert tree.attrs["spec"] == study.text
        (origin,) = json.loads(tree.attrs["provenance"])["origins"]
        assert origin["points"] == len(study.points) - 2


def test_file_holds_what_was_collected_and_collecting_again_changes_nothing(
    study: Study, store: Store, tmp_path: Path
) -> None:
    path, tree = tmp_path / "cube.nc", cube.collect(study, store)
    cube.write_cube(tree, path)
    cube.read_cube(path).identical(tree)
    first = path.read_bytes()
    os.utime(path, (1, 1))
    cube.write_cube(cube.collect(study, store), path)
    assert path.stat().st_mtime == 1  # left alone: what was made from it stays newer
    path.unlink()
    cube.write_cube(cube.collect(study, store), path)
    assert path.read_bytes() == first


@pytest.mark.parametrize(
    ("n_dof", "e_inf", "dof", "at"),
    [
        ("electrons", "sector", 4, -5.0),
        ("qubits", "sector", 12, -5.0),
        ("electrons", "identity", 4, -4.0),
        ("electrons", "zero", 4, 0.0),
    ],
)
def test_v_score_conventions(write_spec: WriteSpec, n_dof: str, e_inf: str, dof: int, at: float) -> None:
    convention = load_study(write_spec(add=f'\n[v_score]\nn_dof = "{n_dof}"\ne_inf = "{e_inf}"\n')).v_score
    molecule = {
        "n_alpha": 2,
        "n_beta": 2,
        "n_spin_orbitals": 12,
        "e_inf_sector": -5.0,
        "e_inf_identity": -4.0,
    }
    assert cube.v_score_in(convention, molecule, -7.0, 0.25) == dof * 0.25 / (-7.0 - at) ** 2


def test_reference_energy_stands_in_where_fci_is_out_of_reach(study: Study, store: Store) -> None:
    point = study.points[0]
    data = store.read_point(point.id)
    assert data is not None
    molecule = json.loads(data.attrs["molecule"]) | {"e_fci": -99.0, "fci_source": "reference"}
    reference = point.molecule.reference.model_copy(update={"fci": -1.5})
    spec = point.molecule.model_copy(update={"reference": reference})
    assert cube._fci(molecule, spec) == (-1.5, "reference")  # that of the spec now
    assert cube._fci(molecule | {"fci_source": "computed"}, spec) == (-99.0, "computed")
    assert cube._fci(molecule, point.molecule) == (None, "none")


def test_points_of_two_hamiltonians_are_not_mixed(study: Study, store: Store) -> None:
    point = study.points[1]
    data = store.read_point(point.id)
    assert data is not None
    store.point_path(point.id).unlink()
    molecule = json.loads(data.attrs["molecule"]) | {"hamiltonian_sha256": "0" * 64}
    store.write_point(point.id, data.assign_attrs(molecule=json.dumps(molecule)))
    with pytest.raises(UserError, match="its Hamiltonian of H2 is not that of the points before"):
        cube.collect(study, store)


def test_unreadable_point_is_a_missing_cell(study: Study, store: Store) -> None:
    point = study.points[0]
    path = store.point_path(point.id)
    path.write_bytes(path.read_bytes()[:-100])
    final = cube.collect(study, store)["final"].to_dataset()
    assert final["status"].sel(labels(point)).item() == 0
    assert path.with_name(path.name + ".corrupt").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such cube"), (b"", "not a readable cube"), (b"CDF\x01" * 9, "not a readable cube")],
)
def test_cube_that_cannot_be_read(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "cube.nc"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        cube.read_cube(path)


def test_cube_of_another_schema_is_refused(study: Study, store: Store, tmp_path: Path) -> None:
    tree = cube.collect(study, store)
    tree.attrs["schema"] = cube.CUBE_SCHEMA + 1
    cube.write_cube(tree, tmp_path / "cube.nc")
    with pytest.raises(UserError, match=r"cube of schema 2; this version reads 1: collect it again"):
        cube.read_cube(tmp_path / "cube.nc")


def test_collecting_loads_no_physics(study: Study, store: Store) -> None:
    """Nor torch, which alone would take as long as hundreds of points."""
    code = (
        "import sys; from replicate.cli import main; main(['collect', *sys.argv[1:]]);"
        "assert not {'torch', 'pyscf', 'openfermion'} & set(sys.modules)"
    )
    arguments = [study.path, "--artifacts", str(store.root.parent)]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
