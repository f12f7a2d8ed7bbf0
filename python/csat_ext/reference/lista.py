"""Parametrisations of the learned sparse decoder: each returns the weights that the operator takes.

A layer of the operator's decoder is

    u_t = a_t + step_t ((S_t - I) a_t + B_t z),    a_{t+1} = soft(u_t, theta_t),    a_0 = 0,    c = psi a_T.

Every function here starts from a sensing matrix ``A`` = F Psi and returns :class:`DecoderWeights` in the shapes of
``torch.ops.csat.decode``. They are plain differentiable torch, so that learned parameters may be passed in.

| parametrisation | learned | S | B | source |
|---|---|---|---|---|
| ISTA | nothing | I - A^T A / L | A^T / L | Daubechies, Defrise & De Mol 2004 |
| LISTA tied, untied | S, B, theta | free | free | Gregor & LeCun 2010 |
| coupled | W, theta, step | I - W^T A | W^T | Chen, Liu, Wang & Yin 2018 (LISTA-CP), tied: Liu et al. 2019 (TiLISTA) |
| ALISTA | theta, step | I - W^T A, W analytic | W^T | Liu, Chen, Wang & Yin 2019 |

With L = ||A||_2^2 and theta = lam / L every one of them can be set exactly to ISTA, where training starts (ALISTA: with
W = A and step 1 / L).
The identity decoder is ``ista_weights(psi, lam=0.0, iterations=T, psi=psi)`` with an orthonormal psi: S = 0,
B = psi^T, c = psi psi^T z = z.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from csat_ext.reference.attention import has_values


class DecoderWeights(NamedTuple):
    """What ``torch.ops.csat.decode`` takes. Hd is 1 or the number of heads; Ts is 1 (tied) or T."""

    S: Tensor  # (Hd, Ts, P, P)
    B: Tensor  # (Hd, Ts, P, R)
    theta: Tensor  # (Hd, T, P), >= 0
    psi: Tensor  # (Hd, Dv, P)
    step: Tensor  # (Hd, T)

    def first_layers(self, depth: int) -> DecoderWeights:
        """The decoder cut after its first ``depth`` layers, 1 <= depth <= T."""
        layers = self.theta.shape[1]
        if not 1 <= depth <= layers:
            raise ValueError(f"depth must be in 1..{layers}, got {depth}")
        S = self.S if self.S.shape[1] == 1 else self.S[:, :depth]
        B = self.B if self.B.shape[1] == 1 else self.B[:, :depth]
        return DecoderWeights(S, B, self.theta[:, :depth], self.psi, self.step[:, :depth])


def with_heads(name: str, matrix: Tensor) -> Tensor:
    """A floating matrix (rows, P) or (Hd, rows, P) as (Hd, rows, P)."""
    if not isinstance(matrix, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(matrix).__name__}")
    if not matrix.is_floating_point():
        raise TypeError(f"{name} must have a floating dtype, got {matrix.dtype}")
    if matrix.ndim not in (2, 3) or 0 in matrix.shape:
        raise ValueError(f"{name} must be a non-empty (rows, P) or (heads, rows, P), got shape {tuple(matrix.shape)}")
    return matrix if matrix.ndim == 3 else matrix.unsqueeze(0)


def lipschitz_constant(A: Tensor) -> Tensor:
    """L = ||A||_2^2, the Lipschitz constant of the gradient of 1/2 ||A a - z||^2. A (..., R, P) -> (...)."""
    return torch.linalg.matrix_norm(A, ord=2).square()


def _dictionary(psi: Tensor | None, A: Tensor) -> Tensor:
    """psi with a head axis; absent, the coefficients themselves are the output (psi = I)."""
    heads, _, atoms = A.shape
    if psi is None:
        return torch.eye(atoms, dtype=A.dtype, device=A.device).expand(heads, atoms, atoms)
    psi = with_heads("psi", psi)
    if psi.shape[-1] != atoms:
        raise ValueError(f"psi must have P = {atoms} columns like A, got shape {tuple(psi.shape)}")
    if psi.shape[0] not in (1, heads):
        raise ValueError(f"psi must have 1 or {heads} heads like A, got shape {tuple(psi.shape)}")
    if psi.dtype != A.dtype or psi.device != A.device:
        raise TypeError(f"psi must be {A.dtype} on {A.device} like A, got {psi.dtype} on {psi.device}")
    return psi.expand(heads, -1, -1)


def _positive_layers(iterations: int) -> int:
    if isinstance(iterations, bool) or not isinstance(iterations, int):
        raise TypeError(f"iterations must be an int, got {type(iterations).__name__}")
    if iterations < 1:
        raise ValueError(f"iterations must be >= 1, got {iterations}")
    return iterations


def ista_weights(A: Tensor, lam: float, iterations: int, psi: Tensor | None = None) -> DecoderWeights:
    """ISTA for min 1/2 ||A a - z||^2 + lam ||a||_1, unrolled: S = I - A^T A / L, B = A^T / L, theta = lam / L.

    Daubechies, Defrise & De Mol 2004, with the step 1/L, L = ||A||_2^2.

    Args:
        A: (R, P) or (Hd, R, P), the sensing matrix F Psi, not zero.
        lam: weight of the l1 norm, >= 0.
        iterations: T >= 1 layers.
        psi: (Dv, P) or (Hd, Dv, P) dictionary of the output; the identity if absent.

    Returns:
        Tied weights (Ts = 1) in A's dtype.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    return coupled_weights(*coupled_start(A, lam, iterations), psi=psi)


