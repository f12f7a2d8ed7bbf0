"""The formulas of `csat plan` against counted bytes of real modules, and against measured times."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from csat_ext import CSATAttention, CSATConfig, cli, planning
from csat_ext.config import DECODERS
from csat_ext.convert import family
from csat_ext.deepspeed import apply
from csat_ext.measurements import Part
from csat_ext.planning import ModelShape, Run
from csat_ext.pretrain.config import ModelConfig
from csat_ext.pretrain.model import EncoderBlock

REPOSITORY = Path(__file__).parents[1]
B, N, E, H, LAYERS = 2, 192, 64, 4, 2
SHAPE = ModelShape(LAYERS, E, H, 4 * E)


def model(config: CSATConfig | None) -> nn.Module:
    blocks = nn.Sequential(*(EncoderBlock(ModelConfig(width=E, heads=H)) for _ in range(LAYERS)))
    if config is not None:
        apply(blocks, {"csat_attention": config.to_dict()})
        assert not any(family(module) for module in blocks.modules())
    return blocks


def saved_bytes(blocks: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of everything autograd keeps of a forward pass, parameters aside."""
    parameters = {p.untyped_storage().data_ptr() for p in blocks.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    x = torch.randn(B, N, E, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = blocks(x)
        assert out.requires_grad
    return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in parameters)


CONFIGS: dict[str, dict[str, Any] | None] = {
    "full": None,
    **{decoder: {"decoder": decoder} for decoder in DECODERS},
    "learned": {"learned": True, "length": N},
    "learned dictionary": {"dictionary": "learned", "atoms": 24},
    "few features": {"feature_rank": 8},
    "no gain": {"gain": False},
    "one Phi": {"head_shift": False},
    "random": {"ensemble": "gaussian", "share_kv": False},
    "without a matrix": {"ensemble": "rademacher"},
}


def config_of(name: str) -> CSATConfig | None:
    keys = CONFIGS[name]
    return None if keys is None else CSATConfig(measurements=24, **keys)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_counted_exactly(name: str) -> None:
    config = config_of(name)
    counted = sum(p.numel() for p in model(config).parameters())
    assert planning.block_parameters(SHAPE, config) * LAYERS == counted


@pytest.mark.parametrize(
    "name", ["full", "none", "linear", "lista", "one Phi", "no gain", "random", "without a matrix"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_activations_are_foreseen(name: str, dtype: torch.dtype) -> None:
    config = config_of(name)
    blocks = model(config).to(dtype)
    run = Run(SHAPE, N, B, attention=config, precision="fp32" if dtype == torch.float32 else "bf16")
    foreseen = LAYERS * (planning.block_activations(run) + planning.phi_bytes(run))
    assert foreseen == pytest.approx(saved_bytes(blocks, dtype), rel=0.03)


@pytest.mark.parametrize(
    "config", [{"grid": (8, 5)}, {"ensemble": "gaussian"}, {"ensemble": "bucket"}, {"ensemble": "dct"}]
)
@pytest.mark.parametrize("head_shift", [True, False])
@pytest.mark.parametrize("anchors", [(), ("first",)])
def test_phi_is_the_one_that_the_module_holds(
    config: dict[str, Any], head_shift: bool, anchors: tuple[str, ...]
) -> None:
    tokens = 40 + len(anchors) * ("grid" in config)  # a class token in front of the grid
    attention = CSATConfig(measurements=8 + len(anchors), head_shift=head_shift, anchors=anchors, **config)
    phi = CSATAttention(32, 4, attention).measurement(tokens, torch.device("cpu")).phi
    assert planning.phi_bytes(Run(ModelShape(1, 32, 4, 64), tokens, attention=attention)) == phi.nbytes


@pytest.mark.parametrize("ensemble", ["pool", "rademacher", "srht"])
def test_ranks_that_share_a_sequence_hold_their_columns(ensemble: str) -> None:
    attention = CSATConfig(measurements=8, ensemble=ensemble)
    part = Part(0, 20, 0, 4)
    phi = CSATAttention(32, 4, attention).measurement(40, torch.device("cpu"), part=part).phi
    run = Run(ModelShape(1, 32, 4, 64), 40, ranks=2, sequence_ranks=2, attention=attention)
    assert planning.phi_bytes(run) == phi.nbytes
    assert planning.phi_bytes(Run(ModelShape(1, 32, 4, 64), 40, attention=attention)) == 0


def test_embeddings_are_counted() -> None:
    bert = planning.MODELS["bert-base"]
    known = 109_482_240 - 590_592 - 2 * 768  # of BERT base: less its pooler and the embedding of two segments
    assert planning.parameters(Run(bert, 512)) == known


@pytest.mark.parametrize(
    ("stage", "ranks", "precision", "bytes_of_one"),
    [
        (0, 4, "bf16", 2 + 2 + 12),
        (1, 4, "bf16", 2 + 2 + 3),
        (2, 4, "bf16", 2 + 0.5 + 3),
        (3, 4, "bf16", 4),
        (0, 1, "fp32", 16),
    ],
)
def test_zero_divides_what_it_says(stage: int, ranks: int, precision: str, bytes_of_one: float) -> None:
    assert sum(planning.state_bytes(1000, stage, ranks, precision).values()) == 1000 * bytes_of_one


@pytest.mark.parametrize("n", [1024, 2048, 4096, 8192])
@pytest.mark.parametrize(("rival", "decoder"), [("csat", "none"), ("csat + LISTA (T = 3)", "lista")])
def test_the_ratio_of_work_is_that_of_measured_times(n: int, rival: str, decoder: str) -> None:
    measured = json.loads((REPOSITORY / "benchmarks" / "results" / "scaling.json").read_text())
    shape = measured["shape"]
    model = ModelShape(1, shape["heads"] * shape["width"], shape["heads"], 1)
    full = Run(model, n)
    ours = Run(model, n, attention=CSATConfig(measurements=shape["m"], decoder=decoder))
    foreseen = sum(planning.attention_work(ours).values()) / sum(planning.attention_work(full).values())
    time = measured["time over sdpa, forward and backward"][str(n)][rival]
    assert 0.5 < time / foreseen < 2


def test_sequences_cost_the_same_whatever_their_length() -> None:
    config = CSATConfig(measurements=64)
    sent = {
        n: [
            planning.communication(Run(SHAPE, n, ranks=8, sequence_ranks=8, attention=a))["sequences"]
            for a in (config, None)
        ]
        for n in (1024, 4096)
    }
    assert sent[1024][0] == sent[4096][0]
    assert sent[4096][1] == 4 * sent[1024][1]


def test_recomputation_keeps_the_inputs_of_the_blocks() -> None:
    run = Run(SHAPE, N, B, precision="fp32")
    again = Run(SHAPE, N, B, precision="fp32", checkpointing=True)
    inputs = LAYERS * B * N * E * 4
    assert planning.memory(again)["activations"] == inputs + planning.memory(run)["activations"] // LAYERS
    assert 1.2 < planning.block_work(again) / planning.block_work(run) < 1.4


def planned(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    monkeypatch.delenv("CSAT_TRACEBACK", raising=False)
    monkeypatch.setattr(sys, "argv", ["csat", "plan", *arguments])
    with pytest.raises(SystemExit) as done:
        cli.main()
    return str(done.value.code) if done.value.code else capsys.readouterr().out


def test_the_command_prints_both_attentions(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ("--model", "vit-l16", "--seq", "16384", "--gpus", "64", "--sequence-parallel", "8")
    screen = planned(monkeypatch, capsys, *sizes, "--zero", "3", "--measurements", "512")
    assert "8 x 8 ranks (data x sequence), ZeRO 3, bf16" in screen
    for row in ("memory: optimizer", "memory: measurement matrices", "sent: sequences", "work", "step"):
        assert f"\n{row}" in screen
    assert "x in attention" in screen and "assumed: 200 TFLOP/s" in screen


def test_the_command_reads_a_deepspeed_config(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = REPOSITORY / "examples" / "ds_csat.json"
    screen = planned(monkeypatch, capsys, "--model", "vit-b16", "--seq", "257", "--deepspeed", str(path))
    assert "ZeRO 0, fp32" in screen
    screen = planned(monkeypatch, capsys, "--model", "vit-b16", "--seq", "64", "--deepspeed", str(path))
    assert "m = 65 is not below the tokens: attention is exact" in screen


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "vit-xxl", "--seq", "64"), "model: 'vit-xxl' came; accepted: vit-b16"),
        (("--model", "layers=2,width=64", "--seq", "64"), "model: heads is missing or 0"),
        (("--model", "layers=2,width=64,heads=3", "--seq", "64"), "heads must divide width"),
        (("--model", "layers=2,width=64,heads=2,depth=3", "--seq", "64"), "model: unknown size 'depth'"),
        (("--model", "vit-b16", "--seq", "0"), "tokens: 0 came"),
        (("--model", "vit-b16", "--seq", "64", "--gpus", "6", "--sequence-parallel", "4"), "must divide the 6 ranks"),
        (("--model", "vit-b16", "--seq", "64", "--zero", "4"), "stage: 4 came"),
        (("--model", "vit-b16", "--seq", "64", "--precision", "fp8"), "precision: 'fp8' came"),
        (("--model", "vit-b16", "--seq", "64", "--tflops", "0"), "tflops: 0.0 came"),
        (("--model", "vit-b16", "--seq", "64", "--deepspeed", "nowhere.json"), "no file nowhere.json"),
    ],
)
def test_bad_plans_end_in_one_line(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = planned(monkeypatch, capsys, *arguments)
    assert line.startswith("csat: ") and message in line and "\n" not in line


def test_key_heads_are_counted_where_they_are_fewer() -> None:
    shape, config = ModelShape(1, 32, 4, 64, kv_heads=2), CSATConfig(measurements=8, learned=True, length=40)
    core = CSATAttention(32, 4, config, kv_heads=2)
    assert planning.core_parameters(shape, config) == sum(p.numel() for p in core.parameters(recurse=False))
    assert planning.block_parameters(shape, config) == sum(p.numel() for p in core.parameters()) + (
        2 * 32 * 64 + 64 + 32 + 4 * 32  # the MLP and two norms
    )
    # All-to-alls of q, k, v and the output, there and back: a rank sends half of its 20 tokens of 3 sequences.
    sent = planning.communication(Run(shape, 40, 3, ranks=2, sequence_ranks=2))["sequences"]
    assert sent == 2 * (4 + 2 + 2 + 4) * 8 * 3 * 20 * 2 // 2


@pytest.mark.parametrize(("stage", "times"), [(0, 2), (2, 2), (3, 3)])
def test_the_third_stage_gathers_the_parameters_once_more(stage: int, times: int) -> None:
    run = Run(SHAPE, N, ranks=8, stage=stage)
    assert planning.communication(run)["gradients and parameters"] == times * planning.parameters(run) * 2 * 7 // 8


def test_a_learned_phi_costs_its_gradient() -> None:
    fixed, learned = (
        planning.attention_work(Run(SHAPE, N, B, attention=CSATConfig(measurements=24, **keys)))
        for keys in ({}, {"learned": True, "length": N})
    )
    assert learned["forward"] == fixed["forward"]
    assert learned["backward"] - fixed["backward"] == 4 * B * N * 24 * E
