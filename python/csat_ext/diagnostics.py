"""What the theory asks of a sensing matrix, and what a running model shows: figures to look at, none needed to train.

Matrices: :func:`mutual_coherence`, :func:`welch_bound`, :func:`empirical_rip`, :func:`rip_lower_bound`,
:func:`phase_transition`. Models: :func:`measured_sparsity`, :func:`token_attributions`, :func:`csat_attribution`.
Everything computes in the dtype it is given; float64 is meant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike

import torch
from torch import Tensor

from csat_ext.functional import Phi
from csat_ext.implicit import ImplicitMeasurement
from csat_ext.measurements import measurement_matrix
from csat_ext.reference.attention import attend, project, renormalise_rows
from csat_ext.reference.solvers import basis_pursuit, omp

# The constant of Davenport, Duarte, Eldar & Kutyniok 2012, theorem 1.4: 1 / (2 log(sqrt(24) + 1)), about 0.28.
RIP_CONSTANT = 1.0 / (2.0 * math.log(math.sqrt(24.0) + 1.0))
SUPPORTS_AT_ONCE = 256  # sampled supports whose singular values are computed in one call: bounds the memory


def _matrix(name: str, A: Tensor) -> Tensor:
    if not isinstance(A, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(A).__name__}")
    if A.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, got {A.dtype}")
    if A.ndim < 2 or 0 in A.shape:
        raise ValueError(f"{name} must be non-empty with shape (..., R, P), got {tuple(A.shape)}")
    if not bool(A.isfinite().all()):
        raise ValueError(f"{name} must be finite")
    return A


def _within(name: str, value: int, least: int, most: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not least <= value <= most:
        raise ValueError(f"{name} must be in {least}..{most}, got {value}")


def mutual_coherence(A: Tensor) -> Tensor:
    """mu(A) = max over i != j of |a_i . a_j| / (|a_i| |a_j|), in [0, 1] (Donoho & Huo 2001).

    Every k-sparse vector with k < (1 + 1 / mu) / 2 is recovered from A a by OMP and by basis pursuit (Tropp 2004).

    Args:
        A: (..., R, P), P >= 2, float32 or float64, no zero column.

    Returns:
        (...), one value a matrix.
    """
    _matrix("A", A)
    lengths = torch.linalg.vector_norm(A, dim=-2, keepdim=True)
    if A.shape[-1] < 2 or not bool((lengths > 0).all()):
        raise ValueError(f"A must have at least two columns and no zero column, got shape {tuple(A.shape)}")
    gram = (A / lengths).mT @ (A / lengths)
    gram.diagonal(dim1=-2, dim2=-1).zero_()
    return gram.abs().amax((-2, -1))


def welch_bound(rows: int, columns: int) -> float:
    """The least coherence of any (rows, columns) matrix: sqrt((P - R) / (R (P - 1))), 0 for P <= R (Welch 1974)."""
    _within("rows", rows, 1)
    _within("columns", columns, 2)
    return math.sqrt(max(columns - rows, 0) / (rows * (columns - 1)))


def empirical_rip(A: Tensor, k: int, trials: int = 1000, seed: int = 0) -> Tensor:
    """A lower bound on the restricted isometry constant delta_k, from randomly drawn supports.

    delta_k = max over |S| = k of max(sigma_max(A_S)^2 - 1, 1 - sigma_min(A_S)^2) (Candes & Tao 2005); the maximum over
    a sample of supports can only be smaller. Columns are taken as they are: normalise first what should be.

    Args:
        A: (..., R, P) float32 or float64.
        k: size of the supports, 1 <= k <= P. For k > R the result is at least 1: k columns are dependent.
        trials: number of supports, the same for every matrix of the batch.
        seed: of the supports, drawn on the CPU.

    Returns:
        (...), one value a matrix. More trials with the same seed never lower it.
    """
    _matrix("A", A)
    _within("k", k, 1, A.shape[-1])
    _within("trials", trials, 1)
    generator = torch.Generator().manual_seed(seed)
    worst = A.new_zeros(A.shape[:-2])
    for first in range(0, trials, SUPPORTS_AT_ONCE):
        count = min(SUPPORTS_AT_ONCE, trials - first)
        order = torch.rand(SUPPORTS_AT_ONCE, A.shape[-1], generator=generator, dtype=torch.float64)
        support = order.topk(k, dim=-1).indices[:count].to(A.device)
        columns = A[..., support].movedim(-2, -3)  # (..., count, R, k)
        squared = torch.linalg.svdvals(columns).square()
        least = squared[..., -1] if k <= A.shape[-2] else torch.zeros_like(squared[..., -1])
        worst = torch.maximum(worst, torch.maximum(squared[..., 0] - 1, 1 - least).amax(-1))
    return worst


def rip_lower_bound(n: int, k: int) -> int:
    """The fewest measurements m with which a matrix (m, n) can have delta_2k <= 1/2: m >= 0.28 k log(n / k).

    Davenport, Duarte, Eldar & Kutyniok 2012 ("Introduction to compressed sensing"), theorem 1.4, with the constant
    1 / (2 log(sqrt(24) + 1)); it is a necessary condition, and random matrices need a small multiple of it.

    Args:
        n: number of unknowns, k: number of nonzeros, 1 <= k <= n / 2.
    """
    _within("n", n, 2)
    _within("k", k, 1, n // 2)
    return math.ceil(RIP_CONSTANT * k * math.log(n / k))


@dataclass(frozen=True)
class Sparsity:
    """Mean over the rows of a head; every field is (H,)."""

    zeros: Tensor  # fraction of the coefficients with |a| <= threshold
    hoyer: Tensor  # (sqrt(P) - |a|_1 / |a|_2) / (sqrt(P) - 1): 0 all equal, 1 a single nonzero (Hoyer 2004)
    effective: Tensor  # |a|_1^2 / |a|_2^2, between 1 and P: the number of equal nonzeros with the same ratio of norms


def measured_sparsity(coefficients: Tensor, threshold: float = 0.0) -> Sparsity:
    """How sparse decoder coefficients a_T are, per head.

    Args:
        coefficients: (B, H, N, P), P >= 2, any floating dtype; measured in float32 (float64 if given).
        threshold: in the coefficients' units; |a| <= threshold is a zero, for ``zeros`` and for the norms alike.

    Returns:
        :class:`Sparsity`. A row without a nonzero has hoyer 1 and effective 0.
    """
    if not isinstance(coefficients, Tensor) or not coefficients.is_floating_point():
        raise TypeError(
            f"coefficients must be a floating Tensor, got {getattr(coefficients, 'dtype', type(coefficients))}"
        )
    if coefficients.ndim != 4 or 0 in coefficients.shape or coefficients.shape[-1] < 2:
        raise ValueError(f"coefficients must be a non-empty (B, H, N, P) with P >= 2, got {tuple(coefficients.shape)}")
    if not threshold >= 0:
        raise ValueError(f"threshold must be >= 0, got {threshold}")
    size = coefficients.abs().to(torch.promote_types(coefficients.dtype, torch.float32))
    size = torch.where(size <= threshold, torch.zeros_like(size), size)
    empty = (size == 0).all(-1)
    root = math.sqrt(size.shape[-1])
    ratio = size.sum(-1) / torch.linalg.vector_norm(size, dim=-1).masked_fill(empty, 1.0)  # |a|_1 / |a|_2
    hoyer = ((root - ratio) / (root - 1)).masked_fill(empty, 1.0)
    return Sparsity((size == 0).to(size.dtype).mean((0, 2, 3)), hoyer.mean((0, 2)), ratio.square().mean((0, 2)))


# A recovery method under test: (z (trials, m), A (m, n), number of nonzeros) -> coefficients (trials, n).
Solver = Callable[[Tensor, Tensor, int], Tensor]
SOLVERS: dict[str, Solver] = {
    "basis_pursuit": lambda z, A, k: basis_pursuit(z, A, iterations=2000, tolerance=1e-5).coefficients,
    "omp": lambda z, A, k: omp(z, A, sparsity=min(k, *A.shape)).coefficients,
}


@dataclass(frozen=True)
class PhaseTransition:
    """Success rates of exact recovery over undersampling delta = m / n and sparsity rho = k / m."""

    delta: Tensor  # (I,) as realised by whole numbers of measurements
    rho: Tensor  # (J,) as asked for; k = max(1, round(rho m))
    success: Tensor  # (I, J) fraction of the trials recovered
    n: int
    trials: int
    tolerance: float
    seed: int
    ensemble: str
    solver: str


def phase_transition(
    ensemble: str | Callable[[int, int, int], Tensor],
    solver: str | Solver = "basis_pursuit",
    *,
    n: int = 128,
    deltas: Sequence[float] | Tensor = (0.1, 0.3, 0.5, 0.7, 0.9),
    rhos: Sequence[float] | Tensor = (0.1, 0.3, 0.5, 0.7, 0.9),
    trials: int = 20,
    tolerance: float = 1e-2,
    seed: int = 0,
) -> PhaseTransition:
    """The empirical phase transition of Donoho & Tanner 2009: where a solver recovers sparse vectors from z = A a.

    A cell draws one matrix and ``trials`` vectors with k nonzeros (places uniform, values standard normal), in float64;
    a vector counts as recovered when |a' - a|_2 <= tolerance |a|_2. Columns are normalised before use.

    Args:
        ensemble: a name that ``measurement_matrix`` knows, or a function (m, n, seed) -> (m, n) matrix.
        solver: "basis_pursuit", "omp" or a function (z, A, k) -> coefficients.
        n: length of the vectors; deltas: m / n in (0, 1]; rhos: k / m in (0, 1], sequences or (I,) and (J,) tensors.

    Returns:
        :class:`PhaseTransition`, the same for the same arguments.
    """
    _within("n", n, 2)
    _within("trials", trials, 1)
    deltas, rhos = _fractions("deltas", deltas), _fractions("rhos", rhos)
    if isinstance(solver, str) and solver not in SOLVERS:
        raise ValueError(f"solver must be one of {sorted(SOLVERS)} or a function, got {solver!r}")
    solve = SOLVERS[solver] if isinstance(solver, str) else solver
    success = torch.zeros(len(deltas), len(rhos), dtype=torch.float64)
    measured = [max(1, round(delta * n)) for delta in deltas]
    for i, m in enumerate(measured):
        for j, rho in enumerate(rhos):
            cell = seed + 1 + i * len(rhos) + j
            A = _drawn_matrix(ensemble, m, n, cell)
            k = max(1, round(rho * m))
            truth = _sparse_vectors(trials, n, k, cell)
            error = torch.linalg.vector_norm(solve(truth @ A.mT, A, k) - truth, dim=-1)
            recovered = error <= tolerance * torch.linalg.vector_norm(truth, dim=-1)
            success[i, j] = recovered.to(torch.float64).mean()
    names = [x if isinstance(x, str) else getattr(x, "__name__", repr(x)) for x in (ensemble, solver)]
    delta = torch.tensor(measured, dtype=torch.float64) / n
    return PhaseTransition(delta, torch.tensor(rhos, dtype=torch.float64), success, n, trials, tolerance, seed, *names)


def _fractions(name: str, values: Sequence[float] | Tensor) -> tuple[float, ...]:
    accepted = f"{name} must be a non-empty sequence of numbers in (0, 1]"
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError, RuntimeError) as error:  # torch's of a row of several numbers is a RuntimeError
        raise TypeError(f"{accepted}, got {values!r}") from error
    if not numbers or not all(0 < number <= 1 for number in numbers):
        raise ValueError(f"{accepted}, got {numbers}")
    return numbers


def _drawn_matrix(ensemble: str | Callable[[int, int, int], Tensor], m: int, n: int, seed: int) -> Tensor:
    if isinstance(ensemble, str):
        A = measurement_matrix(ensemble, m, n, seed=seed, dtype=torch.float64, device="cpu")
        A = A.reshape(-1, m, n)[0]
    else:
        A = ensemble(m, n, seed)
        if tuple(A.shape) != (m, n):
            raise ValueError(f"ensemble must return a matrix of shape {(m, n)}, got {tuple(A.shape)}")
    lengths = torch.linalg.vector_norm(A.to(torch.float64), dim=0)
    return A.to(torch.float64) / lengths.masked_fill(lengths == 0, 1.0)


def _sparse_vectors(count: int, n: int, k: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    support = torch.rand(count, n, generator=generator, dtype=torch.float64).topk(k, dim=-1).indices
    values = torch.randn(count, k, generator=generator, dtype=torch.float64)
    return torch.zeros(count, n, dtype=torch.float64).scatter(1, support, values)


def donoho_tanner(delta: Tensor) -> Tensor:
    """rho(delta) below which l1 recovery of signed vectors from Gaussian measurements succeeds as n grows.

    The weak threshold of Donoho & Tanner in the form of Donoho, Maleki & Montanari 2009: the maximum over z >= 0 of
    (1 - 2 / delta h(z)) / (1 + z^2 - 2 h(z)), h(z) = (1 + z^2) Phi(-z) - z phi(z).

    Args:
        delta: (...), each in (0, 1].

    Returns:
        (...) in float64, to about 1e-5.
    """
    if not isinstance(delta, Tensor):
        raise TypeError(f"delta must be a Tensor, got {type(delta).__name__}")
    if not bool(((delta > 0) & (delta <= 1)).all()):
        raise ValueError(f"delta must lie in (0, 1], got {delta.tolist()}")
    z = torch.linspace(5e-4, 10, 20000, dtype=torch.float64)  # at 0 it is 0 / 0 for delta = 1
    tail = torch.special.ndtr(-z)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    h = (1 + z.square()) * tail - z * density
    return ((1 - 2 / delta.to(torch.float64).unsqueeze(-1) * h) / (1 + z.square() - 2 * h)).amax(-1).clamp(0, 1)


def plot_phase_transition(result: PhaseTransition, path: str | PathLike[str]) -> None:
    """Writes the success rates as a picture (format by the path's ending), with the Donoho-Tanner curve over them.

    Needs matplotlib. The colour map (cividis) reads the same with and without colour vision deficiency, and in grey.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 4.2), layout="constrained")
    axes = figure.add_subplot()
    delta, order = result.delta.sort()
    rho, across = result.rho.sort()
    success = result.success[order][:, across]
    mesh = axes.pcolormesh(
        delta.numpy(), rho.numpy(), success.T.numpy(), cmap="cividis", vmin=0, vmax=1, shading="nearest"
    )
    figure.colorbar(mesh, ax=axes, label=f"fraction recovered of {result.trials}")
    grid = torch.linspace(0.01, 1, 200, dtype=torch.float64)
    axes.plot(
        grid.numpy(),
        donoho_tanner(grid).numpy(),
        color="white",
        linestyle="--",
        label=r"$\ell_1$, Gaussian, $n \to \infty$",
    )
    axes.set(xlabel=r"$\delta = m / n$", ylabel=r"$\rho = k / m$", xlim=(0, 1), ylim=(0, 1))
    axes.set_title(f"{result.ensemble}, {result.solver}, n = {result.n}")
    axes.legend(loc="upper left", facecolor="black", labelcolor="white")
    figure.savefig(path, dpi=150)


