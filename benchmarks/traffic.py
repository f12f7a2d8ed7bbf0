"""Bytes one rank sends for one attention layer, forward and backward: CSAT, DeepSpeed Ulysses and ring attention.

The table is the model of `csat_ext.parallel.traffic`, for a layer of 32 heads of 128 in bfloat16 and m = 256. The model
is checked here: real processes over gloo run the three at 2 and 4 ranks and count what they hand to the network.

    python benchmarks/traffic.py            # count, write the result file and the table of docs/parallel.md
    python benchmarks/traffic.py --check    # exit 1 where the model, the file and the page disagree (a test runs this)
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from machine import header
from torch import Tensor

from csat_ext import CSATAttention, CSATConfig
from csat_ext.parallel import SequenceParallel, UlyssesParallel
from csat_ext.parallel.traffic import Layer, SentBytes, csat_bytes, ring_bytes, ulysses_bytes

PAGE = Path(__file__).resolve().parents[1] / "docs" / "parallel.md"
LENGTHS = [4**power for power in range(6, 11)]  # 4k to 1M
RANKS = [2**power for power in range(1, 11)]
LAYER = Layer(batch=1, heads=32, width=128, measurements=256)
SMALL = Layer(batch=2, heads=4, width=16, measurements=8)
MODELS = {"csat": csat_bytes, "ulysses": ulysses_bytes, "ring": ring_bytes}


# ---- ring attention, as small as it gets -----------------------------------------------------------------------------


def pass_on(tensors: list[Tensor]) -> list[Tensor]:
    """Each rank's tensors to the next rank; those of the one before."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    came = [torch.empty_like(tensor) for tensor in tensors]
    work = [dist.P2POp(dist.isend, tensor.contiguous(), (rank + 1) % ranks) for tensor in tensors]
    work += [dist.P2POp(dist.irecv, tensor, (rank - 1) % ranks) for tensor in came]
    for request in dist.batch_isend_irecv(work):
        request.wait()
    return came


