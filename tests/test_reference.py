"""The oracle itself: against SDPA, loops over scalars, and the identities the operator must satisfy, in float64."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from csat_ext.measurements import ENSEMBLES, measurement
from csat_ext.reference import attend, csat_attention, decode, project, renormalise_rows, soft_threshold

F64 = torch.float64
NAN, INF = math.nan, math.inf


def randn(*shape, seed=0, grad=False):
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape))
    return torch.randn(*shape, dtype=F64, generator=generator).requires_grad_(grad)


def qkv(batch=2, heads=4, key_heads=2, queries=5, tokens=12, dim=8, value_dim=6, grad=False):
    return (
        randn(batch, heads, queries, dim, seed=1, grad=grad),
        randn(batch, key_heads, tokens, dim, seed=2, grad=grad),
        randn(batch, key_heads, tokens, value_dim, seed=3, grad=grad),
    )


def close(got, expected, tolerance=1e-12):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


# --- the formulas, one scalar at a time ---


def test_the_whole_operator_as_loops():
    q, k, v = qkv(batch=1, heads=2, key_heads=1, queries=2, tokens=5, dim=3, value_dim=2)
    phi_k, phi_v = randn(2, 3, 5, seed=4), randn(3, 5, seed=5)
    bias, sensing, scale = randn(2, 3, seed=6), randn(1, 2, seed=7), 0.7
    S, B, theta, psi, step = randn(2, 3, 3), randn(1, 3, 1), randn(2, 3).abs() / 4, randn(4, 3), randn(2)
    decoder = SimpleNamespace(S=S, B=B, theta=theta, psi=psi, step=step)
    got = csat_attention(q, k, v, phi_k, phi_v, decoder=decoder, feature_sensing=sensing, scale=scale, score_bias=bias)
    for h in range(2):
        for i in range(2):
            scores, values = [], []
            for j in range(3):
                key = [sum(float(phi_k[h, j, s] * k[0, 0, s, d]) for s in range(5)) for d in range(3)]
                value = [sum(float(phi_v[j, s] * v[0, 0, s, d]) for s in range(5)) for d in range(2)]
                values.append(sum(value[d] * float(sensing[0, d]) for d in range(2)))
                scores.append(scale * sum(float(q[0, h, i, d]) * key[d] for d in range(3)) + float(bias[h, j]))
            mass = sum(math.exp(s) for s in scores)
            z = sum(math.exp(s) / mass * value for s, value in zip(scores, values, strict=True))
            a = [0.0] * 3
            for t in range(2):
                pre = [sum(float(S[t, p, r]) * a[r] for r in range(3)) + float(B[0, p, 0]) * z for p in range(3)]
                u = [a[p] + float(step[t]) * (pre[p] - a[p]) for p in range(3)]
                a = [math.copysign(max(abs(u[p]) - float(theta[t, p]), 0.0), u[p]) for p in range(3)]
            expected = [sum(float(psi[d, p]) * a[p] for p in range(3)) for d in range(4)]
            close(got[0, h, i], torch.tensor(expected, dtype=F64))


def test_soft_threshold():
    u = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0], dtype=F64)
    assert soft_threshold(u, 1.0).tolist() == [-2, 0, 0, 0, 0, 0, 2]
    assert torch.equal(soft_threshold(u, 0.0), u)
    assert torch.equal(soft_threshold(u, INF), torch.zeros_like(u))


@pytest.mark.parametrize(("x_heads", "phi_heads"), [(1, 1), (2, 1), (2, 2), (2, 6), (1, 3)])
@pytest.mark.parametrize("phi_batch", [1, 3])
def test_project_pairs_heads_in_groups(x_heads, phi_heads, phi_batch):
    x, phi = randn(3, x_heads, 7, 4), randn(phi_batch, phi_heads, 5, 7)
    y = project(x, phi)
    heads = max(x_heads, phi_heads)
    assert y.shape == (3, heads, 5, 4)
    for b in range(3):
        for h in range(heads):
            row = phi[b if phi_batch > 1 else 0, h if phi_heads > 1 else 0]
            close(y[b, h], row @ x[b, h * x_heads // heads])


# --- identities of the operator ---


@pytest.mark.parametrize("ensemble", ["pool", "bucket", "learned"])
def test_m_equal_n_is_exact_attention(ensemble):
    q, k, v = qkv(grad=True)
    made = measurement(ensemble, 12, 12, heads=4, dtype=F64)
    exact = scaled_dot_product_attention(q, k, v, enable_gqa=True)
    got = csat_attention(q, k, v, made.phi, score_bias=made.score_bias)
    close(got, exact)
    upstream = randn(*got.shape, seed=9)
    for mine, theirs in zip(
        torch.autograd.grad(got, (q, k, v), upstream), torch.autograd.grad(exact, (q, k, v), upstream), strict=True
    ):
        close(mine, theirs)


def test_keys_constant_per_segment_need_the_log_mass():
    made = measurement("pool", 4, 22, heads=4, head_shift=True, anchors=("first",), dtype=F64)
    q, k, v = qkv(heads=4, key_heads=4, tokens=22)
    # Segments unequal and whole: one-hot assignment of every token to the row that weighs it most.
    owner = made.phi.argmax(1)
    phi = torch.nn.functional.one_hot(owner, 4).mT.to(F64)
    counts = phi.sum(-1)
    assert (counts.amax(-1) > counts.amin(-1)).all()
    keys = k[:, :, :4].gather(2, owner[None, :, :, None].expand(2, -1, -1, 8))
    exact = scaled_dot_product_attention(q, keys, v)
    phi = phi / counts[..., None]
    close(csat_attention(q, keys, v, phi, score_bias=counts.log()), exact)
    assert (csat_attention(q, keys, v, phi) - exact).abs().max() > 0.1


def test_constant_keys_are_exact_with_fractional_and_shifted_pools():
    made = measurement("pool", 5, 13, heads=4, head_shift=True, anchors=("last",), dtype=F64)
    q, _, v = qkv(tokens=13)
    keys = randn(2, 2, 1, 8).expand(2, 2, 13, 8)
    exact = scaled_dot_product_attention(q, keys, v, enable_gqa=True)
    close(csat_attention(q, keys, v, made.phi, score_bias=made.score_bias), exact)


def test_grid_pool_is_exact_for_keys_constant_per_cell():
    made = measurement("pool", 6, 24, grid=(4, 6), dtype=F64)
    cells = (made.phi[0] > 0).long().argmax(0)
    q, k, v = qkv(tokens=24)
    keys = k[:, :, cells]
    exact = scaled_dot_product_attention(q, keys, v, enable_gqa=True)
    close(csat_attention(q, keys, v, made.phi, score_bias=made.score_bias), exact)


@pytest.mark.parametrize("ensemble", sorted(ENSEMBLES))
def test_ones_and_shifted_keys(ensemble):
    made = measurement(ensemble, 5, 12, heads=4, dtype=F64)
    q, k, v = qkv()
    averaging = ENSEMBLES[ensemble].averaging
    ones = csat_attention(q, k, torch.ones_like(v), made.phi, score_bias=made.score_bias)
    output = csat_attention(q, k, v, made.phi, score_bias=made.score_bias)
    shifted = csat_attention(q, k + randn(8, seed=4), v, made.phi, score_bias=made.score_bias)
    if averaging:
        close(ones, torch.ones_like(ones))
        close(shifted, output)
    else:
        assert (ones - 1).abs().max() > 0.1
        assert (shifted - output).abs().max() > 0.01


def test_zero_queries_give_the_softmax_of_the_bias():
    q, k, v = qkv()
    phi, bias = randn(4, 5, 12), randn(4, 5)
    expected = torch.softmax(bias, -1)[None, :, None, :] @ project(v, phi)
    close(csat_attention(0 * q, k, v, phi, score_bias=bias), expected.expand(2, 4, 5, 6))


@pytest.mark.parametrize("ensemble", sorted(ENSEMBLES))
def test_permuting_tokens_with_the_columns_changes_nothing(ensemble):
    made = measurement(ensemble, 5, 12, heads=4, dtype=F64)
    q, k, v = qkv()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(24).reshape(2, 12) % 5 > 0
    before = csat_attention(q, k, v, made.phi, score_bias=made.score_bias, key_mask=mask)
    permuted = k[:, :, order], v[:, :, order], made.phi[..., order]
    close(csat_attention(q, *permuted, score_bias=made.score_bias, key_mask=mask[:, order]), before)


def test_phi_v_is_phi_k_unless_given():
    q, k, v = qkv()
    phi, other = randn(5, 12), randn(5, 12, seed=1)
    assert torch.equal(csat_attention(q, k, v, phi), csat_attention(q, k, v, phi, phi))
    assert not torch.equal(csat_attention(q, k, v, phi), csat_attention(q, k, v, phi, other))


def test_heads_of_phi_k_and_phi_v_may_differ():
    q, k, v = qkv()
    per_query_head, shared = randn(4, 5, 12), randn(1, 5, 12)
    got = csat_attention(q, k, v, per_query_head, shared)
    close(got, csat_attention(q, k, v, per_query_head, shared.expand(4, 5, 12)))
    got = csat_attention(q, k, v, shared, per_query_head)
    close(got, csat_attention(q, k, v, shared.expand(4, 5, 12), per_query_head))


# --- masks and dead measurements ---


@pytest.mark.parametrize("ensemble", ["pool", "bucket"])
def test_masked_token_is_a_removed_token(ensemble):
    """By csat_attention's own renormalisation: whole phi, and the bias recomputed from what is left."""
    q, k, v = qkv()
    mask = torch.tensor([True, False] + [True] * 6 + [False, True, False, True])
    made = measurement(ensemble, 4, 12, dtype=F64)
    weights = made.phi * made.score_bias.exp()[..., None]  # tokens' shares
    left = weights[..., mask]
    mass = left.sum(-1)
    removed = csat_attention(q, k[:, :, mask], v[:, :, mask], left / mass[..., None], score_bias=mass.log())
    both = mask.expand(2, 12)
    masked = csat_attention(q, k, v, made.phi, score_bias=mass.log(), key_mask=both)
    close(masked, removed)
    # The measurement made for the mask says the same where cells stay; it is its own renormalisation already.
    if ensemble == "bucket":
        for_mask = measurement(ensemble, 4, 12, dtype=F64, key_mask=both)
        close(csat_attention(q, k, v, for_mask.phi, score_bias=for_mask.score_bias, key_mask=both), removed)


