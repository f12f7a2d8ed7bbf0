"""The csat operators run by the CUDA kernels' own sources, emulated on the CPU with every memory access checked.

`EmulatedOps` has the operators of `torch.ops.csat` under their names, with their arguments and results (CPU tensors of
any strides; float32, bfloat16, float16). A call allocates emulated device memory, calls the launch function of
csrc/csat/launch.h that the CUDA binding calls, and raises `EmulationError` if the emulator reports anything: a race, an
uninitialised read, an access out of bounds, blocks in conflict, a divergent barrier, a budget exceeded. What the kernel
must not read is NaN (the gaps of a strided tensor) or uninitialised (the workspace).
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import shutil
import subprocess
from collections.abc import Iterator
from ctypes import Structure, c_bool, c_char_p, c_float, c_int, c_int64, c_uint64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from csat_ext._composite import new_rows, new_token_rows

# Of a block, by compute capability.
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class EmulationError(RuntimeError):
    """The emulator's report of a launch, one line a fault."""


def _with_source_lines(report: str) -> str:
    """Appends file and line to every "object+0xoffset" of a report, where binutils' addr2line is there to tell."""
    if shutil.which("addr2line") is None:
        return report

    def line(match: re.Match[str]) -> str:
        before_return = hex(int(match[2], 16) - 1)  # the offset is a return address: of the call, not of what follows
        command = ["addr2line", "-i", "-s", "-e", match[1], before_return]
        places = subprocess.run(command, capture_output=True, text=True).stdout.split("\n")
        return f"{match[0]}, {' < '.join(place.split(' ')[0] for place in places if place)}"

    return re.sub(r"([^ \[]+)\+(0x[0-9a-f]+)", line, report)


# ---- the structures of csrc/csat/launch.h; their sizes are compared when the library is loaded


class View(Structure):
    _fields_ = (("data", c_void_p), ("dtype", c_int), ("stride", c_int64 * 4))


def _sizes(*names: str) -> list[tuple[str, type]]:
    return [(name, c_int64) for name in names]


def _views(*names: str) -> list[tuple[str, type]]:
    return [(name, View) for name in names]


class AttendParams(Structure):
    _fields_ = (
        *_views("q", "kc", "vc", "bias", "z", "lse"),
        *_sizes("batch", "heads", "key_heads", "queries", "measurements", "head_dim", "features"),
        ("scale", c_float),
    )


class AttendBackwardParams(Structure):
    _fields_ = (("forward", AttendParams), *_views("dz", "dq", "dkc", "dvc", "dbias"))


class CausalTokens(Structure):
    _fields_ = (
        *_views("k", "v"),
        ("keep", c_void_p),
        *_sizes("heads", "count"),
        *_sizes("first", "queries", "block_size", "blocks", "earlier", "measurements"),  # CausalWindow
    )


class AttendCausalParams(Structure):
    _fields_ = (("measured", AttendParams), ("tokens", CausalTokens))


class AttendCausalBackwardParams(Structure):
    _fields_ = (("measured", AttendBackwardParams), ("tokens", CausalTokens), *_views("dk", "dv"))


class PrefixParams(Structure):
    _fields_ = (
        *_views("q", "k", "v", "phi", "kc", "vc", "mass", "bias", "z", "lse", "kc_end", "vc_end", "mass_end"),
        ("keep", c_void_p),
        *_sizes("batch", "heads", "key_heads", "state_heads", "phi_batch", "phi_heads"),
        *_sizes("tokens", "measurements", "head_dim", "features"),
        *(("scale", c_float), ("is_signed", c_bool)),
    )


class PrefixBackwardParams(Structure):
    _fields_ = (
        ("forward", PrefixParams),
        *_views("dz", "dkc_end", "dvc_end", "dmass_end"),
        *_views("dq", "dk", "dv", "dphi", "dkc", "dvc", "dmass", "dbias"),
    )


