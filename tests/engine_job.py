"""What the ranks of tests/test_engine.py run: small trainings through the real DeepSpeed engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from csat_ext import deepspeed as integration
from csat_ext.config import CSATConfig
from csat_ext.module import CSATCore

WIDTH, TOKENS, BATCH, STEPS = 16, 12, 4, 4
CORE = {"measurements": 5, "dictionary": "dct"}
SECTION = {**CORE, "layers": "auto", "threshold_lr_scale": 10}


_BORN_OUTSIDE = CSATCore(2, WIDTH // 2, CSATConfig.from_dict(CORE))
PHI = {length: _BORN_OUTSIDE.measurement(length, torch.device("cpu")).phi for length in (TOKENS, TOKENS + 1)}
PSI = _BORN_OUTSIDE._psi()


class Block(nn.Module):
    """Pre-norm self-attention by torch, whose projections are one fused parameter of the attention itself."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(WIDTH), nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.out(torch.tanh(self.attn(y, y, y, need_weights=False)[0]))


class Model(nn.Module):
    def __init__(self, around: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Linear(WIDTH, WIDTH), nn.ModuleList(Block() for _ in range(2))
        self.around = around

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.to(self.embed.weight.dtype))
        for block in self.blocks:
            x = block(x) if self.around is None else self.around(block, x)
        return x.float().square().mean()


def seeded(model: nn.Module) -> nn.Module:
    """The same weights whether the model was born whole or in shards."""
    import deepspeed

    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        in_shards = hasattr(parameter, "ds_id")
        gathered = deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=in_shards)
        with torch.no_grad(), gathered:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            value = 0.3 * torch.randn(shape, generator=generator)
            if not in_shards or dist.get_rank() == 0:
                parameter.copy_(value)
    return model


def configuration(stage: int = 0, accumulate: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": BATCH // accumulate // dist.get_world_size(),
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": 0.5,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "eps": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "csat_attention": SECTION,
        **more,
    }


def build(config: dict[str, Any], model: Callable[[], nn.Module] = Model) -> Any:
    engine, *_ = integration.initialize(model=seeded(model()), config=config)
    assert sum(isinstance(module, CSATCore) for module in engine.module.modules()) == 2
    return engine


def global_batch(step: int) -> Tensor:
    return torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(step))


def train(engine: Any, first: int = 0, steps: int = STEPS) -> list[float]:
    """Losses of the global batch: each rank, and each micro batch, takes its rows of it."""
    losses, share = [], BATCH // dist.get_world_size()
    for step in range(first, first + steps):
        total = torch.zeros(())
        rows = global_batch(step)[dist.get_rank() * share :][:share]
        micros = rows.chunk(engine.gradient_accumulation_steps())
        for micro in micros:
            loss = engine(micro)
            engine.backward(loss)
            engine.step()
            total += loss.detach() / len(micros)
        dist.all_reduce(total)
        losses.append(float(total) / dist.get_world_size())
    return losses


def assert_float32_phi(model: nn.Module) -> None:
    """`zero.Init` casts what torch's factories return; Phi and Psi are those of a module born outside, bit for bit."""
    for module in model.modules():
        if isinstance(module, CSATCore):
            for length in (TOKENS, TOKENS + 1):  # one that is remembered and one that is not
                phi = module.measurement(length, torch.device("cpu")).phi
                assert phi.dtype == torch.float32 and PHI[length].equal(phi)
            assert module._psi().dtype == torch.float32 and PSI.equal(module._psi())


def under_zero_init(inside: bool, **more: Any) -> list[float]:
    """A model born in shards, converted after `zero.Init` or within it."""
    import deepspeed

    config = configuration(3, **more)

    def born() -> nn.Module:
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = seeded(Model())
            if inside:
                integration.apply(model, config)
                assert_float32_phi(model)
        if inside:
            assert_float32_phi(model)
        return model

    if not inside:
        return train(build(config, born))
    engine, *_ = integration.initialize(model=born(), config={**config, "csat_attention": {"enabled": False}})
    return train(engine)