class RingAttention(torch.autograd.Function):
    """softmax(Q K^T / sqrt(D)) V of (B, H, n / P, D) on every rank, K and V going round."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scaled, block = q.float() * q.shape[-1] ** -0.5, [k, v]
        out, lse = torch.zeros_like(scaled), torch.full(q.shape[:-1], -torch.inf)
        for turn in range(dist.get_world_size()):
            scores = scaled @ block[0].float().mT
            new = torch.logaddexp(lse, scores.logsumexp(-1))
            out = out * (lse - new).exp()[..., None] + (scores - new[..., None]).exp() @ block[1].float()
            lse = new
            if turn < dist.get_world_size() - 1:
                block = pass_on(block)
        ctx.save_for_backward(q, k, v, out, lse)
        return out.to(q.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out, lse = ctx.saved_tensors
        scale, grad = q.shape[-1] ** -0.5, grad.float()
        delta, dq = (grad * out).sum(-1, keepdim=True), torch.zeros_like(out)
        block, gradients = [k, v], [torch.zeros_like(out), torch.zeros_like(out)]
        for turn in range(dist.get_world_size()):
            kf, vf = (t.float() for t in block)
            p = (scale * q.float() @ kf.mT - lse[..., None]).exp()
            ds = scale * p * (grad @ vf.mT - delta)
            dq += ds @ kf
            gradients = pass_on([gradients[0] + ds.mT @ q.float(), gradients[1] + p.mT @ grad])
            if turn < dist.get_world_size() - 1:
                block = pass_on(block)
        return dq.to(q.dtype), gradients[0].to(k.dtype), gradients[1].to(v.dtype)


# ---- counting --------------------------------------------------------------------------------------------------------


def attention(parallel: Any) -> CSATAttention:
    config = CSATConfig(measurements=SMALL.measurements, decoder="none")
    layer = CSATAttention(SMALL.heads * SMALL.width, SMALL.heads, config).to(torch.bfloat16)
    layer.parallel = parallel
    return layer


def sent(form: str, n: int) -> float:
    """Bytes that this rank sends in one step, forward and backward."""
    own, ranks = n // dist.get_world_size(), dist.get_world_size()
    counter = SentBytes(ranks)
    if form == "ring":
        qkv = [torch.randn(SMALL.batch, SMALL.heads, own, SMALL.width).bfloat16().requires_grad_() for _ in range(3)]
        with counter:
            RingAttention.apply(*qkv).float().sum().backward()
        return counter.sent
    forms = {"csat": SequenceParallel, "ulysses": UlyssesParallel}
    layer = attention(forms[form](dist.group.WORLD, n))
    x = torch.randn(SMALL.batch, own, SMALL.heads * SMALL.width).bfloat16().requires_grad_()
    layer(x)  # Phi is made once for a length
    with counter:
        layer(x).float().sum().backward()
    return counter.sent


def check_ring() -> None:
    """Ring attention is what it says: equal to full attention."""
    torch.manual_seed(0)
    ranks, rank = dist.get_world_size(), dist.get_rank()
    whole = [torch.randn(2, 4, 8 * ranks, 16, requires_grad=True) for _ in range(3)]
    expected = torch.nn.functional.scaled_dot_product_attention(*whole)
    expected.square().sum().backward()
    own = [t.detach().chunk(ranks, dim=2)[rank].clone().requires_grad_() for t in whole]
    got = RingAttention.apply(*own)
    got.square().sum().backward()
    torch.testing.assert_close(got, expected.chunk(ranks, dim=2)[rank])
    for mine, t in zip(own, whole, strict=True):
        assert t.grad is not None
        torch.testing.assert_close(mine.grad, t.grad.chunk(ranks, dim=2)[rank], rtol=1e-4, atol=1e-5)


def count(rank: int, ranks: int, rendezvous: str, output: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled for a minute; gloo serves
    check_ring()
    rows = [
        {"form": form, "n": n, "ranks": ranks, "counted": sent(form, n), "model": model(SMALL, n, ranks)}
        for form, model in MODELS.items()
        for n in (64, 256)
    ]
    everyone: list[Any] = [None] * ranks
    dist.all_gather_object(everyone, rows)
    assert all(other == rows for other in everyone), "ranks send the same"
    if rank == 0:
        Path(output).write_text(json.dumps(rows))
    dist.barrier()


def counted(ranks: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        output = f"{folder}/rows.json"
        mp.spawn(count, (ranks, f"{folder}/rendezvous", output), ranks)
        return json.loads(Path(output).read_text())


def model_table() -> list[dict[str, Any]]:
    """Bytes by number of tokens and ranks; None for Ulysses on more ranks than heads."""
    rows = []
    for n in LENGTHS:
        for ranks in RANKS:
            row: dict[str, Any] = {"n": n, "ranks": ranks}
            row |= {form: round(model(LAYER, n, ranks)) for form, model in MODELS.items()}
            rows.append(row | ({"ulysses": None} if ranks > LAYER.heads else {}))
    return rows


def page_with(rows: list[dict[str, Any]]) -> str:
    """docs/parallel.md with the table of these rows between its marks."""
    shown = (2, 8, 32, 128, 1024)
    by_place = {(row["n"], row["ranks"]): row for row in rows}

    def cells(n: int) -> list[str]:
        chosen = [by_place[n, ranks] for ranks in shown]
        return [f"{megabytes(row['ulysses'])} / {megabytes(row['ring'])}" for row in chosen]

    lines = [["", *(f"{ranks} ranks" for ranks in shown)], ["---"] * (len(shown) + 1)]
    lines += [["CSAT, every n", *(megabytes(by_place[LENGTHS[0], ranks]["csat"]) for ranks in shown)]]
    lines += [[f"Ulysses / ring, n = {n // 1024}k", *cells(n)] for n in LENGTHS]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return re.sub(r"(<!-- traffic -->\n).*(\n<!-- /traffic -->)", rf"\1{table}\2", PAGE.read_text(), flags=re.DOTALL)


def megabytes(count: float | None) -> str:
    return "-" if count is None else f"{count / 1e6:.3g}" if count < 1e9 else f"{count / 1e6:.0f}"


def check(path: Path) -> None:
    result = json.loads(path.read_text())
    rows = result["model"]["rows"]
    if rows != model_table():
        sys.exit(f"{path.name}: not what the model gives; run python benchmarks/traffic.py")
    if any(row["counted"] != row["model"] for row in result["counted"]["rows"]):
        sys.exit(f"{path.name}: the count and the model disagree")
    if PAGE.read_text() != page_with(rows):
        sys.exit(f"docs/parallel.md disagrees with {path.name}; run python benchmarks/traffic.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "traffic.json")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    if arguments.check:
        return check(arguments.output)
    checked = [row for ranks in (2, 4) for row in counted(ranks)]
    for row in checked:
        print(row)
    result = {
        "machine": header(),
        "unit": "bytes that one rank sends for one layer, forward and backward",
        "model": {"layer": vars(LAYER), "rows": model_table()},
        "counted": {"layer": vars(SMALL), "backend": "gloo", "rows": checked},
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    PAGE.write_text(page_with(model_table()))


if __name__ == "__main__":
    main()
