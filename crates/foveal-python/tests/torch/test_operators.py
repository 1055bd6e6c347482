"""PyTorch: operators, gradients, tracing, and attention in its layout. Run where PyTorch is installed."""

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402

import foveal  # noqa: E402
import foveal.fla  # noqa: E402
import foveal.nn  # noqa: E402
import foveal.torch  # noqa: E402

T, H, D = 14, 2, 4
GROUPS = {g: getattr(foveal, g) for g in ("exact", "sparse", "linear", "memory")}
MECHANISMS = {m.name: m for m in foveal.mechanisms()}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def x(*shape):
    return torch.randn(*(shape or (1, T, H, D)))


def calls(name):
    """The arrays of a mechanism that want gradients, and its options."""
    torch.manual_seed(1)
    qkv = x(), x(), x()
    gates, strengths = -x(1, T, H).abs(), torch.sigmoid(x(1, T, H))
    unit = F.normalize(x(), dim=-1)
    pairs = x(1, T, 2 * H, D), x(1, T, 2 * H, D)
    options = {
        "full": (qkv, {}),
        "window": (qkv, {"width": 5}),
        "differential": ((*pairs, x(), *(x(3) / 2 for _ in range(4)), 1 + x(D) / 2), {"init": 0.6}),
        "transformer_xl": ((*qkv, x(7, H, D), x(H, D), x(H, D)), {}),
        "sparse_transformer": (qkv, {"pattern": "fixed", "stride": 4, "width": 2}),
        "longformer": (qkv, {"reach": 3, "global_tokens": [[0, 7]]}),
        "bigbird": (qkv, {"block": 4, "random": 1}),
        "lsh": ((x(), x()), {"chunk": 5, "buckets": 4, "scale": 0.5}),
        "moba": (qkv, {"block": 4, "top": 2}),
        "native_sparse": (
            (*qkv, torch.sigmoid(x(1, T, H, 3))),
            {"length": 4, "stride": 2, "block": 4, "top": 3, "window": 5},
        ),
        "linear": (qkv, {}),
        "performer": (qkv, {"features": 8}),
        "efficient": (qkv, {}),
        "linformer": ((*qkv, x(3, T), x(3, T)), {}),
        "retention": (qkv, {}),
        "scalar_decay": ((*qkv, gates), {}),
        "gla": ((*qkv, -x().abs()), {}),
        "delta": ((x(), unit, x(), strengths), {}),
        "gated_delta": ((x(), unit, x(), gates, strengths), {}),
        "infini": ((*qkv, x(H)), {"segment": 6}),
        "memorizing": ((*qkv, x(H), 1 + x(H).abs()), {"segment": 6, "top": 2}),
        "mla": ((x(1, T, H, 8), x(1, T, 14), x(H * 9, 12) / 2), {"rope_dim": 2, "value_dim": 3}),
    }
    return options[name]


def function(name):
    return getattr(GROUPS[MECHANISMS[name].group], name)


DECAYS = ("retention", "scalar_decay", "gla", "gated_delta")
DIFFERENTIABLE = [name for name, m in MECHANISMS.items() if m.backward]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradcheck(name):
    arrays, options = calls(name)
    # Entries of a memory are constants to the gradients, not to a step.
    fixed = (1, 2) if name == "memorizing" else ()
    arrays = [a.clone().requires_grad_(n not in fixed) for n, a in enumerate(arrays)]
    run = lambda *a: function(name)(*a, **options)  # noqa: E731
    # For dense arrays, masked= does one thing: gradients of zeros may be next to 0 (see the next test) instead of 0.
    assert torch.autograd.gradcheck(run, arrays, eps=1e-3, atol=2e-2, rtol=2e-2, nondet_tol=0.0, masked=name in DECAYS)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_of_zeros(name):
    """They are 0, but where states decay: 2⁻¹⁰⁰ at a step keeps those, and their gradients, from subnormal numbers."""
    arrays, options = calls(name)
    arrays = [a.clone().requires_grad_() for a in arrays]
    out = function(name)(*arrays, **options)
    for d in torch.autograd.grad(out, arrays, torch.zeros_like(out)):
        assert d.abs().max() <= (2.0**-90 if name in DECAYS else 0.0)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_opcheck(name, monkeypatch):
    arrays, options = calls(name)
    arrays = [a.clone().requires_grad_() for a in arrays]
    asked = []

    def run(mechanism, given, more):
        more = (*more[:-1], True) if mechanism == "attention" else more
        given = (*given, *(None,) * (len(foveal.torch.NAMES[mechanism].all) - len(given)))
        asked.append((mechanism, given, more))
        return foveal.torch.OPERATORS[mechanism](*given, repr(more))

    monkeypatch.setattr(foveal.torch, "run", run)
    try:
        function(name)(*arrays, **options)
    except TypeError:
        pass  # A single result is no tuple here.
    (mechanism, given, more) = asked[0]
    operator = getattr(torch.ops.foveal, mechanism).default
    torch.library.opcheck(operator, (*given, repr(more)))


