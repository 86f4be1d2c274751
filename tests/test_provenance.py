"""Seeds that are reproducible everywhere, and records that say where a number is from."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from replicate import provenance


def test_stream_seed_is_the_committed_one() -> None:
    """A changed seed changes every result without changing an id: never change this value."""
    assert provenance.stream_seed(0, "0123456789ab", "samples") == 4682586858965072925


def test_stream_seed_is_seed_sequence_of_root_id_and_stream() -> None:
    digest = hashlib.sha256(b"0123456789ab/samples").digest()
    words = [int.from_bytes(digest[i : i + 4], "little") for i in range(0, 32, 4)]
    (state,) = np.random.SeedSequence([7, *words]).generate_state(1, np.uint64)
    assert provenance.stream_seed(7, "0123456789ab", "samples") == int(state) // 2


def test_streams_are_distinct_and_fit_a_generator() -> None:
    seeds = {
        provenance.stream_seed(root, point, stream)
        for root in range(5)
        for point in ("0123456789ab", "0123456789ac")
        for stream in ("initialisation", "samples", "evaluation")
    }
    assert len(seeds) == 30
    for seed in seeds:
        assert 0 <= seed < 2**63
        torch.Generator().manual_seed(seed)


def test_record_is_json_and_names_no_machine() -> None:
    text = json.dumps(provenance.collect())
    record = json.loads(text)
    assert record["versions"]["torch"] == torch.__version__
    assert record["threads"]["torch"] == torch.get_num_threads()
    assert record["hardware"]["cores"] == provenance.available_cores() >= 1
    assert platform.node() not in text


def test_commit_is_that_of_the_checkout() -> None:
    root = Path(__file__).parent.parent
    head = subprocess.run(
        ["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    if head.returncode:
        pytest.skip("not a git checkout")
    assert provenance.commit()["commit"] == head.stdout.strip()


def test_commit_outside_a_checkout_is_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "replicate"
    package.mkdir()
    monkeypatch.setattr(provenance, "__file__", str(package / "provenance.py"))
    provenance.commit.cache_clear()
    try:
        assert provenance.commit() == {"commit": None, "dirty": None}
    finally:
        provenance.commit.cache_clear()