class Decoder(Structure):
    _fields_ = (
        *_views("S", "B", "theta", "psi", "step"),
        *_sizes("heads", "layers", "s_layers", "b_layers", "coefficients", "features", "outputs"),
    )


class DecodeParams(Structure):
    _fields_ = (("decoder", Decoder), *_views("z", "out"), *_sizes("batch", "heads", "queries"))


class DecodeBackwardParams(Structure):
    _fields_ = (
        ("forward", DecodeParams),
        *_views("dout", "dz"),
        *[(name, c_void_p) for name in ("dS", "dB", "dtheta", "dpsi", "dstep")],
    )


class ProjectParams(Structure):
    _fields_ = (
        *_views("x", "phi"),
        ("keep", c_void_p),
        ("y", View),
        *_sizes("batch", "x_heads", "phi_batch", "phi_heads", "tokens", "measurements", "head_dim"),
    )


class ProjectBackwardParams(Structure):
    _fields_ = (("forward", ProjectParams), *_views("dy", "dx", "dphi"))


class RowsParams(Structure):
    _fields_ = (
        *_views("phi"),
        *((name, c_void_p) for name in ("keep", "factor", "mass")),
        *_sizes("batch", "phi_batch", "heads", "measurements", "tokens"),
    )


class ImplicitParams(Structure):
    _fields_ = (
        *_views("x", "y"),
        *(("counts", c_void_p), ("anchors", c_void_p)),
        *_sizes("counts_batch", "anchors_batch"),
        *(("ensemble", c_int), ("seed", c_uint64), ("layer", c_int64)),
        *_sizes("batch", "x_heads", "phi_heads", "tokens", "anchor_rows", "measurements", "head_dim"),
    )


ENSEMBLES = ("rademacher", "srht", "pool")  # csrc/csat/ensembles.h


class Counters(Structure):
    """What the emulator has counted since the last call (tests/emulator/runtime/report.h)."""

    _fields_ = tuple(
        (name, c_uint64)
        for name in (
            *("launches", "blocks", "barriers", "accesses"),
            *("mma", "ldmatrix", "shared_wavefronts", "bank_conflicts"),
        )
    )


_STRUCTURES = (
    *(View, AttendParams, AttendBackwardParams, AttendCausalParams, AttendCausalBackwardParams),
    *(PrefixParams, PrefixBackwardParams),
    *(Decoder, DecodeParams, DecodeBackwardParams),
    *(ProjectParams, ProjectBackwardParams, RowsParams, ImplicitParams, Counters),
)
# Which axes of a View the axes of a tensor take: (B, H, M) and (B, H, Nq) leave one out, and so on.
_ALL, _NO_ROW, _NO_LAST, _NO_LAYER, _ENDS = (0, 1, 2, 3), (0, 1, 3), (0, 1, 2), (0, 2, 3), (0, 3)


