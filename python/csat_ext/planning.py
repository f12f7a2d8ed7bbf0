"""What a training run needs on every rank: memory, communication, work; the formulas behind `csat plan`.

Per-rank bytes of parameters, gradients and optimizer follow ZeRO (Rajbhandari et al. 2020, section 5), activations are
what autograd keeps of a pre-norm transformer block, work is counted in multiply-adds times two. Tests hold each against
counted bytes of real modules and engines, and the ratio of work against the measured times of `benchmarks/scaling.py`.

Symbols: B sequences and n tokens on a rank, E width, F hidden width, H heads, Hk key heads, D = E / H, m measurements,
R = `feature_rank` or D, P atoms, T iterations; N data-parallel and S sequence-parallel ranks.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csat_ext.config import CSATConfig
from csat_ext.implicit import IMPLICIT
from csat_ext.measurements import ENSEMBLES, measurement
from csat_ext.parallel import traffic
from csat_ext.section import load_json, read_section

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a transformer encoder whose blocks are attention and an MLP with biases, each behind a layer norm.

    Attributes:
        layers, width, heads, hidden: number of blocks, E, H, F.
        kv_heads: Hk; `heads` where 0.
        vocabulary: rows of a token embedding.
        patch: numbers in an image patch (channels times side squared), of a linear patch embedding.
    """

    layers: int
    width: int
    heads: int
    hidden: int
    kv_heads: int = 0
    vocabulary: int = 0
    patch: int = 0

    @property
    def key_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


MODELS = {
    "vit-b16": ModelShape(12, 768, 12, 3072, patch=768),
    "vit-l16": ModelShape(24, 1024, 16, 4096, patch=768),
    "vit-h14": ModelShape(32, 1280, 16, 5120, patch=588),
    "vit-g14": ModelShape(40, 1408, 16, 6144, patch=588),
    "bert-base": ModelShape(12, 768, 12, 3072, vocabulary=30522),
    "bert-large": ModelShape(24, 1024, 16, 4096, vocabulary=30522),
}
"""Names that `csat plan --model` knows."""


def model_shape(text: str) -> ModelShape:
    """A name of `MODELS`, or sizes such as ``"layers=24,width=1024,heads=16"`` (hidden is then 4 width unless given).

    Raises:
        ValueError: an unknown name or size, a missing one, or one that is not a positive integer.
    """
    if text in MODELS:
        return MODELS[text]
    names = [f.name for f in dataclasses.fields(ModelShape)]
    if re.fullmatch(r"(\w+=\d+)(,\w+=\d+)*", text) is None:
        known = ", ".join(MODELS)
        raise ValueError(f"model: {text!r} came; accepted: {known}, or sizes as layers=24,width=1024,heads=16")
    sizes = {key: int(value) for key, value in (part.split("=") for part in text.split(","))}
    for name in sizes:
        if name not in names:
            raise ValueError(f"model: unknown size {name!r}; accepted: {', '.join(names)}")
    for name in ("layers", "width", "heads"):
        if sizes.get(name, 0) < 1:
            raise ValueError(f"model: {name} is missing or 0 in {text!r}")
    shape = ModelShape(**({"hidden": 4 * sizes["width"]} | sizes))
    if shape.width % shape.heads or shape.heads % shape.key_heads:
        raise ValueError(f"model: heads must divide width and kv_heads must divide heads, got {text!r}")
    return shape


@dataclass(frozen=True)
class Run:
    """How a model is trained.

    Attributes:
        model: its sizes.
        tokens: length of one sequence.
        batch: sequences a data-parallel rank takes at once (micro batch).
        ranks: ranks in all, `sequence_ranks` of which share one sequence.
        attention: the compressed attention of every block; None is full attention.
        stage: of ZeRO.
        precision: "fp32", "bf16" or "fp16".
        checkpointing: every block is recomputed in the backward pass.
    """

    model: ModelShape
    tokens: int
    batch: int = 1
    ranks: int = 1
    sequence_ranks: int = 1
    attention: CSATConfig | None = None
    stage: int = 0
    precision: str = "bf16"
    checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("tokens", "batch", "ranks", "sequence_ranks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} came, at least 1 is accepted")
        if self.ranks % self.sequence_ranks or self.tokens % self.sequence_ranks:
            raise ValueError(
                f"sequence_ranks: {self.sequence_ranks} must divide the {self.ranks} ranks and {self.tokens} tokens"
            )
        if self.stage not in (0, 1, 2, 3):
            raise ValueError(f"stage: {self.stage} came, 0 to 3 is accepted")
        if self.precision not in BYTES:
            raise ValueError(f"precision: {self.precision!r} came; accepted: {', '.join(BYTES)}")

    @property
    def local_tokens(self) -> int:
        return self.tokens // self.sequence_ranks

    @property
    def data_ranks(self) -> int:
        return self.ranks // self.sequence_ranks

    @property
    def compressed(self) -> CSATConfig | None:
        """The attention config where it compresses: with m >= n the module attends exactly."""
        config = self.attention
        return None if config is None or config.measurements >= self.tokens else config


