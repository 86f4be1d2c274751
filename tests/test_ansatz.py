"""Ansatze: normalised, autoregressive, tree = flat, counts, and independent implementations as oracles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import KINDS, PARAMS, SECTORS, wave_function
from torch import nn

from replicate import flops
from replicate.ansatz import Made, RetNet, Transformer, build_wave_function, find_ansatz
from replicate.ansatz.retnet import FORMS
from replicate.sector import Sector
from replicate.tree import build_tree, tokens_of


def all_keys(sector: Sector) -> torch.Tensor:
    return torch.as_tensor(sector.enumerate_keys())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SECTORS)
@pytest.mark.parametrize("order", ["reversed", "energy"])
def test_normalised_over_the_sector(kind: str, shape: tuple[int, int, int], order: str) -> None:
    sector = Sector(*shape, order)
    tree = build_tree(all_keys(sector), sector)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        wave = wave_function(sector, kind, seed=3, dtype=dtype)
        total = wave.log_prob(tree).exp().sum().item()
        assert abs(total - 1) < tolerance
        assert abs(wave.flat_log_prob(tree.keys).exp().sum().item() - 1) < tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_states_outside_the_sector_have_no_amplitude(kind: str) -> None:
    sector = Sector(4, 2, 1)
    keys = torch.arange(1 << sector.n_qubits)
    prob = wave_function(sector, kind).flat_log_prob(keys).exp()
    inside = torch.isin(keys, all_keys(sector))
    assert (prob[~inside] == 0).all()
    assert (prob[inside] > 0).all()
    assert abs(prob.sum().item() - 1) < 1e-12


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from(KINDS),
    st.sampled_from(SECTORS),
    st.integers(0, 1000),
    st.sampled_from([0.0, 0.05, 0.4, 1.0]),
)
def test_tree_equals_flat(kind: str, shape: tuple[int, int, int], seed: int, share: float) -> None:
    """Values and gradients, on partial batches and single determinants; float64 1e-10, float32 1e-4."""
    sector = Sector(*shape)
    keys = sector.enumerate_keys()
    chosen = np.random.default_rng(seed).random(len(keys)) < share
    chosen[seed % len(keys)] = True
    batch = torch.as_tensor(keys[chosen])
    tree = build_tree(batch, sector)
    weight = torch.randn(len(batch), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        wave = wave_function(sector, kind, seed, dtype=dtype)
        parameters = list(wave.modulus.parameters())
        results = []
        for log_prob in (wave.log_prob(tree), wave.flat_log_prob(batch)):
            grads = torch.autograd.grad(log_prob, parameters, weight, allow_unused=True)
            grads = [
                g if g is not None else torch.zeros_like(p) for g, p in zip(grads, parameters, strict=True)
            ]
            results.append((log_prob.detach(), torch.cat([g.reshape(-1) for g in grads])))
        (tree_value, tree_grad), (flat_value, flat_grad) = results
        torch.testing.assert_close(tree_value, flat_value, rtol=tolerance, atol=tolerance)
        scale = max(flat_grad.abs().max().item(), 1.0)
        torch.testing.assert_close(tree_grad / scale, flat_grad / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_depend_on_earlier_tokens_only(kind: str) -> None:
    """Changing token t moves logits after t and leaves those up to t alone."""
    sector = Sector(6, 3, 3)
    wave = wave_function(sector, kind, seed=1)
    keys = all_keys(sector)
    logits = wave.network.flat_logits(keys)
    for t in range(sector.n_orbitals):
        groups = torch.unique(keys >> 2 * (sector.n_orbitals - t), return_inverse=True)[1]
        for group in range(int(groups.max()) + 1):
            rows = logits[groups == group][:, : t + 1]
            torch.testing.assert_close(rows, rows[:1].expand_as(rows), rtol=0, atol=1e-12)
    last = logits[:, -1]
    assert (last - last[:1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_orbitals", [2, 7, 10])
def test_parameter_counts_are_the_closed_forms(kind: str, n_orbitals: int) -> None:
    sector = Sector(n_orbitals, 1, 1)
    for params in (
        PARAMS[kind],
        {"width": 5, "depth": 3} if kind == "made" else {**PARAMS[kind], "layers": 1},
    ):
        for width, depth in ((3, 0), (8, 1), (6, 3)):
            wave = build_wave_function(sector, kind, params, width, depth, seed=0)
            assert wave.n_modulus == flops.modulus_parameters(kind, params, sector.n_qubits)
            assert wave.n_phase == flops.phase_parameters(width, depth, sector.n_qubits)


def test_made_masks() -> None:
    """Token 0 sees biases only; unmasked weights are what the degree rule keeps, counted by hand."""
    made = Made(Sector(3, 1, 1), width=4, depth=2)
    # degrees of hidden units 0, 0, 1, 1; inputs 0 0 1 1 2 2; outputs 4 each of token 0, 1, 2
    first, hidden, last = 2 * 2 + 2 * 4, 2 * 2 + 2 * 4, 4 * 2 + 4 * 4
    assert made.n_unmasked == first + hidden + last + 4 + 4 + 12
    assert not made.get_buffer("mask2")[:4].any()


def test_made_random_degrees_are_reproducible() -> None:
    sector = Sector(5, 2, 2)
    one, two = (Made(sector, 16, 2, degrees="random") for _ in range(2))
    assert torch.equal(one.get_buffer("mask1"), two.get_buffer("mask1"))
    assert not torch.equal(one.get_buffer("mask1"), Made(sector, 16, 2).get_buffer("mask1"))


def test_transformer_equals_torch_encoder_layers() -> None:
    """Post-LN blocks with the same weights as torch's own."""
    sector = Sector(5, 2, 2)
    ours = Transformer(sector, d=8, heads=2, ff=12, layers=2).double()
    keys = all_keys(sector)
    tokens = tokens_of(keys, 5)
    x = ours.token(torch.cat([torch.full_like(tokens[:, :1], 4), tokens[:, :-1]], 1)) + ours.position.weight
    for layer in ours.layers:
        theirs = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True).double()
        names = {
            "self_attn.in_proj_weight": layer.qkv.weight,
            "self_attn.in_proj_bias": layer.qkv.bias,
            "self_attn.out_proj.weight": layer.out.weight,
            "self_attn.out_proj.bias": layer.out.bias,
            "linear1.weight": layer.up.weight,
            "linear1.bias": layer.up.bias,
            "linear2.weight": layer.down.weight,
            "linear2.bias": layer.down.bias,
            "norm1.weight": layer.norm1.weight,
            "norm1.bias": layer.norm1.bias,
            "norm2.weight": layer.norm2.weight,
            "norm2.bias": layer.norm2.bias,
        }
        theirs.load_state_dict(names)
        mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
        x = theirs(x, src_mask=mask, is_causal=True)
    torch.testing.assert_close(ours.flat_logits(keys), ours.head(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("heads", "chunk"), [(1, 1), (2, 2), (4, 3), (2, 7)])
def test_retention_forms_agree(heads: int, chunk: int) -> None:
    sector = Sector(7, 3, 3)
    keys = all_keys(sector)[::7]
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        torch.manual_seed(0)
        net = RetNet(sector, d=16, heads=heads, ff=8, layers=2, init_std=0.2, chunk=chunk).to(dtype)
        parallel, recurrent, chunkwise = (net.flat_logits(keys, form) for form in FORMS)
        assert parallel.abs().max() > 0.1
        torch.testing.assert_close(recurrent, parallel, rtol=0, atol=tolerance)
        torch.testing.assert_close(chunkwise, parallel, rtol=0, atol=tolerance)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # theirs, on import
def test_retnet_equals_an_independent_implementation() -> None:
    """yet-another-retnet's decoder layers with our weights: the same numbers, no deliberate difference."""
    from yet_another_retnet.retnet import RetNetDecoderLayer

    sector = Sector(6, 3, 2)
    torch.manual_seed(0)
    ours = RetNet(sector, d=32, heads=4, ff=24, layers=2, init_std=0.2).double()
    keys = all_keys(sector)
    x = torch.randn(len(keys), 6, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = x
    for layer in ours.layers:
        theirs = RetNetDecoderLayer(32, 4, 24, dropout=0.0, dtype=torch.float64)
        q, k, v = layer.qkv.weight.chunk(3)
        qb, kb, vb = layer.qkv.bias.chunk(3)
        weights = {"q_proj": (q, qb), "k_proj": (k, kb), "v_proj": (v, vb)}
        weights |= {
            "g_proj": (layer.gate.weight, layer.gate.bias),
            "out_proj": (layer.out.weight, layer.out.bias),
        }
        state = {
            f"retention.{name}.{part}": w
            for name, pair in weights.items()
            for part, w in zip(("weight", "bias"), pair, strict=True)
        }
        for their_name, part in (
            ("norm1", layer.norm1),
            ("norm2", layer.norm2),
            ("linear1", layer.up),
            ("linear2", layer.down),
        ):
            state |= {f"{their_name}.weight": part.weight, f"{their_name}.bias": part.bias}
        state["retention.thetas"] = theirs.retention.thetas
        theirs.load_state_dict(state)
        theirs.eval()
        expected = theirs.forward_parallel(expected)
    torch.testing.assert_close(ours.sequence_logits(x), ours.head(expected), rtol=0, atol=1e-10)


def test_phase_selects_by_first_token() -> None:
    sector = Sector(4, 2, 2)
    wave = wave_function(sector, "made")
    keys = all_keys(sector)
    x = ((keys.unsqueeze(1) >> torch.tensor([4, 5, 2, 3, 0, 1])) & 1).double()
    for layer in wave.phase.layers[:-1]:
        x = torch.relu(layer(x))
    out = wave.phase.layers[-1](x)
    expected = torch.stack([out[i, int(k) >> 6] for i, k in enumerate(keys)])
    torch.testing.assert_close(wave.phase(keys), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_one_seed_is_one_initial_state(kind: str) -> None:
    sector = Sector(4, 2, 2)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one, two, other = (build_wave_function(sector, kind, PARAMS[kind], 4, 1, seed=s) for s in (5, 5, 6))
    assert torch.equal(before, torch.random.get_rng_state())
    flat = [torch.cat([w.reshape(-1) for _, w in wave.named_weights()]) for wave in (one, two, other)]
    assert torch.equal(flat[0], flat[1])
    assert not torch.equal(flat[0], flat[2])


def test_initial_weights_are_scaled() -> None:
    sector = Sector(4, 2, 2)
    plain = build_wave_function(sector, "made", {"width": 6, "depth": 2}, 5, 1, seed=3)
    scaled = build_wave_function(
        sector, "made", {"width": 6, "depth": 2, "init_scale": 2.0}, 5, 1, seed=3, phase_scale=0.5
    )
    for (name, one), (_, two) in zip(plain.named_weights(), scaled.named_weights(), strict=True):
        factor = 1.0 if name.endswith("bias") else 0.5 if name.startswith("phase") else 2.0
        assert torch.equal(factor * one, two), name


def test_unknown_and_impossible_ansatze_are_refused() -> None:
    sector = Sector(4, 2, 2)
    with pytest.raises(KeyError, match="made, retnet, transformer"):
        find_ansatz("mlp")
    with pytest.raises(ValueError, match="heads"):
        Transformer(sector, d=6, heads=4, ff=4, layers=1)
    with pytest.raises(ValueError, match="heads"):
        RetNet(sector, d=6, heads=2, ff=4, layers=1)
    with pytest.raises(ValueError, match="norm"):
        Transformer(sector, d=4, heads=2, ff=4, layers=1, norm="none")
    with pytest.raises(ValueError, match="activation"):
        Transformer(sector, d=4, heads=2, ff=4, layers=1, activation="step")
    with pytest.raises(ValueError, match="degrees"):
        Made(sector, 4, 1, degrees="odd")
