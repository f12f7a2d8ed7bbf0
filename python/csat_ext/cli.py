"""The `csat` command. Heavy imports stay inside the commands, so that `csat --help` is immediate."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
except ImportError:
    sys.exit("csat: the command line needs the extra 'pretrain': pip install 'csat_ext[pretrain]'")

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Compressed Sensing Attention: pretraining, evaluation, reports.",
)

bench = typer.Typer(no_args_is_help=True, help="Times on this machine, one revision beside another, pictures of them.")
app.add_typer(bench, name="bench")

USER_ERRORS = (OSError, FloatingPointError, ValueError, TypeError)


@app.callback()
def launched(local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None) -> None:
    # The deepspeed launcher puts the option in front of the command; the environment, as with torchrun, has it too.
    if local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(local_rank))


@app.command()
def pretrain(
    config: Annotated[Path, typer.Option(help="YAML file: model sizes, data, schedule.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, wins over the file.")] = None,
    deepspeed: Annotated[
        Path | None,
        typer.Option(help="DeepSpeed JSON, wins over the YAML's; its csat_attention section chooses the attention."),
    ] = None,
    output: Annotated[
        Path, typer.Option(help="Folder of the run: metrics, TensorBoard, checkpoints, evaluation.")
    ] = Path("runs/pretrain"),
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, wins over train.steps.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint in --output.")] = False,
) -> None:
    """Pretrain the vision-language model; under torchrun or deepspeed on many ranks, else on one."""
    from csat_ext.pretrain import config as configs

    chosen = list(overrides or []) + ([] if steps is None else [f"train.steps={steps}"])
    settings = configs.load(config, chosen, None if deepspeed is None else str(deepspeed))
    from csat_ext.pretrain import train

    run = train.read_run(settings)
    train.pretrain(run, output, resume=resume)
    train.leave_process_group()  # first: whoever waited for the evaluation would be given up after ten minutes
    if settings.train.evaluate and os.environ["RANK"] == "0":
        _evaluate(output, None)


@app.command()
def evaluate(
    checkpoint: Annotated[Path, typer.Option(help="Output folder of csat pretrain.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder of the results; CHECKPOINT/evaluation by default.")
    ] = None,
) -> None:
    """Retrieval and captioning on the held-out split; writes results.json and examples.png."""
    _evaluate(checkpoint, output)


@app.command("lm")
def language_model(
    config: Annotated[Path, typer.Option(help="YAML file: model sizes and form of attention, text, schedule.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, wins over the file.")] = None,
    deepspeed: Annotated[Path | None, typer.Option(help="DeepSpeed JSON, wins over the YAML's.")] = None,
    output: Annotated[Path, typer.Option(help="Folder of the run: metrics, TensorBoard, checkpoints.")] = Path(
        "runs/language"
    ),
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, wins over train.steps.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint in --output.")] = False,
) -> None:
    """Train a causal language model over bytes and measure its bits per byte on text held out."""
    from csat_ext.language import config as configs

    chosen = list(overrides or []) + ([] if steps is None else [f"train.steps={steps}"])
    settings = configs.load(config, chosen, None if deepspeed is None else str(deepspeed))
    from csat_ext.language import train
    from csat_ext.pretrain.train import leave_process_group

    result = train.train(train.read_run(settings), output, resume=resume)
    if os.environ["RANK"] == "0":
        typer.echo(
            f"held out: {result['bits per byte']:.3f} bits per byte (frequencies of single bytes: "
            f"{result['bits per byte of single bytes']:.3f}); written: {output / train.EVALUATION}"
        )
    leave_process_group()


@app.command()
def generate(
    checkpoint: Annotated[Path, typer.Option(help="Output folder of csat lm.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    count: Annotated[int, typer.Option("--bytes", help="How many bytes to add.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable byte.")] = 0.8,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
) -> None:
    """Continue a prompt with a trained language model, through the cache of its attention."""
    from csat_ext.language.generate import generate as continued
    from csat_ext.language.train import load_trained

    made = continued(load_trained(checkpoint), prompt.encode(), count, temperature, seed)
    typer.echo(prompt + made.text.decode(errors="replace"))
    typer.echo(f"cache after the last byte: {made.cache_bytes} bytes", err=True)


@app.command()
def plan(
    model: Annotated[str, typer.Option(help="vit-b16, vit-l16, bert-large, ... or layers=24,width=1024,heads=16")],
    seq: Annotated[int, typer.Option(help="Tokens of one sequence.")],
    gpus: Annotated[int, typer.Option(help="Ranks in all.")] = 1,
    batch: Annotated[int, typer.Option(help="Sequences that a data-parallel rank takes at once.")] = 1,
    sequence_parallel: Annotated[int, typer.Option(help="Ranks that share one sequence.")] = 1,
    deepspeed: Annotated[
        Path | None, typer.Option(help="DeepSpeed JSON: its csat_attention section, ZeRO stage and precision.")
    ] = None,
    measurements: Annotated[int | None, typer.Option(help="m, wins over the JSON.")] = None,
    zero: Annotated[int | None, typer.Option(help="ZeRO stage, wins over the JSON.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16, wins over the JSON.")] = None,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Every block is recomputed.")] = False,
    tflops: Annotated[float, typer.Option(help="Assumed: 10^12 operations a second that a rank achieves.")] = 200.0,
    bandwidth: Annotated[float, typer.Option(help="Assumed: 10^9 bytes a second that a rank sends.")] = 50.0,
) -> None:
    """Memory, communication, work and step time of a rank, beside those of full attention."""
    from csat_ext import planning

    run = planning.read_run(
        planning.model_shape(model),
        {} if deepspeed is None else deepspeed,
        measurements=measurements,
        stage=zero,
        precision=precision,
        tokens=seq,
        batch=batch,
        ranks=gpus,
        sequence_ranks=sequence_parallel,
        checkpointing=checkpointing,
    )
    typer.echo(planning.table(run, tflops=tflops, bandwidth=bandwidth))


@bench.command("kernels")
def bench_kernels(
    output: Annotated[Path, typer.Option(help="Result file, JSON.")] = Path("kernels.json"),
    device: Annotated[str | None, typer.Option(help="cpu or cuda; cuda where there is one.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Two lengths, one point of everything else, few sets of inputs.")
    ] = False,
    op: Annotated[list[str] | None, typer.Option(help="Only this op; may be given again.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Only this n; may be given again, the base first.")] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Result file or git revision to compare with; exit code 1 if anything is slower than there."),
    ] = None,
) -> None:
    """Every op alone and the whole operator, forward, backward and both, beside ceilings measured in the same run."""
    import json

    import torch

    from csat_ext.bench import compare, kernels, revision

    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    arguments: dict[str, Any] = {"device": chosen, "quick": quick, "ops": op or [], "tokens": tokens or []}
    earlier = None
    if base is not None and not Path(base).is_file():
        earlier, result = revision.beside(base, arguments, report=typer.echo)
        beside = output.with_name(f"{output.stem}_base.json")
        beside.write_text(json.dumps(earlier, indent=1) + "\n")
        typer.echo(f"written: {beside}")
    else:
        earlier = None if base is None else compare.load(Path(base))
        result = kernels.measured(**arguments, report=typer.echo)
    output.write_text(json.dumps(result, indent=1) + "\n")
    typer.echo(f"written: {output}")
    if earlier is not None:
        _show_comparison(earlier, result)


@bench.command("compare")
def bench_compare(
    base: Annotated[Path, typer.Argument(help="Result file of csat bench kernels.")],
    new: Annotated[Path, typer.Argument(help="Another of the same machine and settings.")],
) -> None:
    """Rows slower or faster by more than the spread; exit code 1 if any is slower."""
    from csat_ext.bench import compare

    _show_comparison(compare.load(base), compare.load(new))


@bench.command("roofline")
def bench_roofline(
    result: Annotated[Path, typer.Argument(help="Result file of csat bench kernels.")],
    output: Annotated[Path, typer.Option(help="Picture.")] = Path("roofline.png"),
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; that of the first row.")] = None,
    direction: Annotated[str, typer.Option("--pass", help="forward, backward or both.")] = "forward",
) -> None:
    """Rate of every problem under the roof of the machine, as measured in the same run."""
    from csat_ext.bench import compare, roofline

    roofline.draw(compare.load(result), output, dtype=dtype, direction=direction)
    typer.echo(f"written: {output}")


@app.command()
def report(
    results: Annotated[Path, typer.Option(help="Folder of result files.")] = Path("benchmarks/results"),
    output: Annotated[Path, typer.Option(help="The page, HTML with its pictures inside.")] = Path("report.html"),
) -> None:
    """Tables and pictures of every known result file, as docs/results.md has them, on one HTML page."""
    from csat_ext.bench import report
    from csat_ext.bench.tables import Results

    link = Path(os.path.relpath(results, output.resolve().parent)).as_posix()
    output.write_text(report.html(Results(results, link)))
    typer.echo(f"written: {output}")


@app.command("ds-report")
def ds_report() -> None:
    """DeepSpeed's ds_report with our operator in its list."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.env_report import main as report

    from csat_ext import op_builder

    op_builder.register()
    report()