def read_run(
    model: ModelShape,
    ds_config: str | Path | dict[str, Any],
    *,
    measurements: int | None = None,
    stage: int | None = None,
    precision: str | None = None,
    **sizes: Any,
) -> Run:
    """A run whose attention, ZeRO stage and precision a DeepSpeed config says, unless an argument does.

    Raises:
        ValueError, TypeError, FileNotFoundError: as `csat_ext.section.read_section`, or a size that `Run` refuses.
    """
    ds_config = load_json(ds_config)
    section = read_section(ds_config)
    if stage is None:
        stage = ds_config.get("zero_optimization", {}).get("stage", 0)
    if precision is None:
        precision = next((p for p in ("bf16", "fp16") if ds_config.get(p, {}).get("enabled")), "fp32")
        precision = precision if ds_config else "bf16"
    attention = section.attention
    if measurements is not None:
        attention = attention.replace(measurements=measurements)
    return Run(model, attention=attention, stage=stage, precision=precision, **sizes)


# ---- parameters ------------------------------------------------------------------------------------------------------


def block_parameters(model: ModelShape, attention: CSATConfig | None) -> int:
    """Parameters of one block: projections with biases, MLP, two layer norms, and what `CSATCore` adds."""
    e, f, kv = model.width, model.hidden, model.key_heads * model.head_dim
    projections = 2 * (e * e + e) + 2 * (e * kv + kv)
    mlp = 2 * e * f + f + e
    return projections + mlp + 4 * e + (0 if attention is None else core_parameters(model, attention))


def core_parameters(model: ModelShape, config: CSATConfig) -> int:
    """Parameters of a `CSATCore`, the table of its docstring."""
    h, d = model.heads, model.head_dim
    r, p, t = config.feature_rank or d, config.atoms or d, config.iterations
    per_head = {
        "none": 0,
        "linear": r * d,
        "ista": t * p,
        "alista": t * p + t,
        "lista": t * p + t + r * p,
        "lista_untied": t * p + t * p * p + t * p * r,
    }[config.decoder]
    per_head += config.gain + (r * d if config.feature_rank else 0)
    per_head += d * p if config.dictionary == "learned" and config.decoder not in ("none", "linear") else 0
    phi = model.key_heads * config.measurements * ((config.length or 0) + 1) if config.learned else 0
    return h * per_head + phi


def parameters(run: Run) -> int:
    """Parameters of the whole model: blocks, a last layer norm, positions, token and patch embedding."""
    model = run.model
    embedding = (run.tokens + model.vocabulary) * model.width + (model.patch + 1) * model.width * bool(model.patch)
    return model.layers * block_parameters(model, run.attention) + 2 * model.width + embedding


# ---- memory ----------------------------------------------------------------------------------------------------------


