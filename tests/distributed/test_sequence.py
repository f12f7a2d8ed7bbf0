"""Both forms of sequence parallelism against one rank, in float64, and what they refuse."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from sharding import HEADS, WIDTH, chunks, errors, layer, shards, summed, worst
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from csat_ext.measurements import ENSEMBLES, measurement
from csat_ext.parallel.sequence import SequenceParallel, TokensOfRank, parallelise, process_group, token_mean
from csat_ext.parallel.ulysses import UlyssesParallel

if TYPE_CHECKING:
    from ranks import Ranks

pytest_plugins = ["ranks"]
pytestmark = pytest.mark.distributed
FORMS: dict[str, Any] = {"measurements": SequenceParallel, "ulysses": UlyssesParallel}
CONFIGS: dict[str, dict[str, Any]] = {
    "pool": {},
    "pool without anchors, log-mass and head shift": {"anchors": (), "log_mass": False, "head_shift": False},
    "pool on a grid": {"grid": (3, 3), "measurements": 6},
    "bucket with feature sensing": {"ensemble": "bucket", "feature_rank": 3},
    "rademacher, untied": {"ensemble": "rademacher", "decoder": "lista_untied"},
    "dct with its own Phi of V": {"ensemble": "gaussian", "share_kv": False, "decoder": "linear"},
    "grouped queries, learned": {"learned": True, "length": 11, "kv_heads": 2, "feature_rank": 3},
    "grouped queries": {"kv_heads": 2, "ensemble": "bucket"},
    "learned": {"learned": True, "length": 11, "dictionary": "learned"},
    "as many measurements as tokens of all ranks": {"measurements": 11},
}


def quiet_deepspeed() -> None:
    """DeepSpeed would compile a shared-memory all-reduce for a minute; gloo serves."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def world() -> Any:
    return dist.group.WORLD


def compare(form: str) -> dict[str, float]:
    """Every config, with and without a key mask that leaves one sequence short and one empty."""
    quiet_deepspeed()
    n, ranks = 11, dist.get_world_size()
    x = torch.randn(3, n, WIDTH, dtype=torch.float64)
    keep = torch.rand(3, n) < 0.7
    keep[1, 3:] = False
    keep[2] = False
    ragged = (4, 7) if ranks == 2 else (1, 6, 0, 4)
    found: dict[str, float] = {}
    for name, config in CONFIGS.items():
        if form == "ulysses" and config.get("kv_heads", ranks) % ranks:
            continue  # refused: `test_ulysses_refuses_heads_that_do_not_divide`
        for mask in (None, keep):
            for lengths, length in ((chunks(n, ranks), n), (ragged, None)):
                parallel = FORMS[form](world(), length)
                measured = errors(layer(**config), parallel, x, lengths, key_mask=mask)
                case = f"{name}, {'masked' if mask is not None else 'whole'}, {lengths}"
                found |= {f"{case}: {what}": error for what, error in measured.items()}
    return found


@pytest.mark.parametrize("form", FORMS)
def test_equal_to_one_rank(ranks: Ranks, form: str) -> None:
    """Outputs and every gradient to 1e-12: uneven and empty shards, key masks, all kinds of Phi."""
    for found in ranks.run(compare, form):
        assert len(found) > 300
        assert {what: error for what, error in found.items() if not error < 1e-12} == {}


def cross(form: str) -> dict[str, float]:
    quiet_deepspeed()
    x, context = torch.randn(2, 7, WIDTH, dtype=torch.float64), torch.randn(2, 13, 6, dtype=torch.float64)
    attention = layer(kv_dim=6)
    return errors(attention, FORMS[form](world()), x, chunks(7, 2), context, (4, 9), torch.rand(2, 13) < 0.6)


@pytest.mark.parametrize("form", FORMS)
def test_cross_attention(two: Ranks, form: str) -> None:
    for found in two.run(cross, form):
        assert "dcontext" in found
        assert max(found.values()) < 1e-12


def narrow(dtype: torch.dtype) -> tuple[float, float]:
    """RMS errors against float64, over its RMS: of two ranks, and of one."""
    x = torch.randn(2, 64, WIDTH)
    exact = layer(torch.float64)(x.double())
    attention = layer(dtype)
    one = attention(x.to(dtype)).double()
    attention.parallel = SequenceParallel(world())
    two = attention(shards(x.to(dtype), (32, 32))).double()
    return tuple(
        float((got - want).square().mean().sqrt() / want.square().mean().sqrt())
        for got, want in ((two, shards(exact, (32, 32))), (one, exact))
    )  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_narrow_types_are_as_accurate_as_on_one_rank(two: Ranks, dtype: torch.dtype) -> None:
    for of_two, of_one in two.run(narrow, dtype):
        assert of_two < {torch.bfloat16: 1e-2, torch.float32: 1e-5}[dtype]
        assert of_two < 2 * of_one


