"""`CSATCache`: any split of a sequence gives the rows of the parallel form, from the memory it promises."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from test_causal import BK, DV, FORMS, HK, B, D, H, M, N, R, block_phi, name_of, prefix_phi, some_kept, tokens
from torch import Tensor

from csat_ext import CSATCache, LinearDecoder, MeasurementStream, csat_attention


def cache_of(form: str, **more: Any) -> tuple[CSATCache, Tensor]:
    _, make_phi, options = FORMS[form]
    phi = make_phi()
    of_cache = {"phi_k": phi} if name_of(form) == "block" else {}
    return CSATCache(name_of(form), **of_cache, **options, **more), phi


def stepped(cache: CSATCache, phi: Tensor, lengths: list[int], mask: Tensor | None = None, **changes: Any) -> Tensor:
    rows, start, (q, k, v) = [], 0, changes.get("tokens", tokens())
    for count in lengths:
        at = slice(start, start + count)
        phi_here = phi[:, :, at] if cache.causal == "prefix" else None
        call = cache.prefill if start == 0 else cache.step
        mask_here = None if mask is None or not bool((~mask[:, at]).any()) else mask[:, at]
        rows.append(call(q[:, :, at], k[:, :, at], v[:, :, at], phi_here, key_mask=mask_here))
        start += count
    return torch.cat(rows, 2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("lengths", [[1] * N, [11] + [1] * (N - 11), [BK, 1, 20, 3, 5], [N]], ids=str)
def test_steps_give_the_parallel_form(form: str, masked: bool, lengths: list[int]) -> None:
    weight = LinearDecoder(torch.randn(H, 4, DV, dtype=torch.float64))
    more = {"decoder": weight, "feature_sensing": torch.randn(HK, 4, DV, dtype=torch.float64), "scale": 0.3}
    mask = some_kept() if masked else None
    cache, phi = cache_of(form, **more)
    got = stepped(cache, phi, lengths, mask)
    expected = csat_attention(*tokens(), phi, causal=name_of(form), key_mask=mask, **FORMS[form][2], **more)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
    assert cache.length == N


def test_the_pool_of_blocks_steps_as_well() -> None:
    options: dict[str, Any] = {"block_size": BK, "measurements_per_block": R, "window_blocks": 1}
    mask = some_kept()
    got = stepped(CSATCache("block", **options), torch.empty(0), [5] + [1] * (N - 5), mask)
    expected = csat_attention(*tokens(), causal="block", key_mask=mask, **options)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["block", "prefix"])
def test_lower_precision_steps_as_the_parallel_form(form: str, dtype: torch.dtype) -> None:
    inputs = tokens(dtype=dtype)
    phi = (block_phi() if form == "block" else prefix_phi()).float()
    cache = CSATCache(form, *([phi] if form == "block" else []))
    got = stepped(cache, phi, [9] + [1] * (N - 9), tokens=inputs)
    expected = csat_attention(*inputs, phi, causal=form)
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected)  # at most the rounding of the dtype apart: sums in another order


def test_memory_is_what_the_docstring_says() -> None:
    window = 1
    block, phi = CSATCache("block", block_phi(), window_blocks=window), torch.empty(0)
    stepped(block, phi, [N])
    finished = N // BK - window
    tokens_kept = N - finished * BK
    entries = B * finished * R * (HK * (D + DV) + H)
    assert block.nbytes == 8 * (entries + B * HK * tokens_kept * (D + DV))
    prefix = CSATCache("prefix")
    sizes = {prefix.nbytes for _ in range(N) if stepped_once(prefix)}
    assert sizes == {8 * B * HK * M * (D + DV + 1)}


def stepped_once(cache: CSATCache) -> bool:
    q, k, v = tokens(1)
    return cache.step(q, k, v, prefix_phi(n=1)).shape == (B, H, 1, DV)


@pytest.mark.parametrize("form", FORMS)
def test_beams_clones_and_checkpoints_go_on_from_where_they_were(form: str) -> None:
    cache, phi = cache_of(form)
    stepped(cache, phi, [21])
    q, k, v = (x[:, :, 21:] for x in tokens())
    rest = phi[:, :, 21:] if cache.causal == "prefix" else None
    other, loaded = cache.clone(), cache_of(form)[0]
    file = io.BytesIO()
    torch.save(cache.state_dict(), file)
    file.seek(0)
    loaded.load_state_dict(torch.load(file))
    expected = cache.step(q, k, v, rest)
    assert torch.equal(other.clone().step(q, k, v, rest), expected) and torch.equal(
        loaded.step(q, k, v, rest), expected
    )
    index = torch.tensor([1, 0, 1])
    other.reorder(index)
    beams = rest if rest is None or rest.shape[0] == 1 else rest[index]
    torch.testing.assert_close(other.step(q[index], k[index], v[index], beams), expected[index], rtol=1e-10, atol=1e-12)


def test_what_does_not_continue_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="causal = None came"):
        CSATCache(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a phi comes with its tokens"):
        CSATCache("prefix", prefix_phi())
    cache, prefix = CSATCache("block", block_phi()), CSATCache("prefix")
    q, k, v = tokens()
    with pytest.raises(ValueError, match="phi came, None is accepted with causal='block'"):
        cache.step(q, k, v, prefix_phi())
    cache.prefill(q, k, v)
    with pytest.raises(ValueError, match="prefill takes the first tokens, 37 have come"):
        cache.prefill(q, k, v)
    with pytest.raises(ValueError, match=r"key has shape \(1, 2, 37, 8\)"):
        cache.step(q[:1], k[:1], v[:1])
    with pytest.raises(TypeError, match="the tokens before had torch"):
        cache.step(q.float(), k.float(), v.float())
    with pytest.raises(TypeError, match=r"^phi must be a"):  # phi_k is its name in csat_attention
        prefix.prefill(q, k, v)
    with pytest.raises(ValueError, match=r"^phi has shape \(.*\); accepted"):
        prefix.step(q, k, v, prefix_phi(n=1))
    with pytest.raises(ValueError, match=r"^phi has negative entries"):
        prefix.step(q, k, v, -prefix_phi())
    assert prefix.length == 0
    with pytest.raises(ValueError, match="state_dict has kind = 'CSATCache', causal = 'block'"):
        prefix.load_state_dict(cache.state_dict())
    with pytest.raises(ValueError, match="accepted: an int and"):
        cache.load_state_dict(cache.state_dict() | {"length": 3, "rows": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"state_dict has kind = 'CSATCache'.*accepted: kind = 'MeasurementStream'"):
        MeasurementStream().load_state_dict(CSATCache("prefix").state_dict())
    with pytest.raises(ValueError, match=r"signed = True; accepted: .*signed = False"):
        MeasurementStream().load_state_dict(MeasurementStream(signed=True).state_dict())
    with pytest.raises(ValueError, match=r"window_blocks = 1.*accepted: .*window_blocks = 0"):
        CSATCache("block", block_phi()).load_state_dict(CSATCache("block", block_phi(), window_blocks=1).state_dict())
    with pytest.raises(ValueError, match=f"key has {H} heads, the tokens before had {HK}"):
        cache.step(q, q, v)
    with pytest.raises(TypeError, match="index must be a tensor of one dimension"):
        cache.reorder([0, 1])  # type: ignore[arg-type]


# ---- MeasurementStream -----------------------------------------------------------------------------------------------


def frames(signed: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries of another length, keys, values, and the phi of every token."""
    q, k, v = tokens(dtype=dtype)
    phi = torch.randn(B, HK, N, M).sign() if signed else torch.rand(B, HK, N, M)
    return q[:, :, :7], k, v, phi.to(torch.float32 if dtype != torch.float64 else dtype)