def state_bytes(count: int, stage: int, ranks: int, precision: str) -> dict[str, int]:
    """Bytes of parameters, gradients and optimizer (Adam) on one rank, padding aside.

    A ZeRO optimizer (stage 1 and up), and any 16-bit one, keeps float32 copies of the parameters that it owns.
    """
    size = BYTES[precision]
    copies = 12 if stage > 0 or size == 2 else 8
    shares = {"parameters": stage == 3, "gradients": stage >= 2, "optimizer": stage >= 1}
    whole = {"parameters": count * size, "gradients": count * size, "optimizer": count * copies}
    return {name: -(-total // ranks) if shares[name] else total for name, total in whole.items()}


def phi_bytes(run: Run) -> int:
    """Bytes of one layer's fixed Phi, float32, kept from step to step (a rank keeps its own columns of it)."""
    config = run.compressed
    if config is None or config.learned or _implicit(run, config):
        return 0
    shifts = config.head_shift and "head_shift" in ENSEMBLES[config.ensemble].options  # on a grid too
    sample = measurement(config.ensemble, 2, 8, heads=2, head_shift=shifts)  # deterministic ensembles make one for all
    heads = 1 if sample.phi.shape[0] == 1 else run.model.key_heads
    return 4 * heads * config.measurements * run.local_tokens * (1 if config.share_kv else 2)


def _implicit(run: Run, config: CSATConfig) -> bool:
    """The kernels make Phi as they go: nothing of it, nor of what it measures, is kept. Ranks that share a sequence
    have their columns in memory."""
    whole = run.sequence_ranks == 1
    return whole and config.ensemble in IMPLICIT and config.grid is None and not config.learned


def block_activations(run: Run) -> int:
    """Bytes that autograd keeps of one block for one micro batch.

    Inputs of both norms, of the projections and of the MLP's first layer, q, k, v, the attention's output, and the
    MLP's hidden layer before and after its activation; float32 statistics of the norms and log-sum-exp. Compressed
    attention keeps its rows before a decoder as well, and the measured keys (before and after the gain) and values.
    """
    model, size, rows = run.model, BYTES[run.precision], run.batch * run.local_tokens
    kv = model.key_heads * model.head_dim
    kept = rows * ((6 * model.width + 2 * kv + 2 * model.hidden) * size + 4 * 4 + 4 * model.heads)
    config = run.compressed
    if config is None:
        return kept
    measured = run.batch * config.measurements * kv * (3 if config.gain else 2)
    if _implicit(run, config):
        kept -= rows * 2 * kv * size
    decoded = 0 if config.decoder == "none" else rows * model.width
    return kept + (decoded + measured) * size + _decoder_bytes(model, config)


def _decoder_bytes(model: ModelShape, config: CSATConfig) -> int:
    """float32 weights of the sparse decoder, made anew in every pass: S, B, Psi and the thresholds."""
    if config.decoder in ("none", "linear"):
        return 0
    d = model.head_dim
    r, p, t = config.feature_rank or d, config.atoms or d, config.iterations
    matrices = t if config.decoder == "lista_untied" else 1
    return 4 * model.heads * (matrices * (p * p + p * r) + d * p + t * p)


def memory(run: Run) -> dict[str, int]:
    """Bytes on one rank by what holds them, without a language-model head, buffers of NCCL and fragmentation."""
    model = run.model
    state = state_bytes(parameters(run), run.stage, run.data_ranks, run.precision)
    size = BYTES[run.precision]
    block = block_activations(run)
    kept_input = run.batch * run.local_tokens * model.width * size
    activations = model.layers * kept_input + block if run.checkpointing else model.layers * block
    gathered = 2 * block_parameters(model, run.attention) * size if run.stage == 3 else 0
    return {
        **state,
        "gathered layers": gathered,
        "activations": activations,
        "measurement matrices": model.layers * phi_bytes(run),
    }


# ---- work and communication ------------------------------------------------------------------------------------------


def attention_work(run: Run) -> dict[str, float]:
    """Floating-point operations of one block's attention between its projections, on one rank, forward and backward.

    Full: Q K^T and P V are 4 n n E, and five such products instead of two in the backward pass of an attention that
    keeps no n x n matrix. Compressed: measuring K and V is 4 n m E Hk / H, attending 4 n m E with the same factor, a
    row's T decoder iterations 2 P (P + R) each and Psi 2 P D, recomputed once and differentiated twice.
    """
    model, config = run.model, run.compressed
    rows = run.batch * run.local_tokens
    if config is None:
        forward = 4.0 * rows * run.tokens * model.width
        return {"forward": forward, "backward": 2.5 * forward}
    d, m = model.head_dim, config.measurements
    r, p = config.feature_rank or d, config.atoms or d
    measure = 4.0 * rows * m * model.key_heads * d
    attend = 2.0 * rows * m * model.heads * (d + r)
    iterated = config.iterations * 2.0 * p * (p + r) + 2.0 * p * d
    decode = rows * model.heads * {"none": 0.0, "linear": 2.0 * r * d}.get(config.decoder, iterated)
    backward = measure * (2 if config.learned else 1) + 2.5 * attend + (2 if config.decoder == "linear" else 3) * decode
    return {"forward": measure + attend + decode, "backward": backward}


def block_work(run: Run) -> float:
    """Floating-point operations of one block on one rank for one micro batch, with the projections and the MLP."""
    model, rows = run.model, run.batch * run.local_tokens
    kv = model.key_heads * model.head_dim
    linear = 2.0 * rows * (2 * model.width * (model.width + kv) + 2 * model.width * model.hidden)
    attention = attention_work(run)
    forward = linear + attention["forward"]
    return forward * (2 if run.checkpointing else 1) + 2 * linear + attention["backward"]


def communication(run: Run) -> dict[str, int]:
    """Bytes that one rank sends in a step of one micro batch (ring algorithms: (N - 1) / N of what is shared).

    Gradients: an all-reduce, or a reduce-scatter and an all-gather, twice the parameters; at stage 3 a second gather.
    Sequences: `csat_ext.parallel.traffic`; full attention by Ulysses.
    """
    model, size = run.model, BYTES[run.precision]
    n, s = run.data_ranks, run.sequence_ranks
    gradients = (3 if run.stage == 3 else 2) * parameters(run) * size * (n - 1) // n
    config = run.compressed
    m, rank = (1, None) if config is None else (config.measurements, config.feature_rank)
    queries, keys = (
        traffic.Layer(run.batch, heads, model.head_dim, m, rank, size) for heads in (model.heads, model.key_heads)
    )
    if config is None:  # q and the output have H heads, k and v Hk
        shared = (traffic.ulysses_bytes(queries, run.tokens, s) + traffic.ulysses_bytes(keys, run.tokens, s)) / 2
    else:
        shared = traffic.csat_bytes(keys, run.tokens, s)
    return {"gradients and parameters": gradients, "sequences": model.layers * int(shared)}


@dataclass(frozen=True)
class Plan:
    """A run in numbers. `seconds` assumes the rate and bandwidth that the user named, and no overlap of the two."""

    memory: Mapping[str, int]
    communication: Mapping[str, int]
    work: float
    seconds: float

    @property
    def total_memory(self) -> int:
        return sum(self.memory.values())


def plan(run: Run, *, tflops: float, bandwidth: float) -> Plan:
    """Memory, communication, work and time of one step on one rank.

    Args:
        run: the model and how it is trained.
        tflops: what a rank achieves in matrix products, in 10^12 operations a second.
        bandwidth: what a rank sends, in 10^9 bytes a second.
    """
    for name, value in (("tflops", tflops), ("bandwidth", bandwidth)):
        if not value > 0:
            raise ValueError(f"{name}: {value} came, a positive number is accepted")
    work, sent = run.model.layers * block_work(run), communication(run)
    seconds = work / (tflops * 1e12) + sum(sent.values()) / (bandwidth * 1e9)
    return Plan(memory(run), sent, work, seconds)


def table(run: Run, *, tflops: float, bandwidth: float) -> str:
    """The plan of a run beside that of full attention in the same setting, as lines of text."""
    full = plan(dataclasses.replace(run, attention=None), tflops=tflops, bandwidth=bandwidth)
    ours = plan(run, tflops=tflops, bandwidth=bandwidth)
    lines = [
        f"{parameters(run) / 1e6:,.1f} M parameters, {run.tokens:,} tokens, {run.batch} sequence(s) a rank, "
        f"{run.data_ranks} x {run.sequence_ranks} ranks (data x sequence), ZeRO {run.stage}, {run.precision}",
        f"{'':34}{'compressed':>14}{'full':>14}",
    ]
    rows: list[tuple[str, float, float, float, str]] = []
    rows += [(f"memory: {name}", value, full.memory[name], 2**30, "GiB") for name, value in ours.memory.items()]
    rows.append(("memory of a rank", ours.total_memory, full.total_memory, 2**30, "GiB"))
    sent = full.communication
    rows += [(f"sent: {name}", value, sent[name], 2**30, "GiB") for name, value in ours.communication.items()]
    rows += [("work", ours.work, full.work, 1e12, "TFLOP"), ("step", ours.seconds, full.seconds, 1e-3, "ms")]
    lines += [f"{name:<34}{a / unit:>14,.3f}{b / unit:>14,.3f} {word}" for name, a, b, unit, word in rows]
    attention = [sum(attention_work(r).values()) for r in (run, dataclasses.replace(run, attention=None))]
    lines.append(
        f"work of full attention over compressed: {attention[1] / attention[0]:.2f} x in attention, "
        f"{full.work / ours.work:.2f} x in the blocks; step time {full.seconds / ours.seconds:.2f} x"
    )
    if run.attention is not None and run.compressed is None:
        lines.append(f"m = {run.attention.measurements} is not below the tokens: attention is exact, nothing is saved")
    lines.append(
        f"assumed: {tflops:g} TFLOP/s and {bandwidth:g} GB/s a rank, no overlap, the same rate for both attentions; "
        "measure yours before you rely on the times"
    )
    return "\n".join(lines)
