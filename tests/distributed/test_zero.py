"""Two ranks through the real DeepSpeed engine: every trap that running it found, at every ZeRO stage."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from sharding import WIDTH, layer
from torch import Tensor, nn

from csat_ext import CSATAttention
from csat_ext import deepspeed as integration
from csat_ext.config import DECODERS
from csat_ext.module import parameter_groups
from csat_ext.parallel import engine as engine_module
from csat_ext.parallel import shard_sequence, token_mean

if TYPE_CHECKING:
    from ranks import Ranks

pytest.importorskip("deepspeed")
pytest_plugins = ["ranks"]
pytestmark = pytest.mark.distributed
STAGES = [0, 1, 2, 3]


class Plain(nn.Module):
    """Full attention that `integration.initialize` replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        raise AssertionError("replaced before it is called")


class Model(nn.Module):
    """Two layers with something between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.between, self.second = Plain(), nn.Linear(WIDTH, WIDTH), Plain()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.between(self.first(x))) + x)


SECTION: dict[str, Any] = {"measurements": 5, "dictionary": "dct", "threshold": 0.01, "seed": 7}


def config(stage: int, **keys: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "csat_attention": SECTION,
    } | keys


@contextlib.contextmanager
def deepspeed_state() -> Iterator[Any]:
    """DeepSpeed without the groups of an earlier engine, and with its sequence-parallel state."""
    import logging

    import deepspeed
    from deepspeed.runtime.sequence_parallel import parallel_state_sp
    from deepspeed.utils import groups

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled for a minute; gloo serves
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(verbose=False)
    groups.mpu = groups.mesh_device = None
    parallel_state_sp._release_sequence_parallel_groups()
    try:
        yield parallel_state_sp
    finally:
        groups.mpu = groups.mesh_device = None
        parallel_state_sp._release_sequence_parallel_groups()


def converted() -> Model:
    torch.manual_seed(0)
    model = Model()
    integration.apply(model, integration.read_section(config(0)))
    return model


def one_rank(x: Tensor, target: Tensor) -> tuple[float, dict[str, Tensor]]:
    model = converted()
    loss = (model(x) - target).square().mean()
    loss.backward()
    return float(loss), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def gradient_ratios(engine: Any, expected: dict[str, Tensor]) -> dict[str, float]:
    """Gradients of the engine over those expected, as a factor; NaN where they are no multiple.

    Those of key biases are 0: a constant added to all keys changes no row.
    """
    from deepspeed.utils import safe_get_full_grad

    ratios = {}
    for name, p in engine.module.named_parameters():
        got, want = safe_get_full_grad(p), expected[name]
        ratio = 1.0 if name.endswith("k_proj.bias") else float((got * want).sum() / want.square().sum())
        same = float((got - ratio * want).abs().max()) < 1e-4 * float(want.abs().max()) + 1e-8
        ratios[name] = ratio if same else float("nan")
    return ratios


def one_step(stage: int, form: str | None, **keys: Any) -> tuple[float, float, dict[str, float]]:
    """Loss, that of one rank, and gradients over those of one rank; form None: a group that DeepSpeed does not know."""
    with deepspeed_state() as mpu:
        x, target = torch.randn(2, 11, WIDTH), torch.randn(2, 11, WIDTH)
        loss_of_one, expected = one_rank(x, target)
        torch.manual_seed(0)
        model: nn.Module = Model()
        keys = config(stage, **keys)
        if form is None:
            model = converted()
            shard_sequence(model, dist.group.WORLD)
            del keys["csat_attention"]
            import deepspeed

            engine, *_ = deepspeed.initialize(model=model, config=keys, model_parameters=model.parameters())
            engine_module.reconcile(engine)
        else:
            mpu.initialize_sequence_parallel(2)
            keys["csat_attention"] = SECTION | {"sequence_parallel": form}
            engine, *_ = integration.initialize(model=model, config=keys, mpu=mpu)
        own = [t.split([6, 5], dim=1)[dist.get_rank()] for t in (x, target)]
        loss = token_mean((engine(own[0]) - own[1]).square(), dist.group.WORLD)
        engine.backward(loss)
        return float(loss), loss_of_one, gradient_ratios(engine, expected)


@pytest.mark.parametrize("form", ["measurements", "ulysses", None])
@pytest.mark.parametrize("stage", STAGES)
def test_gradients_under_sequence_parallelism_are_those_of_one_rank(two: Ranks, stage: int, form: str | None) -> None:
    """Stage 3 would scale them by 1 / ranks, and so would every stage for a group that DeepSpeed does not know of."""
    for loss, loss_of_one, ratios in two.run(one_step, stage, form):
        assert loss == pytest.approx(loss_of_one, rel=1e-5)
        assert len(ratios) > 20
        assert ratios == pytest.approx(dict.fromkeys(ratios, 1.0), rel=1e-4)


def two_by_two(stage: int) -> tuple[float, float, dict[str, float]]:
    """Four ranks: two shares of the batch, each with its tokens on two ranks."""
    with deepspeed_state() as mpu:
        x, target = torch.randn(4, 11, WIDTH), torch.randn(4, 11, WIDTH)
        loss_of_one, expected = one_rank(x, target)
        mpu.initialize_sequence_parallel(2)
        torch.manual_seed(0)
        engine, *_ = integration.initialize(model=Model(), config=config(stage), mpu=mpu)
        batch, tokens = divmod(dist.get_rank(), 2)
        own = [t.chunk(2)[batch].split([6, 5], dim=1)[tokens] for t in (x, target)]
        loss = token_mean((engine(own[0]) - own[1]).square(), mpu.get_sequence_parallel_group())
        engine.backward(loss)
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        return float(mean) / 4, loss_of_one, gradient_ratios(engine, expected)


@pytest.mark.parametrize("stage", [1, 3])
def test_batch_and_tokens_over_four_ranks(four: Ranks, stage: int) -> None:
    for loss, loss_of_one, ratios in four.run(two_by_two, stage):
        assert loss == pytest.approx(loss_of_one, rel=1e-5)
        assert ratios == pytest.approx(dict.fromkeys(ratios, 1.0), rel=1e-4)


def uncorrected(stage: int) -> float:
    """The factor that `reconcile` makes up for, measured without it."""
    correct = engine_module.reconcile
    engine_module.reconcile = lambda engine: 1.0
    try:
        ratios = one_step(stage, "measurements")[2]
    finally:
        engine_module.reconcile = correct
    del ratios["first.k_proj.bias"], ratios["second.k_proj.bias"]
    assert max(ratios.values()) - min(ratios.values()) < 1e-3
    return ratios["between.weight"]


@pytest.mark.parametrize(("stage", "factor"), [(2, 1.0), (3, 0.5)])
def test_what_deepspeed_does_by_itself(two: Ranks, stage: int, factor: float) -> None:
    """Should this fail with a new DeepSpeed, `reconcile` corrects what is right."""
    assert two.run(uncorrected, stage) == pytest.approx([factor] * 2, rel=1e-4)


def setups_that_are_refused() -> None:
    with pytest.raises(ValueError, match="reduce_scatter: false came with stage 3 and sequence parallelism"):
        one_step(3, "measurements", zero_optimization={"stage": 3, "reduce_scatter": False})
    with deepspeed_state():
        model = converted()
        shard_sequence(model, dist.group.WORLD)
        keys = config(1, data_parallel_size=1, sequence_parallel_size=2)
        with pytest.raises(ValueError, match=r"does not sum gradients over the sequence ranks \[\d\].*pass it as mpu"):
            integration.initialize(model=model, config=keys | {"csat_attention": {"enabled": False}})
    with deepspeed_state():
        model = Model()
        model.scale = nn.Parameter(torch.tensor(1.0))
        with pytest.raises(ValueError, match=r"no 0-dimensional parameters, scale came: give them shape \(1,\)"):
            integration.initialize(model=model, config=config(1))
    with deepspeed_state() as mpu:
        mpu.initialize_sequence_parallel(2)
        keys = config(0, tensor_parallel={"autotp_size": 2, "partition_config": {}})
        with pytest.raises(ValueError, match="tensor_parallel and an mpu with sequence-parallel groups came"):
            integration.initialize(model=Model(), config=keys, mpu=mpu)
    with deepspeed_state():
        keys = config(0, csat_attention=SECTION | {"seed": dist.get_rank()})
        with pytest.raises(ValueError, match="ranks 0 and 1 of the group differ in the seed"):
            integration.initialize(model=Model(), config=keys)


def test_setups_that_train_wrongly_are_refused_with_the_reason(two: Ranks) -> None:
    two.run(setups_that_are_refused)


@pytest.mark.parametrize("decoder", DECODERS)
def test_no_parameter_is_0_dimensional(decoder: str) -> None:
    attention = layer(decoder=decoder, dictionary="learned", feature_rank=None if decoder == "none" else 2)
    assert min(p.dim() for p in attention.parameters()) >= 1


# ---- data parallelism ------------------------------------------------------------------------------------------------


def losses(stage: int) -> tuple[list[float], list[float]]:
    """Of three steps on two ranks, averaged over them, and of plain torch on the whole batch."""
    batches = [(torch.randn(4, 11, WIDTH), torch.randn(4, 11, WIDTH)) for _ in range(3)]
    model = converted()
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2))
    of_one = []
    for x, target in batches:
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        of_one.append(float(loss))
    of_two = []
    with deepspeed_state():
        torch.manual_seed(0)
        engine, *_ = integration.initialize(model=Model(), config=config(stage))
        for x, target in batches:
            own = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
            loss = (engine(x[own]) - target[own]).square().mean()
            engine.backward(loss)
            engine.step()
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            of_two.append(float(mean) / 2)
    return of_two, of_one


@pytest.mark.parametrize("stage", STAGES)
def test_losses_are_those_of_one_rank_with_the_same_global_batch(two: Ranks, stage: int) -> None:
    for of_two, of_one in two.run(losses, stage):
        assert of_one[0] != of_one[-1]
        assert of_two == pytest.approx(of_one, rel=1e-4)


# ---- buffers and casts -----------------------------------------------------------------------------------------------


def phi_of_a_cast_model(stage: int, zero_init: bool) -> list[bool]:
    """A bf16 engine built, on each rank, with another state of the global generator."""
    import deepspeed

    with deepspeed_state():
        torch.manual_seed(0)
        ensemble = {"ensemble": "gaussian", "decoder": "alista"}
        keys = config(stage, bf16={"enabled": True}, csat_attention=SECTION | ensemble)
        expected: Any = Model()
        integration.apply(expected, integration.read_section(keys))
        torch.manual_seed(dist.get_rank())
        context = deepspeed.zero.Init(config_dict_or_path=keys) if zero_init else contextlib.nullcontext()
        with context:
            model = Model()
            integration.apply(model, integration.read_section(keys))
        engine, *_ = integration.initialize(
            model=model, config=keys | {"csat_attention": {"enabled": False}}, model_parameters=model.parameters()
        )
        with torch.no_grad():
            engine(torch.randn(2, 11, WIDTH, dtype=torch.bfloat16))
        got, want = engine.module.second, expected.second
        assert isinstance(got, CSATAttention)
        with deepspeed.zero.GatheredParameters(list(got.parameters())):
            psi = got._psi()
        phi = got.measurement(11, torch.device("cpu")).phi
        return [
            got.measurement_key.dtype == torch.int64,
            torch.equal(got.measurement_key, want.measurement_key),
            phi.dtype == torch.float32,
            torch.equal(phi, want.measurement(11, torch.device("cpu")).phi),
            not torch.equal(phi, phi.bfloat16().float()),
            psi.dtype == torch.float32,
            torch.equal(psi, want._psi()),
            got.k_proj.weight.dtype == torch.bfloat16,
        ]


@pytest.mark.parametrize(("stage", "zero_init"), [(1, False), (3, False), (3, True)])
def test_seeds_and_phi_are_unharmed_by_casts_and_zero_init(two: Ranks, stage: int, zero_init: bool) -> None:
    """`zero.Init` rounds buffers to bfloat16 and nothing broadcasts them: Phi and Psi are made from the seed."""
    assert two.run(phi_of_a_cast_model, stage, zero_init) == [[True] * 8] * 2


def copied() -> None:
    model = converted()
    shard_sequence(model, dist.group.WORLD)
    assert copy.deepcopy(model).first.parallel is model.first.parallel


def test_a_copy_of_a_model_works_with_the_same_ranks(two: Ranks) -> None:
    two.run(copied)
