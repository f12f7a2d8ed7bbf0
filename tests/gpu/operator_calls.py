"""Calls of every csat operator, forward and backward, at sizes that reach each branch of the CUDA kernels,
sizes of zero included.

A call is the operator's name and its arguments as CPU tensors, values exactly representable in the dtype asked for;
`expected` is the operator in plain torch and float64, `plain` the same in the dtype of the call (a float32 phi beside
16-bit tokens is rounded to their dtype there: that is how a matrix product in the tokens' dtype takes it). In 16 bits
`decode_backward` gets a decoder far from its thresholds, and stock torch operations of that dtype as `plain`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from conftest import assert_accurate
from operator_cases import plain_torch_attend_prefix_backward, plain_torch_decode_backward, settled_decode
from torch import Tensor

from csat_ext import _composite
from csat_ext._library import _C
from csat_ext.info import FAMILIES

RESULTS = {
    "project": ("y",),
    "project_backward": ("dx", "dphi"),
    "renormalise_rows": ("factor", "mass"),
    "project_implicit": ("y",),
    "project_implicit_backward": ("dx",),
    "attend": ("z", "lse"),
    "attend_backward": ("dq", "dkc", "dvc", "dbias"),
    "attend_causal": ("z", "lse"),
    "attend_causal_backward": ("dq", "dkc", "dvc", "dk", "dv", "dbias"),
    "attend_prefix": ("z", "lse", "kc_end", "vc_end", "mass_end"),
    "attend_prefix_backward": ("dq", "dk", "dv", "dphi", "dkc", "dvc", "dmass", "dbias"),
    "decode": ("c",),
    "decode_backward": ("dz", "dS", "dB", "dtheta", "dpsi", "dstep"),
    "attend_decode": ("c", "z", "lse"),
    "attend_causal_decode": ("c", "z", "lse"),
    "attend_prefix_decode": ("c", "z", "lse", "kc_end", "vc_end", "mass_end"),
}


def as_tuple(results: Any) -> tuple[Tensor, ...]:
    return tuple(results) if isinstance(results, (tuple, list)) else (results,)


@dataclass(frozen=True)
class Call:
    op: str
    label: str
    args: tuple[Any, ...]

    def __str__(self) -> str:
        return f"{self.op}-{self.label}"

    def map(self, convert: Any) -> tuple[Any, ...]:
        return tuple(convert(a) if isinstance(a, Tensor) else a for a in self.args)

    def to(self, device: torch.device | str) -> tuple[Any, ...]:
        return self.map(lambda t: t.to(device))  # strides are kept

    def expected(self) -> tuple[Tensor, ...]:
        def double(t: Tensor) -> Tensor:
            return t.double() if t.is_floating_point() else t

        args = self.map(double)
        if self.op == "attend_backward":  # the gradient of the exact attend: not through a rounded z and lse
            dz, q, kc, vc, bias, _, _, scale = args
            args = (dz, q, kc, vc, bias, *_composite.attend(q, kc, vc, bias, scale), scale)
        if self.op == "attend_causal_backward":
            dz, *data, _, _, scale, size, window, rows = args
            args = (dz, *data, *_composite.attend_causal(*data, scale, size, window, rows), scale, size, window, rows)
        if self.op == "attend_prefix_backward":
            *others, _, scale, signed = args
            args = (*others, _composite.attend_prefix(*others[4:], scale, signed)[1], scale, signed)
        return as_tuple(getattr(_composite, self.op)(*args))

    def plain(self) -> tuple[Tensor, ...]:
        operator, dtype = getattr(_composite, self.op), self.args[0].dtype
        if self.op == "project_backward":
            dx, dphi = operator(*self.map(lambda t: t.to(dtype) if t.is_floating_point() else t))
            return dx, dphi.to(self.args[2].dtype)
        if self.op == "project":
            return as_tuple(operator(self.args[0], self.args[1].to(dtype), self.args[2]))
        if self.op == "decode_backward" and dtype.itemsize == 2:
            return plain_torch_decode_backward(*self.args)
        if self.op == "attend_prefix_backward" and dtype.itemsize == 2 and self.args[0].shape[2]:
            return plain_torch_attend_prefix_backward(*self.args)
        results = as_tuple(operator(*self.args))
        if self.op in ("attend_prefix", "attend_prefix_decode"):  # scores pass through 16 bits on the tensor cores
            at = RESULTS[self.op].index("lse")
            return *results[:at], results[at].to(dtype), *results[at + 1 :]
        return results

    def named(self, results: Any) -> Iterator[tuple[str, Tensor]]:
        return zip((f"{self} {name}" for name in RESULTS[self.op]), as_tuple(results), strict=True)

    def assert_accurate(self, results: Any) -> None:
        """The tolerance rule for every result. The tensor cores round what they multiply, so the gradients of a decoder
        in 16 bits are held to the limit of that dtype, though they are returned in float32."""
        for (name, got), exact, plain in zip(self.named(results), self.expected(), self.plain(), strict=True):
            got = got.cpu().to(plain.dtype)
            finite = exact.isfinite()  # lse is -inf where nothing is left to attend to
            assert torch.equal(got[~finite].double(), exact[~finite]), name
            assert_accurate(name, got[finite], exact[finite], plain[finite])

    def family(self, kernel: str, capability: int, shared_bytes: int) -> str:
        """Which kernels run the `kernel` that this call is, or is made of, on a device of that compute capability."""
        gradients = 4 if self.op == "attend_prefix_backward" else 1
        args = self.args[gradients:] if self.op.endswith("_backward") else self.args
        sizes = dict.fromkeys(("B", "H", "Nq", "D", "Hk", "M", "R", "Hd", "T", "Ts", "Tb", "P", "Dv"), 1)
        q, weights = args[0], ()
        if "decode" in self.op:
            weights = args[-6:-1] if "attend" in self.op else args[1:6]
        if "prefix" in self.op:
            k, v, phi = args[1:4]
            sizes |= {"Hk": k.shape[1], "M": phi.shape[3], "D": k.shape[3], "R": v.shape[3]}
        elif "attend" in self.op:
            kc, vc = args[1:3]
            sizes |= dict(zip(("Hk", "M", "D"), kc.shape[1:], strict=True)) | {"R": vc.shape[3]}
        if "causal" in self.op:
            sizes |= dict(zip(("Hn", "N"), args[3].shape[1:3], strict=True))
        if "decode" in self.op:
            S, B, theta, psi, _ = weights
            sizes |= dict(zip(("Hd", "Ts", "P"), S.shape[:3], strict=True))
            sizes |= {"Tb": B.shape[1], "R": B.shape[3], "T": theta.shape[1], "Dv": psi.shape[1]}
        dtypes = [str(t.dtype).removeprefix("torch.") for t in (q, weights[0] if weights else q)]
        sizes |= dict(zip(("B", "H", "Nq"), q.shape[:3], strict=True))
        for family in FAMILIES:
            if _C.can_run(kernel, family, sizes, *dtypes, capability, shared_bytes)[0] is None:
                return family
        raise ValueError(f"{self}: no family runs {kernel}")


class Values:
    """Normal numbers from a seed, rounded to `dtype`."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        self.dtype = dtype
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return (scale * torch.randn(shape, generator=self._generator)).to(dtype or self.dtype)

    def strided(self, *shape: int) -> Tensor:
        """A (B, H, N, D) view of (B, N, H, D) storage."""
        return self(shape[0], shape[2], shape[1], shape[3]).transpose(1, 2)


