"""`CSATAttention`: starts as what it approximates, keeps seeds instead of Phi, and round-trips bit for bit."""

from __future__ import annotations

import copy
import dataclasses
import io
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from csat_ext import CSATAttention, CSATConfig, SparseDecoder, csat_attention, measurement_matrix, reference
from csat_ext.config import DECODERS
from csat_ext.measurements import ENSEMBLES
from csat_ext.module import parameter_groups

E, H = 24, 3


def attention(kv_dim: int | None = None, **config: object) -> CSATAttention:
    torch.manual_seed(0)
    return CSATAttention(E, H, CSATConfig.from_dict({"measurements": 8, **config}), kv_dim)


def exact(module: CSATAttention, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    q, k, v = (module._heads(p(t)) for p, t in ((module.q_proj, x), (module.k_proj, context), (module.v_proj, context)))
    return module.out_proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_decoder_starts_as_the_identity(decoder: str) -> None:
    x = torch.randn(2, 20, E)
    plain, decoded = attention(decoder="none"), attention(decoder=decoder)
    torch.testing.assert_close(decoded(x), plain(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dictionary", ["dct", "haar", "overcomplete", "learned"])
def test_tight_frames_start_as_the_identity(dictionary: str) -> None:
    x = torch.randn(2, 20, E)
    out = attention(dictionary=dictionary)(x)
    torch.testing.assert_close(out, attention(decoder="none")(x), rtol=1e-4, atol=1e-5)


def test_the_random_dictionary_comes_from_the_seed() -> None:
    x, module = torch.randn(2, 20, E), attention(dictionary="random", atoms=11, seed=4)
    other = attention(dictionary="random", atoms=11, seed=5)
    assert not torch.equal(other(x), module(x))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))


@pytest.mark.parametrize("decoder", [d for d in DECODERS if d != "none"])
def test_every_decoder_takes_sensed_features_and_learns_the_sensing(decoder: str) -> None:
    module = attention(decoder=decoder, feature_rank=4)
    rows = module.feature_sensing.detach()
    torch.testing.assert_close(rows @ rows.mT, torch.eye(4).expand(H, 4, 4), rtol=0, atol=1e-5)
    module(torch.randn(2, 20, E)).square().mean().backward()
    assert module.feature_sensing.grad is not None and bool(module.feature_sensing.grad.isfinite().all())
    assert float(module.feature_sensing.grad.abs().max()) > 0


@pytest.mark.parametrize("ensemble", ENSEMBLES)
@pytest.mark.parametrize("masked", [False, True])
def test_every_ensemble_trains(ensemble: str, masked: bool) -> None:
    learned = {"learned": True, "length": 20} if ensemble == "learned" else {}
    module, x = attention(ensemble=ensemble, **learned), torch.randn(2, 20, E)
    mask = torch.arange(20) < torch.tensor([[20], [13]]) if masked else None
    if mask is not None:
        x[1, 13:] = torch.nan
    out = module(torch.nan_to_num(x), x, key_mask=mask)
    out.square().mean().backward()
    used = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    assert {"gain", "step", "decoder_w", "q_proj.weight"} <= set(used)
    for name, grad in used.items():
        if name.startswith(("k_proj.weight", "v_proj.weight")):
            continue  # the input itself is NaN there: Linear's own weight gradient is not ours to save
        assert bool(grad.isfinite().all()), name


def test_short_keys_are_attended_exactly_or_refused() -> None:
    module, x = attention(), torch.randn(2, 8, E)
    torch.testing.assert_close(module(x), exact(module, x, x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="exact_when_short is False"):
        attention(exact_when_short=False)(x)


def test_a_mask_on_short_keys_removes_tokens() -> None:
    module, x = attention(decoder="none"), torch.randn(1, 8, E)
    mask = torch.tensor([[True] * 5 + [False] * 3])
    torch.testing.assert_close(module(x, key_mask=mask), exact(module, x, x[:, :5]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ensemble", ["pool", "bucket"])
def test_padding_does_not_change_the_output(ensemble: str) -> None:
    """For pools the padded sequence equals the short one exactly: segments divide the valid tokens."""
    module, x = attention(ensemble=ensemble, decoder="none"), torch.randn(1, 20, E)
    mask = torch.ones(1, 31, dtype=torch.bool)
    mask[:, 20:] = False
    padded = torch.cat([x, torch.full((1, 11, E), 1e4)], 1)
    out = module(x, padded, key_mask=mask)
    if ensemble == "pool":
        torch.testing.assert_close(out, module(x), rtol=1e-4, atol=1e-5)
    changed = padded.clone()
    changed[:, 20:] = -7.0
    assert torch.equal(out, module(x, changed, key_mask=mask))


def test_constant_tokens_per_segment_are_exact() -> None:
    """m = 10 anchored pool over 2 + 8 * 4 tokens, keys equal within each segment: log-mass makes it exact attention."""
    module = attention(measurements=10, decoder="none", head_shift=False)
    middle = torch.randn(2, 8, E).repeat_interleave(4, 1)
    x = torch.cat([torch.randn(2, 1, E), middle, torch.randn(2, 1, E)], 1)
    torch.testing.assert_close(module(x), exact(module, x, x), rtol=1e-4, atol=1e-5)
    without = attention(measurements=10, decoder="none", head_shift=False, log_mass=False)
    assert not torch.allclose(without(x), exact(without, x, x), rtol=1e-2, atol=1e-3)


def test_image_grid_with_cls_anchor() -> None:
    module = attention(measurements=5, anchors=["first"], grid=[4, 4], head_shift=False)
    phi = module.measurement(17, torch.device("cpu")).phi
    assert phi.shape[-2:] == (5, 17)
    assert bool((phi[0, 1:, 1:] > 0).sum(-1).eq(4).all())
    assert module(torch.randn(2, 17, E)).shape == (2, 17, E)


def test_cross_attention_of_another_width() -> None:
    module = attention(kv_dim=10)
    x, context = torch.randn(2, 5, E), torch.randn(2, 30, 10)
    assert module(x, context).shape == (2, 5, E)
    with pytest.raises(ValueError, match="context has shape"):
        module(x, torch.randn(2, 30, E))
    with pytest.raises(ValueError, match="x has shape"):
        module(torch.randn(5, E))


def test_learned_phi_trains_and_takes_one_length() -> None:
    module = attention(learned=True, length=20)
    module(torch.randn(2, 20, E)).square().mean().backward()
    assert module.phi.grad is not None and float(module.phi.grad.abs().max()) > 0
    assert module.score_bias.grad is not None
    with pytest.raises(ValueError, match="length 20, got 21"):
        module(torch.randn(2, 21, E))


def test_feature_sensing_calibrated_by_principal_components_beats_truncation() -> None:
    torch.manual_seed(3)
    x = torch.randn(4, 30, 3) @ torch.randn(3, E)
    module, full = attention(feature_rank=4), attention()
    module.load_state_dict({k: v for k, v in full.state_dict().items() if "decoder" not in k}, strict=False)
    before = float((module(x) - full(x)).norm())
    module.calibrate(x)
    after = float((module(x) - full(x)).norm())
    assert after < 1e-3 * before
    with pytest.raises(ValueError, match="feature_rank = None"):
        full.calibrate(x)


@pytest.mark.parametrize("ensemble", ["gaussian", "bucket", "srht", "pool"])
def test_state_dict_holds_the_seed_and_restores_bit_for_bit(ensemble: str) -> None:
    module, x = attention(ensemble=ensemble, seed=11, layer=2), torch.randn(2, 40, E)
    state = module.state_dict()
    assert not any(t.shape[-1:] == (40,) or "phi" in n for n, t in state.items())
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other = attention(ensemble=ensemble, seed=5)
    other(x)  # fills its cache with another Phi
    other.load_state_dict(torch.load(file))
    assert other.config.seed == 11 and other.config.layer == 2
    assert torch.equal(other(x), module(x))
    assert torch.equal(copy.deepcopy(module)(x), module(x))


def test_another_ensemble_in_the_checkpoint_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'srht'.*'pool'"):
        attention().load_state_dict(attention(ensemble="srht").state_dict())


def test_casting_the_module_keeps_phi_in_float32() -> None:
    module = attention(ensemble="gaussian", seed=3)
    before = module.measurement(33, torch.device("cpu")).phi
    half = copy.deepcopy(module).bfloat16()
    after = half.measurement(33, torch.device("cpu")).phi
    assert after.dtype == torch.float32 and torch.equal(before, after)
    assert half(torch.randn(2, 33, E, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_global_random_state_is_neither_read_nor_moved() -> None:
    module = attention(ensemble="gaussian")
    torch.manual_seed(1)
    a = module.measurement(33, torch.device("cpu")).phi
    state = torch.get_rng_state()
    module._fixed.clear()
    torch.manual_seed(2)
    assert torch.equal(a, module.measurement(33, torch.device("cpu")).phi)
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())


def test_what_a_captured_graph_reads_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph knows the address of Phi alone: many other lengths must not free it, and under capture nothing that
    outlives it can be made."""
    module, here = attention(ensemble="gaussian", dictionary="dct"), torch.device("cpu")
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    module(torch.randn(1, 33, E))
    capturing = True
    module(torch.randn(1, 33, E))
    captured = [id(value) for value in module._fixed.values()]
    with pytest.raises(RuntimeError, match=r"phi of CSATAttention .*call the module once with inputs of these sizes"):
        module(torch.randn(1, 34, E))
    capturing = False
    for n in range(40, 70):
        module.measurement(n, here)
    assert {*captured} <= {id(value) for value in module._fixed.values()} and len(module._fixed) <= 16 + len(captured)
    again = module.measurement(60, here)
    for n in range(70, 85):
        module.measurement(n, here)
    assert module.measurement(60, here) is again  # the least used goes first


def test_heads_and_layers_draw_different_columns() -> None:
    phi = attention(ensemble="rademacher").measurement(33, torch.device("cpu")).phi
    other = attention(ensemble="rademacher", layer=1).measurement(33, torch.device("cpu")).phi
    assert not torch.equal(phi[0, 2:], phi[1, 2:]) and not torch.equal(phi, other)


def test_autocast_runs_in_its_dtype() -> None:
    module, x = attention(), torch.randn(2, 20, E)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), module(x), rtol=5e-2, atol=2e-2)
    out.sum().backward()


@pytest.mark.parametrize("decoder", ["ista", "lista", "alista"])
def test_the_decoder_is_float32_under_autocast_and_float64_in_a_float64_module(decoder: str) -> None:
    module = attention(decoder=decoder, dictionary="overcomplete", feature_rank=5)
    plain = module.decoder()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = module.decoder()
    wide = copy.deepcopy(module).double().decoder()
    assert isinstance(plain, SparseDecoder)
    for name in ("S", "B", "theta", "psi", "step"):
        assert torch.equal(getattr(under_autocast, name), getattr(plain, name)), name
        assert getattr(wide, name).dtype == torch.float64
        torch.testing.assert_close(getattr(wide, name).float(), getattr(plain, name), rtol=1e-4, atol=1e-5)


def test_the_identity_dictionary_costs_no_product() -> None:
    module, x = attention(dictionary="identity"), torch.randn(2, 20, E)
    decoder = module.decoder()
    assert isinstance(decoder, SparseDecoder) and decoder.psi is None
    explicit = dataclasses.replace(decoder, psi=torch.eye(E // H))
    q, k, v = torch.randn(3, 1, H, 20, E // H)
    phi = measurement_matrix("pool", 8, 20, seed=0)
    ours, theirs = (csat_attention(q, k, v, phi, decoder=d) for d in (decoder, explicit))
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(ours, reference.csat_attention(q, k, v, phi, decoder=decoder))
    assert attention(dictionary="overcomplete").decoder().psi is not None
    assert bool(module(x).isfinite().all())


@pytest.mark.parametrize("decoder", ["lista", "alista"])
def test_training_goes_on_after_an_evaluation_in_inference_mode(decoder: str) -> None:
    module, x = attention(decoder=decoder), torch.randn(2, 20, E)
    with torch.inference_mode():
        module(x)
    module(x).sum().backward()
    assert module.q_proj.weight.grad is not None


def test_made_on_meta_and_filled_from_a_checkpoint() -> None:
    module, x = attention(ensemble="gaussian", seed=3), torch.randn(2, 20, E)
    with torch.device("meta"):
        other = attention(ensemble="gaussian")
    other = other.to_empty(device="cpu")
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))


@pytest.mark.parametrize("decoder", DECODERS)
def test_made_on_meta_and_initialised(decoder: str) -> None:
    """What FSDP2 does before it shards: memory that nothing has written is refused, then initialised."""
    rank = None if decoder == "none" else 4
    config: dict[str, object] = {"ensemble": "gaussian", "seed": 3, "feature_rank": rank, "decoder": decoder}
    expected, x = attention(**config), torch.randn(2, 20, E)
    with torch.device("meta"):
        module = attention(**config)
    module = module.to_empty(device="cpu")
    module.measurement_key.zero_()
    with pytest.raises(ValueError, match=r"generator version 0.*reset_parameters\(\) comes first"):
        module(x)
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        getattr(module, name).load_state_dict(getattr(expected, name).state_dict())
    assert torch.equal(module(x), expected(x))


def test_the_seed_of_a_loader_that_bypasses_load_state_dict() -> None:
    """transformers puts tensors in the buffers' place, distributed checkpoints write into them."""
    source, x = attention(ensemble="gaussian", seed=9, layer=2), torch.randn(2, 20, E)
    for place in ("in its place", "into it"):
        module = attention(ensemble="gaussian")
        assert not torch.equal(module(x), source(x))
        with torch.no_grad():
            for name, tensor in source.state_dict().items():
                owner = module.get_submodule(name.rpartition(".")[0])
                own = getattr(owner, name.rpartition(".")[2])
                if place == "in its place" and name == "measurement_key":
                    module.measurement_key = tensor.clone()
                else:
                    own.copy_(tensor)
        assert torch.equal(module(x), source(x)) and module.config.seed == 9 and module.config.layer == 2
        assert torch.equal(module.measurement(20, x.device).phi, source.measurement(20, x.device).phi)


def test_a_cache_follows_the_seed_of_such_a_loader() -> None:
    form = {"causal": "prefix", "content": False, "ensemble": "bucket", "dictionary": "random", "atoms": 2 * E // H}
    source, module, x = attention(**form, seed=9), attention(**form), torch.randn(2, 20, E)
    cache = module.new_cache()
    for own, other in zip(module.parameters(), source.parameters(), strict=True):
        own.data.copy_(other)
    module.measurement_key = source.measurement_key.clone()
    with torch.no_grad():
        torch.testing.assert_close(module(x, cache=cache), source(x))


def test_nothing_made_of_fakes_is_remembered() -> None:
    module, x = attention(ensemble="gaussian", dictionary="dct"), torch.randn(2, 20, E)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(module(torch.randn(2, 20, E)), FakeTensor)
    assert torch.equal(module(x), attention(ensemble="gaussian", dictionary="dct")(x))


@pytest.mark.parametrize("causal", [{}, {"causal": "prefix"}, {"causal": "block", "block_size": 16}])
def test_forward_mode_is_refused(causal: dict[str, object]) -> None:
    """torch gives operators of others no tangents: zeros would come without a word."""
    module, x = attention(**causal).requires_grad_(False), torch.randn(2, 20, E)
    for derivative in (lambda: torch.func.jvp(module, (x,), (x,)), lambda: torch.func.jacfwd(module)(x)):
        with pytest.raises(NotImplementedError, match=r"forward-mode .*accepted: reverse mode"):
            derivative()
    with torch.autograd.forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match="forward-mode"):
            module(torch.autograd.forward_ad.make_dual(x, x))
        assert torch.equal(module(x), attention(**causal)(x))


@pytest.mark.parametrize("tokens", [5, 20])  # attended exactly, and measured
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor"),
        ({"x": torch.ones(2, 4, E, dtype=torch.int64)}, TypeError, "x has dtype torch.int64"),
        ({"x": torch.ones(2, 4, E, dtype=torch.float64)}, TypeError, "x has dtype torch.float64"),
        ({"x": torch.ones(3, 4, E)}, ValueError, "context has batch size 2, x has 3"),
        ({"key_mask": lambda n: torch.ones(2, n)}, TypeError, "key_mask has dtype torch.float32"),
        ({"key_mask": lambda n: torch.ones(1, n, dtype=torch.bool)}, ValueError, "key_mask has shape"),
        ({"key_mask": lambda n: torch.ones(2, n, n, dtype=torch.bool)}, ValueError, "key_mask has shape"),
        ({"key_mask": lambda n: [[True] * n] * 2}, TypeError, "key_mask must be a torch.Tensor"),
    ],
)
def test_wrong_inputs_are_refused_by_name(
    tokens: int, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    call = {"x": torch.randn(2, 4, E), "key_mask": None, **changes}
    mask = call["key_mask"](tokens) if callable(call["key_mask"]) else None
    with pytest.raises(error, match=message):
        attention()(call["x"], torch.randn(2, tokens, E), key_mask=mask)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((E, H, {"measurements": 8}), TypeError, "config must be a CSATConfig"),
        ((E, 3.0, CSATConfig()), TypeError, "num_heads must be an int"),
        ((E, 5, CSATConfig()), ValueError, "embed_dim = 24 must be a positive multiple of num_heads = 5"),
        ((E, H, CSATConfig(), 0), ValueError, "kv_dim must be at least 1"),
        ((E, H, CSATConfig(feature_rank=9)), ValueError, "feature_rank = 9 exceeds the head width 8"),
    ],
)
def test_wrong_modules_are_refused_by_name(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CSATAttention(*arguments)


@pytest.mark.parametrize("decoder", ["ista", "lista_untied", "alista"])
def test_every_decoder_compiles_fullgraph(decoder: str) -> None:
    torch._dynamo.reset()
    module, x = attention(decoder=decoder), torch.randn(2, 20, E)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x), rtol=1e-4, atol=1e-5)


def test_thresholds_have_their_own_rate_and_can_return_from_below_zero() -> None:
    module = attention(threshold=0.1)
    groups = {g["name"]: g for g in parameter_groups(module, lr=1e-3, weight_decay=0.1, threshold_lr_scale=20.0)}
    assert groups["threshold"]["lr"] == pytest.approx(2e-2) and groups["threshold"]["weight_decay"] == 0
    assert sum(len(g["params"]) for g in groups.values()) == len(list(module.parameters()))
    with torch.no_grad():
        module.threshold.fill_(-0.5)
    assert bool((module.decoder().theta == 0).all())  # type: ignore[union-attr]
    module(torch.randn(2, 20, E)).square().mean().backward()
    assert module.threshold.grad is not None and float(module.threshold.grad.abs().max()) > 0


def test_no_parameter_is_zero_dimensional() -> None:
    for decoder in DECODERS:
        rank = None if decoder == "none" else 4
        assert all(p.dim() > 0 for p in attention(decoder=decoder, feature_rank=rank).parameters())


def test_compiles_fullgraph_and_does_not_recompile_per_length() -> None:
    torch._dynamo.reset()
    module = attention(ensemble="pool")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for n in (20, 33, 47, 64):
            x = torch.randn(2, n, E)
            torch.testing.assert_close(compiled(x), module(x), rtol=1e-4, atol=1e-5)
            compiled(x).sum().backward()


class _LastHeads:
    """The last two of four heads, as one of two ranks computes them."""

    def heads(self, count: int) -> range:
        return range(count // 2, count)

    def own(self, weight: torch.Tensor) -> torch.Tensor:
        return weight[weight.shape[0] // 2 :]

    def attend(self, *arguments: Any) -> torch.Tensor:
        raise NotImplementedError


@pytest.mark.parametrize("decoder", ["ista", "alista"])
def test_what_is_remembered_of_all_heads_is_not_taken_for_that_of_a_rank(decoder: str) -> None:
    module = CSATAttention(E, 4, CSATConfig(measurements=8, decoder=decoder))
    whole = module.decoder()
    module.parallel = _LastHeads()
    own = module.decoder()
    assert isinstance(whole, SparseDecoder) and isinstance(own, SparseDecoder)
    assert own.B.shape[0] == own.S.shape[0] == 2
    assert torch.equal(own.B, whole.B[2:]) and torch.equal(own.S, whole.S[2:])


@pytest.mark.parametrize("form", [{}, {"decoder": "lista"}, {"causal": "block", "block_size": 8, "measurements": 4}])
def test_a_layer_copies_no_rows(form: dict[str, Any]) -> None:
    """Projections, the operators and their gradients read and write the rows of all heads where they lie."""
    module, x = attention(**form), torch.randn(2, 40, E, requires_grad=True)
    copied = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            copies = func in (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default)
            if copies and out.dim() >= 3 and out.numel() >= x.numel():
                copied.append((func, out.shape))
            return out

    with Copies():
        module(x).square().sum().backward()
    assert not copied


def test_matrices_decay_and_nothing_else_does() -> None:
    module = attention(learned=True, length=20, feature_rank=4, dictionary="learned", atoms=12)
    groups = {g["name"]: {id(p) for p in g["params"]} for g in parameter_groups(module, lr=1e-3, weight_decay=0.1)}
    found = {kind: {n for n, p in module.named_parameters() if id(p) in ids} for kind, ids in groups.items()}
    biases = {f"{name}.bias" for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    assert found["threshold"] == {"threshold"}
    assert found["no_decay"] == {"gain", "step", "phi", "score_bias", *biases}
    assert found["decay"] == {"psi", "feature_sensing", "decoder_w", *(n.replace("bias", "weight") for n in biases)}