def token_attributions(attention: Tensor, phi_v: Tensor) -> Tensor:
    """What every token contributed to an output: attention over measurements, carried back through Phi_V.

    attribution_is = sum_j A_ij (Phi_V)_js, so that attribution @ V is Z (without feature sensing and decoder). For a
    row-stochastic Phi_V it is >= 0 and its rows sum to 1; a signed Phi_V gives signed attributions.

    Args:
        attention: (..., Nq, M), rows of attention weights.
        phi_v: (M, N) or anything that broadcasts with attention's leading axes, (1 or B, 1 or H, M, N).

    Returns:
        (..., Nq, N) in attention's dtype.
    """
    for name, tensor in (("attention", attention), ("phi_v", phi_v)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating Tensor, got {getattr(tensor, 'dtype', type(tensor))}")
        if tensor.ndim < 2:
            raise ValueError(f"{name} must have at least two axes, got shape {tuple(tensor.shape)}")
    if attention.shape[-1] != phi_v.shape[-2]:
        raise ValueError(
            f"attention (..., Nq, M) and phi_v (..., M, N) must agree in M, "
            f"got {tuple(attention.shape)} and {tuple(phi_v.shape)}"
        )
    return attention @ phi_v.to(attention.dtype)


def csat_attribution(
    query: Tensor,
    key: Tensor,
    phi_k: Phi,
    phi_v: Phi | None = None,
    *,
    rows: Sequence[int] | Tensor | None = None,
    scale: float | None = None,
    score_bias: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Token attributions of CSAT for chosen query rows, from q and k: the other rows are never computed.

    Args:
        query: (B, H, Nq, D); key: (B, Hk, N, D), Hk divides H.
        phi_k, phi_v, scale, score_bias, key_mask: as in ``csat_attention``, the same renormalisation included. An
            ``ImplicitMeasurement`` is taken by its matrix.
        rows: indices of the queries asked for, in 0..Nq-1; all of them if None.

    Returns:
        (B, H, len(rows), N), dtype of the query: times V (its heads repeated to H) it is ``csat_attention`` without
        decoder.
        A masked token has attribution 0; with every token masked all are 0.
    """
    for name, tensor in (("query", query), ("key", key)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating Tensor, got {getattr(tensor, 'dtype', type(tensor))}")
        if tensor.ndim != 4:
            raise ValueError(f"{name} must have four axes (B, heads, tokens, D), got shape {tuple(tensor.shape)}")
    heads, queries = query.shape[1:3]
    if key.shape[1] == 0 or heads % key.shape[1] or key.shape[0] != query.shape[0] or key.shape[3] != query.shape[3]:
        raise ValueError(
            f"key must be (B, Hk, N, D) with query's B and D and Hk dividing H, "
            f"got key {tuple(key.shape)} for query {tuple(query.shape)}"
        )
    sizes = (query.shape[0], heads, key.shape[2])
    if key_mask is not None and (key_mask.dtype != torch.bool or tuple(key_mask.shape) != sizes[::2]):
        raise ValueError(f"key_mask must be bool of shape {sizes[::2]}, got {key_mask.dtype} {tuple(key_mask.shape)}")
    if rows is not None:
        index = torch.as_tensor(rows, dtype=torch.int64, device=query.device)
        if index.ndim != 1 or bool(((index < 0) | (index >= queries)).any()):
            raise ValueError(f"rows must be a list of indices in 0..{queries - 1}, got {rows}")
        query = query[:, :, index]
    read = phi_k.key_mask if key_mask is None and isinstance(phi_k, ImplicitMeasurement) else key_mask
    rows_k, empty = _masked_rows("phi_k", phi_k, key_mask, key.dtype, *sizes)
    rows_v = rows_k if phi_v is None else _masked_rows("phi_v", phi_v, key_mask, key.dtype, *sizes)[0]
    if empty is not None:
        beta = torch.zeros((), dtype=rows_k.dtype, device=key.device) if score_bias is None else score_bias
        score_bias = torch.where(empty.repeat_interleave(heads // empty.shape[1], dim=1), -math.inf, beta)
    measured_key = project(key, rows_k, read)
    weights = torch.eye(rows_k.shape[2], dtype=query.dtype, device=query.device)[None, None]
    attention, _ = attend(query, measured_key, weights, score_bias, query.shape[-1] ** -0.5 if scale is None else scale)
    return token_attributions(attention, rows_v.repeat_interleave(heads // rows_v.shape[1], dim=1))


def _masked_rows(
    name: str, phi: Phi, key_mask: Tensor | None, dtype: torch.dtype, batch: int, heads: int, tokens: int
) -> tuple[Tensor, Tensor | None]:
    """phi as (1 or B, heads that divide H, M, N), renormalised for a key mask, and which rows that leaves empty."""
    if isinstance(phi, ImplicitMeasurement):
        if key_mask is not None and phi.key_mask is not None:
            raise ValueError(f"{name} was made for a key mask; accepted beside key_mask: one made without")
        made = (phi if key_mask is None else phi.masked(key_mask)).dense(torch.promote_types(dtype, torch.float32))
        empty = None if key_mask is None or made.score_bias is None else made.score_bias == -math.inf
        return _four_axes(name, made.phi, batch, heads, tokens), empty
    four = _four_axes(name, phi, batch, heads, tokens)
    if key_mask is None:
        return four, None
    factor, empty = renormalise_rows(four, key_mask)
    return torch.where(key_mask[:, None, None, :], four, 0.0) * factor[..., None], empty


def _four_axes(name: str, phi: Tensor, batch: int, heads: int, tokens: int) -> Tensor:
    """phi as (1 or B, heads that divide H, M, N)."""
    if not isinstance(phi, Tensor) or not phi.is_floating_point():
        raise TypeError(f"{name} must be a floating Tensor, got {getattr(phi, 'dtype', type(phi))}")
    four = phi.reshape((1,) * (4 - phi.ndim) + phi.shape) if 2 <= phi.ndim <= 4 else None
    if four is None or four.shape[3] != tokens or four.shape[0] not in (1, batch) or heads % max(four.shape[1], 1):
        raise ValueError(
            f"{name} must be (M, N), (heads, M, N) or (1 or B, heads, M, N) with N = {tokens}, B = {batch} "
            f"and heads a divisor of {heads}, got shape {tuple(phi.shape)}"
        )
    return four
