"""Classical sparse recovery, batched, in plain torch: what a learned decoder is compared with.

Every row is a problem of its own: given z = A a + noise with A (R, P), find a sparse a (P). Conventions of all solvers:

- ``z`` (..., R), ``A`` (R, P), both float32 or both float64, on one device; the result's ``coefficients`` are (..., P)
  in that dtype.
- ``tolerance`` stops early, ``iterations`` / ``sparsity`` bound the work; the result says how many were used.
- Rows never influence one another, except that all rows run until the last one has met the tolerance.
- Bad input raises TypeError or ValueError naming the argument.

| solver | solves | source |
|---|---|---|
| :func:`ista` | min 1/2 |A a - z|^2 + lam |a|_1 | Daubechies, Defrise & De Mol 2004 |
| :func:`fista` | the same, rate 1/t^2 | Beck & Teboulle 2009; restart: O'Donoghue & Candes 2015 |
| :func:`omp` | greedy, at most k nonzeros | Pati, Rezaiifar & Krishnaprasad 1993; Tropp & Gilbert 2007 |
| :func:`basis_pursuit` | min |a|_1 s.t. |A a - z|_2 <= noise | Chen, Donoho & Saunders 1998; ADMM of Boyd et al. 2011 |
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from csat_ext.reference.attention import soft_threshold


@dataclass(frozen=True)
class Recovery:
    """What a solver returns: coefficients (..., P), iterations used, residual norms |A a - z|_2 (...)."""

    coefficients: Tensor
    iterations: int
    residual: Tensor


@dataclass(frozen=True)
class SolverDecoder:
    """A classical solver in the decoder's place: c = Psi a with a = solver(z, F Psi), for every row of Z.

    Args:
        solver: z (..., R), A (R, P) -> `Recovery`, its other arguments bound, such as
            ``functools.partial(fista, lam=0.01, iterations=50, tolerance=1e-6)`` or ``partial(omp, sparsity=4)``.
        psi: (Dv, P), the dictionary.
        feature_sensing: F (R, Dv), as given to `csat_attention`; None is F = I.
    """

    solver: Callable[[Tensor, Tensor], Recovery]
    psi: Tensor
    feature_sensing: Tensor | None = None

    def __call__(self, z: Tensor) -> Tensor:
        sensing = self.psi if self.feature_sensing is None else self.feature_sensing @ self.psi
        return self.solver(z, sensing).coefficients @ self.psi.mT


def _problem(z: Tensor, A: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Checks z against A; returns z as rows (rows, R) and its leading shape."""
    for name, tensor in (("z", z), ("A", A)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} must be float32 or float64, got {tensor.dtype}")
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} must be finite")
    if A.ndim != 2 or 0 in A.shape:
        raise ValueError(f"A must be a non-empty (R, P) matrix, got shape {tuple(A.shape)}")
    if z.ndim < 1 or z.shape[-1] != A.shape[0]:
        raise ValueError(f"z must have shape (..., R) with R = {A.shape[0]} like A, got {tuple(z.shape)}")
    if z.dtype != A.dtype or z.device != A.device:
        raise TypeError(f"z must be {A.dtype} on {A.device} like A, got {z.dtype} on {z.device}")
    return z.reshape(-1, A.shape[0]), tuple(z.shape[:-1])


