from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from scaling_tables import ADDITIVE, grid_table
from synthetic_cube import CROSSED, CubeOptions, Truth, synthetic_cube

from replicate.cli import main
from replicate.scaling.objective import Objective
from replicate.scaling.solve import solve
from replicate.scaling.validate import is_intact

LAW = "A0 + A1*N^-a1 + A2*D^-a2"


def _csv(path: Path, **columns: Any) -> Path:
    names = list(columns)
    lines = [",".join(names)]
    lines += [",".join(str(v) for v in row) for row in zip(*columns.values(), strict=True)]
    path.write_text("\n".join(lines) + "\n")
    return path


def _good(tmp_path: Path, **more: Any) -> Path:
    table = grid_table(0)
    values = {"params": table.variables["N"], "tokens": table.variables["D"], "loss": table.value}
    return _csv(tmp_path / "t.csv", **{k: [repr(float(x)) for x in v] for k, v in values.items()}, **more)


def _fit(path: Path, out: Path, *more: str) -> int:
    base = ["fit", "--csv", str(path), "--x", "N=params", "--x", "D=tokens", "--y", "L=loss", "--law", LAW]
    return main([*base, "--json", str(out), *more])


def test_csv_fit_writes_what_the_design_asks_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    assert _fit(_good(tmp_path), out, "--objective", "huber:1e-3", "--bootstrap", "100", "--seed", "3") == 0
    result = json.loads(out.read_text())
    solution = solve(grid_table(0).design(), Objective("huber", delta=1e-3))
    assert result["parameters"] == solution.raw()
    assert list(result)[:6] == [
        "parameters",
        "objective",
        "certificate",
        "standard_errors",
        "intervals",
        "n_points",
    ]
    assert result["certificate"]["stationary"] is True
    assert result["certificate"]["scaled_gradient"] < 1e-9
    r = np.abs(solution.residuals())
    huber = np.where(r <= 1e-3, 0.5 * r * r, 1e-3 * (r - 0.5e-3)).sum()
    assert result["objective"] == pytest.approx(float(huber), rel=1e-10)
    assert result["n_points"] == 240
    assert set(result["standard_errors"]) == set(result["parameters"])
    low, high = result["intervals"]["a2"]
    assert low < result["parameters"]["a2"] < high
    assert "a2 = " in capsys.readouterr().out


def test_csv_fit_is_bit_identical_from_run_to_run(tmp_path: Path) -> None:
    path = _good(tmp_path)
    command = [
        sys.executable,
        "-m",
        "replicate",
        "fit",
        "--csv",
        str(path),
        "--x",
        "N=params",
        "--x",
        "D=tokens",
    ]
    command += ["--y", "L=loss", "--law", LAW, "--bootstrap", "200"]
    texts = [subprocess.run(command, capture_output=True, check=True, text=True).stdout for _ in range(2)]
    assert texts[0] == texts[1]
    assert json.loads(texts[0])["bootstrap"]["converged"] == 1.0


def test_csv_clusters_and_groups(tmp_path: Path) -> None:
    labels = {"run": [f"r{i // 4}" for i in range(240)], "molecule": [["a", "b"][i % 2] for i in range(240)]}
    out = tmp_path / "out.json"
    more = ["--cluster", "run", "--group", "molecule", "--bootstrap", "100"]
    assert _fit(_good(tmp_path, **labels), out, *more) == 0
    result = json.loads(out.read_text())
    assert result["n_runs"] == 60
    assert set(result["intercepts"]) == {"a", "b"}