def lista_untied(A: Tensor, lam: float, iterations: int, psi: Tensor | None = None) -> DecoderWeights:
    """LISTA (Gregor & LeCun 2010) with an S and B of its own in every layer, at its start: exactly ISTA.

    Arguments as :func:`ista_weights`, which is the tied form; here S is (Hd, T, P, P) and B (Hd, T, P, R), each layer
    a copy.
    """
    tied = ista_weights(A, lam, iterations, psi)
    return tied._replace(S=tied.S.repeat(1, iterations, 1, 1), B=tied.B.repeat(1, iterations, 1, 1))


def coupled_start(A: Tensor, lam: float, iterations: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(W, A, theta, step) that make :func:`coupled_weights` exactly ISTA: W = A / L, theta = lam / L, step = 1.

    Shapes: W and A (Hd, R, P), theta (Hd, T, P), step (Hd, T).
    """
    A = with_heads("A", A)
    layers = _positive_layers(iterations)
    if not lam >= 0.0:
        raise ValueError(f"lam must be >= 0, got {lam}")
    if has_values(A) and not bool(A.isfinite().all() and A.any(-1).any(-1).all()):
        raise ValueError("A must be finite and not zero in any head")
    L = lipschitz_constant(A)
    heads, _, atoms = A.shape
    theta = (lam / L)[:, None, None].expand(heads, layers, atoms).clone()
    return A / L[:, None, None], A, theta, torch.ones(heads, layers, dtype=A.dtype, device=A.device)


def coupled_weights(W: Tensor, A: Tensor, theta: Tensor, step: Tensor, psi: Tensor | None = None) -> DecoderWeights:
    """The coupled form S = I - W^T A, B = W^T: with the step, S_t = I - step_t W^T A and B_t = step_t W^T.

    Chen, Liu, Wang & Yin 2018, theorem 1: weights of a LISTA that converges must couple like this as t grows.

    Args:
        W: (R, P), (Hd, R, P) or, one per layer, (Hd, T, R, P).
        A: (R, P) or (Hd, R, P), the sensing matrix.
        theta: (T, P) or (Hd, T, P), >= 0.
        step: (T,) or (Hd, T).
        psi: as in :func:`ista_weights`.

    Returns:
        Weights in A's dtype; Ts = T if W has a layer axis, else 1. Hd is the largest of the heads given.
    """
    A = with_heads("A", A)
    tied = W if W.ndim == 4 else with_heads("W", W).unsqueeze(1)
    theta = theta if theta.ndim == 3 else theta.unsqueeze(0)
    step = step if step.ndim == 2 else step.unsqueeze(0)
    heads, layers = max(x.shape[0] for x in (A, tied, theta, step)), theta.shape[-2]
    _, rows, atoms = A.shape
    expected = {"W": (tied, (rows, atoms)), "theta": (theta, (layers, atoms)), "step": (step, (layers,))}
    for name, (tensor, tail) in {"A": (A, (rows, atoms)), **expected}.items():
        if tuple(tensor.shape[-len(tail) :]) != tail or tensor.shape[0] not in (1, heads):
            raise ValueError(f"{name} must end in {tail} with 1 or {heads} heads, got shape {tuple(tensor.shape)}")
        if tensor.dtype != A.dtype or tensor.device != A.device:
            raise TypeError(f"{name} must be {A.dtype} on {A.device} like A, got {tensor.dtype} on {tensor.device}")
    if tied.shape[1] not in (1, layers):
        raise ValueError(f"W must have 1 or T = {layers} layers, got shape {tuple(W.shape)}")
    A = A.expand(heads, -1, -1)
    B = tied.mT.expand(heads, -1, -1, -1)
    S = torch.eye(atoms, dtype=A.dtype, device=A.device) - B @ A.unsqueeze(1)
    return DecoderWeights(S, B, theta.expand(heads, -1, -1), _dictionary(psi, A), step.expand(heads, -1))


def analytic_weight(A: Tensor) -> Tensor:
    """W of least generalised coherence: min ||W^T A||_F^2 subject to w_i . a_i = 1 for every column i.

    The first stage of ALISTA (Liu, Chen, Wang & Yin 2019, section 3). The columns separate, min w_i^T (A A^T) w_i
    subject to w_i . a_i = 1, so that the minimiser is closed: w_i = G^+ a_i / (a_i^T G^+ a_i) with G = A A^T (the
    pseudo-inverse, for an A of any rank).

    Args:
        A: (R, P) or (Hd, R, P) without a zero column.

    Returns:
        W in A's shape and dtype. For a tight frame of unit columns W = A: then ALISTA with step 1/L is ISTA.
    """
    with_heads("A", A)
    if has_values(A) and bool((A.square().sum(-2) == 0).any()):
        raise ValueError("A must not have a zero column: w_i . a_i = 1 has no solution there")
    whitened = torch.linalg.pinv(A @ A.mT, hermitian=True) @ A
    return whitened / (A * whitened).sum(-2, keepdim=True)


def alista_weights(
    A: Tensor, theta: Tensor, step: Tensor, W: Tensor | None = None, psi: Tensor | None = None
) -> DecoderWeights:
    """ALISTA: the coupled form with W computed, not learned; thresholds and steps are left (Liu et al. 2019).

    Arguments as :func:`coupled_weights`, ``W`` being :func:`analytic_weight` unless given. With W = A and step = 1/L it
    is ISTA.
    """
    return coupled_weights(analytic_weight(A) if W is None else W, A, theta, step, psi)