def test_masked_signed_rows_keep_variance_of_what_is_left():
    q, k, v = qkv()
    mask = (torch.arange(12) < 7).expand(2, 12)
    long, short = (measurement("gaussian", 4, n, heads=4, seed=3, dtype=F64).phi for n in (12, 7))
    close(csat_attention(q, k, v, long, key_mask=mask), csat_attention(q, k[:, :, :7], v[:, :, :7], short))


def test_renormalise_rows_by_hand():
    phi = torch.tensor([[1, 1, 2, 0], [1, -1, 0, 0], [0, 0, 0, 5], [0, 1, 0, -1], [0, 0, 0, 0]], dtype=F64)
    mask = torch.tensor([[True, True, True, False], [True, False, False, False], [False] * 4])
    factor, empty = renormalise_rows(phi, mask)
    r = math.sqrt(4 / 3)
    close(factor[:, 0], torch.tensor([[1, r, 0, r, 0], [4, 2, 0, 0, 0], [0] * 5], dtype=F64))
    assert empty[:, 0].tolist() == [
        [False, False, True, False, True],
        [False, False, True, True, True],
        [True] * 5,
    ]


@pytest.mark.parametrize("junk", [NAN, INF, 1e300])
@pytest.mark.parametrize("ensemble", ["pool", "gaussian"])
def test_junk_in_masked_tokens_changes_neither_output_nor_gradients(ensemble, junk):
    mask = torch.arange(12) < torch.tensor([[7], [0]])  # the second sequence has nothing left
    made = measurement(ensemble, 4, 12, heads=4, dtype=F64)

    def run(fill):
        q, k, v = (x.detach().clone() for x in qkv())
        k.masked_fill_(~mask[:, None, :, None], fill)
        v.masked_fill_(~mask[:, None, :, None], fill)
        phi = made.phi.clone()
        inputs = [x.requires_grad_() for x in (q, k, v, phi)]
        out = csat_attention(q, k, v, phi, score_bias=made.score_bias, key_mask=mask)
        return out, torch.autograd.grad(out, inputs, randn(*out.shape, seed=7))

    (clean, clean_grads), (dirty, dirty_grads) = run(0.0), run(junk)
    assert torch.equal(clean, dirty)
    assert (dirty[1] == 0).all()
    for a, b in zip(clean_grads, dirty_grads, strict=True):
        assert torch.equal(a, b)
    assert (dirty_grads[1][~mask[:, None, :].expand(2, 2, 12)] == 0).all()


