from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from chemistry import TABLE, integrals, molecule, sector, spec
from scipy.sparse.linalg import LinearOperator, eigsh

from replicate import molecule as molecule_module
from replicate.fcidump import read_fcidump
from replicate.hamiltonian import Kernel
from replicate.molecule import Molecule, load_molecule
from replicate.spec import MoleculeSpec, UserError, molecule_from_file
from replicate.store import _process_start

REPOSITORY = Path(__file__).parents[1]


def reference(name: str, kind: str) -> float:
    return TABLE[name]["reference"][kind]


# -- energies -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n, table in TABLE.items() if "reference" in table])
def test_hartree_fock_energies(name: str) -> None:
    assert integrals(name)[1] == pytest.approx(reference(name, "hf"), abs=1e-7)


@pytest.mark.parametrize("name", ["H2O", "N2", "H2S", "PH3", "Li2O", "LiH"])
def test_coupled_cluster_energies_of_closed_shells(name: str) -> None:
    mol = molecule(name)
    assert mol.e_ccsd == pytest.approx(reference(name, "ccsd"), abs=1e-6)
    assert mol.e_ccsd_t is not None
    assert mol.e_ccsd_t < mol.e_ccsd


@pytest.mark.parametrize("name", ["H2O", "N2", "O2", "H2S", "PH3", "LiH"])
def test_full_ci_energies(name: str) -> None:
    mol = molecule(name)
    assert mol.e_fci == pytest.approx(reference(name, "fci"), abs=1e-7)
    assert mol.energy_sources["fci"] == "computed"
    assert mol.n_alpha - mol.n_beta == TABLE[name].get("multiplicity", 1) - 1  # alpha is the majority


@pytest.mark.slow
def test_energies_of_the_largest_sector_that_is_diagonalised() -> None:
    mol = molecule("LiCl")
    assert mol.search_space == 1_002_001
    assert mol.e_fci == pytest.approx(reference("LiCl", "fci"), abs=1e-7)
    assert mol.e_ccsd == pytest.approx(reference("LiCl", "ccsd"), abs=1e-6)


def test_energies_out_of_reach_are_labelled_as_published() -> None:
    mol = molecule("Li2O")
    assert mol.search_space == 41_409_225
    assert mol.e_fci == reference("Li2O", "fci")
    assert mol.energy_sources == {
        "hf": "computed", "ccsd": "computed", "ccsd_t": "computed", "fci": "reference",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["H2", "LiH", "H2O", "CH2", "O2", "H2S"])
def test_fci_is_the_lowest_state_of_the_sector(name: str) -> None:
    mol = molecule(name)
    keys = torch.from_numpy(sector(mol).enumerate_keys())
    lowest = torch.linalg.eigvalsh(Kernel(mol.hamiltonian).sector_matrix(keys).to_dense())[0].item()
    assert mol.e_fci == pytest.approx(lowest, abs=1e-9)


@pytest.mark.slow
def test_fci_is_not_caught_in_the_symmetry_of_its_start() -> None:
    # B2: following one root from the lowest determinants ends 43 mHa above the ground state
    atoms = (("B", 0.0, 0.0, 0.0), ("B", 0.0, 0.0, 1.6))
    mol = load_molecule(MoleculeSpec(name="B2", atoms=atoms))
    matrix = Kernel(mol.hamiltonian).sector_matrix(torch.from_numpy(sector(mol).enumerate_keys()))
    operator = LinearOperator(
        tuple(matrix.shape),
        matvec=lambda v: torch.mv(matrix, torch.from_numpy(v.ravel())).numpy(),
        dtype=float,
    )
    start = np.random.default_rng(0).normal(size=matrix.shape[0])
    assert mol.e_fci == pytest.approx(eigsh(operator, k=1, which="SA", v0=start, tol=1e-9)[0][0], abs=1e-7)


