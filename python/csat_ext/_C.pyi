"""CSAT operators on the CPU; every function is torch.ops.csat.* of the same name (docs/architecture.md)."""

from typing import Any

from torch import Tensor

def project(x: Tensor, phi: Tensor, key_mask: Tensor | None) -> Tensor: ...
def project_backward(
    dy: Tensor, x: Tensor, phi: Tensor, key_mask: Tensor | None, need_dx: bool, need_dphi: bool
) -> tuple[Tensor, Tensor]: ...
def renormalise_rows(phi: Tensor, key_mask: Tensor) -> tuple[Tensor, Tensor]: ...
def project_implicit(
    x: Tensor,
    counts: Tensor | None,
    anchors: Tensor | None,
    ensemble: str,
    rows: int,
    heads: int,
    seed: int,
    layer: int,
) -> Tensor: ...
def project_implicit_backward(
    dy: Tensor,
    counts: Tensor | None,
    anchors: Tensor | None,
    ensemble: str,
    heads: int,
    seed: int,
    layer: int,
    x_heads: int,
    tokens: int,
) -> Tensor: ...
def attend(q: Tensor, kc: Tensor, vc: Tensor, score_bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]: ...
def attend_backward(
    dz: Tensor, q: Tensor, kc: Tensor, vc: Tensor, score_bias: Tensor | None, z: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
def attend_causal(
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
) -> tuple[Tensor, Tensor]: ...
def attend_causal_backward(
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
    block_size: int,
    window_blocks: int,
    measurements_per_block: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]: ...
def attend_prefix(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]: ...
def attend_prefix_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]: ...
def decode(z: Tensor, S: Tensor, B: Tensor, theta: Tensor, psi: Tensor | None, step: Tensor) -> Tensor: ...
def decode_backward(
    dc: Tensor, z: Tensor, S: Tensor, B: Tensor, theta: Tensor, psi: Tensor | None, step: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]: ...
def attend_decode(
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
) -> tuple[Tensor, Tensor, Tensor]: ...
def attend_prefix_decode(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]: ...
def can_run(
    kernel: str,
    family: str,
    sizes: dict[str, int],
    dtype: str,
    weights: str,
    capability: int,
    shared_bytes: int,
    wgmma_code: bool = True,
) -> tuple[str | None, int]: ...
def build_info() -> dict[str, Any]: ...