def project_calls(dtype: torch.dtype) -> Iterator[Call]:
    # B, Hx, N, D, Bp, Hp, M, masked, parameter dtype
    sizes = {
        "shared": (2, 3, 65, 16, 1, 1, 9, False, dtype),
        "per-head-masked": (2, 2, 33, 24, 1, 2, 7, True, torch.float32),
        "per-batch": (3, 2, 17, 5, 3, 2, 4, True, dtype),
        "per-batch-shared-heads": (2, 2, 19, 8, 2, 1, 4, False, torch.float32),
        "grouped": (2, 2, 21, 8, 1, 4, 6, True, dtype),
        "one-token": (1, 1, 1, 3, 1, 1, 1, False, torch.float32),
        "in-parts": (1, 1, 20001, 24, 1, 1, 33, False, dtype),
        "grouped-in-parts": (2, 2, 34001, 24, 1, 4, 33, True, torch.float32),
        "no-batch": (0, 2, 5, 3, 1, 1, 4, False, torch.float32),
        "no-tokens": (2, 2, 0, 3, 1, 4, 4, False, dtype),
        "no-measurements": (2, 2, 5, 3, 1, 2, 0, False, torch.float32),
        "no-features": (2, 2, 5, 0, 1, 1, 4, False, dtype),
    }
    for label, (batch, x_heads, tokens, dim, phi_batch, phi_heads, m, masked, parameter) in sizes.items():
        values = Values(dtype)
        x = values.strided(batch, x_heads, tokens, dim)
        phi = values(phi_batch, phi_heads, m, tokens, scale=max(tokens, 1) ** -0.5, dtype=parameter)
        keep = None
        if masked:
            keep = values(batch, tokens, dtype=torch.float32) > -0.5
            keep[0, 0] = False
        dy = values(batch, max(x_heads, phi_heads), m, dim)
        yield Call("project", label, (x, phi, keep))
        yield Call("project_backward", label, (dy, x, phi, keep, True, True))


