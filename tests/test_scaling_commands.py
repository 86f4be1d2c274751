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
    truth = 8e-4 * final["d_prime"] ** -0.55 + 4e-3 * m**-0.5 + 8e-4 * p**-0.35
    noise = np.exp(0.03 * np.random.default_rng(0).standard_normal(truth.shape))
    electrons = cube["molecule"]["n_alpha"] + cube["molecule"]["n_beta"]
    final["variance"] = final["variance"].copy(
        data=(truth * noise * (final["energy"] - cube["molecule"]["e_inf_sector"]) ** 2 / electrons)
        .transpose(*final["status"].dims).values
    )  # fmt: skip
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
