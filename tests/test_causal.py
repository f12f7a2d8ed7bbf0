"""The causal forms: exact where they must be, blind to the future, and the same in tiles, chunks and steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Backend, assert_accurate
from operator_cases import Case, make_inputs
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from csat_ext import CSATAttention, CSATCache, CSATConfig, SparseDecoder, csat_attention, measurement, reference
from csat_ext.measurements import BY_POSITION, ENSEMBLES, columns_by_position

B, H, HK, N, D, DV, M, R, BK = 2, 4, 2, 37, 8, 6, 5, 3, 8


def tokens(n: int = N, dtype: torch.dtype = torch.float64, batch: int = B, kv_heads: int = HK) -> list[Tensor]:
    g = torch.Generator().manual_seed(n)
    shapes = (batch, H, n, D), (batch, kv_heads, n, D), (batch, kv_heads, n, DV)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


def block_phi(heads: int = HK, rows: int = R, size: int = BK) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(heads, rows, size, generator=g, dtype=torch.float64).softmax(-1)


def prefix_phi(heads: int = HK, n: int = N, batch: int = B) -> Tensor:
    g = torch.Generator().manual_seed(2)
    return torch.randn(batch, heads, n, M, generator=g, dtype=torch.float64).softmax(-1)


def signs(heads: int = HK, n: int = N, batch: int = 1) -> Tensor:
    return torch.randn(batch, heads, n, M, generator=torch.Generator().manual_seed(3), dtype=torch.float64).sign()


def some_kept(n: int = N) -> Tensor:
    """A mask with a whole block, the first token and scattered ones masked."""
    mask = torch.rand(B, n, generator=torch.Generator().manual_seed(4)) < 0.7
    mask[:, 0], mask[0, BK : 2 * BK], mask[1, 0] = False, False, True
    return mask


FORMS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], dict[str, Any]]] = {
    "block": (reference.causal_block, block_phi, {"window_blocks": 1}),
    "block, heads of the queries": (reference.causal_block, lambda: block_phi(H), {}),
    "prefix": (reference.causal_prefix, prefix_phi, {}),
    "prefix, shared": (reference.causal_prefix, lambda n=N: prefix_phi(1, n, 1), {}),
    "prefix, heads of the queries": (reference.causal_prefix, lambda n=N: prefix_phi(H, n), {}),
    "prefix, signed": (reference.causal_prefix, signs, {"signed": True}),
}


def name_of(form: str) -> str:
    return form.partition(",")[0]


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


# ---- identities of the definitions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", [reference.causal_block, lambda *a, **o: csat_attention(*a, causal="block", **o)])
@pytest.mark.parametrize("window", [0, 2])
def test_identity_blocks_are_causal_attention(attention: Any, window: int) -> None:
    q, k, v = tokens()
    eye = torch.eye(BK, dtype=torch.float64)
    torch.testing.assert_close(attention(q, k, v, eye, window_blocks=window), exact(q, k, v))


@pytest.mark.parametrize(
    "attention", [reference.causal_prefix, lambda *a, **o: csat_attention(*a, causal="prefix", **o)]
)
def test_one_hot_prefixes_are_causal_attention(attention: Any) -> None:
    q, k, v = tokens()
    torch.testing.assert_close(attention(q, k, v, torch.eye(N, dtype=torch.float64)), exact(q, k, v))


def test_keys_constant_per_segment_are_exact_with_the_log_mass_alone() -> None:
    q, k, v = tokens(40)
    k = k[:, :, ::4].repeat_interleave(4, 2)
    pooled = csat_attention(q, k, v, causal="block", block_size=8, measurements_per_block=2)
    torch.testing.assert_close(pooled, exact(q, k, v))
    phi = measurement("pool", 2, 8, dtype=torch.float64).phi
    assert float((csat_attention(q, k, v, phi, causal="block") - exact(q, k, v)).abs().max()) > 1e-2


def test_masked_pools_are_exact_over_what_is_left() -> None:
    """Equal keys: then the pools of a block differ from its kept tokens in nothing."""
    q, k, v = tokens(40)
    k, mask = k[:, :, :1].expand_as(k), some_kept(40)
    out = csat_attention(q, k, v, causal="block", block_size=BK, measurements_per_block=R, key_mask=mask)
    seen = torch.ones(40, 40).tril().bool() & mask[:, None, None]
    expected = scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    torch.testing.assert_close(out, expected.masked_fill(~seen.any(-1, keepdim=True), 0))


# ---- the library against the reference -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n", [1, 5, 37, 40, 101])
def test_agrees_with_the_reference(form: str, masked: bool, n: int) -> None:
    """Outputs and all gradients, with tiles and chunks shorter than the longest sequence; what is masked is NaN."""
    oracle, make_phi, options = FORMS[form]
    q, k, v = tokens(n)
    phi = make_phi() if name_of(form) == "block" else make_phi(n=n)
    mask = some_kept(n) if masked else None
    if mask is not None:
        k, v = (x.masked_fill(~mask[:, None, :, None], math.nan) for x in (k, v))
    bias = torch.randn(H, phi.shape[-2] if name_of(form) == "block" else M, dtype=torch.float64)
    sensing = torch.randn(HK, 4, DV, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v, phi, bias, sensing)]

    def call(attention: Any, **more: Any) -> tuple[Tensor, ...]:
        out = attention(q, k, v, phi, score_bias=bias, feature_sensing=sensing, key_mask=mask, **options, **more)
        return out, *torch.autograd.grad(out.sin().sum(), leaves, allow_unused=True, materialize_grads=True)

    for got, expected in zip(call(csat_attention, causal=name_of(form)), call(oracle), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)
        assert bool(got.isfinite().all())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("decoder", ["sparse", "untied", "linear"])
def test_decodes_every_row(form: str, decoder: str) -> None:
    oracle, make_phi, options = FORMS[form]
    q, k, v = tokens()
    weights = make_inputs(Case(decoder=decoder, dv=DV, heads=H, kv_heads=HK, phi_heads=HK, decoder_heads=H)).decoder()
    got = csat_attention(q, k, v, make_phi(), decoder=weights, causal=name_of(form), **options)
    torch.testing.assert_close(got, oracle(q, k, v, make_phi(), decoder=weights, **options))


@pytest.mark.parametrize("form", ["block", "prefix"])
@pytest.mark.parametrize("sensed", [False, True])
def test_a_sparse_decoder_is_fused_where_no_feature_is_sensed(sensed: bool, form: str) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(func.name())
            return func(*args, **(kwargs or {}))

    called: list[str] = []
    q, k, v = tokens()
    weights = make_inputs(Case(decoder="sparse", dv=DV, heads=H, kv_heads=HK, phi_heads=HK, decoder_heads=H)).decoder()
    sensing = torch.eye(DV, dtype=torch.float64) if sensed else None
    phi, oracle, op = (
        (block_phi(), reference.causal_block, "csat::attend_causal")
        if form == "block"
        else (prefix_phi(), reference.causal_prefix, "csat::attend_prefix")
    )
    with Names():
        got = csat_attention(q, k, v, phi, decoder=weights, feature_sensing=sensing, causal=form)
    torch.testing.assert_close(got, oracle(q, k, v, phi, decoder=weights))
    assert [name for name in called if name.startswith("csat::") and "project" not in name] == (
        [op, "csat::decode"] if sensed else [f"{op}_decode"]
    )


def test_independent_measurements_of_keys_and_values() -> None:
    (q, k, v), phis = tokens(), (block_phi(), block_phi(H, R) + 0.1)
    got = csat_attention(q, k, v, *phis, causal="block")
    torch.testing.assert_close(got, reference.causal_block(q, k, v, *phis))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("attention", ["reference", "library"])
def test_the_future_has_no_gradient_at_all(form: str, attention: str) -> None:
    oracle, make_phi, options = FORMS[form]
    q, k, v = (x.requires_grad_() for x in tokens())
    leaves = [q, k, v]
    phi = make_phi().requires_grad_()
    if name_of(form) == "prefix":
        leaves.append(phi)
    out = oracle(q, k, v, phi, **options) if attention == "reference" else csat_attention(
        q, k, v, phi, causal=name_of(form), **options
    )  # fmt: skip
    for t in (0, BK - 1, BK, 2 * BK + 3, N - 2):
        for leaf, grad in zip(leaves, torch.autograd.grad(out[:, :, t].sum(), leaves, retain_graph=True), strict=True):
            assert bool((grad[:, :, t + 1 :] == 0).all())
            assert bool((grad[:, :, t] != 0).any()) or (t == 0 and leaf is not v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["block", "prefix"])
@pytest.mark.parametrize("decoded", [False, True])
def test_the_kernels_see_no_future(kernels: Backend, form: str, decoded: bool, dtype: torch.dtype) -> None:
    """More tokens than the chunk of a kernel, which has 64 and 128 of the prefix form."""
    if kernels.name == "emulated_sm_90":
        pytest.skip("the causal forms have no kernels of Hopper's own")
    n = 140 if form == "prefix" and dtype == torch.bfloat16 else 75
    options: dict[str, Any] = {"window_blocks": 1} if form == "block" else {}
    if decoded:
        eye = torch.eye(DV)[None]
        options["decoder"] = SparseDecoder(*(kernels.to(x) for x in (eye, eye, torch.zeros(2, DV))), None)
    phi = kernels.to(block_phi(1)[0].float() if form == "block" else prefix_phi(n=n).float())
    leaves = [kernels.to(x).requires_grad_() for x in tokens(n, dtype)]
    if form == "prefix":
        leaves.append(phi.requires_grad_())
    out = csat_attention(*leaves[:3], phi, causal=form, **options)
    for t in (40, n - 2) if decoded else (0, BK - 1, 40, n - 2):
        for grad in torch.autograd.grad(out[:, :, t].sum(), leaves, retain_graph=True):
            assert bool((grad[:, :, t + 1 :] == 0).all()) and bool(grad.isfinite().all())


@pytest.mark.parametrize("n", [47, 48, 49, 96, 97, 200])
@pytest.mark.parametrize("form", FORMS)
def test_the_tile_and_the_chunk_do_not_matter(form: str, n: int) -> None:
    oracle, make_phi, options = FORMS[form]
    phi = make_phi() if name_of(form) == "block" else make_phi(n=n)
    got = csat_attention(*tokens(n), phi, causal=name_of(form), **options)
    torch.testing.assert_close(got, oracle(*tokens(n), phi, **options), rtol=1e-10, atol=1e-12)


# ---- dtypes and backends ---------------------------------------------------------------------------------------------


def plain_block(q: Tensor, k: Tensor, v: Tensor, phi: Tensor) -> Tensor:
    """Stock torch operations, each rounded to the dtype."""
    k, v, phi = (x.repeat_interleave(H // HK, -3) for x in (k, v, phi.to(q.dtype)))
    blocks = N // BK
    kc, vc = ((phi[:, None] @ x[:, :, : blocks * BK].unflatten(2, (blocks, BK))).flatten(2, 3) for x in (k, v))
    token = torch.arange(N)
    seen = torch.arange(blocks).repeat_interleave(R) < (token // BK)[:, None]
    near = (token <= token[:, None]) & (token // BK == (token // BK)[:, None])
    mask = torch.cat([seen, near], -1)
    scores = (q @ torch.cat([kc, k], 2).mT * D**-0.5).masked_fill(~mask, -math.inf)
    return scores.softmax(-1) @ torch.cat([vc, v], 2)


def plain_prefix(q: Tensor, k: Tensor, v: Tensor, phi: Tensor) -> Tensor:
    k, v, phi = (x.repeat_interleave(H // HK, 1) for x in (k, v, phi.to(q.dtype)))
    mass = phi.cumsum(2)
    kc, vc = ((phi[..., None] * x[..., None, :]).cumsum(2) / mass[..., None] for x in (k, v))
    scores = torch.einsum("bhtd,bhtjd->bhtj", q, kc) * D**-0.5 + mass.log()
    return torch.einsum("bhtj,bhtjd->bhtd", scores.softmax(-1), vc)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["block", "prefix"])
def test_accuracy(kernels: Backend, form: str, dtype: torch.dtype) -> None:
    """The tolerance rule, for outputs and for every gradient."""
    make_phi, plain = (block_phi, plain_block) if form == "block" else (prefix_phi, plain_prefix)
    oracle = reference.causal_block if form == "block" else reference.causal_prefix
    inputs = [*tokens(dtype=dtype), make_phi().float()]

    def run(attention: Callable[..., Tensor], *values: Tensor) -> list[Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in values]
        out = attention(*leaves)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        return [out, *torch.autograd.grad(out, leaves, weight.to(out))]

    got = run(lambda *a: csat_attention(*a, causal=form), *(kernels.to(x) for x in inputs))
    true, stock = run(oracle, *(x.double() for x in inputs)), run(plain, *inputs)
    for name, g, t, s in zip(("out", "q", "k", "v", "phi"), got, true, stock, strict=True):
        tolerance_dtype = g.to(dtype)  # phi's gradient is float32, its arithmetic that of the dtype
        assert_accurate(name, tolerance_dtype, t, s)


def test_autocast_computes_in_its_dtype() -> None:
    q, k, v = tokens(dtype=torch.float32)
    for form, phi in (("block", block_phi().float()), ("prefix", prefix_phi().float())):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = csat_attention(q, k, v, phi, causal=form)
        expected = csat_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), phi, causal=form)
        assert out.dtype == torch.bfloat16 and torch.equal(out, expected)


@pytest.mark.parametrize("form", ["block", "prefix"])
def test_long_scores_stay_finite(form: str) -> None:
    q, k, v = tokens(dtype=torch.bfloat16)
    phi = (block_phi() if form == "block" else prefix_phi()).float()
    out = csat_attention(q * 100, k * 100, v, phi, causal=form, scale=1.0)
    assert bool(out.isfinite().all()) and float(out.abs().max()) <= float(v.abs().max()) * 1.01


@pytest.mark.parametrize("form", ["block", "prefix"])
def test_compiles_with_gradients(form: str) -> None:
    torch._dynamo.reset()
    q, k, v = (x.requires_grad_() for x in tokens(dtype=torch.float32))
    phi = (block_phi() if form == "block" else prefix_phi()).float()
    compiled = torch.compile(lambda *a: csat_attention(*a, causal=form), backend="aot_eager", fullgraph=True)
    out, expected = compiled(q, k, v, phi), csat_attention(q, k, v, phi, causal=form)
    torch.testing.assert_close(out, expected)
    grads = [torch.autograd.grad(x.sin().sum(), (q, k, v)) for x in (out, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"causal": "blocks"}, ValueError, "causal = 'blocks' came; accepted: None, 'block', 'prefix'"),
        ({"causal": None, "is_causal": True}, ValueError, "causal='block' and causal='prefix'"),
        ({"causal": None, "phi_k": None}, TypeError, "phi_k must be a torch.Tensor"),
        ({"causal": None, "window_blocks": 1}, ValueError, "window_blocks = 1 belongs to causal='block'"),
        ({"causal": "prefix", "block_size": 8}, ValueError, "block_size = 8 belongs to causal='block'"),
        ({"signed": True}, ValueError, "signed=True belongs to causal='prefix'"),
        ({"signed": 1}, TypeError, "signed must be False or True"),
        ({"block_size": 4}, ValueError, "block_size = 4 came with a phi_k of 8"),
        ({"measurements_per_block": 4}, ValueError, "measurements_per_block = 4 came with a phi_k of 3"),
        ({"block_size": 0}, ValueError, "block_size must be at least 1"),
        ({"block_size": 8.0}, TypeError, "block_size must be an int"),
        ({"window_blocks": -1}, ValueError, "window_blocks must be at least 0"),
        ({"phi_k": None}, ValueError, "needs 1 <= measurements_per_block <= block_size"),
        ({"phi_k": None, "block_size": 4, "measurements_per_block": 5}, ValueError, "measurements_per_block <= block"),
        ({"phi_k": None, "score_bias": torch.zeros(R)}, ValueError, "come with a phi_k"),
        ({"phi_k": torch.randn(B, HK, R, BK)}, ValueError, "phi_k has shape"),
        ({"phi_k": torch.randn(BK + 1, BK)}, ValueError, "phi_k has m = 9"),
        ({"phi_k": torch.randn(3, R, BK)}, ValueError, "phi_k has 3 heads"),
        ({"phi_k": "pool"}, TypeError, "phi_k must be a torch.Tensor"),
        ({"phi_v": torch.randn(R + 1, BK)}, ValueError, "phi_v has 4 measurements"),
        ({"phi_v": torch.randn(R, BK + 1)}, ValueError, "phi_v has 9 columns"),
        ({"score_bias": torch.zeros(B, H, R)}, ValueError, "score_bias has shape"),
        ({"query": torch.randn(B, H, N - 1, D)}, ValueError, "query has 36 tokens, key 37"),
        ({"key_mask": torch.ones(B, N - 1, dtype=torch.bool)}, ValueError, "key_mask has shape"),
        ({"scale": math.nan}, ValueError, "scale must be finite"),
        ({"decoder": "lista"}, TypeError, "decoder must be"),
        ({"feature_sensing": torch.randn(DV + 1, DV)}, ValueError, "feature_sensing has shape"),
        ({"causal": "prefix"}, ValueError, r"phi_k has shape \(3, 8\); accepted with causal='prefix'"),
        ({"causal": "prefix", "phi_k": torch.rand(B, 3, N, M)}, ValueError, "phi_k has shape"),
        ({"causal": "prefix", "phi_k": torch.rand(1, 1, 1, N, M)}, ValueError, "phi_k has shape"),
        ({"causal": "prefix", "phi_k": torch.rand(N)}, ValueError, "phi_k has shape"),
        ({"causal": "prefix", "phi_k": torch.rand(N, M).double()}, TypeError, "phi_k has dtype torch.float64"),
        ({"causal": "prefix", "phi_k": torch.randn(N, M)}, ValueError, "phi_k has negative entries"),
        ({"causal": "prefix", "phi_k": None}, TypeError, "phi_k must be a torch.Tensor"),
        ({"causal": "prefix", "phi_k": torch.rand(N, M), "phi_v": torch.rand(N, M)}, ValueError, "phi_v came"),
    ],
)
def test_wrong_arguments_are_refused_by_name(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    q, k, v = tokens(dtype=torch.float32)
    call = {"query": q, "key": k, "value": v, "phi_k": block_phi(1)[0].float(), "causal": "block", **changes}
    with pytest.raises(error, match=message):
        csat_attention(**call)


def test_nothing_to_do() -> None:
    q, k, v = tokens(0)
    for form, phi in (("block", block_phi()), ("prefix", prefix_phi(n=0))):
        assert csat_attention(q, k, v, phi, causal=form).shape == (B, H, 0, DV)


# ---- the module ------------------------------------------------------------------------------------------------------

WIDTH = 16
LAYERS: dict[str, dict[str, Any]] = {
    "block": {"causal": "block", "block_size": BK, "measurements": 4, "window_blocks": 1},
    "block, every token": {"causal": "block", "block_size": BK, "measurements": BK},
    "block, learned": {"causal": "block", "block_size": BK, "measurements": 4, "learned": True, "length": BK},
    "block, two Phi": {"causal": "block", "block_size": BK, "measurements": 3, "ensemble": "srht", "share_kv": False},
    "prefix": {"causal": "prefix", "measurements": M},
    **{e: {"causal": "prefix", "measurements": M, "content": False, "ensemble": e} for e in BY_POSITION},
}


def layer(name: str, **config: Any) -> CSATAttention:
    torch.manual_seed(0)
    settings = {"feature_rank": 3, **LAYERS[name], **config}
    return CSATAttention(WIDTH, 4, CSATConfig.from_dict(settings), kv_heads=HK)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("masked", [False, True])
def test_the_module_is_causal_trains_and_steps(name: str, masked: bool) -> None:
    module, x = layer(name), torch.randn(B, N, WIDTH, requires_grad=True)
    mask = some_kept() if masked else None
    out = module(x, key_mask=mask)
    (grad,) = torch.autograd.grad(out[:, 20].sum(), x, retain_graph=True)
    assert bool((grad[:, 21:] == 0).all()) and float(grad[:, :20].abs().max()) > 0
    out.square().mean().backward()
    for parameter, value in module.named_parameters():
        assert value.grad is not None and bool(value.grad.isfinite().all()), parameter
    cache, rows = module.new_cache(), []
    for at in (slice(0, 11), *(slice(t, t + 1) for t in range(11, N))):
        rows.append(module(x[:, at], key_mask=None if mask is None else mask[:, at], cache=cache))
    torch.testing.assert_close(torch.cat(rows, 1), out, rtol=1e-4, atol=1e-5)


def test_blocks_of_as_many_measurements_are_causal_attention() -> None:
    module, x = layer("block, every token", feature_rank=None), torch.randn(B, N, WIDTH)
    q, k, v = (module._heads(p(x)) for p in (module.q_proj, module.k_proj, module.v_proj))
    expected = module.out_proj(exact(q, k, v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["block, learned", "prefix", "bucket"])
def test_a_causal_layer_restores_bit_for_bit(name: str) -> None:
    module, other, x = layer(name), layer(name, seed=9), torch.randn(B, N, WIDTH)
    assert not torch.equal(other(x), module(x))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(x).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["block, learned", "prefix"])
def test_a_layer_takes_its_own_caches_alone(name: str) -> None:
    module, other, x = layer(name), layer(name), torch.randn(B, N, WIDTH)
    with pytest.raises(ValueError, match=r"cache came of another layer; accepted: what the layer's new_cache made"):
        module(x, cache=other.new_cache())
    with pytest.raises(ValueError, match="cache came that no layer made"):
        module(x, cache=CSATCache("prefix"))
    with pytest.raises(TypeError, match="cache must be a CSATCache of this layer's new_cache, got dict"):
        module(x, cache={})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"accepted: None, as causal is None"):
        CSATAttention(WIDTH, H, CSATConfig(measurements=4))(x, cache=module.new_cache())


@pytest.mark.parametrize("name", ["block, learned", "prefix"])
def test_a_compiled_layer_decodes_with_a_cache(name: str) -> None:
    module, x = layer(name), torch.randn(B, N, WIDTH)
    compiled, cache = torch.compile(module, backend="eager"), module.new_cache()
    with torch.no_grad():
        rows = [compiled(x[:, at], cache=cache) for at in (slice(0, 11), slice(11, 12), slice(12, N))]
        torch.testing.assert_close(torch.cat(rows, 1), module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["block, learned", "prefix", "bucket"])
@pytest.mark.parametrize("rank", [None, 4])  # attended and decoded by one operator, and by two
def test_activation_checkpointing_of_a_causal_layer(name: str, rank: int | None) -> None:
    """Saved tensors are looked at once: `use_reentrant=False` gives them out once."""
    module, x = layer(name, feature_rank=rank), torch.randn(B, N, WIDTH, requires_grad=True)
    (plain,) = torch.autograd.grad(module(x).square().sum(), x)
    (again,) = torch.autograd.grad(checkpoint(module, x, use_reentrant=False).square().sum(), x)
    assert torch.equal(plain, again)


@pytest.mark.parametrize("ensemble", ENSEMBLES)
def test_columns_by_position_know_no_length(ensemble: str) -> None:
    def columns(start: int, stop: int) -> Tensor:
        return columns_by_position(ensemble, M, start, stop, seed=3, layer=1, heads=2, device=torch.device("cpu"))

    if ensemble not in BY_POSITION:
        with pytest.raises(ValueError, match="depends on the length"):
            columns(0, 9)
        return
    long = columns(0, 40)
    assert long.shape == (2, 40, M) and torch.equal(long[:, 13:17], columns(13, 17))
    phi = measurement(ensemble, M, 40, seed=3, layer=1, heads=2).phi
    if ENSEMBLES[ensemble].averaging:  # its rows are divided by their mass
        torch.testing.assert_close(phi, long.mT / long.mT.sum(-1, keepdim=True))
    else:
        torch.testing.assert_close(phi, long.mT * 40**-0.5)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"causal": "blocks"}, ValueError, "did you mean 'block'"),
        ({"causal": True}, TypeError, "causal must be a str or None"),
        ({"causal": "block"}, ValueError, "needs measurements <= block_size"),
        ({"causal": "block", "block_size": 32}, ValueError, "measurements = 64, block_size = 32"),
        ({"causal": "block", "block_size": 64, "learned": True, "length": 63}, ValueError, "length = 63"),
        ({"causal": "block", "block_size": 64, "grid": (8, 8)}, ValueError, "grid = "),
        ({"block_size": 64}, ValueError, "block_size = 64 belongs to causal='block'"),
        ({"causal": "prefix", "window_blocks": 1}, ValueError, "window_blocks = 1 belongs"),
        ({"causal": "block", "block_size": 64, "window_blocks": -1}, ValueError, "window_blocks must be at least 0"),
        ({"content": False}, ValueError, "content=False belongs to causal='prefix'"),
        ({"causal": "prefix", "content": False}, ValueError, "'pool' depends on the length"),
        ({"causal": "prefix", "share_kv": False}, ValueError, "share_kv = False came"),
        ({"causal": "prefix", "log_mass": False}, ValueError, "log_mass = False came"),
        ({"causal": "prefix", "learned": True, "length": 9}, ValueError, "learned = True came"),
    ],
)
def test_wrong_configs_are_refused_by_name(config: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CSATConfig.from_dict(config)


def test_what_a_causal_layer_does_not_take_is_refused_by_name() -> None:
    module, x = layer("prefix"), torch.randn(B, N, WIDTH)
    with pytest.raises(ValueError, match="context came, None is accepted"):
        module(x, x)
    with pytest.raises(ValueError, match="causal = 'prefix' runs on one rank"):
        module.parallel = object()  # type: ignore[assignment]
    with pytest.raises(ValueError, match="a cache is for causal='block' or 'prefix'"):
        CSATAttention(WIDTH, 4, CSATConfig()).new_cache()


def test_the_phi_of_a_masked_key_is_not_made_of_it() -> None:
    """NaN in masked keys reaches neither the rows nor the gradient of W."""
    torch.manual_seed(0)
    module = CSATAttention(16, 2, CSATConfig(causal="prefix", measurements=4, decoder="none"))
    mask = torch.rand(2, 9) < 0.6
    q, k, v = torch.randn(3, 2, 2, 9, 8)
    gradients = []
    for fill in (0.0, torch.nan):
        module.zero_grad()
        keys = k.masked_fill(~mask[:, None, :, None], fill)
        module.attend(q, keys, v, mask).square().sum().backward()
        gradients.append(module.content_weight.grad)
    assert gradients[0].abs().max() > 0 and torch.equal(*gradients)