@pytest.mark.parametrize("name", MECHANISMS)
def test_tensors_give_what_arrays_give(name):
    arrays, options = calls(name)
    expected = function(name)(*(a.numpy() for a in arrays), **options)
    out = function(name)(*arrays, **options)
    assert isinstance(out, torch.Tensor) and torch.equal(out, torch.from_numpy(expected))
    wanting = [a.clone().requires_grad_() for a in arrays]
    again = function(name)(*wanting, **options)
    assert again.requires_grad
    if name == "mla":  # Its gradients take another way there.
        torch.testing.assert_close(again.detach(), out, atol=2e-6, rtol=1e-5)
    else:
        assert torch.equal(again.detach(), out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["full", "gla", "gated_delta", "moba", "infini", "linformer", "differential"])
def test_half_precision(name, dtype):
    arrays, options = calls(name)
    halves = [(a.to(dtype) if a.dim() == 4 and n < 3 else a).requires_grad_() for n, a in enumerate(arrays)]
    out = function(name)(*halves, **options)
    assert out.dtype == dtype
    expected = function(name)(*(a.float() for a in halves), **options)
    assert (out.float() - expected).abs().max() < (0.06 if dtype == torch.bfloat16 else 0.01)
    out.float().square().sum().backward()
    assert all(a.grad is not None and a.grad.dtype == a.dtype and a.grad.isfinite().all() for a in halves)