def held_bytes(stage: int, precision: str) -> list[float]:
    """Parameters of the model, and bytes of parameters and of Adam's state that this rank holds after a step."""
    half = {"bf16": {"enabled": True}} if precision == "bf16" else {}
    engine = build(configuration(stage, **half))
    train(engine, steps=1)
    parameters = list(engine.module.parameters())
    count = sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
    own = [p.ds_tensor if stage == 3 else p for p in parameters]
    adam = engine.optimizer.optimizer
    masters = [p for group in adam.param_groups for p in group["params"]]
    if stage == 3:
        masters = engine.optimizer.fp32_partitioned_groups_flat
    moments = [t for state in adam.state.values() for t in state.values() if t.dim()]
    return [count, *(float(sum(t.numel() * t.element_size() for t in held)) for held in (own, [*masters, *moments]))]


def checkpointed(around: Callable[..., Tensor], stage: int) -> list[float]:
    return train(build(configuration(stage), lambda: Model(around)))


def deepspeed_checkpoint(block: nn.Module, x: Tensor) -> Tensor:
    import deepspeed

    return deepspeed.checkpointing.checkpoint(block, x)


def compiled() -> list[float]:
    engine = build(configuration(0))
    engine.compile(backend="aot_eager")
    return train(engine)


def half() -> list[float]:
    """DeepSpeed refuses float16 on a CPU without instructions for it; torch computes it on any."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    return train(build(configuration(2, fp16={"enabled": True, "initial_scale_power": 8})))


SELECTIVE = partial(
    checkpoint, use_reentrant=False, context_fn=integration.checkpoint_contexts("attend_decode", "project")
)
OFFLOAD = {
    "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
    "zero_force_ds_cpu_optimizer": False,
}
CASES: dict[str, Callable[[], list[float]]] = {
    **{f"stage {stage}": partial(lambda stage: train(build(configuration(stage))), stage) for stage in range(4)},
    "accumulation": lambda: train(build(configuration(2, accumulate=2))),
    "zero.Init": lambda: under_zero_init(False),
    "within zero.Init": lambda: under_zero_init(True),
    "torch checkpointing": lambda: checkpointed(partial(checkpoint, use_reentrant=False), 2),
    "selective checkpointing": lambda: checkpointed(SELECTIVE, 3),
    "deepspeed checkpointing": lambda: checkpointed(deepspeed_checkpoint, 1),
    **{f"bytes {s} {p}": partial(held_bytes, s, p) for s in (1, 2, 3) for p in ("fp32", "bf16")},
    "compile": compiled,
    "offload": lambda: train(build(configuration(**OFFLOAD))),
    "bf16": lambda: train(build(configuration(1, bf16={"enabled": True}))),
    "bf16 zero.Init": lambda: under_zero_init(True, bf16={"enabled": True}),
    "fp16": half,
}


def save(folder: str, stage: int) -> list[float]:
    """Trains half of the steps, saves, and goes on."""
    engine = build(configuration(stage))
    losses = train(engine, steps=STEPS // 2)
    engine.save_checkpoint(folder, tag="half")
    return losses + train(engine, STEPS // 2, STEPS - STEPS // 2)


def resume(folder: str, stage: int, universal: bool) -> list[float]:
    engine = build(configuration(stage, checkpoint={"load_universal": universal}))
    engine.load_checkpoint(folder, tag="universal" if universal else "half")
    return train(engine, STEPS // 2, STEPS - STEPS // 2)


def main(results: str, *names: str) -> None:
    """Runs cases; rank 0 writes {case: losses of each step}."""
    from csat_ext.pretrain.train import leave_process_group, set_up_process_group

    set_up_process_group()
    made = {}
    for name in names:
        verb, _, rest = name.partition(" ")
        if verb in ("save", "resume", "universal"):
            stage, folder = rest.split(" ", 1)
            saving = verb == "save"
            made[name] = save(folder, int(stage)) if saving else resume(folder, int(stage), verb == "universal")
        else:
            made[name] = CASES[name]()
    if dist.get_rank() == 0:
        Path(results).write_text(json.dumps(made))
    leave_process_group()