def test_dead_measurements_take_no_part():
    q, kc, vc = randn(2, 2, 3, 4, grad=True), randn(2, 2, 5, 4, seed=1, grad=True), randn(2, 2, 5, 6, seed=2, grad=True)
    alive = torch.tensor([True, False, True, True, False])
    bias = randn(2, 5, seed=3)
    dead = bias.masked_fill(~alive, -INF).requires_grad_()
    z, lse = attend(q, kc, vc, dead, 0.5)
    expected_z, expected_lse = attend(q, kc[:, :, alive], vc[:, :, alive], bias[:, alive], 0.5)
    close(z, expected_z)
    close(lse, expected_lse)
    close(lse, torch.logsumexp(0.5 * q @ kc.mT + dead[:, None, :], -1))
    gradients = torch.autograd.grad(z.sum() + lse.sum(), (q, kc, vc, dead))
    assert all(g.isfinite().all() for g in gradients)
    assert (gradients[1][:, :, ~alive] == 0).all() and (gradients[3][:, ~alive] == 0).all()


def test_rows_whose_every_measurement_is_dead():
    q, kc, vc = randn(1, 2, 3, 4, grad=True), randn(1, 2, 5, 4, grad=True), randn(1, 2, 5, 6, grad=True)
    bias = torch.full((2, 5), -INF, dtype=F64).index_fill(0, torch.tensor([1]), 0.0).requires_grad_()
    z, lse = attend(q, kc, vc, bias, 1.0)
    assert (z[:, 0] == 0).all() and (lse[:, 0] == -INF).all() and lse[:, 1].isfinite().all()
    gradients = torch.autograd.grad(z.sum(), (q, kc, vc, bias))
    assert all(g.isfinite().all() for g in gradients)
    assert (gradients[0][:, 0] == 0).all() and (gradients[3][0] == 0).all()