@app.command()
def info() -> None:
    """Versions, compiled architectures, device, and which backend runs and why: what to paste into an issue."""
    from csat_ext.info import info as facts

    typer.echo(facts())


def _show_comparison(base: dict[str, Any], new: dict[str, Any]) -> None:
    from csat_ext.bench.compare import compare

    compared = compare(base, new)
    typer.echo(str(compared))
    if compared.of("slower"):
        raise typer.Exit(1)


def _evaluate(checkpoint: Path, output: Path | None) -> None:
    from csat_ext.pretrain.evaluate import PICTURE, RESULTS, evaluate, table

    results = evaluate(checkpoint, output)
    typer.echo(table(results))
    folder = output or checkpoint / "evaluation"
    typer.echo(f"written: {folder / RESULTS}, {folder / PICTURE}")


def main() -> Any:
    """Entry point: exit code 0; 1 with a line for what the user can mend (CSAT_TRACEBACK=1 shows where); 2 for a wrong
    command line."""
    try:
        return app()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("csat_ext"):
            raise
        sys.exit(
            f"csat: {error.name} is not installed; this needs the extra 'pretrain': pip install 'csat_ext[pretrain]'"
        )
    except USER_ERRORS as error:
        if os.environ.get("CSAT_TRACEBACK"):
            raise
        sys.exit(f"csat: {error}")


if __name__ == "__main__":
    main()
