"""The commands as a user types them: exit status, what is printed, what is written."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import xarray as xr

from replicate.cli import main
from replicate.cube import MOLECULE
from replicate.run import run_point
from replicate.spec import Study, load_study
from replicate.store import Store

WriteSpec = Callable[..., Path]
ROOT = Path(__file__).parent.parent
COMMANDS = ("plan", "run", "status", "collect", "fit", "allocate", "molecule", "flops", "verify", "bench")


@pytest.fixture
def spec(write_spec: WriteSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study of four points, and its folder as the current one."""
    monkeypatch.chdir(tmp_path)
    return write_spec(('sizes = ["xs"]', 'sizes = ["xs", "s"]'), ("seeds = [0]", "seeds = [0, 1]"))


@pytest.fixture
def trained(spec: Path, tmp_path: Path) -> tuple[Study, Store]:
    """Three points trained, one failed."""
    study = load_study(spec)
    store = Store.of(study, tmp_path / "artifacts")
    store.prepare()
    for point in study.points[:3]:
        run_point(point, store, cache=tmp_path / "artifacts" / ".molecules")
    store.write_error(study.points[3], ValueError("made up"))
    return study, store


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_every_command_has_help(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    assert "usage: python -m replicate" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["plan"], ["run", "x.toml", "--workers", "0"]])
def test_bad_arguments_end_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().out == ""


def test_plan_lists_every_point(spec: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(spec), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    study = load_study(spec)
    assert [row["id"] for row in record["points"]] == [p.id for p in study.points]
    assert record["n_left"] == 4
    row = record["points"][0]
    assert row["n_total"] == row["n_modulus"] + row["n_phase"]
    assert main(["plan", str(spec)]) == 0
    table = capsys.readouterr().out
    assert all(p.id in table for p in study.points)
    assert not (spec.parent / "artifacts").exists()


def test_plan_estimates_flops_where_m_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(ROOT / "specs" / "study.toml"), "--json"]) == 0
    for row in json.loads(capsys.readouterr().out)["points"]:
        assert row["flops_estimated"] > 0
        assert row["seconds_estimated"] > 0


