"""Heads over ranks (torch's parallelize_module, DeepSpeed's AutoTP), FSDP2 and DTensor inputs, against one rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from sharding import WIDTH, layer, shards, summed, worst
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

from csat_ext import CSATAttention, CSATConfig
from csat_ext.parallel import SequenceParallel, shard_sequence
from csat_ext.parallel.tensor import HeadParallel, accept_dtensors, autotp_rules, tensor_parallel_plan

if TYPE_CHECKING:
    from ranks import Ranks

pytest_plugins = ["ranks"]
pytestmark = pytest.mark.distributed
CONFIGS: list[dict[str, Any]] = [
    {},
    {"ensemble": "bucket", "feature_rank": 3, "decoder": "alista"},
    {"ensemble": "rademacher", "decoder": "lista_untied", "share_kv": False},
    {"learned": True, "length": 11, "dictionary": "learned"},
    {"measurements": 16, "decoder": "linear"},
]


class Model(nn.Module):
    def __init__(self, attention: CSATAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        return self.attention(x, key_mask=key_mask)


def model(**config: Any) -> Model:
    return Model(layer(**config))


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def expected(plain: nn.Module, x: Tensor, weight: Tensor, mask: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and gradients of x and of the parameters."""
    x = x.clone().requires_grad_()
    y = plain(x, key_mask=mask)
    (y * weight).sum().backward()
    assert x.grad is not None
    gradients = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    return y.detach(), gradients | {"x": x.grad}


def problem() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(2, 11, WIDTH, dtype=torch.float64)
    return x, torch.randn_like(x), torch.rand(2, 11) < 0.7


# ---- heads over ranks ------------------------------------------------------------------------------------------------


def by_heads() -> dict[str, float]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found: dict[str, float] = {}
    for index, config in enumerate(CONFIGS):
        for masked in (False, True):
            x, weight, keep = problem()
            mask = keep if masked else None
            y, gradients = expected(model(**config), x, weight, mask)
            split = model(**config)
            parallelize_module(split, mesh, tensor_parallel_plan(split))
            assert isinstance(split.attention.threshold if index < 4 else split.attention.gain, DTensor)
            own = x.clone().requires_grad_()
            got = split(own, key_mask=mask)
            (got * weight).sum().backward()
            found[f"{index}, {masked}: output"] = worst(got, y)
            assert own.grad is not None
            found[f"{index}, {masked}: dx"] = worst(full(own.grad), gradients["x"])
            for name, p in split.named_parameters():
                if name in gradients:
                    assert p.grad is not None
                    found[f"{index}, {masked}: {name}"] = worst(full(p.grad), gradients[name])
    return found


def test_heads_over_ranks(ranks: Ranks) -> None:
    for found in ranks.run(by_heads):
        assert len(found) > 100
        assert {what: error for what, error in found.items() if not error < 1e-12} == {}


def by_heads_and_tokens() -> float:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tp", "sp"))
    x, weight, keep = problem()
    y, gradients = expected(model(), x, weight, keep)
    split = model()
    parallelize_module(split, mesh["tp"], tensor_parallel_plan(split, SequenceParallel(mesh["sp"])))
    rank = mesh["sp"].get_local_rank()
    own = [t.split([6, 5], dim=1)[rank] for t in (x, weight, keep)]
    got = split(own[0], key_mask=own[2])
    (got * own[1]).sum().backward()
    worsts = [worst(got, y.split([6, 5], dim=1)[rank])]
    for name, p in split.named_parameters():
        assert p.grad is not None
        total = full(p.grad).clone()
        dist.all_reduce(total, group=mesh["sp"].get_group())
        worsts.append(worst(total, gradients[name]))
    return max(worsts)


def test_heads_over_ranks_of_one_dimension_and_tokens_over_the_other(four: Ranks) -> None:
    assert max(four.run(by_heads_and_tokens)) < 1e-12


def refusals_of_heads() -> None:
    mesh = init_device_mesh("cpu", (2,))
    with pytest.raises(TypeError, match="HeadParallel: Linear came, a CSATAttention is accepted"):
        parallelize_module(nn.Linear(2, 2), mesh, HeadParallel())
    attention = layer()
    attention.kv_heads = 3
    with pytest.raises(ValueError, match="3 heads over 2 ranks came"):
        parallelize_module(attention, mesh, HeadParallel())


def test_refusals_of_heads(two: Ranks) -> None:
    two.run(refusals_of_heads)


# ---- FSDP2 -----------------------------------------------------------------------------------------------------------