def test_any_law_and_column_names(tmp_path: Path) -> None:
    table = grid_table(1, sigma=0.0)
    value = 0.3 * table.variables["N"] ** 0.2 + 2.0 * table.variables["D"] ** -0.7
    path = _csv(tmp_path / "t.csv", **{"#p": table.variables["N"], "tok": table.variables["D"], "y": value})
    out = tmp_path / "out.json"
    command = [
        "fit",
        "--csv",
        str(path),
        "--x",
        "X=#p",
        "--x",
        "Y=tok",
        "--y",
        "Z=y",
        "--law",
        "u*X^v + w/Y^s",
    ]
    assert main([*command, "--objective", "l2-log", "--bootstrap", "0", "--json", str(out)]) == 0
    truth = {"u": 0.3, "v": -0.2, "w": 2.0, "s": 0.7}
    found = json.loads(out.read_text())["parameters"]
    # v is written as a growing power: X^v with v >= 0.
    assert found == pytest.approx(truth | {"v": 0.2}, rel=1e-9)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"loss": ["x"] * 240}, "column 'loss': 'x' is not a finite number (and 239 more)"),
        ({"loss": ["nan"] * 240}, "'nan' is not a finite number"),
        ({"loss": [""] * 240}, "'' is not a finite number"),
        ({"params": [-5.0] * 240}, "column 'params' (N): 240 values are not positive"),
        ({"params": [7.0] * 240}, "N: constant (7)"),
        ({"loss": [0.0] * 240}, "column 'loss' (L): 240 values are not positive"),
        ({"loss": [7.0] * 240}, "L: constant (7)"),
        ({"params": ["1_000"] * 240}, "'1_000' is not a finite number"),
        ({"params": ["1,5"] * 240}, "line 2 has another number of cells"),
        ({"loss": ["x"] * 240, "params": ["y"] * 240}, "'y' is not a finite number (and 239 more); line 2"),
        ({"params": None}, "no column 'params'; columns are tokens, loss"),
        ({"params": None, "loss": None}, "no column 'params', 'loss'; columns are tokens"),
        ({"tokens": grid_table(0).variables["N"] * 3}, "cannot be told apart (condition number"),
    ],
)
def test_bad_tables_get_one_line_and_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], words: str
) -> None:
    table = grid_table(0)
    columns: dict[str, Any] = {
        "params": table.variables["N"],
        "tokens": table.variables["D"],
        "loss": table.value,
    }
    columns = {k: v for k, v in (columns | change).items() if v is not None}
    out = tmp_path / "out.json"
    assert _fit(_csv(tmp_path / "t.csv", **columns), out) == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert "t.csv" in error
    assert len(error.splitlines()) == 1
    assert not out.exists()


@pytest.mark.parametrize(
    "dress",
    [
        lambda text: "\ufeff" + text,
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace(",", ";"),
        lambda text: text.replace(",", "\t"),
        lambda text: text.replace(",", " , "),
        lambda text: "\n# made by hand\n\n" + text.replace("\n", "\n# a note, on the row above\n\n", 5),
        lambda text: text.replace("\n", ",\n").replace(",\n", ",about\n", 1),
        lambda text: text.replace("params", '"N, paramètres"'),
    ],
)
def test_tables_in_other_dress_are_the_same_table(tmp_path: Path, dress: Any) -> None:
    plain = _good(tmp_path)
    out = [tmp_path / "a.json", tmp_path / "b.json"]
    dressed = tmp_path / "dressed.csv"
    dressed.write_bytes(dress(plain.read_text()).encode())
    column = "N, paramètres" if "paramètres" in dressed.read_text(encoding="utf-8") else "params"
    for path, name, to in ((plain, "params", out[0]), (dressed, column, out[1])):
        command = ["fit", "--csv", str(path), "--x", f"N={name}", "--x", "D=tokens", "--y", "L=loss"]
        assert main([*command, "--law", LAW, "--bootstrap", "0", "--json", str(to)]) == 0
    results = [json.loads(path.read_text()) for path in out]
    for result in results:
        del result["csv_sha256"], result["columns"]
    assert results[0] == results[1]


def test_labels_that_begin_with_a_hash_are_no_comments(tmp_path: Path) -> None:
    table = grid_table(0)
    labels = [f"#{i // 4}" for i in range(240)]
    columns = {"run": labels, "params": table.variables["N"], "tokens": table.variables["D"]}
    out = tmp_path / "out.json"
    path = _csv(tmp_path / "t.csv", **columns, loss=table.value)
    assert _fit(path, out, "--cluster", "run", "--bootstrap", "0") == 0
    assert json.loads(out.read_text())["n_runs"] == 60


def test_signed_values_have_no_rows_of_log_objectives(tmp_path: Path) -> None:
    table = grid_table(0, sigma=0.05)
    value = table.value - 0.4 * float(np.median(table.value))
    columns = {"params": table.variables["N"], "tokens": table.variables["D"], "loss": value}
    out = tmp_path / "out.json"
    more = ["--objective", "l2-raw", "--bootstrap", "0"]
    assert np.any(value < 0)
    assert _fit(_csv(tmp_path / "t.csv", **columns), out, *more) == 0
    assert json.loads(out.read_text())["sensitivity"] == []