def test_open_shell_coupled_cluster_is_exact_where_it_must_be() -> None:
    # H3, three electrons in three orbitals: no triple excitation exists, so CCSD on ROHF orbitals is exact
    atoms = (("H", 0.0, 0.0, 0.0), ("H", 0.0, 0.1, 0.9), ("H", 0.0, 0.0, 2.1))
    mol = load_molecule(MoleculeSpec(name="H3", atoms=atoms, multiplicity=2))
    assert (mol.n_alpha, mol.n_beta) == (2, 1)
    assert mol.e_fci is not None
    assert mol.e_fci < mol.e_hf - 1e-3
    assert mol.e_ccsd == pytest.approx(mol.e_fci, abs=1e-8)
    assert mol.e_ccsd_t is None
    assert mol.energy_sources["ccsd_t"] == "none"


def test_a_broken_bond_has_an_energy() -> None:
    # restricted orbitals are wrong here and coupled cluster may give up; FCI is twice the atom
    atoms = (("H", 0.0, 0.0, 0.0), ("H", 0.0, 0.0, 20.0))
    mol = load_molecule(MoleculeSpec(name="H2 far", atoms=atoms))
    atom = load_molecule(MoleculeSpec(name="H", atoms=atoms[:1], multiplicity=2))
    assert mol.e_fci == pytest.approx(2 * atom.e_hf, abs=1e-7)
    assert (atom.e_ccsd, atom.search_space, atom.hamiltonian.n_unique_flips) == (None, 1, 1)


@pytest.mark.parametrize(
    ("name", "e_inf_sector", "e_inf_identity"),
    [("H2O", -61.10821319, -46.46560078), ("N2", -86.38468603, -66.29543095), ("Li2O", -52.18446642, None)],
)
def test_infinite_temperature_energies(name: str, e_inf_sector: float, e_inf_identity: float | None) -> None:
    mol = molecule(name)
    assert mol.e_inf_sector == pytest.approx(e_inf_sector, abs=1e-8)
    if e_inf_identity is not None:
        assert mol.e_inf_identity == pytest.approx(e_inf_identity, abs=1e-8)


@pytest.mark.parametrize("name", ["H2", "LiH", "H2O", "CH2", "O2", "N2"])
def test_infinite_temperature_energy_is_the_mean_over_the_sector(name: str) -> None:
    mol = molecule(name)
    keys = torch.from_numpy(sector(mol).enumerate_keys())
    mean = Kernel(mol.hamiltonian).diagonal(keys).mean().item()
    assert mol.e_inf_sector == pytest.approx(
        mean, abs=1e-7
    )  # the strings that are dropped are below 1e-8 each


def test_molecule_table_knows_m_and_n() -> None:
    for name in ("H2", "LiH", "H2O", "CH2", "N2", "O2", "H2S", "PH3", "Li2O"):
        mol = molecule(name)
        assert mol.hamiltonian.n_unique_flips == TABLE[name]["unique_flips"], name
        assert mol.n_spin_orbitals == TABLE[name]["spin_orbitals"] == mol.hamiltonian.n_qubits, name


# -- determinism --------------------------------------------------------------------------------------

_HASHES = """
import json, sys
sys.path.insert(0, "tests")
from chemistry import molecule
print(json.dumps([molecule(name).hamiltonian.sha256 for name in sys.argv[1:]]))
"""


def test_hamiltonians_are_bit_identical_on_one_and_two_threads() -> None:
    names = ["N2", "NH3"]  # NH3: orbitals that differ by 2e-5 Hartree amplify every last bit
    hashes = []
    for threads in ("1", "2"):
        env = {
            **os.environ,
            "OMP_NUM_THREADS": threads,
            "OPENBLAS_NUM_THREADS": threads,
            "PYTHONPATH": str(REPOSITORY),
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", _HASHES, *names],
            cwd=REPOSITORY,
            env=env,
            capture_output=True,
            text=True,
            check=True,
        )
        hashes.append(json.loads(done.stdout))
    assert hashes[0] == hashes[1]


