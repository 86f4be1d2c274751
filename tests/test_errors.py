"""Bad input at every command that reads a spec: lines on stderr, exit status 2, nothing written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from test_spec import MALFORMED, write_malformed

from replicate.cli import main

WriteSpec = Callable[..., Path]


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_spec_ends_run_with_2_and_writes_nothing(
    name: str,
    tmp_path: Path,
    write_spec: WriteSpec,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_malformed(name, tmp_path, write_spec)
    before = sorted(tmp_path.rglob("*"))
    assert main(["run", path.name]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"{path.name}: {MALFORMED[name][2]}" in printed.err
    assert all(line.startswith(path.name) for line in printed.err.splitlines())
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", ["plan", "run", "status", "collect", "flops", "verify"])
def test_every_command_reports_all_problems_alike(
    command: str,
    tmp_path: Path,
    write_spec: WriteSpec,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_spec(("seeds = [0]", "sedes = [0]"), ("[phase]\nwidth = 4", "[phase]\nwidth = -4"))
    assert main([command, path.name]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    first, second = printed.err.splitlines()
    assert first.startswith('tiny.toml: sedes: unknown key, did you mean "seeds"?; allowed study, title, ')
    assert second == "tiny.toml: phase.width: must be greater than or equal to 1, got -4"
    assert not (tmp_path / "artifacts").exists()