@pytest.mark.parametrize("ensemble", sorted(ENSEMBLES))
def test_measurements_made_for_a_mask_give_finite_outputs(ensemble):
    q, k, v = qkv(batch=3)
    mask = torch.tensor([[True] * 12, [True] + [False] * 11, [False] * 12])
    made = measurement(ensemble, 4, 12, heads=4, anchors=("first", "last"), key_mask=mask, dtype=F64)
    out = csat_attention(q, k, v, made.phi, score_bias=made.score_bias)
    assert out.isfinite().all() and (out[2] == 0).all()
    if ENSEMBLES[ensemble].averaging:  # one token is left: every query gets its value
        close(out[1], v[1, :, :1].repeat_interleave(2, 0).expand(4, 5, 6))


# --- decoders ---


def _ista(A, iterations, theta):
    """S, B, theta of ISTA for the sensing matrix A (R, P), step 1 / L."""
    L = torch.linalg.matrix_norm(A, 2) ** 2
    S = torch.eye(A.shape[1], dtype=F64) - A.T @ A / L
    return S[None], (A.T / L)[None], torch.full((iterations, A.shape[1]), theta, dtype=F64)


@pytest.mark.parametrize("iterations", [1, 4])
def test_orthonormal_dictionary_without_threshold_is_the_identity(iterations):
    psi = torch.linalg.qr(randn(6, 6)).Q
    z = randn(2, 3, 5, 6, seed=1)
    S, B, theta = _ista(psi, iterations, 0.0)
    close(decode(z, S, B, theta, psi), z)
    assert (decode(z, S, B, theta + INF, psi) == 0).all()