def trained(net: nn.Module, batches: list[Tensor], own: slice) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for x in batches:
        optimizer.zero_grad()
        net(x[own]).square().mean().backward()
        optimizer.step()
    return {name: full(p.detach()) for name, p in net.named_parameters()}


def under_fsdp() -> float:
    batches = [torch.randn(4, 11, WIDTH, dtype=torch.float64) for _ in range(2)]
    one = trained(model(learned=True, length=11), batches, slice(None))
    net = model(learned=True, length=11)
    fully_shard(net.attention)
    fully_shard(net)
    assert isinstance(net.attention.threshold, DTensor)
    two = trained(net, batches, slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2))
    assert one.keys() == two.keys()
    return max(worst(two[name], one[name]) for name in one)


def test_fully_shard_trains_as_one_rank(two: Ranks) -> None:
    assert max(two.run(under_fsdp)) < 1e-12


def made_on_meta() -> list[bool]:
    """Equal to what one rank makes, whatever was in the memory."""
    config = CSATConfig(measurements=5, dictionary="learned", learned=True, length=11)
    one = Model(CSATAttention(WIDTH, 4, config))
    with torch.device("meta"):
        net = Model(CSATAttention(WIDTH, 4, config))
    fully_shard(net)
    net.to_empty(device="cpu")
    for part in net.modules():
        if isinstance(part, CSATAttention):
            part.reset_parameters()
    own = dict(one.attention.named_parameters(recurse=False))
    return [torch.equal(full(p), own[name]) for name, p in net.attention.named_parameters(recurse=False)]


def test_fully_shard_of_a_model_made_on_the_meta_device(two: Ranks) -> None:
    found = two.run(made_on_meta)
    assert len(found[0]) > 5 and all(all(rank) for rank in found)


def under_fsdp_by_tokens() -> float:
    x, weight, keep = problem()
    y, gradients = expected(model(), x, weight, keep)
    net = model()
    shard_sequence(net, dist.group.WORLD)
    fully_shard(net)
    net.set_gradient_divide_factor(1.0)  # a sum over the ranks, not their mean
    got = net(shards(x, (6, 5)), key_mask=shards(keep, (6, 5)))
    (got * shards(weight, (6, 5))).sum().backward()
    worsts = [worst(full(p.grad), gradients[name]) for name, p in net.named_parameters() if p.grad is not None]
    assert len(worsts) > 8
    return max([*worsts, worst(got, shards(y, (6, 5)))])


def test_fully_shard_with_tokens_over_its_ranks(two: Ranks) -> None:
    assert max(two.run(under_fsdp_by_tokens)) < 1e-12


