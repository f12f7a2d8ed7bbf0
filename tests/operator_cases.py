"""Random inputs of `csat_attention` at one shape, as leaves that gradients are asked of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from csat_ext import LinearDecoder, SparseDecoder, _composite, reference


@dataclass(frozen=True)
class Case:
    """Sizes of one call. ``phi_heads`` 0 means no head axis; ``decoder`` is none, sparse, untied or linear."""

    batch: int = 2
    heads: int = 4
    kv_heads: int = 4
    queries: int = 63
    tokens: int = 65
    m: int = 9
    d: int = 16
    dv: int = 24
    phi_heads: int = 4
    phi_batch: int = 0
    rank: int = 0
    decoder: str = "none"
    atoms: int = 33
    layers: int = 3
    decoder_heads: int = 0
    bias: bool = False
    mask: bool = False
    signed: bool = False
    separate_phi_v: bool = False

    def __str__(self) -> str:
        default = Case()
        return ",".join(f"{k}={v}" for k, v in self.__dict__.items() if v != getattr(default, k)) or "default"


@dataclass
class Inputs:
    """Leaves by name, the key mask, and the call that uses them."""

    case: Case
    leaves: dict[str, Tensor]
    key_mask: Tensor | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def as_dtype(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Inputs:
        """The same values in another dtype: tokens in it, parameters too (float32 at least where the dtype is 16 bits
        wide)."""
        wide = dtype if dtype in (torch.float32, torch.float64) else torch.float32
        leaves = {
            name: t.detach().to(device, dtype if name in ("query", "key", "value") else wide).clone().requires_grad_()
            for name, t in self.leaves.items()
        }
        return Inputs(self.case, leaves, None if self.key_mask is None else self.key_mask.to(device))

    def rounded_to(self, dtype: torch.dtype) -> Inputs:
        """Values that ``dtype`` holds exactly, so that only arithmetic differs between the oracle and a kernel."""
        return self.as_dtype(dtype).as_dtype(torch.float64)

    def with_settled_thresholds(self) -> Inputs:
        """Thresholds of 0 or 100, so that every atom is surely on or surely off.

        The derivative of a soft threshold jumps at |u| = theta: at random thresholds a 16-bit rounding of z moves some
        coefficients across, in plain torch as in a kernel, and the error of a gradient is the luck of which.
        """
        if "theta" in self.leaves:
            atom = torch.arange(self.leaves["theta"].shape[-1])
            self.leaves["theta"] = (
                torch.where(atom % 3 == 0, 100.0, 0.0).expand_as(self.leaves["theta"]).double().clone()
            )
        return self

    def decoder(self) -> Any:
        get = self.leaves.get
        if self.case.decoder == "none":
            return None
        if self.case.decoder == "linear":
            return LinearDecoder(self.leaves["weight"])
        return SparseDecoder(self.leaves["S"], self.leaves["B"], self.leaves["theta"], self.leaves["psi"], get("step"))

    def call(self, attention: Any) -> Tensor:
        get = self.leaves.get
        return attention(
            self.leaves["query"],
            self.leaves["key"],
            self.leaves["value"],
            self.leaves["phi_k"],
            get("phi_v"),
            decoder=self.decoder(),
            feature_sensing=get("feature_sensing"),
            score_bias=get("score_bias"),
            key_mask=self.key_mask,
        )

    def gradients(self, attention: Any, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        out = self.call(attention)
        grads = torch.autograd.grad(
            out, list(self.leaves.values()), weight.to(out.device, out.dtype), allow_unused=True
        )
        return out, {
            n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(self.leaves.items(), grads, strict=True)
        }


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Inputs in float64. Thresholds are small against the coefficients, so that about a third of them are zeroed."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    c = case
    phi_shape = ((c.phi_batch,) if c.phi_batch else ()) + ((c.phi_heads,) if c.phi_heads else ()) + (c.m, c.tokens)
    leaves = {
        "query": normal(c.batch, c.heads, c.queries, c.d),
        "key": normal(c.batch, c.kv_heads, c.tokens, c.d),
        "value": normal(c.batch, c.kv_heads, c.tokens, c.dv),
        "phi_k": _phi(normal(*phi_shape), c),
    }
    if c.separate_phi_v:
        leaves["phi_v"] = _phi(normal(*phi_shape), c)
    if c.rank:
        leaves["feature_sensing"] = normal(c.rank, c.dv) / c.dv**0.5
    if c.bias:
        leaves["score_bias"] = normal(c.heads, c.m)
    leaves |= _decoder_leaves(c, normal)
    mask = None
    if c.mask:
        mask = torch.rand(c.batch, c.tokens, generator=g) < 0.7
        mask[:, 0] = True
    return Inputs(c, leaves, mask)


def _phi(raw: Tensor, case: Case) -> Tensor:
    return raw / case.tokens**0.5 if case.signed else torch.softmax(raw, -1)


def _decoder_leaves(c: Case, normal: Any) -> dict[str, Tensor]:
    rank = c.rank or c.dv
    head = (c.decoder_heads,) if c.decoder_heads else ()
    if c.decoder == "linear":
        return {"weight": normal(*head, rank, c.dv) / rank**0.5}
    if c.decoder not in ("sparse", "untied"):
        return {}
    depth = c.layers if c.decoder == "untied" else 1
    return {
        "S": 0.3 * normal(*head, depth, c.atoms, c.atoms) / c.atoms**0.5,
        "B": normal(*head, depth, c.atoms, rank) / rank**0.5,
        "theta": 0.05 * normal(*head, c.layers, c.atoms).abs(),
        "psi": normal(*head, c.dv, c.atoms) / c.atoms**0.5,
        "step": 1 + 0.2 * normal(*head, c.layers),
    }


def plain_torch_attention(
    query: Tensor, key: Tensor, value: Tensor, phi_k: Tensor, phi_v: Tensor | None = None, *, decoder: Any = None,
    feature_sensing: Tensor | None = None, score_bias: Tensor | None = None, key_mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What a user would write: the same formulas in stock torch operations, every one rounded to the dtype of the
    query."""
    dtype, heads = query.dtype, query.shape[1]

    def measured(x: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
        phi = phi.reshape((1,) * (4 - phi.dim()) + phi.shape)
        factor, empty = torch.ones(1, 1, 1), torch.zeros(1, 1, 1, dtype=torch.bool)
        if key_mask is not None:
            factor, empty = reference.renormalise_rows(phi, key_mask)
            x = x.masked_fill(~key_mask[:, None, :, None], 0)
        rows = (phi.to(dtype).repeat_interleave(max(1, x.shape[1] // phi.shape[1]), 1) @ grouped(x, phi.shape[1])).to(
            dtype
        )
        return rows * factor.to(dtype).unsqueeze(-1), empty

    def grouped(x: Tensor, count: int) -> Tensor:
        return x if x.shape[1] >= count else x.repeat_interleave(count // x.shape[1], 1)

    kc, empty = measured(key, phi_k)
    vc, _ = measured(value, phi_k if phi_v is None else phi_v)
    if feature_sensing is not None:
        vc = vc @ feature_sensing.to(dtype).mT
    scores = query @ grouped(kc, heads).mT * query.shape[-1] ** -0.5
    if score_bias is not None:
        scores = scores + score_bias.to(dtype)[:, None]
    scores = scores.masked_fill(empty.repeat_interleave(heads // empty.shape[1], 1)[:, :, None], float("-inf"))
    z = torch.softmax(scores, -1) @ grouped(vc, heads)
    if decoder is None:
        return z
    if isinstance(decoder, LinearDecoder):
        return z @ decoder.weight.to(dtype)
    return plain_torch_decode(z, *(t.to(dtype) for t in decoder.with_head_axis()))


def plain_torch_decode(z: Tensor, s: Tensor, b: Tensor, theta: Tensor, psi: Tensor, step: Tensor) -> Tensor:
    """The decoder in stock torch operations, weights with a head axis, every operation rounded to the dtype of z."""
    a = z.new_zeros(*z.shape[:-1], theta.shape[-1])
    for t in range(theta.shape[1]):
        s_t, b_t = s[:, t % s.shape[1]], b[:, t % b.shape[1]]
        u = a + step[:, t, None, None] * (a @ s_t.mT - a + z @ b_t.mT)
        a = torch.sign(u) * torch.relu(u.abs() - theta[:, t, None])
    return a @ psi.mT


def settled_decoder(weights: Sequence[Tensor], dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, ...]:
    """(S, B, theta, psi, step), values of `dtype` in float32: for every positive z each coefficient is far from its
    threshold, every third one off, the others of the sign of their atom by a wide margin. A rounding then moves none
    across, where the gradient jumps."""
    S, B, theta, psi, step = (t.to(dtype) for t in weights)
    atom = torch.arange(theta.shape[-1])
    sign = torch.where(torch.rand(atom.shape, generator=generator) < 0.5, -1, 1).to(dtype)
    S, B = 3 * sign[:, None] * sign * S.abs() / S.shape[-1] ** 0.5, sign[:, None] * B.abs()
    theta = torch.where(atom % 3 == 2, math.inf, theta)
    return tuple(t.float() for t in (S, B, theta, psi, step))


def settled_decode(z: Tensor, weights: Sequence[Tensor], generator: torch.Generator) -> tuple[Tensor, ...]:
    """Arguments of decode_backward in the dtype of z: a cotangent, a positive z and a settled decoder.

    The cotangent is half the output, so that the gradient of a step, a sum over everything, does not cancel.
    """
    z, weights = z.abs() + 0.5, settled_decoder(weights, z.dtype, generator)
    out = _composite.decode(z.double(), *(t.double() for t in weights))
    size = float(out.square().mean().sqrt()) if out.numel() else 1.0
    dc = 0.02 * (out / size + torch.randn(out.shape, generator=generator))  # float16 holds every sum
    return dc.to(z.dtype), z, *weights


def plain_torch_decode_backward(dc: Tensor, z: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """The gradients of `plain_torch_decode`, all in the dtype of z."""
    leaves = [t.to(z.dtype).detach().requires_grad_() for t in (z, *weights)]
    return torch.autograd.grad(plain_torch_decode(*leaves), leaves, dc)


def plain_torch_attend_prefix(
    q: Tensor, k: Tensor, v: Tensor, phi: Tensor, kc: Tensor, vc: Tensor, mass: Tensor, bias: Tensor | None,
    mask: Tensor | None, scale: float, signed: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """z, lse and the state behind, every state of every token in memory."""
    heads, of_state = q.shape[1], kc.shape[1]
    phi = phi.expand(q.shape[0], -1, -1, -1)
    if mask is not None:
        k, v, phi = (torch.where(mask[:, None, :, None], x, torch.zeros_like(x)) for x in (k, v, phi))
    k, v, phi = (x.repeat_interleave(of_state // x.shape[1], 1) for x in (k, v, phi))
    kcs, vcs = (c.unsqueeze(2) + (phi[..., None] * x[..., None, :]).cumsum(2) for c, x in ((kc, k), (vc, v)))
    counted = torch.ones(q.shape[0], 1, q.shape[2], 1, dtype=q.dtype) if mask is None else mask[:, None, :, None]
    masses = mass.unsqueeze(2) + (counted.to(q.dtype) if signed else phi).cumsum(2)
    ends = kcs[:, :, -1], vcs[:, :, -1], masses[:, :, -1]
    kcs, vcs = (x.repeat_interleave(heads // of_state, 1) for x in (kcs, vcs))
    g = masses if signed else masses.repeat_interleave(heads // of_state, 1)
    filled = g > 0
    g = torch.where(filled, g, torch.ones_like(g))
    scores = scale * torch.einsum("bhtd,bhtjd->bhtj", q, kcs)
    scores = scores / g.sqrt() if signed else scores / g + g.log()
    scores = scores if bias is None else scores + bias.unsqueeze(2)
    scores = scores.masked_fill(~filled, -torch.inf)
    empty = scores.isneginf().all(-1, keepdim=True)
    p = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    return torch.einsum("bhtj,bhtjd->bhtd", p / (g.sqrt() if signed else g), vcs), scores.logsumexp(-1), *ends


def plain_torch_attend_prefix_backward(dz: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """What attend_prefix_backward returns, all in the dtype of dz, by autograd."""
    of_ends, (*data, bias, mask, _, scale, signed) = arguments[:3], arguments[3:]
    q, k, v, phi, kc, vc, mass = (x.to(dz.dtype) for x in data)
    leaves = [q, k, v, phi.expand(q.shape[0], kc.shape[1], -1, -1), kc, vc, mass]
    if bias is not None:
        leaves.append(bias.to(dz.dtype).expand(*q.shape[:2], -1))
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    given = [dz, *(x.to(dz.dtype) for x in of_ends)]
    results = plain_torch_attend_prefix(*leaves[:7], leaves[7] if bias is not None else None, mask, scale, signed)
    outputs = [results[0], *results[2:]]
    wanted = [x for i, x in enumerate(leaves) if i != 6 or not signed]
    pairs = [(o, g) for o, g in zip(outputs, given, strict=True) if o.requires_grad]
    found = list(torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs]))
    if signed:
        found.insert(6, dz.new_empty(0))
    return *found, *(() if bias is not None else (dz.new_empty(0),))