_CALLER = """
import signal, sys
from chemistry import spec
from replicate.molecule import load_molecule
signal.signal(signal.SIGTERM, lambda *_: None)  # as a worker that stops after its step
print(load_molecule(spec(sys.argv[1])).e_fci)
"""


@contextmanager
def pyscf_at_work(name: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that has a molecule computed, and the id of the process that computes it."""
    caller = subprocess.Popen(
        [sys.executable, "-c", _CALLER, name],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    children: list[str] = []
    try:
        while not children:
            assert caller.poll() is None
            children = Path(f"/proc/{caller.pid}/task/{caller.pid}/children").read_text("ascii").split()
            time.sleep(0.01)
        yield caller, int(children[0])
    finally:
        for process in (caller.pid, *map(int, children)):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        caller.communicate()


@pytest.mark.processes
def test_signal_to_the_group_is_not_for_pyscf() -> None:
    """Slurm, torchrun and terminals signal whole groups: it means a checkpoint, not a failed point."""
    with pyscf_at_work("H2O") as (caller, _):
        time.sleep(1.0)
        os.killpg(caller.pid, signal.SIGTERM)
        output, _ = caller.communicate(timeout=100)
    assert caller.returncode == 0
    assert float(output) == pytest.approx(reference("H2O", "fci"), abs=1e-5)


@pytest.mark.processes
def test_pyscf_ends_with_its_caller() -> None:
    """kill -9 of a worker must not leave minutes of FCI behind."""
    with pyscf_at_work("LiCl") as (caller, worker):
        time.sleep(1.0)
        caller.kill()
        caller.wait()
        deadline = time.monotonic() + 20
        while _process_start(worker) is not None:
            assert time.monotonic() < deadline, "PySCF goes on"
            time.sleep(0.05)


def test_the_folder_it_is_started_in_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "replicate.py").write_text("raise SystemExit(3)", encoding="utf-8")
    (tmp_path / "numpy.py").write_text("raise SystemExit(3)", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert load_molecule(spec("H2")).hamiltonian.sha256 == molecule("H2").hamiltonian.sha256


def test_orbital_signs_and_degenerate_frames_do_not_depend_on_where_they_start() -> None:
    from replicate.scf import _orient

    rng = np.random.default_rng(3)
    for size in (1, 2, 3):
        block = np.linalg.qr(rng.normal(size=(9, size)))[0]
        turn = np.linalg.qr(rng.normal(size=(size, size)))[0]
        for degenerate in ("generic", "aligned"):
            oriented = _orient(block, degenerate)
            np.testing.assert_allclose(_orient(block @ turn, degenerate), oriented, atol=1e-12)
            np.testing.assert_allclose(oriented.T @ oriented, np.eye(size), atol=1e-12)
            np.testing.assert_allclose(oriented @ oriented.T, block @ block.T, atol=1e-12)


def test_degenerate_frame_is_part_of_the_molecule() -> None:
    generic, aligned = molecule("N2"), load_molecule(spec("N2", degenerate="aligned", unique_flips=None))
    assert (generic.hamiltonian.n_unique_flips, aligned.hamiltonian.n_unique_flips) == (534, 378)
    for energy in ("e_hf", "e_ccsd", "e_fci", "e_inf_sector", "e_inf_identity"):
        assert getattr(aligned, energy) == pytest.approx(getattr(generic, energy), abs=1e-7), energy
    assert spec("N2").identity() != spec("N2", degenerate="aligned").identity()


# -- cache --------------------------------------------------------------------------------------------


def test_cache_is_read_and_damage_is_noticed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = load_molecule(spec("LiH"), cache=tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()

    with monkeypatch.context() as patch:
        patch.setattr(molecule_module, "_compute", lambda *_: pytest.fail("computed again"))
        again = load_molecule(spec("LiH", name="another label"), cache=tmp_path, threshold=1e-6)
    assert again.e_fci == fresh.e_fci
    assert again.hamiltonian.n_pauli_terms <= fresh.hamiltonian.n_pauli_terms

    def deliver(_spec: MoleculeSpec, _problem: object, folder: Path) -> Path:
        (folder / "molecule.npz").write_bytes(whole)  # what PySCF would give again
        return folder / "molecule.npz"

    monkeypatch.setattr(molecule_module, "_compute", deliver)
    middle = len(whole) // 2
    arrays = dict(np.load(path))
    arrays["e_fci"] = arrays["e_fci"] + 1e-3
    flipped = bytearray(whole)
    flipped[middle] ^= 1
    for number, damage in enumerate((whole[:middle], b"", b"not a file", bytes(flipped), None)):
        if damage is None:  # a readable file with another content
            np.savez(path, **arrays)
        else:
            path.write_bytes(damage)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            repaired = load_molecule(spec("LiH"), cache=tmp_path)
        assert "damaged" in caplog.text, number
        assert (repaired.e_fci, repaired.hamiltonian.sha256) == (fresh.e_fci, fresh.hamiltonian.sha256)
        assert [p.name for p in tmp_path.iterdir()] == [path.name]  # nothing is left over


def test_what_changes_the_hamiltonian_changes_the_cache_key(tmp_path: Path) -> None:
    load_molecule(spec("H2"), cache=tmp_path)
    load_molecule(spec("H2", source="elsewhere", name="x"), cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    load_molecule(spec("H2", basis="6-31g", spin_orbitals=None), cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


# -- files --------------------------------------------------------------------------------------------


def same(one: Molecule, other: Molecule) -> None:
    for energy in ("e_hf", "e_ccsd", "e_fci", "e_inf_sector"):
        assert getattr(one, energy) == pytest.approx(getattr(other, energy), abs=1e-8), energy
    assert (one.n_alpha, one.n_beta, one.n_orbitals) == (other.n_alpha, other.n_beta, other.n_orbitals)


def test_xyz_is_the_table(tmp_path: Path) -> None:
    path = tmp_path / "water.xyz"
    atoms = TABLE["H2O"]["atoms"]
    path.write_text("3\nwater\n" + "".join(f"{s} {x} {y} {z}\n" for s, x, y, z in atoms), encoding="utf-8")
    mol = load_molecule(molecule_from_file(str(path)))
    assert mol.hamiltonian.sha256 == molecule("H2O").hamiltonian.sha256


@pytest.mark.parametrize("name", ["LiH", "CH2"])
def test_fcidump_round_trip(name: str, tmp_path: Path) -> None:
    from pyscf.tools import fcidump

    mol = molecule(name)
    ints = mol.integrals
    path = tmp_path / "integrals.fcidump"
    fcidump.from_integrals(
        str(path), ints.h1, ints.eri, mol.n_orbitals, (mol.n_alpha, mol.n_beta), nuc=ints.constant,
        ms=mol.n_alpha - mol.n_beta, tol=0.0, float_format=" %.17g",
    )  # fmt: skip
    back = read_fcidump(path)
    np.testing.assert_allclose(back.eri, ints.eri, atol=1e-14)
    np.testing.assert_allclose(back.h1, ints.h1, atol=1e-14)
    loaded = load_molecule(molecule_from_file(str(path)))
    same(loaded, mol)
    assert loaded.geometry == ()
    ours, theirs = loaded.hamiltonian, mol.hamiltonian
    np.testing.assert_array_equal(ours.flips, theirs.flips)
    np.testing.assert_array_equal(ours.z_masks, theirs.z_masks)
    np.testing.assert_allclose(ours.weights, theirs.weights, atol=1e-13)


def test_fcidump_keeps_its_orbitals(tmp_path: Path) -> None:
    # turned orbitals are another Hamiltonian with the same energies: the file decides
    from pyscf.tools import fcidump

    mol = molecule("LiH")
    turn = np.linalg.qr(np.eye(6) + 0.1 * np.random.default_rng(0).normal(size=(6, 6)))[0]
    h1 = turn.T @ mol.integrals.h1 @ turn
    eri = np.einsum("pqrs,pi,qj,rk,sl->ijkl", mol.integrals.eri, turn, turn, turn, turn, optimize=True)
    path = tmp_path / "turned.fcidump"
    fcidump.from_integrals(
        str(path), h1, eri, 6, 4, nuc=mol.integrals.constant, tol=0.0, float_format=" %.17g"
    )
    loaded = load_molecule(molecule_from_file(str(path)))
    np.testing.assert_allclose(loaded.integrals.h1, h1, atol=1e-12)
    same(loaded, mol)


@pytest.fixture(scope="module")
def pyscf_dump() -> tuple[str, float]:
    """Water's FCIDUMP as PySCF writes it, and PySCF's FCI energy of the same integrals."""
    from pyscf import fci, gto, scf
    from pyscf.tools import fcidump

    atoms = [(atom[0], tuple(atom[1:])) for atom in TABLE["H2O"]["atoms"]]
    mf = scf.RHF(gto.M(atom=atoms, basis="sto-3g", symmetry=True, verbose=0)).run(conv_tol=1e-12)
    with tempfile.TemporaryDirectory() as folder:
        fcidump.from_scf(mf, f"{folder}/x", tol=1e-15)
        return Path(f"{folder}/x").read_text(encoding="utf-8"), float(fci.FCI(mf).kernel()[0])


def _spelling(text: str, name: str) -> str:
    """The same integrals as other programs write them."""
    header, body = text.split("&END")
    entries = [line.split() for line in body.splitlines() if line.strip()]
    match name:
        case "slash":
            return text.replace("&END", "/")
        case "dollar":
            return text.replace("&", "$")
        case "lower case":
            return header.lower() + "&end" + body
        case "one line":
            return " ".join(header.split()) + " &END" + body
        case "no symmetry":
            return re.sub(r"ORBSYM=[\d,\s]*ISYM=\d,", "", header) + "&END" + body
        case "not UHF":
            return header + "IUHF=0,\n&END" + body
        case "crlf":
            return text.replace("\n", "\r\n")
        case "Fortran exponents":
            return header + "&END" + body.replace("e-", "D-")
        case "every permutation":
            return text + "".join(
                f"{v} {s} {r} {q} {p}\n{v} {q} {p} {s} {r}\n" for v, p, q, r, s in entries if s != "0"
            )
        case "twice":
            return text + body
    raise AssertionError(name)


@pytest.mark.parametrize(
    "name",
    ["slash", "dollar", "lower case", "one line", "no symmetry", "not UHF", "crlf", "Fortran exponents",
     "every permutation", "twice"],
)  # fmt: skip
def test_fcidump_as_other_programs_write_it(name: str, pyscf_dump: tuple[str, float], tmp_path: Path) -> None:
    text, e_fci = pyscf_dump
    spelled = _spelling(text, name)
    assert spelled != text
    for file, content in (("plain", text), ("other", spelled)):
        (tmp_path / file).write_text(content, encoding="utf-8", newline="")
    plain, other = read_fcidump(tmp_path / "plain"), read_fcidump(tmp_path / "other")
    assert (other.constant, other.n_electrons, other.ms2) == (plain.constant, plain.n_electrons, plain.ms2)
    np.testing.assert_array_equal(other.h1, plain.h1)
    np.testing.assert_array_equal(other.eri, plain.eri)
    if name == "slash":
        mol = load_molecule(molecule_from_file(str(tmp_path / "other")))
        assert mol.e_fci == pytest.approx(e_fci, abs=1e-9)


def _fcidump(body: str, header: str = "&FCI NORB=2,NELEC=2,MS2=0,\n ORBSYM=1,1,\n ISYM=1,\n&END") -> str:
    return header + "\n" + body


_BODY = "0.7 1 1 1 1\n0.2 2 1 2 1\n-1.2 1 1 0 0\n-0.5 2 2 0 0\n-0.9 1 0 0 0\n0.7 0 0 0 0\n"


def test_fcidump_reader(tmp_path: Path) -> None:
    path = tmp_path / "x.fcidump"
    path.write_text(_fcidump(_BODY.replace("0.7 1", "7.0D-01 1")), encoding="utf-8")
    dump = read_fcidump(path)
    assert (dump.constant, dump.n_electrons, dump.ms2) == (0.7, 2, 0)
    assert dump.eri[0, 0, 0, 0] == 0.7
    assert dump.eri[0, 1, 0, 1] == dump.eri[1, 0, 0, 1] == dump.eri[1, 0, 1, 0] == 0.2
    np.testing.assert_array_equal(dump.h1, np.diag([-1.2, -0.5]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.7 1 1 1 1\n", "header"),
        (_fcidump(_BODY, "&FCI NELEC=2 &END"), "NORB"),
        (_fcidump(_BODY, "&FCI NORB=2,NELEC=2,MS2=1 &END"), "MS2: 1 is impossible with NELEC = 2"),
        (_fcidump(_BODY, "&FCI NORB=1,NELEC=4,MS2=0 &END"), "impossible"),
        (_fcidump(_BODY, "&FCI NORB=32,NELEC=4,MS2=0 &END"), "64 spin-orbitals; supported are 2 to 62"),
        (_fcidump(_BODY, "&FCI NORB=2,NELEC=2,MS2=0,IUHF=1 &END"), "UHF"),
        (_fcidump("(0.7,0.1) 1 1 1 1\n" + _BODY), "line 5: complex integral"),
        (_fcidump(_BODY + "abc 1 1 1 1\n"), "line 11: expected a value and four orbital indices"),
        (_fcidump(_BODY + "0.1 1 1 1\n"), "line 11: expected a value"),
        (_fcidump(_BODY + "0.1 3 1 1 1\n"), "line 11: orbital index outside 0 to NORB = 2"),
        (_fcidump(_BODY + "nan 1 1 2 2\n"), "line 11: the integral is nan"),
        (_fcidump(_BODY + "0.3 1 2 1 2\n"), "line 11: .* was 0.2 before"),
        (_fcidump(_BODY + "0.3 2 1 1 2\n"), r"line 11: \(21|12\) was 0.2 before"),
        (_fcidump(_BODY + "-1.3 1 1 0 0\n"), r"line 11: h\(1,1\) was -1.2 before"),
        (_fcidump(_BODY + "0.8 0 0 0 0\n"), "line 11: constant was 0.7 before"),
        (_fcidump(_BODY + "0.3 1 0 1 0\n"), "line 11: indices 1 0 1 0 name no integral"),
        (_fcidump(""), "no one-electron integral"),
    ],
)
def test_broken_fcidump(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.fcidump"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message) as error:
        read_fcidump(path)
    assert len(error.value.problems) == 1
    assert "broken.fcidump" in str(error.value)


def test_a_file_that_changed_after_planning_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.fcidump"
    path.write_text(_fcidump(_BODY), encoding="utf-8")
    planned = molecule_from_file(str(path))
    path.write_text(_fcidump(_BODY.replace("-1.2", "-1.3")), encoding="utf-8")
    with pytest.raises(UserError, match="has changed"):
        load_molecule(planned)
    path.unlink()
    with pytest.raises(UserError, match="no such file"):
        load_molecule(planned)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"basis": "sto-4711g", "spin_orbitals": None}, "H2O: basis: 'sto-4711g'"),
        (
            {"basis": "cc-pvtz", "spin_orbitals": None},
            "H2O: basis: 116 spin-orbitals; supported are at most 62",
        ),
        ({"basis": "6-31g"}, "H2O: spin_orbitals: 14 given, but 6-31g has 26 here"),
    ],
)
def test_impossible_molecules(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_molecule(spec("H2O", **changes), cache=tmp_path)
    assert len(error.value.problems) == 1
