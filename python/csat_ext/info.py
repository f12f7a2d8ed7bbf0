"""Which kernels run, and why: the text of `python -m csat_ext info`, and `explain` for one problem."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import Tensor

    from csat_ext.functional import Decoder, Phi

# Families of CUDA kernels in the order of preference (csrc/csat/limits.h).
FAMILIES = {
    "wgmma": "Hopper's warpgroup products",
    "mma": "tensor cores",
    "pair": "attend or attend_causal, then decode, in two kernels",
    "simt": "float32 arithmetic",
}
# Shared memory that a block may have, by compute capability (CUDA programming guide, "Technical Specifications").
_SHARED_BYTES = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}


def info() -> str:
    """`build_facts()` as aligned lines; the reason in one line when the compiled library is missing."""
    try:
        from csat_ext._library import build_facts
    except ImportError as error:
        return str(error)
    facts = build_facts()
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())


@dataclass(frozen=True)
class KernelChoice:
    """What runs one operator.

    op: name in `torch.ops.csat`. family: a key of `FAMILIES`, "cublas", or "none" where nothing takes the problem.
    refused: (family, reason) of every family that comes before the chosen one. shared_bytes: of a block.
    """

    op: str
    family: str
    refused: tuple[tuple[str, str], ...] = ()
    shared_bytes: int = 0

    def __str__(self) -> str:
        line = f"{self.op}: {self.family}"
        if self.family in FAMILIES:
            line += f" ({FAMILIES[self.family]})"
        return "\n".join([line, *(f"  not {family}: {reason}" for family, reason in self.refused)])


@dataclass(frozen=True)
class Explanation:
    """The operators of one `csat_attention` call and of its backward pass, on one device."""

    device: str
    choices: tuple[KernelChoice, ...]

    def __str__(self) -> str:
        return "\n".join([f"on {self.device}", *map(str, self.choices)])

    def __iter__(self) -> Iterator[KernelChoice]:
        return iter(self.choices)

    def __getitem__(self, op: str) -> KernelChoice:
        for choice in self.choices:
            if choice.op == op:
                return choice
        raise KeyError(f"{op!r} is not among {[choice.op for choice in self.choices]}")


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    phi_k: Phi | None = None,
    *,
    decoder: Decoder | None = None,
    feature_sensing: Tensor | None = None,
    causal: str | None = None,
    block_size: int | None = None,
    measurements_per_block: int | None = None,
    window_blocks: int = 0,
    device: str | torch.device | None = None,
) -> Explanation:
    """Which kernels `csat_attention` with these arguments runs, and why not faster ones.

    Only shapes and dtypes are looked at: tensors may be on the "meta" device.

    Args:
        query, key, value, phi_k, decoder, feature_sensing, causal, block_size, measurements_per_block, window_blocks:
            as `csat_attention` takes them.
        device: where it would run: None is the query's own device; "sm_80", "sm_90", .. is a GPU of that compute
            capability, which need not be there.

    Raises:
        TypeError: no phi_k without the block form; a query, key or value that `csat_attention` takes of no dtype.
        ValueError: an unknown device; a query, key or value without four axes; sizes of a block that do not fit.
    """
    import torch

    from csat_ext.functional import check_form

    check_form(causal, False, block_size, measurements_per_block, window_blocks, False)
    _check_inputs(query=query, key=key, value=value)
    m, n = _measured(phi_k, causal, block_size, measurements_per_block)
    where, gpu = _device(query.device if device is None else device)
    if not gpu:
        return Explanation(where, ())
    attend = {None: "attend", "block": "attend_causal", "prefix": "attend_prefix"}[causal]
    if query.dtype == torch.float64:
        return Explanation(where, (KernelChoice(attend, "none", (("simt", "float64 belongs to the CPU"),)),))
    rank = value.shape[3] if feature_sensing is None else feature_sensing.shape[-2]
    sizes = dict(zip(("B", "H", "Nq", "D"), query.shape, strict=True))
    sizes |= {"Hk": key.shape[1], "M": m, "Hn": key.shape[1], "N": key.shape[2]}
    if causal == "block":  # the blocks that leave the window
        sizes["M"] = m * max(key.shape[2] // n - window_blocks, 0)
    dtypes = {"dtype": _name(query.dtype), "weights": _name(query.dtype)}
    sparse = decoder is not None and hasattr(decoder, "psi")
    if sparse:
        S, B, theta, psi, _ = decoder.with_head_axis()  # type: ignore[union-attr]
        sizes |= {"Hd": S.shape[0], "T": theta.shape[1], "Ts": S.shape[1], "Tb": B.shape[1], "P": S.shape[2]}
        sizes |= {"Dv": S.shape[2] if psi is None else psi.shape[1]}
        dtypes["weights"] = _name(S.dtype)

    def choose(op: str) -> KernelChoice:
        # The causal forms sense the rows that they have attended to.
        features = value.shape[3] if causal is not None and op.startswith("attend") else rank
        return _choose(op, sizes=sizes | {"R": features}, **gpu, **dtypes)

    fused = sparse and (causal is None or feature_sensing is None)
    choices = [] if causal == "prefix" else [_projection(phi_k, query.dtype)]
    choices.append(choose(f"{attend}_decode" if fused else attend))
    if choices[-1].family == "pair":
        choices += [choose(attend), choose("decode")]
    if sparse and not fused:
        choices += [choose("decode")]
    choices += [choose(f"{attend}_backward"), *([choose("decode_backward")] if sparse else [])]
    return Explanation(where, tuple(choices))


def _check_inputs(**inputs: Tensor) -> None:
    """What is read of them here: `csat_attention` checks how they fit together."""
    import torch

    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        if value.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise TypeError(f"{name} has dtype {value.dtype}; accepted: float32, bfloat16, float16 or float64 (CPU)")
        if value.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; accepted: (batch, heads, tokens, features)")


def _measured(phi: Phi | None, causal: str | None, block_size: int | None, per_block: int | None) -> tuple[int, int]:
    """Measurements and tokens of a phi: r and Bk of a block."""
    from csat_ext.implicit import ImplicitMeasurement

    if causal == "prefix" and phi is not None and not isinstance(phi, ImplicitMeasurement):
        return phi.shape[-1], phi.shape[-2]
    if phi is None or causal == "prefix":
        if causal != "block":
            accepted = "a torch.Tensor" + ("" if causal else " or an ImplicitMeasurement")
            raise TypeError(f"phi_k must be {accepted}, got {type(phi).__name__}")
        if block_size is None or per_block is None or per_block > block_size:
            raise ValueError(
                "causal='block' without phi_k needs 1 <= measurements_per_block <= block_size, got "
                f"measurements_per_block = {per_block}, block_size = {block_size}"
            )
        return per_block, block_size
    m, n = (phi.m, phi.n) if isinstance(phi, ImplicitMeasurement) else phi.shape[-2:]
    for name, given, size in (("block_size", block_size, n), ("measurements_per_block", per_block, m)):
        if given not in (None, size):
            raise ValueError(f"{name} = {given} came with a phi_k of {size}: they must agree")
    return m, n


def _choose(op: str, **problem: Any) -> KernelChoice:
    from csat_ext._library import _C

    refused: list[tuple[str, str]] = []
    for family in FAMILIES:
        reason, shared_bytes = _C.can_run(kernel=op, family=family, **problem)
        if reason is None:
            return KernelChoice(op, family, tuple(refused), shared_bytes)
        if family != "pair" or (op.startswith("attend") and op.endswith("_decode")):
            refused.append((family, reason))
    return KernelChoice(op, "none", tuple(refused))


def _projection(phi: Phi | None, dtype: torch.dtype) -> KernelChoice:
    """Of a phi; None are the pools of a block."""
    from csat_ext.implicit import ImplicitMeasurement

    if phi is not None and not isinstance(phi, ImplicitMeasurement):
        return KernelChoice("project", "cublas")
    ensemble = "pool" if phi is None else phi.ensemble
    if ensemble != "rademacher":
        return KernelChoice("project_implicit", "simt", (("mma", f"{ensemble} has no matrix to multiply by"),))
    if dtype.itemsize == 2:
        return KernelChoice("project_implicit", "mma")
    return KernelChoice("project_implicit", "simt", (("mma", f"{_name(dtype)}: the tensor cores take bf16 and fp16"),))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _device(device: str | torch.device) -> tuple[str, dict[str, int]]:
    """Its name, and what `_C.can_run` asks of a GPU: nothing of what has no CUDA kernels."""
    import torch

    from csat_ext._library import CUDA, backend_of

    name = str(device)
    named = {f"sm_{capability}{letter}": capability for capability in _SHARED_BYTES for letter in ("", "a")}
    if name in named:
        return name, {"capability": named[name], "shared_bytes": _SHARED_BYTES[named[name]] * 1024}
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        accepted = f"{[f'sm_{c}' for c in _SHARED_BYTES]} and torch devices"
        raise ValueError(f"device {name!r}: accepted are {accepted}") from error
    if kind != "cuda" or not CUDA.kernels or not torch.cuda.is_available():
        return f"{name}: {backend_of(kind)}", {}
    properties = torch.cuda.get_device_properties(torch.device(name))
    return f"{name} ({properties.name})", {
        "capability": 10 * properties.major + properties.minor,
        "shared_bytes": int(properties.shared_memory_per_block_optin),  # type: ignore[attr-defined]
        "wgmma_code": "90a" in torch.ops.csat.cuda_build_info(),
    }