def compiled(form: str, length: int | None) -> float:
    quiet_deepspeed()
    torch._dynamo.reset()
    attention = layer(decoder="linear")
    whole = torch.randn(2, 11, WIDTH, dtype=torch.float64), torch.rand(2, 11) < 0.7
    expected = attention(whole[0], key_mask=whole[1])
    expected.square().sum().backward()
    gradient = attention.gain.grad
    attention.zero_grad()
    attention.parallel = FORMS[form](world(), length)
    x, keep = (shards(t, (6, 5)) for t in whole)
    got = torch.compile(attention, backend="aot_eager")(x, key_mask=keep)
    got.square().sum().backward()
    assert gradient is not None
    gradients = summed(attention.gain.grad, attention.gain)
    return max(worst(got, shards(expected, (6, 5))), worst(gradients, gradient))


@pytest.mark.parametrize(("form", "length"), [("measurements", None), ("ulysses", 11)])
def test_compiled(two: Ranks, form: str, length: int | None) -> None:
    assert max(two.run(compiled, form, length)) < 1e-12


# ---- Phi -------------------------------------------------------------------------------------------------------------


def columns_differ() -> list[str]:
    """Ensembles whose columns, or bias, differ from those of one rank in any bit."""
    lengths = chunks(23, dist.get_world_size())
    start = sum(lengths[: dist.get_rank()])
    part = TokensOfRank(start, start + lengths[dist.get_rank()], 1, 3, lengths, world())
    keep = torch.rand(2, 23) < 0.5
    different = []
    for ensemble, kind in ENSEMBLES.items():
        options: dict[str, Any] = {"head_shift": True} if "head_shift" in kind.options else {}
        for mask in (None, keep):
            whole = measurement(
                ensemble, 7, 23, seed=3, heads=4, anchors=("first", 9, "last"), key_mask=mask, **options
            )
            own = measurement(
                ensemble, 7, 23, seed=3, heads=4, anchors=("first", 9, "last"), key_mask=shards(mask, lengths),
                part=part, **options,
            )  # fmt: skip
            phi = whole.phi[..., part.start : part.stop]
            heads = slice(1, 3) if phi.shape[-3] > 1 else slice(None)
            same = torch.equal(own.phi, phi[..., heads, :, :])
            assert whole.score_bias is not None and own.score_bias is not None
            bias = whole.score_bias[..., heads, :] if whole.score_bias.shape[-2] > 1 else whole.score_bias
            if not (same and torch.equal(own.score_bias, bias)):
                different.append(f"{ensemble}, {mask is not None}")
    return different


def test_columns_of_phi_are_those_of_one_rank(ranks: Ranks) -> None:
    assert ranks.run(columns_differ) == [[]] * ranks.count


# ---- communication ---------------------------------------------------------------------------------------------------


def log_of_one_step(tokens: int) -> list[str]:
    """What happens in a training step, in order: sums that start and are waited for, and the projection of Q."""
    attention, log = layer(feature_rank=3), []
    group = world()
    attention.parallel = SequenceParallel(group, length=tokens * group.size())
    x = torch.randn(2, tokens, WIDTH, dtype=torch.float64, requires_grad=True)
    attention(x)  # Phi is made and remembered
    attention.q_proj.register_forward_hook(lambda *_: log.append("Q projected"))
    attention.q_proj.register_full_backward_hook(lambda *_: log.append("Q projection differentiated"))
    started = dist.all_reduce

    class Watched:
        def __init__(self, work: Any) -> None:
            self.work = work

        def wait(self) -> None:
            log.append("waited")
            self.work.wait()

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Watched:
        log.append(f"sum of {tuple(tensor.shape)}")
        return Watched(started(tensor, *args, **kwargs))

    dist.all_reduce = all_reduce
    try:
        attention(x).sum().backward()
    finally:
        dist.all_reduce = started
    return log