def streamed(k: Tensor, v: Tensor, phi: Tensor, mask: Tensor | None, signed: bool, *sizes: int) -> MeasurementStream:
    stream = MeasurementStream(signed=signed)
    for at in torch.arange(N).split(list(sizes)):
        stream.append(k[:, :, at], v[:, :, at], phi[:, :, at], key_mask=None if mask is None else mask[:, at])
    return stream


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_a_stream_is_attention_over_the_whole_sequence(signed: bool, masked: bool) -> None:
    q, k, v, phi = frames(signed)
    mask = some_kept() if masked else torch.ones(B, N, dtype=torch.bool)
    decoder, bias = LinearDecoder(torch.randn(H, DV, DV, dtype=torch.float64)), torch.randn(H, M, dtype=torch.float64)
    stream = streamed(k, v, phi, mask if masked else None, signed, 11, 1, 20, N - 32)
    got = stream.attend(q, decoder=decoder, scale=0.3, score_bias=bias)
    kept = phi * mask[:, None, :, None]  # (B, Hk, N, M)
    mass = mask.sum(1).double()[:, None, None].expand(B, HK, M) if signed else kept.sum(2)
    whole = (kept / (mass.sqrt() if signed else mass).unsqueeze(2)).mT.contiguous()
    log_mass = torch.zeros(B, H, M, dtype=torch.float64) if signed else mass.log().repeat_interleave(H // HK, 1)
    expected = csat_attention(q, k, v, whole, decoder=decoder, scale=0.3, score_bias=(bias + log_mass).contiguous())
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
    assert stream.length == N


def test_a_stream_sums_in_float32_under_autocast() -> None:
    """In bfloat16 256 + 1 is 256."""
    one, stream = torch.ones(1, 1, 1, 1), MeasurementStream()
    for _ in range(400):
        with torch.autocast("cpu", torch.bfloat16):
            stream.append(one, one.bfloat16(), torch.ones(1, 1))
    assert [x.dtype for x in stream.measured()] == [torch.float32] * 3
    assert float(stream.measured()[1]) == 1.0 and stream.length == 400
    with pytest.raises(ValueError, match="key has 2 heads, the tokens before had 1"):
        stream.append(one.expand(1, 2, 1, 1), one.expand(1, 2, 1, 1), torch.ones(1, 1))


@pytest.mark.parametrize("form", ["block", "prefix"])
def test_steps_under_autocast(form: str) -> None:
    q, k, v = tokens(dtype=torch.float32)
    cache = CSATCache("block", block_phi().float()) if form == "block" else CSATCache("prefix")
    rows = []
    for at in (slice(0, 20), slice(20, 21), slice(21, N)):
        phi = None if form == "block" else prefix_phi().float()[:, :, at]
        with torch.autocast("cpu", torch.bfloat16):
            rows.append(cache.step(q[:, :, at], k[:, :, at], v[:, :, at], phi))
    arguments = {"causal": form, "phi_k": (block_phi() if form == "block" else prefix_phi()).float()}
    with torch.autocast("cpu", torch.bfloat16):
        whole = csat_attention(q, k, v, **arguments)
    torch.testing.assert_close(torch.cat(rows, 2), whole, rtol=2e-2, atol=2e-2)


def test_a_stream_forgets_its_tokens_and_goes_on_from_a_checkpoint() -> None:
    q, k, v, phi = frames(False)
    stream = streamed(k, v, phi, None, False, N)
    assert stream.nbytes == B * HK * M * (D + DV + 1) * 8
    other = MeasurementStream()
    other.load_state_dict(stream.clone().state_dict())
    before = stream.attend(q)
    other.append(k, v, phi)
    assert other.nbytes == stream.nbytes and other.length == 2 * N
    torch.testing.assert_close(stream.attend(q), before, rtol=0, atol=0)
    other.reorder(torch.tensor([1, 0]))
    torch.testing.assert_close(other.attend(q.flip(0)), streamed_twice(q, k, v, phi).flip(0))


def streamed_twice(q: Tensor, k: Tensor, v: Tensor, phi: Tensor) -> Tensor:
    stream = streamed(k, v, phi, None, False, N)
    stream.append(k, v, phi)
    return stream.attend(q)


def test_a_stream_has_gradients_and_takes_low_precision() -> None:
    q, k, v, phi = (x.requires_grad_() for x in frames(False, torch.bfloat16))
    out = streamed(k, v, phi, None, False, 20, N - 20).attend(q)
    grads = torch.autograd.grad(out.float().square().sum(), (q, k, v, phi))
    assert out.dtype == torch.bfloat16 and all(float(g.abs().max()) > 0 for g in grads)
    wide = streamed(k.double(), v.double(), phi.double(), None, False, N).attend(q.double())
    torch.testing.assert_close(out.double(), wide, rtol=0.03, atol=0.03)


def test_a_stream_of_masked_tokens_is_nothing_and_wrong_tokens_are_refused_by_name() -> None:
    q, k, v, phi = frames(False)
    none = torch.zeros(B, N, dtype=torch.bool)
    junk = torch.full_like(k, float("nan"))
    assert not streamed(junk, v, phi, none, False, N).attend(q).any()
    stream = MeasurementStream()
    with pytest.raises(ValueError, match="no token"):
        stream.attend(q)
    with pytest.raises(ValueError, match=r"^phi has negative entries"):
        stream.append(k, v, -phi)
    with pytest.raises(ValueError, match=r"^phi has shape"):
        stream.append(k, v, phi[:, :, 1:])
    stream.append(k, v, phi)
    with pytest.raises(ValueError, match=f"{M - 1} measurements, the tokens before had {M}"):
        stream.append(k, v, phi[..., 1:])
    with pytest.raises(ValueError, match="had batch size"):
        stream.append(k[:1], v[:1], phi[:1])
    with pytest.raises(ValueError, match="key_mask has shape"):
        stream.append(k, v, phi, key_mask=none[:, 1:])
    assert stream.length == N


@pytest.mark.parametrize("form", FORMS)
def test_nothing_beside_what_is_kept_stays_in_memory(form: str) -> None:
    """A view of a long prompt would hold all of it."""
    cache, phi = cache_of(form)
    stepped(cache, phi, [N])
    assert cache._state is not None
    assert sum(t.untyped_storage().nbytes() for t in cache._state if t is not None) == cache.nbytes