def test_parameters_may_be_greek(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = ["fit", "--csv", str(_good(tmp_path)), "--x", "N=params", "--y", "L=loss", "--bootstrap", "0"]
    assert main([*command, "--law", "E + A/N^α", "--json", str(out)]) == 0
    assert set(json.loads(out.read_text())["parameters"]) == {"E", "A", "α"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty file"),
        ("# nothing but a note\n", "empty file"),
        ("params,tokens,loss\n", "no rows below the header"),
        ("params,tokens,loss\n1,2\n", "line 2 has another number of cells"),
        ("params,tokens,loss,loss\n1,2,3,4\n", "more than one column 'loss'"),
        ("params,tokens,loss\n1,2,3\n2,3,4\n", "too few points, 2 runs for 5 parameters"),
    ],
)
def test_broken_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    assert _fit(path, tmp_path / "out.json") == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fit"], "either a cube or --csv"),
        (["fit", "a.nc", "--csv", "b.csv"], "either a cube or --csv"),
        (["fit", "missing.nc"], "missing.nc: cannot be read"),
        (["fit", "a.nc", "--x", "N=n"], "belong to --csv"),
        (["fit", "a.nc", "--law", "A*N^-a"], "known laws are additive"),
        (["fit", "a.nc", "--bootstrap", "3"], "--bootstrap 3"),
        (["fit", "a.nc", "--seed", "-1"], "--seed -1"),
        (["fit", "a.nc", "--objective", "mse"], "--objective 'mse'"),
        (["fit", "--csv", "b.csv"], "needs --x"),
        (["fit", "--csv", "b.csv", "--x", "N", "--y", "L=l", "--law", LAW], "expected NAME=COLUMN"),
        (["fit", "--csv", "b.csv", "--x", "N=a", "--x", "N=b", "--y", "L=l", "--law", LAW], "given twice"),
        (["fit", "--csv", "b.csv", "--x", "N=a", "--y", "L=l", "--law", LAW], "'D' is no column"),
        (
            ["fit", "--csv", "b.csv", "--x", "N=a", "--y", "L=l", "--law", "A*N^-a", "--objective", "asinh"],
            "--noise",
        ),
        (["fit", "--csv", "b.csv", "--x", "N=a", "--y", "L=l", "--law", "A*N^-a"], "b.csv: cannot be read"),
        (["allocate", "none.json", "--molecule", "N2", "--ansatz", "made", "--budget", "1e15"], "none.json"),
    ],
)
def test_bad_arguments(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


SPEC = """[ansatz.transformer.sizes]
xs = { d = 8, heads = 2, ff = 32, layers = 2 }
m = { d = 24, heads = 2, ff = 96, layers = 2 }
xxl = { d = 104, heads = 2, ff = 416, layers = 2 }
[phase.sizes]
xs = { width = 8 }
m = { width = 24 }
xxl = { width = 104 }"""
MOLECULES = """[Be]
atoms = [["Be", 0.0, 0.0, 0.0]]
multiplicity = 1
spin_orbitals = 10
unique_flips = 40
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cube fitted through the command line."""
    path = tmp_path_factory.mktemp("study")
    clear = Truth(A0=0.0, A1=4e-3, a1=0.5, A2=8e-4, a2=0.55)
    truths = {("transformer", m): clear for m in ("v_score", "abs_error")}
    none = Truth(A0=0.0, A1=0.0, A2=2e-3, a2=0.5)
    truths |= {("made", m): none for m in ("v_score", "abs_error")}
    options = CubeOptions(
        molecules=("H2O", "N2", "O2"), ansatze=("transformer", "made"), steps=(250, 1000, 4000),
        truths=truths, sigma=0.15, hold_outs=SPEC, records=3,
    )  # fmt: skip
    synthetic_cube(options).to_netcdf(path / "cube.nc", engine="netcdf4")
    (path / "molecules.toml").write_text(MOLECULES)
    status = main(
        ["fit", str(path / "cube.nc"), "--metric", "v_score", "--no-selection", "--bootstrap", "300"]
    )
    assert status == 0
    return path


def _allocate(folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, Any, str]:
    command = ["allocate", str(folder / "fit.json"), "--molecules", str(folder / "molecules.toml"), "--json"]
    capsys.readouterr()
    status = main([*command, *more])
    seen = capsys.readouterr()
    return status, json.loads(seen.out) if status == 0 else None, seen.err


def test_fit_of_a_cube_writes_three_files(folder: Path) -> None:
    assert {p.name for p in folder.iterdir()} == {
        "cube.nc",
        "fit.json",
        "fit.nc",
        "report.md",
        "molecules.toml",
    }
    assert json.loads((folder / "fit.json").read_text())["cube"] == "cube.nc"


def test_allocate_a_molecule_of_the_study(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--molecule", "N2", "--ansatz", "transformer", "--budget", "1e15"]
    status, advice, _ = _allocate(folder, capsys, *more)
    assert status == 0
    assert advice["status"] == "ok"
    low, high = advice["interval_n"]
    assert low < advice["n_optimal"] < high
    assert advice["steps"] == int(advice["steps"]) >= 1
    assert advice["search_fraction"] <= 1
    assert advice["flop_spent"] == pytest.approx(1e15, rel=0.05)
    assert (
        advice["prediction"]["new_run_90"][0]
        < advice["prediction"]["value"]
        < advice["prediction"]["new_run_90"][1]
    )
    parameters = json.loads((folder / "fit.json").read_text())["fits"][0]["parameters"]
    value = ADDITIVE(parameters, {"N": advice["n"], "D": advice["d_prime"]})
    assert advice["prediction"]["value"] == pytest.approx(float(value), rel=1.0)
    # The network is one that can be built: whole widths, d a multiple of the heads.
    params = advice["network"]["params"]
    assert params["d"] % params["heads"] == 0


def test_executed_flops_buy_a_larger_network(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--molecule", "N2", "--ansatz", "transformer", "--budget", "1e14"]
    _, estimated, _ = _allocate(folder, capsys, *more)
    _, executed, _ = _allocate(folder, capsys, *more, "--flops", "executed")
    # Executed FLOPs are 2 % of the estimate in this cube, so the same budget is worth 50 times as much.
    assert np.log(executed["n_optimal"] / estimated["n_optimal"]) == pytest.approx(
        estimated["exponent_n"] * np.log(50), rel=1e-6
    )


def test_allocate_a_molecule_outside_the_study(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--ansatz", "transformer", "--budget", "1e13"]
    status, from_table, _ = _allocate(folder, capsys, "--molecule", "Be", *base)
    assert status == 0
    assert not from_table["in_study"]
    assert any("not in the study" in f for f in from_table["flags"])
    _, by_hand, _ = _allocate(
        folder, capsys, "--molecule", "X", "--n", "10", "--M", "40", "--S", "100", *base
    )
    assert by_hand["n_optimal"] == from_table["n_optimal"]
    wide = np.log(from_table["prediction"]["interval_95"][1] / from_table["prediction"]["interval_95"][0])
    _, known, _ = _allocate(folder, capsys, "--molecule", "N2", *base)
    assert wide > np.log(known["prediction"]["interval_95"][1] / known["prediction"]["interval_95"][0])


def test_arms_are_registered_before_training(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--molecule", "N2", "--ansatz", "transformer", "--budget", "1e15", "--arms", "4"]
    status, advice, _ = _allocate(folder, capsys, *more)
    assert status == 0
    record = advice["arms"]
    assert is_intact(record)
    low, middle, high = record["arms"]
    assert high["n"] / middle["n"] == pytest.approx(4)
    assert middle["n"] / low["n"] == pytest.approx(4)
    assert record["both_neighbours_worse"]
    assert record["seeds_per_arm"] > 1
    cost = [a["n"] * a["d_prime"] for a in record["arms"]]
    # Linear cost in this cube: one IsoFLOP curve.
    assert cost == pytest.approx([cost[0]] * 3, rel=1e-9)
    assert main(["allocate", str(folder), *more]) == 0
    assert "arms        x4" in capsys.readouterr().out
    assert main(["allocate", str(folder), *more[:-1], "0.5"]) == 2


def test_made_gets_no_number(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, advice, _ = _allocate(folder, capsys, "--molecule", "N2", "--ansatz", "made", "--budget", "1e15")
    assert status == 0
    assert advice["status"] == "no interior optimum identified"
    assert "n_optimal" not in advice


def test_networks_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A cube whose truth has separate terms of the two networks, in crossed ratios."""
    options = CubeOptions(
        molecules=("H2O", "N2"), ansatze=("transformer",), steps=(250, 1000, 4000), variants=CROSSED,
        sigma=0.05, records=3, seeds=1,
    )  # fmt: skip
    cube = synthetic_cube(options)
    final = cube["final"].to_dataset()
    m, p = final["n_modulus"], final["n_phase"]
    value = 8e-4 * final["d_prime"] ** -0.55 + 4e-3 * m**-0.5 + 8e-4 * p**-0.35
    value = value * np.exp(0.03 * np.random.default_rng(0).standard_normal(value.shape))
    electrons = cube["molecule"]["n_alpha"] + cube["molecule"]["n_beta"]
    variance = value * (final["energy"] - cube["molecule"]["e_inf_sector"]) ** 2 / electrons
    final["variance"] = final["variance"].copy(data=variance.transpose(*final["status"].dims).values)
    groups = {"/": cube.to_dataset(), "/final": final, "/molecule": cube["molecule"].to_dataset()}
    xr.DataTree.from_dict(groups).to_netcdf(tmp_path / "cube.nc", engine="netcdf4")
    command = [
        "fit",
        str(tmp_path / "cube.nc"),
        "--metric",
        "v_score",
        "--no-selection",
        "--bootstrap",
        "100",
    ]
    assert main(command) == 0
    fits = {f["id"]: f for f in json.loads((tmp_path / "fit.json").read_text())["fits"]}
    found = fits["transformer/v_score/all/modulus_phase"]["parameters"]
    assert found["a1"] == pytest.approx(0.5, abs=0.12)
    assert found["a3"] == pytest.approx(0.35, abs=0.12)
    capsys.readouterr()
    more = ["--molecule", "N2", "--ansatz", "transformer", "--budget", "1e15", "--networks"]
    assert main(["allocate", str(tmp_path), *more, "--json"]) == 0
    advice = json.loads(capsys.readouterr().out)
    assert advice["status"] == "ok"
    for key in ("n_modulus", "n_phase", "d_prime"):
        low, high = advice[f"interval_{key}"]
        assert low < advice[f"{key}_optimal"] < high
    assert 0 < advice["flop_share_phase"] < 1
    assert main(["allocate", str(tmp_path), *more]) == 0
    assert "of the FLOPs" in capsys.readouterr().out


def test_clamps_are_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--molecule", "N2", "--ansatz", "transformer", "--budget", "1e24"]
    _, advice, _ = _allocate(folder, capsys, *more)
    assert any("above the fitted range" in f for f in advice["flags"])
    n_max = json.loads((folder / "fit.json").read_text())["fits"][0]["variables"]["N"]["max"]
    assert advice["n"] <= n_max * 1.01
    capsys.readouterr()
    assert main(["allocate", str(folder), *more, "--molecules", "x"]) == 0
    assert "caution" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--molecule", "N2", "--ansatz", "rbm", "--budget", "1e15"], "no allocation for rbm v_score"),
        (["--molecule", "Xx", "--ansatz", "transformer", "--budget", "1e15"], "give --n, --M and --S"),
        (["--molecule", "N2", "--ansatz", "transformer", "--budget", "-1"], "--budget"),
        (["--molecule", "N2", "--ansatz", "transformer", "--budget", "nan"], "--budget"),
        (
            ["--molecule", "Be", "--ansatz", "transformer", "--budget", "1e15", "--flops", "executed"],
            "executed",
        ),
        (["--molecule", "N2", "--ansatz", "transformer", "--budget", "1e15", "--batch", "0"], "--batch"),
        (
            [
                "--molecule",
                "X",
                "--n",
                "9",
                "--M",
                "4",
                "--S",
                "4",
                "--ansatz",
                "transformer",
                "--budget",
                "1e9",
            ],
            "must be positive",
        ),
    ],
)
def test_bad_questions(folder: Path, capsys: pytest.CaptureFixture[str], more: list[str], words: str) -> None:
    status, _, error = _allocate(folder, capsys, *more)
    assert status == 2
    assert words in error


def test_only_the_standard_library_is_imported_before_a_command_runs() -> None:
    heavy = "{'numpy', 'scipy', 'xarray', 'pydantic'}"
    code = f"import sys, replicate.scaling.commands; print(sorted({heavy} & set(sys.modules)))"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "[]"