class EmulatedOps:
    """The operators on the library at `path`; a non-zero `seed` shuffles the order of lanes, warps and blocks."""

    def __init__(
        self, path: Path, seed: int = 0, count_bank_conflicts: bool = False, compute_capability: int = 80
    ) -> None:
        self.compute_capability = compute_capability
        self.seed = seed
        self.count_bank_conflicts = count_bank_conflicts
        self.counters = Counters()
        self._library = ctypes.CDLL(str(path))
        self._library.csat_allocate.restype = c_void_p
        for name in ("csat_report", "csat_error_string"):
            getattr(self._library, name).restype = c_char_p
        self._library.csat_sizeof.restype = c_int64
        for structure in _STRUCTURES:
            size = self._library.csat_sizeof(structure.__name__.encode())
            if size != ctypes.sizeof(structure):
                raise RuntimeError(f"{structure.__name__} has {size} bytes in C++ and {ctypes.sizeof(structure)} here")

    # ---- device memory

    def _reset(self) -> None:
        device = c_int(self.compute_capability), c_int64(SHARED_BYTES[self.compute_capability])
        self._library.csat_reset(c_int(self.seed), c_int(self.count_bank_conflicts), *device)

    def _allocate(self, size: int) -> int:
        address = self._library.csat_allocate(c_int64(size))
        if address is None:
            raise MemoryError(f"no room for {size} bytes in the emulated device memory")
        return address

    def _upload(self, tensor: Tensor) -> int:
        """Copies what the tensor's strides span, NaN in the gaps; returns the address of its first element."""
        if tensor.numel() == 0:
            return self._allocate(0)
        once = tensor
        for axis, stride in enumerate(tensor.stride()):
            if stride == 0:
                once = once.narrow(axis, 0, 1)
        span = 1 + sum((n - 1) * stride for n, stride in zip(once.shape, once.stride(), strict=True))
        fill = torch.nan if tensor.is_floating_point() else 0
        memory = torch.full((span,), fill, dtype=tensor.dtype)
        memory.as_strided(once.shape, once.stride()).copy_(once)
        size = span * tensor.element_size()
        device = self._allocate(size)
        self._library.csat_to_device(c_void_p(device), c_void_p(memory.data_ptr()), c_int64(size))
        return device

    def _input(self, tensor: Tensor | None, axes: tuple[int, ...] = _ALL) -> View:
        if tensor is None:
            return View()
        if tensor.dtype not in DTYPES:
            raise TypeError(f"emulated tensors are float32, bfloat16 or float16; got {tensor.dtype}")
        view = View(self._upload(tensor), DTYPES[tensor.dtype])
        for axis, n, stride in zip(axes, tensor.shape, tensor.stride(), strict=True):
            view.stride[axis] = stride if n > 1 else 0
        return view

    def _output(self, like: Tensor, axes: tuple[int, ...] = _ALL) -> View:
        """An unwritten tensor of the shape, strides and dtype of `like`, which is dense."""
        view = View(self._allocate(like.numel() * like.element_size()), DTYPES[like.dtype])
        for axis, n, stride in zip(axes, like.shape, like.stride(), strict=True):
            view.stride[axis] = 0 if axis < 2 and n == 1 else stride  # as the CUDA binding
        return view

    def _download(self, like: Tensor, data: int) -> Tensor:
        size = like.numel() * like.element_size()
        self._library.csat_to_host(c_void_p(like.data_ptr()), c_void_p(data), c_int64(size))
        return like

    def _launch(self, name: str, *params: Structure) -> None:
        arguments = [ctypes.byref(p) for p in params]
        size = getattr(self._library, f"csat_{name}_workspace")
        size.restype = c_int64
        workspace = c_void_p(self._allocate(size(*arguments)))
        code = getattr(self._library, f"csat_{name}")(*arguments, workspace)
        self._raise_report()
        if code:
            raise EmulationError(f"{name}: {self._library.csat_error_string(code).decode()}")

    def _raise_report(self) -> None:
        self._library.csat_counters(ctypes.byref(self.counters))
        if report := self._library.csat_report().decode():
            raise EmulationError(_with_source_lines(report))

    def _results(self, *results: tuple[Tensor, View | int | None]) -> tuple[Tensor, ...]:
        tensors = [
            like if where is None else self._download(like, where.data if isinstance(where, View) else where)
            for like, where in results
        ]
        self._raise_report()  # of elements that nobody wrote
        return tuple(tensors)

    # ---- parameters

    def _attend_params(
        self, q: Tensor, kc: Tensor, vc: Tensor, score_bias: Tensor | None, scale: float
    ) -> AttendParams:
        (batch, heads, queries, head_dim), (key_heads, measurements) = q.shape, kc.shape[1:3]
        bias = None if score_bias is None else score_bias.expand(batch, heads, measurements)
        return AttendParams(
            *(self._input(q), self._input(kc), self._input(vc), self._input(bias, _NO_ROW), View(), View()),
            *(batch, heads, key_heads, queries, measurements, head_dim, vc.shape[-1]),
            scale,
        )

    def _decoder(self, S: Tensor, B: Tensor, theta: Tensor, psi: Tensor | None, step: Tensor) -> Decoder:
        heads, layers, coefficients = theta.shape
        return Decoder(
            *(self._input(S), self._input(B), self._input(theta, _NO_ROW), self._input(psi, _NO_LAYER)),
            self._input(step, _ENDS),
            *(heads, layers, S.shape[1], B.shape[1], coefficients, B.shape[-1], _outputs(theta, psi)),
        )

    def _project_params(self, x: Tensor, phi: Tensor, key_mask: Tensor | None) -> ProjectParams:
        keep = None if key_mask is None else self._upload(key_mask.contiguous())
        return ProjectParams(
            *(self._input(x), self._input(phi), keep, View()),
            *(x.shape[0], x.shape[1], phi.shape[0], phi.shape[1], x.shape[2], phi.shape[2], x.shape[3]),
        )

    def _implicit_params(
        self,
        sizes: tuple[int, int, int, int],  # B, Hx, N, D
        places: tuple[Tensor | None, Tensor | None],
        draw: tuple[str, int, int, int],  # ensemble, heads, seed, layer
        rows: int,
    ) -> ImplicitParams:
        (batch, x_heads, tokens, head_dim), (ensemble, heads, seed, layer) = sizes, draw
        addresses = [None if t is None else self._upload(t.contiguous()) for t in places]
        strides = [0 if t is None or t.shape[0] == 1 else t.shape[1] for t in places]
        anchor_rows = 0 if places[1] is None else places[1].shape[1]
        return ImplicitParams(
            *(View(), View(), *addresses, *strides),
            *(ENSEMBLES.index(ensemble), seed % 2**64, layer),
            *(batch, x_heads, heads, tokens, anchor_rows, rows, head_dim),
        )

    # ---- the operators; shapes and meaning in docs/architecture.md

    def project(self, x: Tensor, phi: Tensor, key_mask: Tensor | None) -> Tensor:
        self._reset()
        params = self._project_params(x, phi, key_mask)
        y = x.new_empty(x.shape[0], max(x.shape[1], phi.shape[1]), phi.shape[2], x.shape[3])
        params.y = self._output(y)
        self._launch("project", params)
        return self._results((y, params.y))[0]

    def project_backward(
        self, dy: Tensor, x: Tensor, phi: Tensor, key_mask: Tensor | None, need_dx: bool, need_dphi: bool
    ) -> tuple[Tensor, ...]:
        self._reset()
        params = ProjectBackwardParams(self._project_params(x, phi, key_mask), self._input(dy), View(), View())
        dx = new_rows(x, x.shape[-1]) if need_dx else x.new_empty(0)
        dphi = torch.empty(phi.shape if need_dphi else 0, dtype=phi.dtype)
        if need_dx:
            params.dx = self._output(dx)
        if need_dphi:
            params.dphi = self._output(dphi)
        self._launch("project_backward", params)
        return self._results((dx, params.dx if need_dx else None), (dphi, params.dphi if need_dphi else None))

    def renormalise_rows(self, phi: Tensor, key_mask: Tensor) -> tuple[Tensor, ...]:
        self._reset()
        batch, rows = key_mask.shape[0], phi.shape[1:3]
        factor, mass = torch.empty(batch, *rows), torch.empty(batch, *rows)
        to_factor, to_mass = (self._allocate(t.nbytes) for t in (factor, mass))
        keep = self._upload(key_mask.contiguous())
        sizes = batch, phi.shape[0], *rows, phi.shape[3]
        params = RowsParams(self._input(phi), keep, to_factor, to_mass, *sizes)
        self._launch("renormalise_rows", params)
        return self._results((factor, to_factor), (mass, to_mass))

    def project_implicit(
        self,
        x: Tensor,
        counts: Tensor | None,
        anchors: Tensor | None,
        ensemble: str,
        rows: int,
        heads: int,
        seed: int,
        layer: int,
    ) -> Tensor:
        self._reset()
        params = self._implicit_params(tuple(x.shape), (counts, anchors), (ensemble, heads, seed, layer), rows)
        y = x.new_empty(x.shape[0], max(x.shape[1], heads), params.anchor_rows + rows, x.shape[3])
        params.x, params.y = self._input(x), self._output(y)
        self._launch("project_implicit", params)
        return self._results((y, params.y))[0]

    def project_implicit_backward(
        self,
        dy: Tensor,
        counts: Tensor | None,
        anchors: Tensor | None,
        ensemble: str,
        heads: int,
        seed: int,
        layer: int,
        x_heads: int,
        tokens: int,
    ) -> Tensor:
        self._reset()
        sizes = (dy.shape[0], x_heads, tokens, dy.shape[3])
        rows = dy.shape[2] - (0 if anchors is None else anchors.shape[1])
        params = self._implicit_params(sizes, (counts, anchors), (ensemble, heads, seed, layer), rows)
        dx = new_token_rows(dy, *sizes)
        params.x, params.y = self._output(dx), self._input(dy)
        self._launch("project_implicit_backward", params)
        return self._results((dx, params.x))[0]

    def attend(self, q: Tensor, kc: Tensor, vc: Tensor, score_bias: Tensor | None, scale: float) -> tuple[Tensor, ...]:
        self._reset()
        params = self._attend_params(q, kc, vc, score_bias, scale)
        z, lse = new_rows(q, vc.shape[-1]), torch.empty(q.shape[:-1])
        params.z, params.lse = self._output(z), self._output(lse, _NO_LAST)
        self._launch("attend", params)
        return self._results((z, params.z), (lse, params.lse))

    def attend_backward(
        self,
        dz: Tensor,
        q: Tensor,
        kc: Tensor,
        vc: Tensor,
        score_bias: Tensor | None,
        z: Tensor,
        lse: Tensor,
        scale: float,
    ) -> tuple[Tensor, ...]:
        self._reset()
        forward = self._attend_params(q, kc, vc, score_bias, scale)
        forward.z, forward.lse = self._input(z), self._input(lse, _NO_LAST)
        dq, dkc, dvc = new_rows(q, q.shape[-1]), kc.new_empty(kc.shape), vc.new_empty(vc.shape)
        dbias = torch.empty(0 if score_bias is None else (*q.shape[:2], kc.shape[2]))
        bias = View() if score_bias is None else self._output(dbias, _NO_ROW)
        gradients = [self._output(t) for t in (dq, dkc, dvc)]
        params = AttendBackwardParams(forward, self._input(dz), *gradients, bias)
        self._launch("attend_backward", params)
        known = [(dq, gradients[0]), (dkc, gradients[1]), (dvc, gradients[2])]
        return self._results(*known, (dbias, None if score_bias is None else bias))

    def _causal_tokens(
        self, q: Tensor, kc: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, numbers: tuple[int, ...]
    ) -> CausalTokens:
        (block_size, window_blocks, per_block), tokens, queries = numbers, k.shape[2], q.shape[2]
        keep = None if key_mask is None else self._upload(key_mask.contiguous())
        earlier = kc.shape[2] - per_block * max(tokens // block_size - window_blocks, 0)
        window = tokens - queries, queries, block_size, window_blocks, earlier, per_block
        return CausalTokens(self._input(k), self._input(v), keep, k.shape[1], tokens, *window)

    def attend_causal(
        self,
        q: Tensor,
        kc: Tensor,
        vc: Tensor,
        k: Tensor,
        v: Tensor,
        score_bias: Tensor | None,
        key_mask: Tensor | None,
        scale: float,
        *numbers: int,
    ) -> tuple[Tensor, ...]:
        self._reset()
        measured = self._attend_params(q, kc, vc, score_bias, scale)
        z, lse = new_rows(q, vc.shape[-1]), torch.empty(q.shape[:-1])
        measured.z, measured.lse = self._output(z), self._output(lse, _NO_LAST)
        self._launch("attend_causal", AttendCausalParams(measured, self._causal_tokens(q, kc, k, v, key_mask, numbers)))
        return self._results((z, measured.z), (lse, measured.lse))

    def attend_causal_backward(
        self,
        dz: Tensor,
        q: Tensor,
        kc: Tensor,
        vc: Tensor,
        k: Tensor,
        v: Tensor,
        score_bias: Tensor | None,
        key_mask: Tensor | None,
        z: Tensor,
        lse: Tensor,
        scale: float,
        *numbers: int,
    ) -> tuple[Tensor, ...]:
        self._reset()
        forward = self._attend_params(q, kc, vc, score_bias, scale)
        forward.z, forward.lse = self._input(z), self._input(lse, _NO_LAST)
        of_rows = [new_rows(t, t.shape[-1]) for t in (q, k, v)]
        gradients = [of_rows[0], kc.new_empty(kc.shape), vc.new_empty(vc.shape), *of_rows[1:]]
        dbias = torch.empty(0 if score_bias is None else (*q.shape[:2], kc.shape[2]))
        bias = View() if score_bias is None else self._output(dbias, _NO_ROW)
        dq, dkc, dvc, dk, dv = views = [self._output(t) for t in gradients]
        measured = AttendBackwardParams(forward, self._input(dz), dq, dkc, dvc, bias)
        tokens = self._causal_tokens(q, kc, k, v, key_mask, numbers)
        self._launch("attend_causal_backward", AttendCausalBackwardParams(measured, tokens, dk, dv))
        known = zip(gradients, views, strict=True)
        return self._results(*known, (dbias, None if score_bias is None else bias))

    def _prefix_params(
        self, data: tuple[Tensor, ...], score_bias: Tensor | None, key_mask: Tensor | None, scale: float, signed: bool
    ) -> PrefixParams:
        q, k, v, phi, kc, _, _ = data
        (batch, heads, tokens, head_dim), (phi_batch, phi_heads) = q.shape, phi.shape[:2]
        bias = None if score_bias is None else score_bias.expand(batch, heads, phi.shape[3])
        keep = None if key_mask is None else self._upload(key_mask.contiguous())
        views = [self._input(x) for x in data[:6]]
        nothing = (View(),) * 5
        return PrefixParams(
            *(*views, self._input(data[6], _NO_ROW), self._input(bias, _NO_ROW), *nothing, keep),
            *(batch, heads, k.shape[1], kc.shape[1], phi_batch, phi_heads),
            *(tokens, phi.shape[3], head_dim, v.shape[3], scale, signed),
        )

    def attend_prefix(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        phi: Tensor,
        kc: Tensor,
        vc: Tensor,
        mass: Tensor,
        score_bias: Tensor | None,
        key_mask: Tensor | None,
        scale: float,
        signed: bool,
    ) -> tuple[Tensor, ...]:
        self._reset()
        params = self._prefix_params((q, k, v, phi, kc, vc, mass), score_bias, key_mask, scale, signed)
        z, lse = new_rows(q, v.shape[-1]), torch.empty(q.shape[:-1])
        ends = self._prefix_outputs(params, z, lse, kc, vc, mass)
        self._launch("attend_prefix", params)
        return self._results((z, params.z), (lse, params.lse), *ends)

    def _prefix_outputs(
        self, params: PrefixParams, z: Tensor | None, lse: Tensor, kc: Tensor, vc: Tensor, mass: Tensor
    ) -> list[tuple[Tensor, View]]:
        """Places for z (None: not wanted), lse and the end of the state; the latter with theirs."""
        if z is not None:
            params.z = self._output(z)
        params.lse = self._output(lse, _NO_LAST)
        ends = [torch.empty(x.shape) for x in (kc, vc, mass)]
        params.kc_end, params.vc_end = self._output(ends[0]), self._output(ends[1])
        params.mass_end = self._output(ends[2], _NO_ROW)
        return list(zip(ends, (params.kc_end, params.vc_end, params.mass_end), strict=True))

    def attend_prefix_backward(
        self,
        dz: Tensor,
        dkc_end: Tensor,
        dvc_end: Tensor,
        dmass_end: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        phi: Tensor,
        kc: Tensor,
        vc: Tensor,
        mass: Tensor,
        score_bias: Tensor | None,
        key_mask: Tensor | None,
        lse: Tensor,
        scale: float,
        signed: bool,
    ) -> tuple[Tensor, ...]:
        self._reset()
        forward = self._prefix_params((q, k, v, phi, kc, vc, mass), score_bias, key_mask, scale, signed)
        forward.lse = self._input(lse, _NO_LAST)
        dq, dk, dv = (new_rows(t, t.shape[-1]) for t in (q, k, v))
        dphi, dkc, dvc = (torch.empty(*x) for x in ((q.shape[0], kc.shape[1], *phi.shape[2:]), kc.shape, vc.shape))
        dmass = torch.empty(0 if signed else mass.shape)
        dbias = torch.empty(0 if score_bias is None else (*q.shape[:2], phi.shape[3]))
        views = [self._output(t) for t in (dq, dk, dv, dphi, dkc, dvc)]
        of_mass = None if signed else self._output(dmass, _NO_ROW)
        of_bias = None if score_bias is None else self._output(dbias, _NO_ROW)
        ends = self._input(dkc_end), self._input(dvc_end), self._input(dmass_end, _NO_ROW)
        params = PrefixBackwardParams(forward, self._input(dz), *ends, *views, of_mass or View(), of_bias or View())
        self._launch("attend_prefix_backward", params)
        known = zip((dq, dk, dv, dphi, dkc, dvc), views, strict=True)
        return self._results(*known, (dmass, of_mass), (dbias, of_bias))

    def decode(self, z: Tensor, S: Tensor, B: Tensor, theta: Tensor, psi: Tensor | None, step: Tensor) -> Tensor:
        self._reset()
        out = new_rows(z, _outputs(theta, psi))
        view = self._output(out)
        params = DecodeParams(self._decoder(S, B, theta, psi, step), self._input(z), view, *z.shape[:3])
        self._launch("decode", params)
        return self._results((out, view))[0]

    def decode_backward(
        self, dc: Tensor, z: Tensor, S: Tensor, B: Tensor, theta: Tensor, psi: Tensor | None, step: Tensor
    ) -> tuple[Tensor, ...]:
        self._reset()
        forward = DecodeParams(self._decoder(S, B, theta, psi, step), self._input(z), View(), *z.shape[:3])
        dz = new_rows(z, z.shape[-1])
        weights = [torch.empty(0 if t is None else t.shape) for t in (S, B, theta, psi, step)]
        addresses = [self._allocate(t.numel() * t.element_size()) if t.numel() else None for t in weights]
        view = self._output(dz)
        self._launch("decode_backward", DecodeBackwardParams(forward, self._input(dc), view, *addresses))
        return self._results((dz, view), *zip(weights, addresses, strict=True))

    def attend_decode(
        self,
        q: Tensor,
        kc: Tensor,
        vc: Tensor,
        score_bias: Tensor | None,
        scale: float,
        S: Tensor,
        B: Tensor,
        theta: Tensor,
        psi: Tensor | None,
        step: Tensor,
        need_z: bool,
    ) -> tuple[Tensor, ...]:
        self._reset()
        attend = self._attend_params(q, kc, vc, score_bias, scale)
        out = new_rows(q, _outputs(theta, psi))
        z = new_rows(q, vc.shape[-1]) if need_z else q.new_empty(0)
        lse, view = torch.empty(q.shape[:-1]), self._output(out)
        attend.lse = self._output(lse, _NO_LAST)
        if need_z:
            attend.z = self._output(z)
        decode = DecodeParams(self._decoder(S, B, theta, psi, step), View(), view, *q.shape[:3])
        self._launch("attend_decode", attend, decode)
        return self._results((out, view), (z, attend.z if need_z else None), (lse, attend.lse))

    def attend_causal_decode(
        self,
        q: Tensor,
        kc: Tensor,
        vc: Tensor,
        k: Tensor,
        v: Tensor,
        score_bias: Tensor | None,
        key_mask: Tensor | None,
        scale: float,
        block_size: int,
        window_blocks: int,
        measurements_per_block: int,
        S: Tensor,
        B: Tensor,
        theta: Tensor,
        psi: Tensor | None,
        step: Tensor,
        need_z: bool,
    ) -> tuple[Tensor, ...]:
        self._reset()
        measured = self._attend_params(q, kc, vc, score_bias, scale)
        out = new_rows(q, _outputs(theta, psi))
        z = new_rows(q, vc.shape[-1]) if need_z else q.new_empty(0)
        lse, view = torch.empty(q.shape[:-1]), self._output(out)
        measured.lse = self._output(lse, _NO_LAST)
        if need_z:
            measured.z = self._output(z)
        tokens = self._causal_tokens(q, kc, k, v, key_mask, (block_size, window_blocks, measurements_per_block))
        decode = DecodeParams(self._decoder(S, B, theta, psi, step), View(), view, *q.shape[:3])
        self._launch("attend_causal_decode", AttendCausalParams(measured, tokens), decode)
        return self._results((out, view), (z, measured.z if need_z else None), (lse, measured.lse))

    def attend_prefix_decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        phi: Tensor,
        kc: Tensor,
        vc: Tensor,
        mass: Tensor,
        score_bias: Tensor | None,
        key_mask: Tensor | None,
        scale: float,
        signed: bool,
        S: Tensor,
        B: Tensor,
        theta: Tensor,
        psi: Tensor | None,
        step: Tensor,
        need_z: bool,
    ) -> tuple[Tensor, ...]:
        self._reset()
        attend = self._prefix_params((q, k, v, phi, kc, vc, mass), score_bias, key_mask, scale, signed)
        out = new_rows(q, _outputs(theta, psi))
        z = new_rows(q, v.shape[-1]) if need_z else q.new_empty(0)
        lse, view = torch.empty(q.shape[:-1]), self._output(out)
        ends = self._prefix_outputs(attend, z if need_z else None, lse, kc, vc, mass)
        decode = DecodeParams(self._decoder(S, B, theta, psi, step), View(), view, *q.shape[:3])
        self._launch("attend_prefix_decode", attend, decode)
        return self._results((out, view), (z, attend.z if need_z else None), (lse, attend.lse), *ends)


def _outputs(theta: Tensor, psi: Tensor | None) -> int:
    return theta.shape[2] if psi is None else psi.shape[1]


OPERATORS = (
    *("project", "project_backward", "renormalise_rows", "project_implicit", "project_implicit_backward"),
    *("attend", "attend_backward", "attend_causal", "attend_causal_backward"),
    *("attend_prefix", "attend_prefix_backward"),
    *("decode", "decode_backward", "attend_decode", "attend_causal_decode", "attend_prefix_decode"),
)


@contextlib.contextmanager
def as_cpu_kernels(ops: EmulatedOps) -> Iterator[None]:
    """Within the context `torch.ops.csat.*` on CPU tensors, and all that is built on it, runs emulated."""
    override = torch.library.Library("csat", "IMPL")
    try:
        for name in OPERATORS:
            override.impl(name, getattr(ops, name), "CPU", allow_override=True)
        yield
    finally:
        override._destroy()