def _count(name: str, value: int, most: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not 1 <= value <= most:
        raise ValueError(f"{name} must be in 1..{most}, got {value}")


def _non_negative(name: str, value: float | None) -> None:
    if value is not None and not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and >= 0, got {value}")


def _recovery(rows: Tensor, used: int, z: Tensor, A: Tensor, lead: tuple[int, ...]) -> Recovery:
    residual = torch.linalg.vector_norm(rows @ A.mT - z, dim=-1)
    return Recovery(rows.reshape(*lead, A.shape[1]), used, residual.reshape(lead))


def _settled(new: Tensor, old: Tensor, tolerance: float | None) -> bool:
    """Every row has moved by at most ``tolerance`` relative to its norm (a row that is zero twice has settled)."""
    if tolerance is None:
        return False
    moved = torch.linalg.vector_norm(new - old, dim=-1)
    return bool((moved <= tolerance * torch.linalg.vector_norm(new, dim=-1)).all())


def _inverse_lipschitz(A: Tensor) -> float:
    if not bool(A.any()):
        raise ValueError("A must not be zero")
    return 1.0 / float(torch.linalg.matrix_norm(A, ord=2)) ** 2


def ista(z: Tensor, A: Tensor, lam: float, iterations: int, tolerance: float | None = None) -> Recovery:
    """a <- soft(a - A^T (A a - z) / L, lam / L) from a = 0, L = |A|_2^2, for min 1/2 |A a - z|^2 + lam |a|_1.

    Args:
        z: (..., R) measurements, one problem a row.
        A: (R, P), not zero.
        lam: weight of the l1 norm, >= 0.
        iterations: at most this many, >= 1.
        tolerance: stop when no row moves by more than this times its norm; None runs all iterations.
    """
    rows, lead = _problem(z, A)
    _count("iterations", iterations)
    _non_negative("lam", lam)
    _non_negative("tolerance", tolerance)
    step = _inverse_lipschitz(A)
    a, used = rows.new_zeros(rows.shape[0], A.shape[1]), 0
    while used < iterations:
        used += 1
        previous, a = a, soft_threshold(a - step * ((a @ A.mT - rows) @ A), lam * step)
        if _settled(a, previous, tolerance):
            break
    return _recovery(a, used, rows, A, lead)


def fista(
    z: Tensor, A: Tensor, lam: float, iterations: int, tolerance: float | None = None, restart: bool = False
) -> Recovery:
    """ISTA with momentum: its step is taken at y = a + (t' - 1) / t (a - a'), t = (1 + sqrt(1 + 4 t'^2)) / 2.

    Beck & Teboulle 2009, constant step size. With ``restart`` a row's momentum starts anew (t = 1) whenever it points
    against the step just taken, (y - a) . (a - a') > 0: the gradient scheme of O'Donoghue & Candes 2015, section 3.2.

    Other arguments as :func:`ista`.
    """
    rows, lead = _problem(z, A)
    _count("iterations", iterations)
    _non_negative("lam", lam)
    _non_negative("tolerance", tolerance)
    step = _inverse_lipschitz(A)
    a = rows.new_zeros(rows.shape[0], A.shape[1])
    y, t, used = a, rows.new_ones(rows.shape[0], 1), 0
    while used < iterations:
        used += 1
        previous, a = a, soft_threshold(y - step * ((y @ A.mT - rows) @ A), lam * step)
        if _settled(a, previous, tolerance):
            break
        if restart:
            against = ((y - a) * (a - previous)).sum(-1, keepdim=True) > 0
            t = torch.where(against, torch.ones_like(t), t)
        next_t = (1 + (1 + 4 * t.square()).sqrt()) / 2
        y, t = a + (t - 1) / next_t * (a - previous), next_t
    return _recovery(a, used, rows, A, lead)


def omp(z: Tensor, A: Tensor, sparsity: int, tolerance: float | None = None) -> Recovery:
    """Orthogonal matching pursuit: add the column most correlated with the residual, refit on the support, repeat.

    Tropp & Gilbert 2007, algorithm 3, batched over rows. A column's correlation is |a_i . r| / |a_i|; the refit is a
    least-squares solution by QR (no normal equations, so that the condition number is not squared).

    Args:
        z: (..., R).
        A: (R, P) without zero columns.
        sparsity: number of steps = most nonzeros of a row, 1 <= sparsity <= min(R, P).
        tolerance: a row whose residual norm is at most this times |z| is finished; None: at rounding, R eps. A row
            whose residual no column is correlated with (beyond rounding) is finished too.
    """
    rows, lead = _problem(z, A)
    _count("sparsity", sparsity, min(A.shape))
    _non_negative("tolerance", tolerance)
    lengths = torch.linalg.vector_norm(A, dim=0)
    if not bool((lengths > 0).all()):
        raise ValueError("A must not have a zero column")
    rounding = A.shape[0] * torch.finfo(A.dtype).eps
    sizes = torch.linalg.vector_norm(rows, dim=-1)
    a, residual = rows.new_zeros(rows.shape[0], A.shape[1]), rows
    support = torch.empty(rows.shape[0], 0, dtype=torch.int64, device=A.device)
    open_rows = torch.arange(rows.shape[0], device=A.device)
    used = 0
    for used in range(sparsity + 1):
        correlation = ((residual @ A) / lengths).abs().scatter(1, support, -1.0)
        size = sizes[open_rows]
        far = torch.linalg.vector_norm(residual, dim=-1) > size * max(tolerance or 0.0, rounding)
        unfinished = far & (correlation.amax(-1) > size * rounding)
        open_rows, support, correlation = open_rows[unfinished], support[unfinished], correlation[unfinished]
        if used == sparsity or open_rows.numel() == 0:
            break
        support = torch.cat([support, correlation.argmax(-1, keepdim=True)], dim=1)
        columns = A.mT[support].mT  # (open, R, used + 1)
        Q, triangle = torch.linalg.qr(columns)
        projected = Q.mT @ rows[open_rows].unsqueeze(-1)
        fit = torch.linalg.solve_triangular(triangle, projected, upper=True).squeeze(-1)
        a[open_rows] = a.new_zeros(len(open_rows), A.shape[1]).scatter(1, support, fit)
        residual = rows[open_rows] - (Q @ projected).squeeze(-1)
    return _recovery(a, used, rows, A, lead)


def basis_pursuit(
    z: Tensor,
    A: Tensor,
    noise: float = 0.0,
    iterations: int = 10_000,
    tolerance: float = 1e-6,
    penalty: float | None = None,
) -> Recovery:
    """min |a|_1 subject to |A a - z|_2 <= noise, by ADMM.

    Boyd, Parikh, Chu, Peleato & Eckstein 2011, section 6.2, scaled dual u. With noise = 0 the a-step projects
    x - u on {A a = z}; else (a, r) is projected on the graph {A a - r = z}, r being the copy of the residual that the
    second block projects on the ball. Stops, per their section 3.3, when the primal |a - x| and the dual |x - x'|
    residuals of every row are at most ``tolerance`` times the norm of its coefficients.

    Args:
        z: (..., R).
        A: (R, P), R <= P and of full row rank if noise = 0 (so that A a = z has solutions).
        noise: radius of the ball, >= 0, in the units of z.
        iterations: at most this many, >= 1.
        tolerance: relative, >= 0.
        penalty: the augmented Lagrangian's rho, > 0; by default 1 / mean |A^+ z| of a row, which makes the result scale
            with z. It changes the speed, not the solution.

    Returns:
        A :class:`Recovery` of the block x, which is exactly sparse.
    """
    rows, lead = _problem(z, A)
    _count("iterations", iterations)
    for name, value in (("noise", noise), ("tolerance", tolerance), ("penalty", penalty)):
        _non_negative(name, value)
    if penalty == 0:
        raise ValueError("penalty must be > 0, got 0")
    R, P = A.shape
    # Projection on {A a - r = z}: v - C^T (C C^T)^-1 (C v - z), C = [A, -I]; without noise C = A and there is no r.
    C = A if noise == 0 else torch.cat([A, -torch.eye(R, dtype=A.dtype, device=A.device)], dim=1)
    factor, info = torch.linalg.cholesky_ex(C @ C.mT)
    pivots = factor.diagonal().square()
    if int(info) != 0 or float(pivots.min()) <= R * torch.finfo(A.dtype).eps * float(pivots.max()):
        raise ValueError(f"A must have full row rank when noise = 0, got a singular A A^T for shape {(R, P)}")
    pull = torch.cholesky_solve(C, factor)  # (C C^T)^-1 C
    start = rows @ pull
    if penalty is None:
        mean = start[:, :P].abs().mean(-1, keepdim=True)
        shrink = torch.where(mean > 0, mean, torch.ones_like(mean))
    else:
        shrink = torch.full_like(start[:, :1], 1.0 / penalty)
    x, u, used = torch.zeros_like(start), torch.zeros_like(start), 0
    while used < iterations:
        used += 1
        v = x - u
        v = v - (v @ C.mT - rows) @ pull
        previous, w = x, v + u
        x = soft_threshold(w[:, :P], shrink)
        if noise > 0:
            ball = w[:, P:]
            length = torch.linalg.vector_norm(ball, dim=-1, keepdim=True).clamp_min(torch.finfo(A.dtype).tiny)
            x = torch.cat([x, ball * (noise / length).clamp(max=1.0)], dim=1)
        u = w - x
        scale = tolerance * torch.linalg.vector_norm(v, dim=-1)
        gap = torch.linalg.vector_norm(v - x, dim=-1)
        drift = torch.linalg.vector_norm(x - previous, dim=-1)
        if bool(((gap <= scale) & (drift <= scale)).all()):
            break
    return _recovery(x[:, :P], used, rows, A, lead)
