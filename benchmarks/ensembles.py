"""Which ensembles approximate softmax attention? Output error on the activations of a trained image tower, nothing
retrained.

For every layer of a vision tower that was pretrained with full attention, and every ensemble at several m, the output
before `out_proj` is compared with that of softmax attention: ||out - exact|| / ||exact||, averaged over layers. "mean"
predicts the mean of the values for every query: an ensemble above it tells less than nothing.

    csat pretrain --config examples/pretrain.yaml --deepspeed examples/ds_sdpa.json --output runs/sdpa
    python benchmarks/ensembles.py --checkpoint runs/sdpa
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from machine import header
from torch import Tensor, nn

from csat_ext import measurement, reference
from csat_ext.pretrain.data import validation_batches
from csat_ext.pretrain.evaluate import load_trained

HERE = Path(__file__).parent
MEASUREMENTS = (17, 33, 65, 129)
ROWS: dict[str, tuple[str, dict[str, object]]] = {
    "pool 2-D, CLS exact": ("pool", {"anchors": ("first",), "grid": True}),
    "pool 1-D, CLS exact": ("pool", {"anchors": ("first",), "head_shift": True}),
    "pool 1-D": ("pool", {}),
    "bucket, CLS exact": ("bucket", {"anchors": ("first",)}),
    "bucket": ("bucket", {}),
    "gaussian (the paper's)": ("gaussian", {}),
    "rademacher": ("rademacher", {}),
    "srht": ("srht", {}),
    "count_sketch": ("count_sketch", {}),
    "dct": ("dct", {}),
    "haar": ("haar", {}),
}
QKV = tuple[Tensor, Tensor, Tensor]


def activations(checkpoint: Path, images: int) -> tuple[list[QKV], int]:
    """(q, k, v) (B, H, N, D) of every vision layer on held-out images, and the side of the patch grid."""
    run, model, _ = load_trained(checkpoint)
    captured: list[QKV] = []

    def capture(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0]
        projections = (module.q_proj, module.k_proj, module.v_proj)
        heads = module.num_heads
        q, k, v = (p(x).unflatten(-1, (heads, -1)).transpose(1, 2) for p in projections)
        captured.append((q, k, v))

    for block in model.vision.blocks:
        block.attn.register_forward_pre_hook(capture)
    batch = next(iter(validation_batches(run.config.data)))
    with torch.inference_mode():
        model.encode_image(batch["image"][:images])
    return captured, math.isqrt(captured[0][0].shape[2] - 1)


def relative_error(out: Tensor, exact: Tensor) -> float:
    return float((out - exact).norm() / exact.norm())


def error_of(ensemble: str, options: dict[str, object], m: int, layers: list[QKV], side: int) -> float:
    """Mean relative error over the layers; each layer draws its own Phi."""
    options = dict(options)
    if options.pop("grid", False):
        options["grid"] = (side, side)
    errors = []
    for index, (q, k, v) in enumerate(layers):
        phi = measurement(ensemble, m, k.shape[2], seed=0, layer=index, heads=q.shape[1], **options)
        out = reference.csat_attention(q, k, v, phi.phi, score_bias=phi.score_bias)
        errors.append(relative_error(out, nn.functional.scaled_dot_product_attention(q, k, v)))
    return sum(errors) / len(errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="output folder of a run with full attention")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "ensembles.json")
    arguments = parser.parse_args()
    layers, side = activations(arguments.checkpoint, arguments.images)
    mean = [
        relative_error(v.mean(2, keepdim=True).expand_as(q), nn.functional.scaled_dot_product_attention(q, k, v))
        for q, k, v in layers
    ]
    table = {
        name: {str(m): round(error_of(ensemble, options, m, layers, side), 3) for m in MEASUREMENTS}
        for name, (ensemble, options) in ROWS.items()
    }
    result = {
        "machine": header(),
        "tokens": layers[0][1].shape[2],
        "layers": len(layers),
        "images": arguments.images,
        "error of the mean": round(sum(mean) / len(mean), 3),
        "error": table,
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