def test_decode_lowers_the_lasso_objective_at_every_layer():
    A = randn(5, 12, seed=2)
    z, L = randn(1, 1, 20, 5, seed=3), float(torch.linalg.matrix_norm(A, 2) ** 2)
    objective = []
    for iterations in (1, 2, 5, 20, 80):
        S, B, theta = _ista(A, iterations, 0.3 / L)
        a = decode(z, S, B, theta, torch.eye(12, dtype=F64))
        objective.append(float(0.5 * ((a @ A.T - z) ** 2).sum() + 0.3 * a.abs().sum()))
    assert objective == sorted(objective, reverse=True) and objective[-1] < objective[0]


def test_steps_are_the_untied_weights_they_stand_for():
    z, S, B, theta, psi = randn(2, 2, 3, 4), randn(1, 6, 6), randn(1, 6, 4), randn(3, 6).abs() / 2, randn(5, 6)
    step = torch.tensor([1.0, 0.5, -0.25], dtype=F64)
    eye = torch.eye(6, dtype=F64)
    untied = decode(z, eye + step[:, None, None] * (S - eye), step[:, None, None] * B, theta, psi)
    close(decode(z, S, B, theta, psi, step), untied)
    ones = torch.ones(3, dtype=F64)
    close(decode(z, S, B, theta, psi), decode(z, S.expand(3, 6, 6), B.expand(3, 6, 4), theta, psi, ones))


def test_decoder_heads_are_independent():
    z, S, B = randn(2, 3, 4, 5), randn(3, 1, 6, 6), randn(3, 2, 6, 5)
    theta, psi, step = randn(3, 2, 6).abs() / 2, randn(3, 7, 6), randn(3, 2)
    whole = decode(z, S, B, theta, psi, step)
    for h in range(3):
        close(whole[:, h : h + 1], decode(z[:, h : h + 1], S[h], B[h], theta[h], psi[h], step[h]))


def test_feature_sensing_and_linear_decoder():
    q, k, v = qkv()
    phi, sensing, weight = randn(5, 12), randn(3, 6), randn(3, 6, seed=1)
    z = csat_attention(q, k, v, phi)
    sensed = csat_attention(q, k, v, phi, feature_sensing=sensing)
    close(sensed, z @ sensing.T)
    linear = csat_attention(q, k, v, phi, feature_sensing=sensing, decoder=SimpleNamespace(weight=weight))
    close(linear, z @ sensing.T @ weight)
    per_head = randn(4, 3, 6)
    close(csat_attention(q, k, v, phi, feature_sensing=per_head), z @ per_head.mT)


def test_gradcheck_of_every_parameter():
    q, k, v = qkv(batch=2, heads=2, key_heads=1, queries=2, tokens=5, dim=3, value_dim=3, grad=True)
    phi, bias = randn(2, 3, 5, grad=True), randn(2, 3, grad=True)
    S, B, psi = (t.requires_grad_() for t in (randn(1, 4, 4) / 3, randn(1, 4, 3), randn(3, 4)))
    theta, step = torch.full((2, 4), 0.05, dtype=F64, requires_grad=True), torch.ones(2, dtype=F64, requires_grad=True)
    mask = torch.tensor([[True, True, False, True, True], [True] * 5])

    def run(q, k, v, phi, bias, S, B, theta, psi, step):
        decoder = SimpleNamespace(S=S, B=B, theta=theta, psi=psi, step=step)
        return csat_attention(q, k, v, phi, decoder=decoder, score_bias=bias, key_mask=mask)

    assert torch.autograd.gradcheck(run, (q, k, v, phi, bias, S, B, theta, psi, step))