def test_status_agrees_with_the_files(
    trained: tuple[Study, Store], spec: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, store = trained
    assert main(["status", str(spec), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["counts"] == {"done": 3, "running": 0, "failed": 1, "missing": 0}
    files = {path.stem for path in store.points.glob("*.nc")}
    assert {row["id"] for row in record["points"] if row["state"] == "done"} == files
    assert [row["reason"] for row in record["points"] if row["state"] == "failed"] == ["ValueError: made up"]
    assert main(["status", str(spec)]) == 0
    assert "tiny: 3 done, 0 running, 1 failed, 0 missing" in capsys.readouterr().out


def test_collect_says_what_it_found(
    trained: tuple[Study, Store], spec: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["collect", str(spec)]) == 0
    path = Path("artifacts/tiny/cube.nc")
    assert capsys.readouterr().out == f"{path}: 4 points: 0 missing, 3 done, 1 failed, 0 invalid\n"
    with xr.open_datatree(path, engine="netcdf4") as tree:
        assert tree["final"]["status"].sum() == 5


def test_molecule_has_the_names_of_the_cube(
    trained: tuple[Study, Store], spec: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (spec.parent / "h2.xyz").write_text("2\n\nH 0 0 0\nH 0 0 1.5\n", encoding="utf-8")
    assert main(["molecule", "h2.xyz", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert set(MOLECULE) | {"hamiltonian_sha256"} <= set(record)
    main(["collect", str(spec)])
    with xr.open_datatree("artifacts/tiny/cube.nc", engine="netcdf4") as tree:
        stored = tree["molecule"].to_dataset().sel(molecule="H2").load()
    assert {name: stored[name].item() for name in MOLECULE} == {name: record[name] for name in MOLECULE}
    assert stored["hamiltonian_sha256"].item() == record["hamiltonian_sha256"]


def test_molecule_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = str(ROOT / "specs" / "molecules.toml")
    assert main(["molecule", "H2", "--molecules", table, "--artifacts", str(tmp_path), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["name"], record["n_spin_orbitals"], record["search_space"]) == ("H2", 4, 4)
    assert main(["molecule", "H20", "--molecules", table]) == 2
    assert "unknown molecule 'H20', did you mean \"H2\"?" in capsys.readouterr().err


def test_a_study_of_files_from_geometry_to_cube(
    write_spec: WriteSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """[molecule.NAME] with xyz and fcidump, relative to the spec; the folder it is run in does not matter."""
    from pyscf import gto, scf
    from pyscf.tools import fcidump

    (tmp_path / "cation.xyz").write_text("2\n\nLi 0 0 0\nH 0 0 1.6\n", encoding="utf-8")
    h2 = gto.M(atom="H 0 0 0; H 0 0 1.5", basis="sto-3g", verbose=0)
    fcidump.from_scf(scf.RHF(h2).run(conv_tol=1e-12), str(tmp_path / "h2.fcidump"), tol=1e-15)
    spec = write_spec(
        ('molecules = ["H2"]', 'molecules = ["H2", "dump", "cation"]'),
        add='\n[molecule.dump]\nfcidump = "h2.fcidump"\n'
        '\n[molecule.cation]\nxyz = "cation.xyz"\ncharge = 1\nmultiplicity = 2\n',
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert main(["run", str(spec), "--workers", "1"]) == 0
    assert main(["collect", str(spec)]) == 0
    with xr.open_datatree("artifacts/tiny/cube.nc", engine="netcdf4") as tree:
        found = tree["molecule"].to_dataset().load()
        assert (tree["final"]["status"] == 1).all()
    assert found.sel(molecule="dump")["e_fci"] == pytest.approx(
        float(found.sel(molecule="H2")["e_fci"]), abs=1e-9
    )
    cation = found.sel(molecule="cation")
    assert (int(cation["n_alpha"]), int(cation["n_beta"]), int(cation["search_space"])) == (2, 1, 90)
    assert capsys.readouterr().err.count("[") == 3


def test_a_basis_that_does_not_exist_stops_a_run_before_it_writes(
    write_spec: WriteSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    spec = write_spec(
        ('molecules = ["H2"]', 'molecules = ["H2", "LiH"]'),
        ("[molecule.H2]\n", '[molecule.H2]\nbasis = "sto-4711g"\n'),
        ("[molecule.LiH]\n", '[molecule.LiH]\nbasis = "cc-pv5z"\n'),
    )
    assert main(["run", str(spec)]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("H2: basis: 'sto-4711g' on these atoms: ")
    assert second == "LiH: basis: 292 spin-orbitals; supported are at most 62"
    assert not Path("artifacts").exists()


def test_flops_beside_each_other(
    trained: tuple[Study, Store], spec: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study, store = trained
    assert main(["flops", str(spec), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["id"] for row in rows] == [p.id for p in study.points[:3]]  # M of the fourth is not known
    for row in rows:
        data = store.read_point(row["id"])
        assert data is not None
        parts = {name: value for name, value in row["parts"].items() if name != "total"}
        assert sum(parts.values()) == row["parts"]["total"] == float(data["flops_estimated"])
        assert row["ratio"] == row["parts"]["total"] / float(data["flops_executed"])
        assert row["attention"] == 0  # a MADE has none
        assert sum(row["executed_parts"].values()) == row["flops_executed"]
        assert row["step_seconds"] == sum(row["wall_parts"].values()) <= float(data["wall_seconds"])
        assert row["flop_per_second"] == row["flops_executed"] / row["step_seconds"]
        assert row["samples"] == int(data["n_unique"].sum())


def test_flops_as_a_table_for_papers_and_for_machines(
    trained: tuple[Study, Store], spec: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same numbers in every format; CSV keeps every digit."""
    assert main(["flops", str(spec), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert main(["flops", str(spec), "--format", "csv"]) == 0
    table = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert main(["flops", str(spec), "--format", "markdown"]) == 0
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == list(table[0])
    assert len(lines) == 2 + len(record) == 2 + len(table)
    for row, line, drawn in zip(record, table, lines[2:], strict=True):
        labels = ("id", "molecule", "ansatz", "size", "steps", "variant", "seed", "samples")
        assert [line[name] for name in labels] == [str(row[name]) for name in labels] == drawn[:8]
        assert float(line["seconds"]) == row["step_seconds"]
        assert float(line["estimated"]) == row["parts"]["total"]
        assert float(line["executed"]) == row["flops_executed"]
        assert float(line["estimated/executed"]) == row["ratio"]
        assert float(line["FLOP/s"]) == row["flop_per_second"]
        for label, family in (
            ("estimated", "parts"),
            ("executed", "executed_parts"),
            ("seconds", "wall_parts"),
        ):
            parts = {name: value for name, value in row[family].items() if name != "total"}
            assert {n: float(line[f"{label} {n}"]) for n in parts} == parts
        assert [float(cell) for cell in drawn[8:]] == pytest.approx(
            [float(cell) for cell in list(line.values())[8:]], rel=1e-2
        )
    assert main(["flops", str(spec)]) == 0
    head, *brief, blank, note = capsys.readouterr().out.splitlines()
    assert (blank, note[:6]) == ("", "tiny: ")
    assert head.endswith("sampling %  local energy %  gradient %")
    for row, text in zip(record, brief, strict=True):
        *_, sampling, local, gradient = (float(cell) for cell in text.split()[-3:])
        parts, total = row["parts"], row["parts"]["total"]
        assert sampling == pytest.approx(100 * parts["sampling"] / total, abs=0.005)
        energy = parts["local_energy_modulus"] + parts["local_energy_phase"]
        assert local == pytest.approx(100 * energy / total, abs=0.005)
        assert sampling + local + gradient == pytest.approx(100, abs=0.02)


def test_verify_tells_the_same_from_the_tampered(
    trained: tuple[Study, Store], spec: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study, store = trained
    assert main(["verify", str(spec), "--sample", "3", "--json"]) == 0
    verdicts = json.loads(capsys.readouterr().out)
    assert {v["outcome"] for v in verdicts} == {"identical"}
    assert len(verdicts) == 3
    data = store.read_point(study.points[0].id)
    assert data is not None
    store.point_path(study.points[0].id).unlink()
    store.write_point(study.points[0].id, data.assign(energy=data["energy"] + 1e-12))
    assert main(["verify", str(spec), "--only", study.points[0].id]) == 1
    out = capsys.readouterr().out
    assert "different (same machine and versions)" in out
    assert "differs: energy" in out
    assert "0 of 1 points verified" in out


def test_verify_allows_rounding_on_another_machine_only(trained: tuple[Study, Store]) -> None:
    from replicate.verify import compare

    study, store = trained
    stored = store.read_point(study.points[0].id)
    assert stored is not None
    record = json.loads(stored.attrs["provenance"])
    record["hardware"]["cpu"] = "another processor"
    elsewhere = stored.assign_attrs(provenance=json.dumps(record))
    near, far = (stored.assign(energy=stored["energy"] + shift) for shift in (5e-4, 5e-3))
    outcomes = [
        compare(study.points[0], a, b).outcome for a in (stored, elsewhere) for b in (stored, near, far)
    ]
    assert outcomes == ["identical", "different", "different", "identical", "close", "different"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["run", "tiny.toml", "--address", "tcp://127.0.0.1:8786"],
            "--address: only with --engine dask",
        ),
        (
            ["run", "tiny.toml", "--engine", "dask", "--resources", "GPU"],
            "--resources GPU: expected NAME=AMOUNT, for example GPU=1",
        ),
        (
            ["run", "tiny.toml", "--engine", "slurm", "--slurm", "partition"],
            "--slurm partition: expected KEY=VALUE, for example partition=gpu timeout_min=240",
        ),
        (
            ["run", "tiny.toml", "--only", "0123456789ab"],
            "tiny.toml: no point 0123456789ab; `plan` lists the ids",
        ),
        (["run", "tiny.toml", "--workers", "9999"], "--workers 9999 --threads 1: more than this machine's"),
        (["collect", "tiny.toml"], "artifacts/tiny/points: no such folder; run the study first"),
        (["verify", "tiny.toml"], "artifacts/tiny/points: no stored point to verify"),
        (["molecule", "none.xyz"], "none.xyz"),
        (["molecule", "H2", "--molecules", "none.toml"], "none.toml: no such file"),
    ],
)
def test_mistakes_get_one_line_and_2(
    spec: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert len(printed.err.splitlines()) == 1
    assert not (spec.parent / "artifacts").exists()


def test_results_folder_that_cannot_be_written_is_one_line_and_1(
    spec: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("artifacts").write_text("a file where the folder should be", encoding="utf-8")
    assert main(["run", str(spec)]) == 1
    assert capsys.readouterr().err == "artifacts/tiny/points: cannot be written (Not a directory)\n"
