"""Held-out evaluation of a pretraining run: image-text retrieval both ways, captioning, and a picture of examples."""

from __future__ import annotations

import datetime
import io
import json
import platform
import shlex
import sys
import textwrap
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from csat_ext.pretrain.data import PIXEL_MEAN, PIXEL_STD, CaptionTokenizer, DataConfig, validation_batches
from csat_ext.pretrain.metrics import bleu4, chance_recall_at_k, cider_d, recall_at_k
from csat_ext.pretrain.model import VisionLanguageModel
from csat_ext.pretrain.train import CHECKPOINTS, METRICS, RUN, Run, build_model
from csat_ext.section import apply

RANKS = (1, 5, 10)
RESULTS, PICTURE = "results.json", "examples.png"


def evaluate(checkpoint: Path, output: Path | None = None) -> dict[str, Any]:
    """Evaluates the newest checkpoint of a run on its held-out split; writes `results.json` and `examples.png`.

    Args:
        checkpoint: output folder of `csat pretrain`.
        output: folder of the results; `checkpoint / "evaluation"` where None.

    Returns:
        The content of `results.json`: every metric beside its chance level. Chance of Recall@k is k / items; that of
        the captions is the same score with every caption judged against another image's reference.

    Raises:
        FileNotFoundError: no run or no checkpoint in `checkpoint`.
        ValueError: the held-out split is empty.
    """
    output = checkpoint / "evaluation" if output is None else output
    run, model, step = load_trained(checkpoint)
    data = replace(run.config.data, batch_size=run.config.evaluate.batch_size)
    items = embed_and_caption(model, data, run.config.evaluate.max_items)
    results = {
        "step": step,
        **measured(items),
        "training": _last_metrics(checkpoint),
        "config": _relative(json.loads((checkpoint / RUN).read_text())),
        "command": shlex.join(["csat", *sys.argv[1:]]),
        "machine": {
            "platform": platform.platform(),
            "processor": _processor(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        },
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / RESULTS).write_text(json.dumps(results, indent=1) + "\n")
    if run.config.evaluate.examples:
        _draw(items, run.config.evaluate.examples, output / PICTURE)
    return results


def table(results: dict[str, Any]) -> str:
    """The metrics of `results.json` as lines for a terminal, chance beside each."""
    lines = [f"held-out items: {results['items']}, step {results['step']}"]
    rows = {**results["retrieval"], "captions": results["captioning"]}
    for row, scores in rows.items():
        words = "  ".join(f"{name} {s['score']:.3f} (chance {s['chance']:.3f})" for name, s in scores.items())
        lines.append(f"{row.replace('_', ' '):>13}: {words}")
    return "\n".join(lines)


def load_trained(checkpoint: Path) -> tuple[Run, VisionLanguageModel, int]:
    """Run, model in evaluation mode and step of the newest checkpoint under a run's output folder.

    Raises:
        FileNotFoundError: the folder holds no run or no checkpoint.
    """
    run = Run.load(checkpoint)
    latest = checkpoint / CHECKPOINTS / "latest"
    if not latest.is_file():
        raise FileNotFoundError(f"{latest} does not exist: the run in {checkpoint} has not written a checkpoint")
    tag = latest.read_text().strip()
    model = build_model(run)
    apply(model, run.deepspeed)
    model.load_state_dict(stored_weights(latest.parent, tag))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return run, model.eval().to(device), int(tag.rpartition("-")[2])


@torch.inference_mode()
def greedy_captions(model: VisionLanguageModel, visual: Tensor, tokenizer: CaptionTokenizer) -> Tensor:
    """The most probable next token, one after the other, until every row has its [EOS] or `tokenizer.length` tokens.

    Args:
        visual: visual tokens (B, N, width).

    Returns:
        Token ids (B, L), [BOS] first; what follows a row's first [EOS] means nothing.
    """
    tokens = torch.tensor([[tokenizer.bos_id]] * visual.shape[0], device=visual.device)
    done = torch.zeros(visual.shape[0], dtype=torch.bool, device=visual.device)
    while tokens.shape[1] < tokenizer.length and not done.all():
        following = model.next_token_logits(tokens, visual)[:, -1].argmax(-1)
        tokens = torch.cat([tokens, following[:, None]], dim=1)
        done |= following == tokenizer.eos_id
    return tokens


def stored_weights(folder: Path, tag: str) -> dict[str, Tensor]:
    """The float32 weights of a DeepSpeed checkpoint of any ZeRO stage."""
    if any((folder / tag).glob("*zero_pp_rank_*")):
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # it reports every shard
            weights: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag)
        return weights
    # DeepSpeed's file holds more than tensors; it is the user's own run, as with engine.load_checkpoint.
    states = torch.load(folder / tag / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
    return {name: weight.float() if weight.is_floating_point() else weight for name, weight in states["module"].items()}


@dataclass(frozen=True)
class Items:
    """The held-out split: unit embeddings (N, E) of the images and (T, E) of all their captions, one image's after
    another's; the captions of each, a generated one, pictures (N, 3, S, S)."""

    image: Tensor
    text: Tensor
    captions: list[tuple[str, ...]]
    generated: list[str]
    pictures: Tensor

    def first(self, count: int | None) -> Items:
        """The first so many images."""
        texts = sum(map(len, self.captions[:count]))
        return Items(
            self.image[:count],
            self.text[:texts],
            self.captions[:count],
            self.generated[:count],
            self.pictures[:count],
        )


def measured(items: Items) -> dict[str, Any]:
    """How many items there are, and every metric beside its chance level."""
    return {
        "items": len(items.captions),
        "retrieval": retrieval(items),
        "captioning": _captioning(items.generated, items.captions),
    }


@torch.inference_mode()
def embed_and_caption(
    model: VisionLanguageModel, data: DataConfig, max_items: int | None = None, caption: bool = True
) -> Items:
    """Passes the validation split of `data`, or its first items, through a model in evaluation mode; without `caption`
    nothing is generated.

    Raises:
        ValueError: the split is empty.
    """
    tokenizer = CaptionTokenizer(data.tokenizer, data.text_length)
    device = next(model.parameters()).device
    image, text, pictures = [], [], []
    captions: list[tuple[str, ...]] = []
    generated: list[str] = []
    for batch in validation_batches(data):
        embedding, visual = model.encode_image(batch["image"].to(device))
        image.append(embedding.cpu())
        tokens, masks = map(torch.stack, zip(*map(tokenizer.encode, chain(*batch["captions"])), strict=True))
        text.append(model.encode_text(tokens.to(device), masks.to(device)).cpu())
        pictures.append(batch["image"])
        captions += map(tuple, batch["captions"])
        if caption:
            generated += map(tokenizer.decode, greedy_captions(model, visual, tokenizer))
        if max_items is not None and len(captions) >= max_items:
            break
    if not captions:
        raise ValueError(f"data.val_shards: {data.val_shards} hold no items")
    return Items(torch.cat(image), torch.cat(text), captions, generated, torch.cat(pictures)).first(max_items)


def retrieval(items: Items) -> dict[str, dict[str, dict[str, float]]]:
    """Recall@k of images among texts and of texts among images; an image matches each of its captions, and pictures
    with the same captions match each other's."""
    of_texts = [captions for captions in items.captions for _ in captions]
    similarity = items.image @ items.text.T
    scores, chance = (f(similarity, RANKS, items.captions, of_texts) for f in (recall_at_k, chance_recall_at_k))
    return {
        direction: {f"R@{k}": {"score": scores[direction][k], "chance": chance[direction][k]} for k in RANKS}
        for direction in scores
    }


def _captioning(generated: list[str], references: list[tuple[str, ...]]) -> dict[str, dict[str, float]]:
    """BLEU-4 and CIDEr-D, and the same against the references of other images."""
    half = len(references) // 2
    others = references[half:] + references[:half]
    scores = {"BLEU-4": bleu4, "CIDEr-D": cider_d}
    return {
        name: {"score": score(generated, references), "chance": score(generated, others)}
        for name, score in scores.items()
    }


def _last_metrics(checkpoint: Path) -> dict[str, float]:
    lines: list[str] = (checkpoint / METRICS).read_text().splitlines()
    return json.loads(lines[-1]) if lines else {}


def _relative(value: Any) -> Any:
    """The same JSON value with paths below the working directory made relative to it: results are to be shared."""
    if isinstance(value, dict):
        return {key: _relative(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_relative(item) for item in value]
    return value.removeprefix(f"{Path.cwd()}/") if isinstance(value, str) else value


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [
            line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        if names:
            return f"{names[0]} ({len(names)} cores)"
    return platform.processor()


def _picture(pixels: Tensor) -> Any:
    """Pixels (3, S, S) as the data gives them -> (S, S, 3) in [0, 1]."""
    return (pixels * PIXEL_STD + PIXEL_MEAN).clamp(0, 1).permute(1, 2, 0).numpy()


def _draw(items: Items, rows: int, path: Path) -> None:
    """One row an example, evenly spread over the split: an image, its captions, the five images nearest to its text."""
    from matplotlib.figure import Figure

    nearest = 5
    chosen = torch.linspace(0, len(items.captions) - 1, min(rows, len(items.captions))).long().tolist()
    texts = [0, *accumulate(map(len, items.captions))]  # of each image's first caption
    figure = Figure(figsize=(13, 1.9 * len(chosen) + 0.5), layout="constrained")
    axes = figure.subplots(len(chosen), nearest + 2, squeeze=False, width_ratios=[1, 2] + [1] * nearest)
    for row, index in zip(axes, chosen, strict=True):
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].imshow(_picture(items.pictures[index]))
        row[1].axis("off")
        words = {"reference": items.captions[index][0], "generated": items.generated[index]}
        text = "\n\n".join(textwrap.fill(f"{name}: {caption}", 32) for name, caption in words.items())
        row[1].text(0, 0.5, text, va="center", fontsize=9, transform=row[1].transAxes)
        order = (items.image @ items.text[texts[index]]).argsort(descending=True)
        right = [items.captions[found] == items.captions[index] for found in order.tolist()]
        for axis, found, is_right in zip(row[2:], order.tolist(), right, strict=False):
            axis.imshow(_picture(items.pictures[found]))
            for spine in axis.spines.values():
                spine.set(color="tab:green" if is_right else "lightgray", linewidth=4 if is_right else 1)
        row[2].set_title(f"a right image at rank {right.index(True) + 1} of {len(right)}", fontsize=8, loc="left")
    figure.suptitle(
        "Held-out examples: image and captions; the five images nearest to the reference text (green: right)",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)
