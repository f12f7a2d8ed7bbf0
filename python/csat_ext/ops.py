"""What torch must know about `torch.ops.csat.*` beyond the kernels: fakes, autograd and autocast rules.

The operators, their shapes and dtypes are listed in docs/architecture.md; arguments are checked at the binding. First
derivatives exist for all but the backward operators; a second derivative raises NotImplementedError, except that
`renormalise_rows` has every one.
What carries no gradient: the log-sum-exp that the attend operators return, the z of those that decode, and the number
of tokens that is the mass of `attend_prefix(..., signed=True)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from csat_ext import _composite
from csat_ext._composite import accumulate_dtype, new_rows, new_token_rows

_csat = torch.ops.csat

# ---- fakes: shapes and dtypes of the results -------------------------------------------------------------------------


def _register_fake(name: str) -> Callable[[Callable[..., Any]], None]:
    """Registers a fake that refuses tensors on different devices, which never reach the checks at the binding."""
    arguments = [argument.name for argument in getattr(_csat, name).default._schema.arguments]

    def register(fake: Callable[..., Any]) -> None:
        def checked(*args: Any) -> Any:
            tensors = [(n, t) for n, t in zip(arguments, args, strict=True) if isinstance(t, Tensor)]
            first, device = tensors[0][0], tensors[0][1].device
            for other, tensor in tensors[1:]:
                if tensor.device != device:
                    raise ValueError(
                        f"csat::{name}: {other} must be on {device}, the device of {first}; got {tensor.device}"
                    )
            return fake(*args)

        torch.library.register_fake(f"csat::{name}", checked)

    return register


@_register_fake("project")
def _(x: Tensor, phi: Tensor, key_mask: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], max(x.shape[1], phi.shape[1]), phi.shape[2], x.shape[3]))


@_register_fake("project_backward")
def _(
    dy: Tensor, x: Tensor, phi: Tensor, key_mask: Tensor | None, need_dx: bool, need_dphi: bool
) -> tuple[Tensor, Tensor]:
    dx = new_rows(x, x.shape[3]) if need_dx else x.new_empty(0)
    return dx, phi.new_empty(phi.shape if need_dphi else 0)


@_register_fake("renormalise_rows")
def _(phi: Tensor, key_mask: Tensor) -> tuple[Tensor, Tensor]:
    shape, dtype = (key_mask.shape[0], *phi.shape[1:3]), accumulate_dtype(phi.dtype)
    return phi.new_empty(shape, dtype=dtype), phi.new_empty(shape, dtype=dtype)


@_register_fake("project_implicit")
def _(
    x: Tensor,
    counts: Tensor | None,
    anchors: Tensor | None,
    ensemble: str,
    rows: int,
    heads: int,
    seed: int,
    layer: int,
) -> Tensor:
    anchor_rows = 0 if anchors is None else anchors.shape[1]
    return x.new_empty((x.shape[0], max(x.shape[1], heads), anchor_rows + rows, x.shape[3]))


@_register_fake("project_implicit_backward")
def _(
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
    return new_token_rows(dy, dy.shape[0], x_heads, tokens, dy.shape[3])


@_register_fake("attend")
def _(q: Tensor, kc: Tensor, vc: Tensor, score_bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[:3], dtype=accumulate_dtype(q.dtype))
    return new_rows(q, vc.shape[3]), lse


@_register_fake("attend_backward")
def _(
    dz: Tensor, q: Tensor, kc: Tensor, vc: Tensor, score_bias: Tensor | None, z: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bias_shape = (0,) if score_bias is None else (*q.shape[:2], kc.shape[2])
    dbias = q.new_empty(bias_shape, dtype=accumulate_dtype(q.dtype))
    return new_rows(q, q.shape[3]), kc.new_empty(kc.shape), vc.new_empty(vc.shape), dbias


@_register_fake("attend_causal")
def _(
    q: Tensor,
    kc: Tensor,
    vc: Tensor,
    k: Tensor,
    v: Tensor,
    score_bias: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    *numbers: int,
) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[:3], dtype=accumulate_dtype(q.dtype))
    return new_rows(q, vc.shape[3]), lse


@_register_fake("attend_causal_backward")
def _(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    bias_shape = (0,) if score_bias is None else (*q.shape[:2], kc.shape[2])
    dbias = q.new_empty(bias_shape, dtype=accumulate_dtype(q.dtype))
    dq, dk, dv = (new_rows(t, t.shape[3]) for t in (q, k, v))
    dkc, dvc = (t.new_empty(t.shape) for t in (kc, vc))
    return dq, dkc, dvc, dk, dv, dbias


@_register_fake("attend_prefix")
def _(
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
    lse = q.new_empty(q.shape[:3], dtype=accumulate_dtype(q.dtype))
    return new_rows(q, v.shape[3]), lse, *(t.new_empty(t.shape) for t in (kc, vc, mass))


@_register_fake("attend_prefix_backward")
def _(
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
    dphi = lse.new_empty((q.shape[0], kc.shape[1], *phi.shape[2:]))
    dmass = lse.new_empty(0 if signed else mass.shape)
    dbias = lse.new_empty((0,) if score_bias is None else (*q.shape[:2], phi.shape[3]))
    dq, dk, dv = (new_rows(t, t.shape[3]) for t in (q, k, v))
    dkc, dvc = (t.new_empty(t.shape) for t in (kc, vc))
    return dq, dk, dv, dphi, dkc, dvc, dmass, dbias


@_register_fake("decode")
def _(z: Tensor, S: Tensor, B: Tensor, theta: Tensor, psi: Tensor | None, step: Tensor) -> Tensor:
    return new_rows(z, _outputs(theta, psi))


def _outputs(theta: Tensor, psi: Tensor | None) -> int:
    """Dv; without a psi it is the identity."""
    return theta.shape[2] if psi is None else psi.shape[1]


@_register_fake("decode_backward")
def _(
    dc: Tensor, z: Tensor, S: Tensor, B: Tensor, theta: Tensor, psi: Tensor | None, step: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulate_dtype(z.dtype)
    dS, dB, dtheta, dpsi, dstep = (
        z.new_empty(0 if t is None else t.shape, dtype=dtype) for t in (S, B, theta, psi, step)
    )
    return new_rows(z, z.shape[3]), dS, dB, dtheta, dpsi, dstep


@_register_fake("attend_decode")
def _(
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
) -> tuple[Tensor, Tensor, Tensor]:
    z = new_rows(q, vc.shape[3]) if need_z else q.new_empty(0)
    return new_rows(q, _outputs(theta, psi)), z, q.new_empty(q.shape[:3], dtype=accumulate_dtype(q.dtype))


@_register_fake("attend_causal_decode")
def _(
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
) -> tuple[Tensor, Tensor, Tensor]:
    z = new_rows(q, vc.shape[3]) if need_z else q.new_empty(0)
    return new_rows(q, _outputs(theta, psi)), z, q.new_empty(q.shape[:3], dtype=accumulate_dtype(q.dtype))


@_register_fake("attend_prefix_decode")
def _(
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
    z = new_rows(q, v.shape[3]) if need_z else q.new_empty(0)
    lse = q.new_empty(q.shape[:3], dtype=accumulate_dtype(q.dtype))
    return new_rows(q, _outputs(theta, psi)), z, lse, *(t.new_empty(t.shape) for t in (kc, vc, mass))


# ---- autograd --------------------------------------------------------------------------------------------------------


def _if_needed(needs: tuple[bool, ...], gradients: tuple[Tensor, ...], inputs: tuple[Any, ...]) -> list[Tensor | None]:
    """Gradients in the dtype of their inputs, None where nobody asked."""
    return [g.to(x.dtype) if need else None for need, g, x in zip(needs, gradients, inputs, strict=True)]


def _project_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _project_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, phi, key_mask = ctx.saved_tensors
    need_dx, need_dphi, _ = ctx.needs_input_grad
    dx, dphi = _csat.project_backward(dy, x, phi, key_mask, need_dx, need_dphi)
    return dx if need_dx else None, dphi if need_dphi else None, None


def _renormalise_rows_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    phi, key_mask = inputs
    factor, mass = output
    ctx.save_for_backward(key_mask, factor, mass)  # phi itself is not needed
    ctx.phi = phi.shape, phi.dtype


def _renormalise_rows_backward(ctx: Any, dfactor: Tensor, dmass: Tensor) -> tuple[Tensor, None]:
    """Rows that average have mass_bj = sum_s keep_bs phi_js and factor_bj = sum_s phi_js / mass_bj: dphi_js = sum over
    the b that share phi of c_bj + keep_bs (dmass_bj - c_bj factor_bj), c = dfactor / mass. Of other rows both are
    constant. Through the saved results it is differentiable again."""
    key_mask, factor, mass = ctx.saved_tensors
    shape, dtype = ctx.phi
    averages = (mass != 0).to(mass.dtype)
    of_all = averages * dfactor / torch.where(mass == 0, 1, mass)
    of_kept, keep = averages * dmass - of_all * factor, key_mask.to(mass.dtype)
    if shape[0] == 1:
        dphi = of_all.sum(0, keepdim=True)[..., None] + torch.einsum("bhm,bn->hmn", of_kept, keep)
    else:
        dphi = of_all[..., None] + of_kept[..., None] * keep[:, None, None]
    return dphi.to(dtype), None


def _project_implicit_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, counts, anchors, ensemble, _, heads, seed, layer = inputs
    ctx.save_for_backward(counts, anchors)  # the map is linear: x itself is not needed
    ctx.settings = (ensemble, heads, seed, layer, x.shape[1], x.shape[2])


def _project_implicit_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx = _csat.project_implicit_backward(dy, *ctx.saved_tensors, *ctx.settings)
    return dx, None, None, None, None, None, None, None


def _attend_gradients(
    needs: tuple[bool, ...], dz: Tensor, saved: tuple[Tensor, ...], scale: float
) -> tuple[Tensor | None, ...]:
    """Gradients of (q, kc, vc, score_bias, scale) from the saved (q, kc, vc, score_bias, z, lse)."""
    q, kc, vc, bias, z, lse = saved
    dq, dkc, dvc, dbias = _csat.attend_backward(dz, q, kc, vc, bias, z, lse, scale)
    if bias is not None and needs[3]:
        return *_if_needed(needs[:3], (dq, dkc, dvc), (q, kc, vc)), dbias.sum_to_size(bias.shape).to(bias.dtype), None
    return *_if_needed(needs[:3], (dq, dkc, dvc), (q, kc, vc)), None, None


def _attend_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, kc, vc, score_bias, ctx.scale = inputs
    z, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, kc, vc, score_bias, z, lse)


def _attend_backward(ctx: Any, dz: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
    return _attend_gradients(ctx.needs_input_grad, dz, ctx.saved_tensors, ctx.scale)


def _attend_causal_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, ctx.numbers = inputs[:7], inputs[7:]
    z, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*tensors, z, lse)


def _attend_causal_gradients(
    needs: tuple[bool, ...], dz: Tensor, saved: tuple[Tensor, ...], numbers: tuple[Any, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of (q, kc, vc, k, v, score_bias, key_mask, *numbers) from the saved (q, .., key_mask, z, lse)."""
    *data, bias, key_mask, z, lse = saved
    *gradients, dbias = _csat.attend_causal_backward(dz, *data, bias, key_mask, z, lse, *numbers)
    of_bias = dbias.sum_to_size(bias.shape).to(bias.dtype) if bias is not None and needs[5] else None
    return *_if_needed(needs[:5], tuple(gradients), tuple(data)), of_bias, *(None,) * 5