# --- limits of the signed ensembles ---


def test_gaussian_measurements_tend_to_linear_attention():
    """Z -> V^T grad L(s), L(s) = log E exp(phi . s); for entries N(0, sigma^2) it is sigma^2 V^T s."""
    n = 16
    q, k, v = (x / 2 for x in qkv(batch=1, heads=1, key_heads=1, queries=3, tokens=n))
    limit = (q @ k.mT / math.sqrt(8)) @ v / n
    errors = []
    for m in (64, 1024, 16384):
        phi = torch.randn(m, n, dtype=F64, generator=torch.Generator().manual_seed(0)) / math.sqrt(n)
        errors.append(float((csat_attention(q, k, v, phi) - limit).norm()))
    assert errors[1] < 0.6 * errors[0] and errors[2] < 0.6 * errors[1]
    assert errors[2] < 0.1


def test_ensemble_rows_show_the_same_limits():
    """Heads of one ensemble stand for rows, as m is bounded by n: 64 tokens, of which all but 16 hold zeros."""
    n, heads = 64, 256
    q, k, v = (x / 2 for x in qkv(batch=1, heads=1, key_heads=1, queries=3, tokens=16))
    k, v = (torch.cat([x, x.new_zeros(1, 1, n - 16, x.shape[-1])], dim=2) * 2 for x in (k, v))
    scores = q @ k.mT / math.sqrt(8)
    sigma = 1 / math.sqrt(n)
    limits = {"gaussian": sigma**2 * scores @ v, "rademacher": sigma * torch.tanh(sigma * scores) @ v}
    for ensemble, limit in limits.items():
        draws = [measurement(ensemble, n, n, heads=heads, seed=seed, dtype=F64).phi for seed in (0, 1)]
        rows, independent = (phi.reshape(-1, n) for phi in draws)
        for m in (256, 2048, 16384):  # a mean of m rows: the error falls as 1 / sqrt(m), measured at 1 to 3.3 times it
            assert (csat_attention(q, k, v, rows[:m]) - limit).norm() < 5 / math.sqrt(m)
            assert csat_attention(q, k, v, rows[:m], independent[:m]).norm() < 5 / math.sqrt(m)
        assert limit.norm() > 0.15 > 3 * 5 / math.sqrt(16384)


# --- dtypes and extremes ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_computes_in_float32(dtype):
    q, k, v = (x.to(dtype) for x in qkv())
    made = measurement("pool", 4, 12, heads=4, head_shift=True)
    out = csat_attention(q, k, v, made.phi, score_bias=made.score_bias)
    exact = csat_attention(q.double(), k.double(), v.double(), made.phi.double(), score_bias=made.score_bias.double())
    assert out.dtype == dtype
    limit = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert (out.double() - exact).norm() <= limit * exact.norm()
    kc = project(k, made.phi)
    assert attend(q, kc, project(v, made.phi), None, 1.0)[1].dtype == torch.float32


def test_large_scores_stay_finite():
    q, k, v = (x.to(torch.bfloat16) for x in qkv())
    made = measurement("pool", 4, 12)
    out = csat_attention(q * 1e4, k, v, made.phi, score_bias=made.score_bias)
    assert out.isfinite().all()


def test_sizes_one_and_zero():
    q, k, v = qkv(batch=1, heads=1, key_heads=1, queries=1, tokens=1)
    close(csat_attention(q, k, v, torch.ones(1, 1, dtype=F64)), v)
    no_mask = torch.ones(0, 1, dtype=torch.bool)
    empty = csat_attention(q[:0], k[:0], v[:0], torch.ones(1, 1, dtype=F64), key_mask=no_mask)
    assert empty.shape == (0, 1, 1, 6)