def in_mixed_precision() -> list[bool]:
    net = model(dtype=torch.float32, ensemble="gaussian")
    phi = net.attention.measurement(11, torch.device("cpu")).phi
    fully_shard(net, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    y = net(torch.randn(2, 11, WIDTH))
    y.square().mean().backward()
    now = net.attention.measurement(11, torch.device("cpu")).phi
    finite = all(bool(full(p.grad).isfinite().all()) for p in net.parameters() if p.grad is not None)
    return [y.dtype == torch.bfloat16, now.dtype == torch.float32, torch.equal(now, phi), finite]


def test_phi_stays_float32_in_mixed_precision(two: Ranks) -> None:
    assert two.run(in_mixed_precision) == [[True] * 4] * 2


# ---- DTensor inputs --------------------------------------------------------------------------------------------------


def placed(placement: Any) -> float:
    mesh = init_device_mesh("cpu", (2,))
    x, weight, keep = problem()
    y, gradients = expected(model(), x, weight, keep)
    net = model()
    if placement == Shard(1):
        shard_sequence(net, mesh)
    assert accept_dtensors(net) == ["attention"]
    own, own_weight, mask = (distribute_tensor(t, mesh, [placement]) for t in (x, weight, keep))
    own.requires_grad_()
    got = net(own, key_mask=mask)
    assert isinstance(got, DTensor) and got.placements == (placement,) and got.shape == y.shape
    (got * own_weight).sum().backward()
    assert own.grad is not None
    worsts = [worst(full(got), y), worst(full(own.grad), gradients["x"])]
    for name, p in net.named_parameters():
        assert p.grad is not None
        worsts.append(worst(p.grad if placement == Replicate() else summed(p.grad, p), gradients[name]))
    plain = net(own.to_local().detach(), key_mask=mask.to_local())
    assert not isinstance(plain, DTensor)
    return max(worsts)


@pytest.mark.parametrize("placement", [Replicate(), Shard(0), Shard(1)])
def test_dtensors_come_out_as_they_went_in(two: Ranks, placement: Any) -> None:
    """Eleven tokens on two ranks: six and five."""
    assert max(two.run(placed, placement)) < 1e-12


def misplaced() -> None:
    mesh: DeviceMesh = init_device_mesh("cpu", (2,))
    net = model()
    accept_dtensors(net)
    x, _, keep = problem()
    by_tokens = distribute_tensor(x, mesh, [Shard(1)])
    with pytest.raises(ValueError, match="tokens are split over a dimension of the mesh where, and only where"):
        net(by_tokens)
    with pytest.raises(ValueError, match=r"x is placed as \(Shard\(dim=2\),\); accepted: Replicate"):
        net(distribute_tensor(x, mesh, [Shard(2)]))
    with pytest.raises(ValueError, match="must all be DTensors of one mesh and alike placed, or none of them"):
        net(by_tokens, key_mask=keep)
    shard_sequence(net, mesh)
    with pytest.raises(ValueError, match="tokens are split over"):
        net(distribute_tensor(x, mesh, [Shard(0)]))


def test_misplaced_dtensors_are_refused(two: Ranks) -> None:
    two.run(misplaced)


# ---- DeepSpeed AutoTP ------------------------------------------------------------------------------------------------


def autotp(stage: int) -> tuple[list[float], list[float], float]:
    """Losses of three steps with heads over two ranks, and on one rank; how far weights with a head axis end apart."""
    import test_zero
    from deepspeed.utils import safe_get_full_fp32_param

    from csat_ext import deepspeed as integration
    from csat_ext.module import parameter_groups

    batches = [(torch.randn(2, 11, WIDTH), torch.randn(2, 11, WIDTH)) for _ in range(3)]
    plain = test_zero.converted()
    optimizer = torch.optim.AdamW(parameter_groups(plain, lr=1e-2))
    of_one, of_two = [], []
    for x, target in batches:
        loss = (plain(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        of_one.append(float(loss))
    keys = test_zero.config(stage, tensor_parallel={"autotp_size": 2, "partition_config": {"use_default_specs": False}})
    with test_zero.deepspeed_state():
        torch.manual_seed(0)
        engine, *_ = integration.initialize(model=test_zero.Model(), config=keys)
        first = engine.module.first
        assert first.num_heads == 4 and len(first.heads) == 2
        if stage < 3:
            assert first.q_proj.weight.shape == (WIDTH // 2, WIDTH)
        for x, target in batches:
            loss = (engine(x) - target).square().mean()
            engine.backward(loss)
            engine.step()
            of_two.append(float(loss))
        weights = [(p, getattr(plain.first, name)) for name, p in first.named_parameters(recurse=False)]
        whole = [(p if stage == 0 else safe_get_full_fp32_param(p), want) for p, want in weights]
    assert len(whole) == 4
    return of_two, of_one, max(worst(got.detach(), want.detach()) for got, want in whole)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_autotp_trains_as_one_rank(two: Ranks, stage: int) -> None:
    pytest.importorskip("deepspeed")
    for of_two, of_one, apart in two.run(autotp, stage):
        assert of_one[0] != of_one[-1]
        assert of_two == pytest.approx(of_one, rel=1e-4)
        assert apart < 1e-4


def autotp_refusals() -> None:
    import test_zero

    from csat_ext import deepspeed as integration

    with test_zero.deepspeed_state():
        keys = test_zero.config(0, tensor_parallel={"autotp_size": 2})
        with pytest.raises(ValueError, match="autotp_size came without partition_config: AutoTP would guess"):
            integration.initialize(model=test_zero.Model(), config=keys)
        keys = test_zero.config(0, tensor_parallel={"autotp_size": 3, "partition_config": {}})
        with pytest.raises(ValueError, match="first has 4 key heads, autotp_size is 3"):
            integration.initialize(model=test_zero.Model(), config=keys)


def test_autotp_refusals(two: Ranks) -> None:
    pytest.importorskip("deepspeed")
    two.run(autotp_refusals)


def test_autotp_rules_name_every_parameter_once() -> None:
    import re

    patterns = [pattern for rule in autotp_rules(["a.b", "c"]) for pattern in rule["patterns"]]
    for config in [{}, {"learned": True, "length": 11, "dictionary": "learned", "decoder": "lista_untied"}]:
        for name, _ in layer(feature_rank=2, **config).named_parameters():
            if not name.endswith(".bias"):
                assert sum(bool(re.match(pattern, f"a.b.{name}")) for pattern in patterns) == 1, name
                assert not any(re.match(pattern, f"axb.{name}") for pattern in patterns)
