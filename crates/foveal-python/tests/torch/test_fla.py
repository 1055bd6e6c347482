"""flash-linear-attention's functions against its own plain forms in PyTorch."""

import importlib

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402

import foveal.fla as ours  # noqa: E402

B, T, H, D, V = 2, 64, 3, 16, 8


@pytest.fixture
def naive():
    pytest.importorskip("einops")
    pytest.importorskip("fla")

    def of(family, name):
        return getattr(importlib.import_module(f"fla.ops.{family}.naive"), name)

    return of


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def tokens():
    q, k = torch.randn(B, T, H, D), F.normalize(torch.randn(B, T, H, D), dim=-1)
    return q, k, torch.randn(B, T, H, V)


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def heads_first(*arrays):
    return (x.transpose(1, 2) for x in arrays)


def test_gla(naive):
    q, k, v = tokens()
    g, state = F.logsigmoid(torch.randn(B, T, H, D)), torch.randn(B, H, D, V)
    expected, final = naive("gla", "naive_recurrent_gla")(q, k, v, g, initial_state=state, output_final_state=True)
    for function in (ours.chunk_gla, ours.fused_recurrent_gla):
        out, own = function(q, k, v, g, initial_state=state, output_final_state=True)
        close(out, expected)
        close(own, final)
        assert function(q, k, v, g)[1] is None


def test_retention(naive):
    q, k, v = tokens()
    expected = naive("retention", "naive_retention")(*heads_first(q, k, v)).transpose(1, 2)
    for function in (ours.chunk_retention, ours.fused_recurrent_retention, ours.parallel_retention):
        close(function(q, k, v)[0], expected)


def test_simple_gla(naive):
    q, k, v = tokens()
    g = F.logsigmoid(torch.randn(B, T, H))
    recurrent = naive("simple_gla", "naive_recurrent_simple_gla")
    expected, final = recurrent(q, k, v, g, scale=0.5)
    out, own = ours.chunk_simple_gla(q, k, v, g, scale=0.5, output_final_state=True)
    close(out, expected)
    close(own, final)
    gamma = -torch.rand(H)
    by_head, _ = ours.fused_recurrent_simple_gla(q, k, v, g_gamma=gamma)
    close(by_head, recurrent(q, k, v, gamma.expand(B, T, H))[0])
    with pytest.raises(ValueError, match="g_gamma"):
        ours.chunk_simple_gla(q, k, v, g, gamma)


def test_delta_rule(naive):
    q, k, v = tokens()
    beta = torch.rand(B, T, H)
    expected = naive("delta_rule", "delta_rule_recurrence")(*heads_first(q, k, v, beta))
    out, final = ours.chunk_delta_rule(q, k, v, beta, output_final_state=True)
    close(out, expected[0].transpose(1, 2))
    close(final, expected[1])
    longer, _ = ours.fused_recurrent_delta_rule(q, 3 * k, v, beta, use_qk_l2norm_in_kernel=True)
    close(longer, ours.chunk_delta_rule(F.normalize(q, dim=-1), k, v, beta)[0])


def test_gated_delta_rule(naive):
    q, k, v = tokens()
    g, beta, state = F.logsigmoid(torch.randn(B, T, H)), torch.rand(B, T, H), torch.randn(B, H, D, V)
    rule = naive("gated_delta_rule", "naive_recurrent_gated_delta_rule")
    expected, final = rule(q, k, v, beta, g, initial_state=state, output_final_state=True)
    out, own = ours.chunk_gated_delta_rule(q, k, v, g, beta, initial_state=state, output_final_state=True)
    close(out, expected)
    close(own, final)
    again, _ = ours.fused_recurrent_gated_delta_rule(q, k, v, g, beta=beta, initial_state=state)
    assert torch.equal(again, out)


@pytest.mark.parametrize("normalize", [False, True])
def test_linear_attn(naive, normalize):
    q, k, v = tokens()
    q, k = q.abs(), k.abs()
    recurrent = naive("linear_attn", "naive_recurrent_linear_attn")
    expected, final = recurrent(q, k, v, output_final_state=True, normalize=normalize)
    out, own = ours.chunk_linear_attn(q, k, v, output_final_state=True, normalize=normalize)
    close(out, expected)
    pairs = zip(own, final) if normalize else [(own, final)]
    for a, b in pairs:
        assert a.shape == b.shape
        close(a, b)
    half, state = ours.chunk_linear_attn(q[:, :32], k[:, :32], v[:, :32], output_final_state=True, normalize=normalize)
    rest, _ = ours.fused_recurrent_linear_attn(q[:, 32:], k[:, 32:], v[:, 32:], initial_state=state, normalize=normalize)
    assert torch.equal(torch.cat([half, rest], 1), out)


def test_packed_sequences_and_gradients():
    q, k, v = (x[:1].requires_grad_() for x in tokens())
    g = F.logsigmoid(torch.randn(1, T, H, D)).requires_grad_()
    cuts = torch.tensor([0, 20, T])
    out, states = ours.chunk_gla(q, k, v, g, output_final_state=True, cu_seqlens=cuts)
    assert states.shape == (2, H, D, V)
    parts = [ours.chunk_gla(*(x[:, at] for x in (q, k, v, g)))[0] for at in (slice(0, 20), slice(20, T))]
    close(torch.cat(parts, 1), out)
    got = torch.autograd.grad(out.square().sum(), (q, k, v, g))
    expected = torch.autograd.grad(torch.cat(parts, 1).square().sum(), (q, k, v, g))
    for a, b in zip(got, expected):
        close(a, b)


def test_half_precision_and_what_is_not_supported():
    q, k, v = (x.bfloat16() for x in tokens())
    out, state = ours.chunk_retention(q, k, v, output_final_state=True)
    assert out.dtype == torch.bfloat16 and state.dtype == torch.float32
    close(out.float(), ours.chunk_retention(q.float(), k.float(), v.float())[0].bfloat16().float())
    for options in ({"reverse": True}, {"state_v_first": True}, {"gv": v}, {"head_first": True}):
        with pytest.raises(ValueError, match="not supported"):
            ours.fused_recurrent_gla(q, k, v, **options)
    assert ours.chunk_retention(q, k, v, reverse=False, chunk_size=32)[1] is None