@pytest.mark.parametrize("name", ["full", "window", "gla", "moba", "infini", "rope", "linear"])
def test_compiled_code_gives_the_same(name):
    if name == "rope":
        arrays, run = (x(),), foveal.rope
    else:
        arrays, options = calls(name)
        run = lambda *a: function(name)(*a, **options)  # noqa: E731
    arrays = [a.clone().requires_grad_() for a in arrays]
    loss = lambda *a: run(*(2 * y for y in a)).square().sum()  # noqa: E731
    expected = torch.autograd.grad(loss(*arrays), arrays)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(compiled(*arrays), arrays)
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_operators_give_what_recorded_calls_give(name):
    """Where somebody looks on, calls go through operators: the same kernels."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        seen = ()

        def __torch_dispatch__(self, operator, types, arguments=(), options=None):
            self.seen = (*self.seen, str(operator))
            return operator(*arguments, **(options or {}))

    arrays, options = calls(name)
    arrays = [a.clone().requires_grad_() for a in arrays]
    out = function(name)(*arrays, **options)
    d = torch.autograd.grad(out.square().sum(), arrays, allow_unused=True)
    with Watch() as watch:
        again = function(name)(*arrays, **options)
    d_again = torch.autograd.grad(again.square().sum(), arrays, allow_unused=True)
    assert any(operator.startswith("foveal.") for operator in watch.seen)
    assert torch.equal(again, out)
    assert all(torch.equal(a, b) for a, b in zip(d, d_again) if a is not None or b is not None)


def test_gradients_of_gradients_are_refused():
    z = x().requires_grad_()
    (d,) = torch.autograd.grad(foveal.attention(z, z, z).sum(), z, create_graph=True)
    with pytest.raises(RuntimeError):
        d.sum().backward()


def test_gradients_of_latent_attention_against_float64():
    arrays, options = calls("mla")
    q, rows, up = (a.requires_grad_() for a in arrays)

    def definition(q, rows, up):
        latent, turned = rows[..., :12], rows[..., 12:]
        both = torch.einsum("bsc,hnc->bshn", latent, up.view(H, 9, 12))
        keys = torch.cat([both[..., :6], turned[:, :, None].expand(-1, -1, H, -1)], -1)
        scores = torch.einsum("bthd,bshd->bhts", q, keys) / 8**0.5
        scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), float("-inf"))
        return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), both[..., 6:])

    weights = x(1, T, H, 3)
    out = foveal.exact.mla(q, rows, up, **options)
    exact = definition(q.double(), rows.double(), up.double())
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1e-5)
    got = torch.autograd.grad((out * weights).sum(), (q, rows, up))
    expected = torch.autograd.grad((exact * weights).sum(), (q, rows, up))
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, atol=3e-5, rtol=1e-4)
    _, lse = foveal.exact.mla(q, rows, up, return_lse=True, **options)
    assert lse.shape == (1, T, H) and lse.requires_grad


def test_states_take_tensors():
    z = x().requires_grad_()
    state = foveal.State()
    parts = [foveal.sparse.moba(*[z[:, at]] * 3, block=4, top=2, state=state) for at in (slice(0, 9), slice(9, T))]
    assert not parts[0].requires_grad and len(state) == T
    torch.testing.assert_close(torch.cat(parts, 1), foveal.sparse.moba(z, z, z, block=4, top=2).detach(), atol=2e-6, rtol=1e-5)


def test_states_carry_gradients():
    arrays, _ = calls("gla")
    arrays = [a.double().float().requires_grad_() for a in arrays]
    whole = foveal.linear.gla(*arrays)
    state, parts = None, []
    for piece in (slice(0, 6), slice(6, T)):
        part, state = foveal.linear.gla(*(a[:, piece] for a in arrays), initial_state=state, return_state=True)
        parts.append(part)
    weights = x()
    expected = torch.autograd.grad((whole * weights).sum(), arrays)
    got = torch.autograd.grad((torch.cat(parts, 1) * weights).sum(), arrays)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_gradients_of_terms_against_float64():
    q, k, v = x(2, 9, 4, 8), x(2, 12, 2, 8), x(2, 12, 2, 8)
    bias, slopes, sinks = x(1, 4, 9, 12), x(4).abs(), x(4)
    arrays = [a.requires_grad_() for a in (q, k, v, bias, slopes, sinks)]
    weights, lse_weights = x(2, 9, 4, 8), x(2, 9, 4)

    def definition(q, k, v, bias, slopes, sinks):
        k, v = (y.repeat_interleave(2, 2) for y in (k, v))
        scores = torch.einsum("bthd,bshd->bhts", q, k) * 0.4
        distance = torch.arange(9)[:, None] + 3 - torch.arange(12)[None]
        scores = 5 * torch.tanh(scores / 5) + bias - slopes[:, None, None] * distance
        scores = scores.masked_fill(distance < 0, float("-inf"))
        column = sinks[None, :, None, None].expand(2, -1, 9, 1)
        probabilities = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
        lse = torch.cat([scores, column], -1).logsumexp(-1).transpose(1, 2)
        return torch.einsum("bhts,bshd->bthd", probabilities, v), lse

    out, lse = foveal.attention(
        q, k, v, causal=True, scale=0.4, softcap=5.0, bias=bias, alibi=slopes, sinks=sinks, return_lse=True
    )
    exact, exact_lse = definition(*(a.double() for a in arrays))
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1e-5)
    got = torch.autograd.grad((out * weights).sum() + (lse * lse_weights).sum(), arrays)
    expected = torch.autograd.grad((exact * weights).sum() + (exact_lse * lse_weights).sum(), arrays)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("queries,keys", [(7, 7), (5, 9), (9, 5), (1, 8)])
@pytest.mark.parametrize("causal", [False, True])
def test_sdpa(queries, keys, causal):
    q, k, v = x(2, 4, queries, 8), x(2, 4, keys, 8), x(2, 4, keys, 6)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    got = foveal.torch.scaled_dot_product_attention(q, k, v, is_causal=causal)
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)
    wanting = [y.clone().requires_grad_() for y in (q, k, v)]
    recorded = foveal.torch.scaled_dot_product_attention(*wanting, is_causal=causal)
    assert torch.equal(recorded, got) and recorded.stride() == got.stride()
    got = foveal.torch.scaled_dot_product_attention(q[0], k[0], v[0], is_causal=causal)
    torch.testing.assert_close(got, expected[0], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", [(7, 9), (2, 1, 7, 9), (1, 4, 1, 9), (4, 7, 9)])
def test_sdpa_with_masks(shape):
    q, k, v = x(2, 4, 7, 8), x(2, 2, 9, 8), x(2, 2, 9, 8)
    for mask in (x(*shape) > -0.5, x(*shape)):
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True, scale=0.3)
        with foveal.torch.replace_sdpa():
            assert F.scaled_dot_product_attention is not torch._C._nn.scaled_dot_product_attention
            got = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True, scale=0.3)
        torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention


def test_replace_sdpa_leaves_what_it_does_not_take():
    q = x(2, 4, 7, 8).double()
    expected = F.scaled_dot_product_attention(q, q, q)
    layer = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    y = x(2, 5, 16)
    with_torch = layer(y, y, y, need_weights=False)[0]
    with foveal.torch.replace_sdpa():
        assert torch.equal(F.scaled_dot_product_attention(q, q, q), expected)
        torch.testing.assert_close(layer(y, y, y, need_weights=False)[0], with_torch, atol=2e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="enable_gqa"):
        foveal.torch.scaled_dot_product_attention(x(1, 4, 3, 8), x(1, 2, 3, 8), x(1, 2, 3, 8))
    with pytest.raises(ValueError, match="exclude"):
        z = x(1, 2, 3, 8)
        foveal.torch.scaled_dot_product_attention(z, z, z, torch.ones(3, 3, dtype=torch.bool), is_causal=True)


def test_refusals():
    z = x()
    with pytest.raises(TypeError, match="float64"):
        foveal.attention(z.double(), z, z)
    with pytest.raises(TypeError, match="float64"):
        foveal.attention(z.double().requires_grad_(), z.double(), z.double())
    with pytest.raises(TypeError, match="ndarray"):
        foveal.attention(z, z.numpy(), z)
    with pytest.raises(RuntimeError, match="no gradients"):
        foveal.attention(z.clone().requires_grad_(), z, z, out=torch.empty_like(z))
    with pytest.raises((ValueError, NotImplementedError, RuntimeError)):
        foveal.attention(z.to("meta").to("meta"), z, z).sum().item()
    with pytest.raises(RuntimeError, match="does not require grad"):
        wanting = z.clone().requires_grad_()
        foveal.sparse.moba(wanting, z, z, return_lse=True)[1].sum().backward()


def test_out_and_strides():
    packed = x(2, 9, 3, 4, 8)
    q, k, v = packed.unbind(2)
    expected = foveal.attention(q.contiguous(), k.contiguous(), v.contiguous())
    assert torch.equal(foveal.attention(q, k, v), expected)
    turned = [y.transpose(-1, -2).contiguous().transpose(-1, -2) for y in (q, k, v)]
    assert torch.equal(foveal.attention(*turned), expected)
    place = torch.full((2, 4, 9, 8), float("nan")).transpose(1, 2)
    assert foveal.attention(q, k, v, out=place) is place and torch.equal(place, expected)


def test_merge_has_gradients():
    q, k = x(1, 3, 2, 8).requires_grad_(), x(1, 10, 2, 8).requires_grad_()
    whole = foveal.attention(q, k, k)
    parts = [foveal.attention(q, part, part, return_lse=True) for part in k.split([4, 6], 1)]
    joined, _ = foveal.torch.merge(*parts[0], *parts[1])
    torch.testing.assert_close(joined, whole, atol=1e-6, rtol=1e-5)
    weights = x(1, 3, 2, 8)
    expected = torch.autograd.grad((whole * weights).sum(), (q, k))
    got = torch.autograd.grad((joined * weights).sum(), (q, k))
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_caches_take_tensors():
    cache = foveal.ContiguousCache(2, 8, dtype="bfloat16")
    kv = x(1, 5, 2, 8).bfloat16()
    cache.append(kv, kv)
    q = x(1, 1, 4, 8).bfloat16().requires_grad_()
    out = foveal.attention_cached(q, [cache])
    assert out.dtype == torch.bfloat16 and not out.requires_grad


@pytest.mark.parametrize("name", MECHANISMS)
def test_modules(name):
    camel = "".join(word.capitalize() for word in name.split("_"))
    module = getattr(foveal.nn, camel)
    assert camel in foveal.nn.__all__ and module.__doc__
    if name == "mla":
        return
    arrays, options = calls(name)
    own = {
        "differential": lambda: (module(3, D, depth=1), arrays[:3]),
        "transformer_xl": lambda: (module(H, D, distances=7), arrays[:3]),
        "linformer": lambda: (module(T, 3), arrays[:3]),
        "infini": lambda: (module(H, **options), arrays[:3]),
        "memorizing": lambda: (module(H, **options), arrays[:3]),
    }
    layer, given = own.get(name, lambda: (module(**options), arrays))()
    out = layer(*(a.requires_grad_() for a in given))
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
    assert all(a.grad is not None for a in given)
    assert repr(layer).startswith(camel)


def test_examples():
    import doctest

    for module in (foveal.fla, foveal.nn, foveal.torch):
        failed, attempted = doctest.testmod(module, extraglobs={"foveal": foveal, "torch": torch})
        assert attempted and not failed