@pytest.mark.parametrize("tokens", [8, 80])
def test_one_sum_each_way_that_overlaps_the_projection_of_q(two: Ranks, tokens: int) -> None:
    """(m, D + R) per head forward and backward, for any number of tokens."""
    shape = (2, HEADS, 5, WIDTH // HEADS + 3)
    forward = [f"sum of {shape}", "Q projected", "waited"]
    backward = [f"sum of {shape}", "Q projection differentiated", "waited"]
    assert two.run(log_of_one_step, tokens) == [forward + backward] * 2


def mean_of_tokens() -> list[float]:
    values = torch.arange(7.0, dtype=torch.float64)
    own = values.split([5, 2])[dist.get_rank()].requires_grad_()
    mean = token_mean(own, world())
    mean.backward()
    assert own.grad is not None
    return [float(mean), *own.grad.tolist()]


def test_token_mean_weighs_every_token_alike(two: Ranks) -> None:
    for mean, *gradients in two.run(mean_of_tokens):
        assert mean == 3.0
        assert gradients == pytest.approx([1 / 7] * len(gradients))


def mean_of_many_tokens(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and gradients of `token_mean`, and of `Tensor.mean` in one place."""
    values = torch.randn(70_000).abs().to(dtype)  # more than float16 can count
    sizes, rank = [40_000, 30_000], dist.get_rank()
    own, whole = values.split(sizes)[rank].clone().requires_grad_(), values.clone().requires_grad_()
    mean, expected = token_mean(own, world()), whole.mean()
    for result in (mean, expected):
        (2.0**10 * result).backward()
    assert own.grad is not None and whole.grad is not None
    return mean.detach(), expected.detach(), own.grad, whole.grad.split(sizes)[rank]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_token_mean_of_many_tokens_is_the_mean(two: Ranks, dtype: torch.dtype) -> None:
    for mean, expected, own, whole in two.run(mean_of_many_tokens, dtype):
        assert mean.dtype == dtype
        torch.testing.assert_close(mean, expected)
        torch.testing.assert_close(own, whole)


def mean_of_integers() -> Tensor:
    return token_mean(torch.arange(7).split([5, 2])[dist.get_rank()] + 1, world())


def test_token_mean_of_integers_is_no_integer(two: Ranks) -> None:
    for mean in two.run(mean_of_integers):
        assert float(mean) == 4.0 and mean.dtype == torch.float32


# ---- groups and refusals ---------------------------------------------------------------------------------------------


def through_a_mesh() -> float:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    x = torch.randn(2, 9, WIDTH, dtype=torch.float64)
    attention = layer()
    expected = attention(x)
    with pytest.raises(ValueError, match=r"a DeviceMesh of 2 dimensions \('dp', 'sp'\) came, one is accepted"):
        SequenceParallel(mesh)
    attention.parallel = SequenceParallel(mesh["sp"])
    own = x.split([5, 4], dim=1)[mesh["sp"].get_local_rank()]
    return float((attention(own) - expected.split([5, 4], dim=1)[mesh["sp"].get_local_rank()]).abs().max())


def test_a_dimension_of_a_device_mesh_is_a_group(four: Ranks) -> None:
    assert max(four.run(through_a_mesh)) < 1e-12


def refusals() -> None:
    rank = dist.get_rank()
    with pytest.raises(ValueError, match=r"ranks 0 and 1 .* differ in the seed.* of 1: they would measure differently"):
        parallelise(torch.nn.Sequential(layer(seed=1), layer(seed=rank)), SequenceParallel(world()), world())
    with pytest.raises(ValueError, match=r"differ in the seed.* of the model itself: they would measure differently"):
        parallelise(layer(seed=rank), SequenceParallel(world()), world())
    with pytest.raises(ValueError, match="the model has no CSATAttention"):
        parallelise(torch.nn.Linear(2, 2), SequenceParallel(world()), world())
    model = torch.nn.Sequential(layer(), layer(layer=1))
    assert parallelise(model, SequenceParallel(world()), world()) == ["0", "1"]
    assert model[0].parallel is model[1].parallel is not None
    attention = layer(feature_rank=2)
    attention.parallel = SequenceParallel(world(), length=8)
    x = torch.randn(1, 5, WIDTH, dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"rank {rank} of 2 holds 5 tokens; length = 8 gives it 4"):
        attention(x)
    with pytest.raises(ValueError, match="calibrate needs all tokens and heads"):
        attention.calibrate(x)
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        SequenceParallel(world(), length=0)
    with pytest.raises(TypeError, match="group: 'sp' came, a ProcessGroup or a one-dimensional DeviceMesh"):
        process_group("sp")  # type: ignore[arg-type]
    other = dist.new_group([0])
    if rank == 1:
        with pytest.raises(ValueError, match="this rank is not a member"):
            process_group(other)
    attention = layer(exact_when_short=False, measurements=10)
    attention.parallel = SequenceParallel(world())
    with pytest.raises(ValueError, match="keys of length 10 are no longer than the 10 measurements"):
        attention(x)
    attention = layer(learned=True, length=5)
    attention.parallel = SequenceParallel(world())
    with pytest.raises(ValueError, match="a learned Phi takes keys of length 5, got 10"):
        attention(x)


def test_refusals_name_their_reason(two: Ranks) -> None:
    two.run(refusals)


def heads_that_do_not_divide() -> None:
    quiet_deepspeed()
    attention = layer()
    attention.num_heads = attention.kv_heads = 3
    attention.parallel = UlyssesParallel(world())
    with pytest.raises(ValueError, match="Ulysses scatters 3 heads over 2 ranks"):
        attention(torch.randn(1, 4, WIDTH, dtype=torch.float64))


def test_ulysses_refuses_heads_that_do_not_divide(two: Ranks) -> None:
    two.run(heads_that_do_not_divide)


def of_another_framework() -> float:
    """torch.nn.MultiheadAttention, converted: its own code calls what lies between the projections."""
    from csat_ext import deepspeed as integration

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)).double()
    integration.apply(model, {"csat_attention": {"measurements": 5, "threshold": 0.01}})
    x = torch.randn(2, 11, WIDTH, dtype=torch.float64)
    padding = torch.rand(2, 11) < 0.3
    expected = model[0](x, x, x, key_padding_mask=padding, need_weights=False)[0]
    parallelise(model, SequenceParallel(world()), world())
    own, pad = (shards(t, (6, 5)) for t in (x, padding))
    return worst(model[0](own, own, own, key_padding_mask=pad, need_weights=False)[0], shards(expected, (6, 5)))


def test_converted_attention_takes_shards(two: Ranks) -> None:
    assert max(two.run(of_another_framework)) < 1e-12