def renormalise_rows_calls(dtype: torch.dtype) -> Iterator[Call]:
    # B, Bp, Hp, M, N
    sizes = {
        "shared": (6, 1, 2, 9, 300),
        "per-batch": (3, 3, 2, 5, 41),
        "one-row": (2, 1, 1, 1, 5000),
        "one-token": (1, 1, 1, 1, 1),
        "no-batch": (0, 1, 2, 3, 5),
        "no-tokens": (2, 1, 1, 3, 0),
        "no-rows": (2, 2, 1, 0, 5),
    }
    for label, (batch, phi_batch, heads, rows, tokens) in sizes.items():
        values = Values(dtype)
        phi = values(phi_batch, heads, tokens, rows).mT
        phi[:, :, ::2] = phi[:, :, ::2].abs()  # every other row averages
        phi[..., : tokens // 2] = 0
        keep = values(batch, tokens, dtype=torch.float32) > -0.5
        keep[:1, tokens // 2 :] = False  # nothing is left of any row
        yield Call("renormalise_rows", label, (phi, keep))


def project_implicit_calls(dtype: torch.dtype) -> Iterator[Call]:
    # B, Hx, N, D, Hp, M, masked
    sizes = {
        "shared": (2, 3, 65, 16, 1, 9, False),
        "per-head-masked": (2, 2, 333, 24, 2, 70, True),
        "grouped": (3, 2, 21, 8, 4, 6, True),
        "many-tokens": (1, 1, 5000, 40, 1, 130, False),
        "many-measurements": (1, 2, 1500, 7, 2, 1100, True),
        "one-token": (1, 1, 1, 3, 1, 1, False),
        "no-batch": (0, 2, 5, 3, 1, 4, False),
        "no-tokens": (2, 2, 0, 3, 4, 4, False),
        "no-features": (2, 2, 5, 0, 1, 4, False),
    }
    for ensemble in ("rademacher", "srht", "pool"):
        for label, (batch, x_heads, tokens, dim, phi_heads, m, masked) in sizes.items():
            values = Values(dtype)
            x = values.strided(batch, x_heads, tokens, dim)
            counts = anchors = None
            if masked:
                keep = values(batch, tokens, dtype=torch.float32) > -0.5
                keep[:, -1] = False
                counts = torch.nn.functional.pad(keep.cumsum(-1), (1, 0)).int()
                anchors = torch.tensor([[tokens - 1, -1]], dtype=torch.int32)
            rows = m + (2 if masked else 0)
            dy = values(batch, max(x_heads, phi_heads), rows, dim)
            draw = (phi_heads, -5, 1)
            yield Call("project_implicit", f"{ensemble}-{label}", (x, counts, anchors, ensemble, m, *draw))
            backward = (dy, counts, anchors, ensemble, *draw, x_heads, tokens)
            yield Call("project_implicit_backward", f"{ensemble}-{label}", backward)


def _attend_arguments(values: Values, sizes: tuple[int, ...], bias_shape: tuple[int, int] | None) -> tuple[Any, ...]:
    batch, heads, key_heads, queries, m, dim, features = sizes
    q, kc = values.strided(batch, heads, queries, dim), values.strided(batch, key_heads, m, dim)
    vc = values(batch, key_heads, m, features)
    bias = None
    if bias_shape is not None:
        bias = values(*bias_shape, m, dtype=torch.float32)
        bias[..., :1] = -torch.inf  # an empty segment
    return q, kc, vc, bias, dim**-0.5


def attend_calls(dtype: torch.dtype) -> Iterator[Call]:
    # B, H, Hk, Nq, M, D, R, shape of the bias
    sizes: dict[str, tuple[tuple[int, ...], tuple[int, int] | None]] = {
        "plain": ((2, 2, 2, 63, 33, 16, 16), None),
        "grouped-bias": ((2, 4, 2, 37, 70, 24, 40), (1, 4)),
        "batch-bias": ((3, 2, 1, 9, 12, 17, 5), (3, 1)),
        "many-measurements": ((1, 1, 1, 40, 300, 8, 8), (1, 1)),
        "wide": ((1, 1, 1, 5, 20, 260, 200), None),
        "many-queries": ((1, 1, 1, 600, 10, 8, 8), (1, 1)),
        "one": ((1, 1, 1, 1, 1, 1, 1), None),
        "no-batch": ((0, 2, 1, 5, 4, 8, 8), (1, 2)),
        "no-queries": ((2, 2, 1, 0, 4, 8, 8), (1, 2)),
        "no-measurements": ((2, 2, 1, 5, 0, 8, 8), (1, 2)),
        "no-features": ((2, 2, 1, 5, 4, 8, 0), None),
        # Every compiled size of the tensor-core kernels, resident and streamed; 64 and 128 take wgmma on Hopper.
        "D32": ((1, 2, 1, 70, 130, 32, 30), (1, 2)),
        "D64": ((2, 4, 2, 330, 200, 64, 64), (1, 4)),
        "D80": ((1, 2, 2, 33, 40, 80, 72), None),
        "D96": ((1, 1, 1, 40, 257, 96, 90), (1, 1)),
        "D128": ((2, 2, 1, 150, 100, 128, 128), (2, 1)),
        "streamed": ((1, 2, 1, 70, 600, 128, 100), (1, 2)),
        "ring-of-three": ((1, 3, 1, 450, 1100, 128, 128), (1, 3)),
        "streamed-D64": ((2, 2, 2, 330, 1500, 64, 64), None),
    }
    for label, (shape, bias_shape) in sizes.items():
        values = Values(dtype)
        arguments = _attend_arguments(values, shape, bias_shape)
        yield Call("attend", label, arguments)
        z, lse = _composite.attend(*arguments)
        yield Call("attend_backward", label, (values.strided(*z.shape), *arguments[:4], z, lse, arguments[4]))
    values = Values(dtype)  # measured values that are alike: ds is a small difference of large numbers
    q, kc, vc, bias, scale = _attend_arguments(values, (1, 2, 2, 50, 150, 16, 16), (1, 2))
    vc = (3 + 0.05 * vc.float()).to(dtype)
    z, lse = _composite.attend(q, kc, vc, bias, scale)
    yield Call("attend_backward", "alike-values", (values(*z.shape), q, kc, vc, bias, z, lse, scale))
    values = Values(dtype)
    q, kc, vc, bias, scale = _attend_arguments(values, (2, 2, 2, 7, 5, 8, 8), (2, 2))
    bias[1, 0] = -torch.inf  # nothing left to attend to
    z, lse = _composite.attend(q, kc, vc, bias, scale)
    yield Call("attend", "nothing-left", (q, kc, vc, bias, scale))
    yield Call("attend_backward", "nothing-left", (values(*z.shape), q, kc, vc, bias, z, lse, scale))


def attend_causal_calls(dtype: torch.dtype) -> Iterator[Call]:
    # B, H, Hk, Hn, Nq, N, D, R; block size, window, measurements of a block; those of earlier tokens; is there a mask
    sizes: dict[str, tuple[tuple[int, ...], tuple[int, int, int], int, bool]] = {
        "one-block": ((1, 1, 1, 1, 9, 9, 8, 8), (32, 0, 4), 0, False),
        "grouped-masked": ((2, 4, 1, 2, 150, 150, 20, 24), (16, 1, 3), 0, True),
        "continued": ((1, 2, 2, 1, 70, 90, 17, 5), (8, 2, 2), 5, True),
        "one-query": ((2, 2, 1, 1, 1, 41, 16, 16), (8, 1, 8), 130, False),
        "no-window": ((1, 1, 1, 1, 140, 140, 64, 64), (1, 3, 1), 0, False),
        "wide": ((1, 1, 1, 1, 40, 40, 200, 130), (16, 0, 4), 0, False),
        "no-queries": ((1, 2, 1, 1, 0, 12, 8, 8), (4, 0, 2), 0, False),
        # Every compiled size of the tensor-core kernels.
        "D32": ((1, 2, 1, 1, 330, 330, 32, 30), (64, 1, 16), 0, False),
        "D64": ((2, 4, 2, 2, 600, 600, 64, 64), (128, 0, 20), 0, True),
        "D80": ((1, 2, 2, 2, 70, 200, 80, 72), (32, 2, 5), 40, False),
        "D96": ((1, 1, 1, 1, 270, 270, 96, 90), (33, 0, 33), 0, True),
        "D128": ((1, 2, 1, 1, 300, 300, 128, 128), (50, 1, 7), 3, False),
        # Several slabs of measurements, several ranges of the queries, heads of a group one after the other.
        "slabs": ((1, 4, 2, 1, 1261, 1333, 64, 57), (16, 2, 5), 3, True),
        "slabs-D128": ((1, 2, 2, 1, 700, 700, 120, 128), (24, 2, 11), 0, False),
    }
    for label, (shape, (size, window, rows), earlier, masked) in sizes.items():
        values = Values(dtype)
        batch, heads, measured_heads, token_heads, queries, n, dim, features = shape
        count = earlier + rows * max(n // size - window, 0)
        measured = (batch, heads, measured_heads, queries, count, dim, features)
        *data, bias, scale = _attend_arguments(values, measured, (1, heads) if masked else None)
        k, v = values.strided(batch, token_heads, n, dim), values.strided(batch, token_heads, n, features)
        keep = values(batch, n, dtype=torch.float32) > -0.5 if masked else None
        arguments = (*data, k, v, bias, keep)
        yield Call("attend_causal", label, (*arguments, scale, size, window, rows))
        z, lse = _composite.attend_causal(*arguments, scale, size, window, rows)
        dz = values.strided(*z.shape)
        yield Call("attend_causal_backward", label, (dz, *arguments, z, lse, scale, size, window, rows))
    values = Values(dtype)
    q, kc, vc, bias, scale = _attend_arguments(values, (1, 2, 1, 70, 15, 16, 16), (1, 2))
    k, v = values(1, 2, 70, 16), values(1, 2, 70, 16)
    data = q, kc, (3 + 0.05 * vc.float()).to(dtype), k, (3 + 0.05 * v.float()).to(dtype), bias, None
    z, lse = _composite.attend_causal(*data, scale, 16, 1, 5)
    yield Call("attend_causal_backward", "alike-values", (values(*z.shape), *data, z, lse, scale, 16, 1, 5))


def prefix_arguments(
    values: Values, shape: tuple[int, ...], signed: bool, masked: bool, dtype: torch.dtype
) -> tuple[Any, ...]:
    """q, k, v, phi, kc, vc, mass, score_bias, key_mask of B, H, Hk, heads and batch of phi, N, M, D, R."""
    batch, heads, key_heads, phi_heads, phi_batch, n, m, dim, features = shape
    state_heads, f32 = max(key_heads, phi_heads), torch.float32
    q, k = values.strided(batch, heads, n, dim), values.strided(batch, key_heads, n, dim)
    v = values.strided(batch, key_heads, n, features)
    phi, before = values(phi_batch, phi_heads, n, m, dtype=f32), values(batch, state_heads, 9, m, dtype=f32)
    phi, before = (x.sign() if signed else x.softmax(-1) for x in (phi, before))
    mass = torch.full((batch, 1, 1), 9.0) if signed else before.sum(2)
    state = (*(before.mT @ values(batch, state_heads, 9, d, dtype=f32) for d in (dim, features)), mass)
    bias = values(1, heads, m, dtype=f32) if masked else None
    keep = values(batch, n, dtype=f32) > -0.5 if masked else None
    return q, k, v, phi.to(dtype) if masked else phi, *state, bias, keep


def attend_prefix_calls(dtype: torch.dtype) -> Iterator[Call]:
    # B, H, Hk, heads and batch of phi, N, M, D, R; is phi signed, is there a mask
    sizes: dict[str, tuple[tuple[int, ...], bool, bool]] = {
        "chunks": ((2, 2, 2, 2, 2, 150, 33, 16, 16), False, False),
        "grouped-masked": ((2, 4, 2, 2, 2, 200, 20, 20, 24), False, True),
        "heads-of-queries": ((1, 4, 2, 4, 1, 130, 70, 17, 5), False, False),
        "signed": ((2, 4, 1, 1, 1, 140, 40, 24, 24), True, True),
        "many-measurements": ((1, 2, 1, 1, 1, 70, 300, 32, 32), False, True),
        "D64": ((1, 2, 1, 1, 1, 400, 70, 64, 64), False, False),
        "D128": ((1, 2, 1, 1, 1, 200, 128, 128, 128), False, False),
        "D128-signed": ((1, 2, 1, 2, 1, 300, 65, 100, 128), True, True),
        "wide": ((1, 1, 1, 1, 1, 40, 20, 260, 200), False, False),
        "one-token": ((2, 4, 2, 2, 2, 1, 16, 64, 64), False, False),
        "in-parts": ((1, 3, 3, 1, 1, 20000, 2, 1, 1), False, False),  # little work, and workspace for 64 of each
        "no-batch": ((0, 2, 1, 1, 1, 5, 4, 8, 8), False, False),
        "no-tokens": ((2, 2, 1, 1, 1, 0, 4, 8, 8), False, True),
    }
    for label, (shape, signed, masked) in sizes.items():
        values, dim = Values(dtype), shape[7]
        arguments = prefix_arguments(values, shape, signed, masked, dtype)
        yield Call("attend_prefix", label, (*arguments, dim**-0.5, signed))
        z, lse, *ends = _composite.attend_prefix(*arguments, dim**-0.5, signed)
        of_ends = [values(*x.shape, dtype=torch.float32) for x in ends]
        backward = (values.strided(*z.shape), *of_ends, *arguments, lse, dim**-0.5, signed)
        yield Call("attend_prefix_backward", label, backward)


def decoder_weights(
    values: Values,
    heads: int,
    layers: int,
    s_layers: int,
    b_layers: int,
    p: int,
    r: int,
    dv: int,
    parameter: torch.dtype,
) -> tuple[Tensor, ...]:
    S = (torch.eye(p) + values(heads, s_layers, p, p, scale=0.3 * p**-0.5, dtype=torch.float32)).to(parameter)
    B = values(heads, b_layers, p, r, scale=r**-0.5, dtype=parameter)
    theta = (0.05 + 0.1 * values(heads, layers, p, dtype=torch.float32).abs()).to(parameter)
    psi = values(heads, dv, p, scale=p**-0.5, dtype=parameter)
    step = (1 + 0.2 * values(heads, layers, dtype=torch.float32)).to(parameter)
    return S, B, theta, psi, step


def decode_calls(dtype: torch.dtype) -> Iterator[Call]:
    # B, H, Nq, Hd, T, Ts, Tb, P, R, Dv, parameter dtype
    sizes = {
        "tied": (2, 2, 37, 1, 3, 1, 1, 33, 16, 24, torch.float32),
        "untied": (1, 2, 20, 1, 3, 3, 3, 20, 17, 9, dtype),
        "per-head": (2, 3, 41, 3, 2, 1, 2, 65, 12, 70, torch.float32),
        "per-head-untied-S": (2, 2, 5, 2, 3, 3, 1, 8, 6, 4, torch.float32),
        "wide": (1, 1, 9, 1, 2, 1, 1, 300, 40, 130, torch.float32),
        "one": (1, 1, 1, 1, 1, 1, 1, 1, 1, 1, dtype),
        "no-batch": (0, 2, 5, 1, 2, 1, 1, 8, 6, 4, torch.float32),
        "no-queries": (2, 2, 0, 2, 2, 2, 2, 8, 6, 4, torch.float32),
        "P64": (1, 2, 330, 1, 3, 1, 1, 64, 64, 64, torch.float32),
        "P128": (2, 2, 141, 2, 3, 1, 3, 128, 64, 50, torch.float32),
        "P128-D128": (1, 2, 70, 1, 2, 2, 1, 128, 128, 100, dtype),
        # On Hopper several tiles a warpgroup: the next one on its way, and without room for it.
        "many-queries": (2, 3, 6000, 3, 3, 1, 1, 128, 128, 128, torch.float32),
        "many-queries-untied": (1, 3, 9000, 1, 4, 4, 4, 128, 64, 64, dtype),
        "P256": (1, 2, 37, 1, 2, 1, 1, 256, 40, 64, torch.float32),
    }
    for label, (batch, heads, queries, decoder_heads, layers, s_layers, b_layers, p, r, dv, parameter) in sizes.items():
        values = Values(dtype)
        z = values.strided(batch, heads, queries, r)
        weights = decoder_weights(values, decoder_heads, layers, s_layers, b_layers, p, r, dv, parameter)
        yield Call("decode", label, (z, *weights))
        if label.startswith("many-queries"):  # whose sums for the parameters leave the range of fp16
            continue
        arguments = (values(batch, heads, queries, dv), z, *weights)
        if dtype.itemsize == 2:
            arguments = settled_decode(z, weights, torch.Generator().manual_seed(0))
        yield Call("decode_backward", label, arguments)


def attend_decode_calls(dtype: torch.dtype) -> Iterator[Call]:
    # sizes of attend; Hd, T, Ts, Tb, P, Dv; is z wanted
    sizes: dict[str, tuple[tuple[int, ...], tuple[int, ...], bool]] = {
        "shared": ((2, 4, 2, 45, 40, 16, 20), (1, 3, 1, 1, 33, 16), True),
        "per-head": ((2, 4, 2, 45, 40, 16, 20), (4, 3, 1, 1, 33, 16), False),
        "D64-P64": ((1, 4, 2, 330, 130, 64, 64), (1, 3, 1, 1, 64, 64), True),
        "D64-P128": ((2, 2, 1, 75, 200, 64, 64), (2, 3, 1, 1, 128, 50), False),
        "D96-P128": ((1, 2, 2, 70, 40, 96, 90), (1, 2, 1, 1, 128, 96), True),
        "D128-P64": ((2, 1, 1, 150, 100, 128, 128), (1, 3, 1, 1, 64, 128), True),
        "D128-P128": ((2, 2, 1, 150, 100, 128, 128), (1, 3, 1, 1, 128, 128), True),
        "D128-P256": ((1, 2, 1, 40, 70, 128, 100), (1, 2, 1, 1, 256, 90), False),
        "wide": ((1, 1, 1, 9, 20, 24, 140), (1, 2, 1, 1, 40, 30), True),
    }
    for label, (shape, (decoder_heads, layers, s_layers, b_layers, p, dv), need_z) in sizes.items():
        values = Values(dtype)
        arguments = _attend_arguments(values, shape, (1, shape[1]))
        weights = decoder_weights(values, decoder_heads, layers, s_layers, b_layers, p, shape[6], dv, torch.float32)
        yield Call("attend_decode", label, (*arguments, *weights, need_z))


def attend_causal_decode_calls(dtype: torch.dtype) -> Iterator[Call]:
    # sizes of attend_causal; Hd, T, Ts, Tb, P, Dv; is z wanted
    sizes: dict[str, tuple[tuple[int, ...], tuple[int, ...], bool]] = {
        "D32": ((2, 4, 1, 2, 150, 170, 20, 24), (1, 3, 1, 1, 33, 16), True),
        "D64-P64": ((2, 4, 2, 2, 600, 600, 64, 64), (4, 3, 1, 1, 64, 64), False),
        "D64-P128": ((1, 2, 1, 1, 330, 340, 64, 60), (1, 3, 3, 1, 128, 50), True),
        "D96-P128": ((1, 2, 2, 2, 70, 200, 96, 90), (1, 2, 1, 1, 128, 96), True),
        "D128-P64": ((1, 2, 1, 1, 300, 300, 128, 128), (1, 3, 1, 1, 64, 128), False),
        "D64-P256": ((1, 2, 1, 1, 90, 90, 64, 64), (1, 2, 1, 1, 256, 64), True),
    }
    for label, (shape, (decoder_heads, layers, s_layers, b_layers, p, dv), need_z) in sizes.items():
        values = Values(dtype)
        batch, heads, measured_heads, token_heads, queries, n, dim, features = shape
        numbers = 16, 1, 5
        measured = (batch, heads, measured_heads, queries, 5 * (n // 16 - 1), dim, features)
        *data, bias, scale = _attend_arguments(values, measured, (1, heads))
        k, v = values.strided(batch, token_heads, n, dim), values.strided(batch, token_heads, n, features)
        keep = values(batch, n, dtype=torch.float32) > -0.5
        weights = decoder_weights(values, decoder_heads, layers, s_layers, b_layers, p, features, dv, torch.float32)
        arguments = (*data, k, v, bias, keep, scale, *numbers, *weights, need_z)
        yield Call("attend_causal_decode", label, arguments)


def attend_prefix_decode_calls(dtype: torch.dtype) -> Iterator[Call]:
    # sizes of attend_prefix, is there a mask; Hd, T, Ts, Tb, P, Dv; is z wanted
    sizes: dict[str, tuple[tuple[int, ...], bool, tuple[int, ...], bool]] = {
        "D64-P64": ((2, 2, 1, 2, 1, 400, 64, 64, 64), False, (2, 3, 1, 1, 64, 64), False),
        "D64-P128": ((1, 2, 1, 1, 1, 300, 100, 64, 60), True, (1, 3, 3, 1, 128, 50), True),
        "D128-P64": ((1, 2, 2, 1, 1, 300, 40, 128, 100), False, (1, 3, 1, 1, 64, 128), True),
        "D128-P128": ((1, 1, 1, 1, 1, 140, 33, 96, 128), True, (1, 2, 1, 1, 128, 128), False),
    }
    for label, (shape, masked, (decoder_heads, layers, s_layers, b_layers, p, dv), need_z) in sizes.items():
        values = Values(dtype)
        arguments = prefix_arguments(values, shape, False, masked, dtype)
        weights = decoder_weights(values, decoder_heads, layers, s_layers, b_layers, p, shape[8], dv, torch.float32)
        yield Call("attend_prefix_decode", label, (*arguments, shape[7] ** -0.5, False, *weights, need_z))


def calls(dtype: torch.dtype) -> Iterator[Call]:
    families = (
        project_calls,
        renormalise_rows_calls,
        project_implicit_calls,
        attend_calls,
        attend_causal_calls,
        attend_prefix_calls,
        decode_calls,
        attend_decode_calls,
        attend_causal_decode_calls,
        attend_prefix_decode_calls,
    )
    for family in families:
        yield from family(dtype)