def _attend_causal_backward(ctx: Any, dz: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
    return _attend_causal_gradients(ctx.needs_input_grad, dz, ctx.saved_tensors, ctx.numbers)


def _attend_prefix_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale, ctx.signed = inputs
    _, lse, _, _, mass = output
    ctx.mark_non_differentiable(lse, *((mass,) if ctx.signed else ()))  # signed: a number of tokens
    ctx.save_for_backward(*tensors, lse)


def _attend_prefix_gradients(
    needs: tuple[bool, ...], gradients: tuple[Tensor, ...], saved: tuple[Tensor, ...], scale: float, signed: bool
) -> tuple[Tensor | None, ...]:
    """Gradients of (q, k, v, phi, kc, vc, mass, score_bias, key_mask, scale, signed) from those of z and of the state
    behind, and the saved (q, .., key_mask, lse)."""
    *data, bias, key_mask, lse = saved
    *found, dbias = _csat.attend_prefix_backward(*gradients, *data, bias, key_mask, lse, scale, signed)
    found[3] = found[3].sum_to_size(data[3].shape)  # of phi: over what it was broadcast to
    of_bias = dbias.sum_to_size(bias.shape).to(bias.dtype) if bias is not None and needs[7] else None
    wanted = *needs[:6], needs[6] and not signed
    return *_if_needed(wanted, tuple(found), tuple(data)), of_bias, None, None, None


def _attend_prefix_backward(
    ctx: Any, dz: Tensor, _dlse: Tensor, dkc: Tensor, dvc: Tensor, dmass: Tensor
) -> tuple[Tensor | None, ...]:
    gradients = dz, dkc, dvc, dmass
    return _attend_prefix_gradients(ctx.needs_input_grad, gradients, ctx.saved_tensors, ctx.scale, ctx.signed)


def _decode_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _decode_backward(ctx: Any, dc: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # asked for once, as everywhere: hooks unpack at every look, and checkpoints at one
    return tuple(_if_needed(ctx.needs_input_grad, _csat.decode_backward(dc, *saved), saved))


def _attend_decode_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, kc, vc, score_bias, ctx.scale, *weights, ctx.need_z = inputs
    _, z, lse = output
    ctx.mark_non_differentiable(z, lse)
    ctx.save_for_backward(q, kc, vc, score_bias, z, lse, *weights)


def _attend_decode_backward(ctx: Any, dc: Tensor, _dz: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
    q, kc, vc, bias, z, lse, *weights = ctx.saved_tensors
    if not ctx.need_z:  # one more forward pass instead of the memory
        z, lse = _csat.attend(q, kc, vc, bias, ctx.scale)
    dz, *dweights = _csat.decode_backward(dc, z, *weights)
    needs = ctx.needs_input_grad
    of_attend: tuple[Tensor | None, ...] = (None,) * 5
    if any(needs[:4]):
        of_attend = _attend_gradients(needs[:4], dz, (q, kc, vc, bias, z, lse), ctx.scale)
    return *of_attend, *_if_needed(needs[5:10], tuple(dweights), tuple(weights)), None


def _attend_causal_decode_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    tensors, ctx.numbers, weights, ctx.need_z = inputs[:7], inputs[7:11], inputs[11:16], inputs[16]
    _, z, lse = output
    ctx.mark_non_differentiable(z, lse)
    ctx.save_for_backward(*tensors, z, lse, *weights)


def _attend_causal_decode_backward(ctx: Any, dc: Tensor, _dz: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    tensors, (z, lse), weights = saved[:7], saved[7:9], saved[9:]
    if not ctx.need_z:  # one more forward pass instead of the memory
        z, lse = _csat.attend_causal(*tensors, *ctx.numbers)
    dz, *dweights = _csat.decode_backward(dc, z, *weights)
    needs = ctx.needs_input_grad
    of_attend: tuple[Tensor | None, ...] = (None,) * 11
    if any(needs[:6]):
        of_attend = _attend_causal_gradients(needs[:6], dz, (*tensors, z, lse), ctx.numbers)
    return *of_attend, *_if_needed(needs[11:16], tuple(dweights), tuple(weights)), None


def _attend_prefix_decode_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, (ctx.scale, ctx.signed), weights, ctx.need_z = inputs[:9], inputs[9:11], inputs[11:16], inputs[16]
    _, z, lse, _, _, mass = output
    ctx.mark_non_differentiable(z, lse, *((mass,) if ctx.signed else ()))
    ctx.save_for_backward(*tensors, lse, z, *weights)


def _attend_prefix_decode_backward(
    ctx: Any, dc: Tensor, _dz: Tensor, _dlse: Tensor, dkc: Tensor, dvc: Tensor, dmass: Tensor
) -> tuple[Tensor | None, ...]:
    everything = ctx.saved_tensors
    saved, z, weights = everything[:10], everything[10], everything[11:]
    if not ctx.need_z:  # one more forward pass instead of the memory
        z = _csat.attend_prefix(*saved[:9], ctx.scale, ctx.signed)[0]
    dz, *dweights = _csat.decode_backward(dc, z, *weights)
    needs = ctx.needs_input_grad
    of_attend: tuple[Tensor | None, ...] = (None,) * 11
    if any(needs[:8]):
        of_attend = _attend_prefix_gradients(needs[:8], (dz, dkc, dvc, dmass), saved, ctx.scale, ctx.signed)
    return *of_attend, *_if_needed(needs[11:16], tuple(dweights), tuple(weights)), None


def _no_second_derivative(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(
            f"csat::{name} has no derivative: csat operators are differentiable once; csat_ext.reference at any order"
        )

    return backward


torch.library.register_autograd("csat::project", _project_backward, setup_context=_project_context)
torch.library.register_autograd(
    "csat::renormalise_rows", _renormalise_rows_backward, setup_context=_renormalise_rows_context
)
torch.library.register_autograd(
    "csat::project_implicit", _project_implicit_backward, setup_context=_project_implicit_context
)
torch.library.register_autograd("csat::attend", _attend_backward, setup_context=_attend_context)
torch.library.register_autograd("csat::attend_causal", _attend_causal_backward, setup_context=_attend_causal_context)
torch.library.register_autograd("csat::attend_prefix", _attend_prefix_backward, setup_context=_attend_prefix_context)
torch.library.register_autograd("csat::decode", _decode_backward, setup_context=_decode_context)
torch.library.register_autograd("csat::attend_decode", _attend_decode_backward, setup_context=_attend_decode_context)
torch.library.register_autograd(
    "csat::attend_causal_decode", _attend_causal_decode_backward, setup_context=_attend_causal_decode_context
)
torch.library.register_autograd(
    "csat::attend_prefix_decode", _attend_prefix_decode_backward, setup_context=_attend_prefix_decode_context
)
for _name in (
    *("project_backward", "project_implicit_backward"),
    *("attend_backward", "attend_causal_backward", "attend_prefix_backward", "decode_backward"),
):
    torch.library.register_autograd(f"csat::{_name}", _no_second_derivative(_name))

# ---- autocast: data in the autocast dtype, parameters as they are ----------------------------------------------------

# The arguments cast under autocast: x, q, kc, vc, k, v, z. float64 is left alone, as everywhere in torch's autocast.
_AUTOCAST_ARGUMENTS = {
    **{"project": 1, "project_implicit": 1, "decode": 1},
    **{"attend": 3, "attend_decode": 3, "attend_causal": 5, "attend_causal_decode": 5},
    **{"attend_prefix": 3, "attend_prefix_decode": 3},
}


def _autocast_rule(op: Any, device_type: str, leading: int) -> Callable[..., Any]:
    key = getattr(torch._C.DispatchKey, f"Autocast{device_type.upper()}")

    def rule(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        data = [t if t.dtype == torch.float64 or not t.is_floating_point() else t.to(dtype) for t in args[:leading]]
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return op(*data, *args[leading:])

    return rule


_AUTOCAST = torch.library.Library("csat", "IMPL")
for _name, _leading in _AUTOCAST_ARGUMENTS.items():
    for _device_type in ("cpu", "cuda"):
        _rule = _autocast_rule(getattr(_csat, _name).default, _device_type, _leading)
        _AUTOCAST.impl(_name, _rule, f"Autocast{_device_type.upper()}")
del _composite  # imported for its registrations
