"""docs/results.md from the result files, and the same as one HTML page: `csat report`."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from csat_ext.bench import pictures, tables
from csat_ext.bench.pictures import Drawer
from csat_ext.bench.tables import Results

Place = Callable[[str, Drawer | None], str]
"""Name of a result file and what draws it -> address of the picture; None: it lies beside the file."""


@dataclass(frozen=True)
class Section:
    """What the page says of the result files of a pattern; left out where there are none.

    make: (results, name of one file) -> Markdown. intro, or what `lead` says of all results, stands once, before them.
    drawer draws the picture of a file; kept are pictures in the folder of the results, which the script that measured
    has drawn.
    """

    title: str
    files: str
    make: Callable[[Results, str], str]
    intro: str = ""
    lead: Callable[[Results], str] | None = None
    drawer: Drawer | None = None
    kept: tuple[str, ...] = ()


def _alone(maker: tables.Maker) -> Callable[[Results, str], str]:
    return lambda results, name: maker(results)


SECTIONS = (
    Section(
        "Time and memory of a whole model (the paper's Table 5)",
        "table5_*",
        tables.table5,
        "`full` is torch's fused attention, `full, scores kept` its unfused form with all n² scores in memory, `stock` "
        "that attention on K and V projected by CSAT's measurements, `stock + LISTA` that with LISTA in eager "
        "torch or, compiled, under torch.compile.",
        drawer=pictures.table5,
    ),
    Section("Time of the operator alone", "scaling", _alone(tables.scaling), drawer=pictures.scaling),
    Section(
        "The operators on a GPU",
        "gpu_check_*",
        tables.gpu_check,
        "As each device saw them at the revision that its file names; what changed since stands in the section after.",
    ),
    Section("The kernels from run to run on a GPU", "gpu_ladder", tables.gpu_ladder),
    Section("Pretraining", "pretrain", _alone(tables.pretrain), kept=("pretrain", "pretrain_examples")),
    Section(
        "Language modelling, causal (the paper's Table 1)",
        "quality_causal*",
        tables.language,
        "`window` is what `csat, block` sees exactly, without the measurements of what is behind it: the "
        "control of the block form, as `linear` is that of LISTA.",
        lead=tables.sets_run,
        drawer=pictures.language,
    ),
    Section(
        "Language modelling, masked (Table 1 for attention that has no causal form)",
        "quality_masked*",
        tables.language,
        "Of the bytes that were hidden, in runs, from the others of the window. Every form stands behind the same "
        "convolution, which shows a byte its neighbours: without one only `longformer` (a window) and `nystromformer` "
        "(its authors' convolution over the values) found them in so few steps, full attention did not.",
        drawer=pictures.language,
    ),
    Section(
        "What is learnt with equal parameters, examples and steps (Table 2, the Long Range Arena)",
        "quality_[lpf]*",
        tables.quality,
        "`csat + linear` is the control that `csat + LISTA` has to beat. Pathfinder here has smaller images and "
        "shorter curves than the Long Range Arena's files, whose curves are of 14 dashes (`--lra-pathfinder FOLDER` "
        "reads those): in the time of two cores it can be learnt of 16 x 16 pixels, was not of 32 x 32, and what "
        "stands here of 64 x 64 is chance.",
        drawer=pictures.quality,
    ),
    Section(
        "Retrieval and captioning (Tables 3 and 4)",
        "quality_captions*",
        tables.captions,
        "The model of `csat pretrain`, attention exchanged in its image tower and from the captions to the image; CSAT "
        "measures the class token exactly and pools the patches in 2-D, the others have as large an m.",
        drawer=pictures.captions,
    ),
    Section(
        "Causal associative recall",
        "associative_recall",
        _alone(tables.recall),
        "What each causal form remembers of pairs seen once, all of them but full attention through a small memory.",
    ),
    Section(
        "What the context costs the causal forms",
        "causal_cost",
        _alone(tables.causal_cost),
        "Below 1 a form is faster than full causal attention; a token that costs the same at every n stays at 1.",
    ),
    Section(
        "A training step of the language model as its context grows",
        "language_cost_*",
        tables.language_cost,
        "`sdpa` over each form: above 1 the form is cheaper. Memory is what a step holds beyond the weights.",
    ),
    Section(
        "Decoding: memory and time of a token",
        "decoding",
        _alone(tables.decoding),
        "One layer's cache of a causal form beside a full cache of keys and values, the full one over each: above 1 "
        "the form is cheaper. Contexts are filled at once with random numbers of the shapes that a cache has after so "
        "many tokens; bytes are exact, times are of the processor.",
    ),
    Section("What each part of CSAT buys", "quality_ablation*", tables.ablation),
    Section("Which ensembles approximate attention", "ensembles", _alone(tables.ensembles), drawer=pictures.ensembles),
    Section(
        "Sparse decoding on the synthetic problem",
        "lista_synthetic",
        _alone(tables.lista),
        "M = 250, N = 500, 10 % nonzero, noiseless, 16 layers; one seed, schedules chosen on the test vectors.",
        kept=("lista_synthetic",),
    ),
)

PREFACE = """# Results

Generated from the files under `benchmarks/results` by `python benchmarks/readme_tables.py`; a test fails where they and
this page disagree, and `csat report` writes the same as one HTML page. Under each table: machine, date, command, file.
"""


def found(results: Results) -> Iterator[tuple[Section, list[str]]]:
    """The sections that have files, with their names."""
    for section in SECTIONS:
        names = sorted(path.stem for path in results.folder.glob(f"{section.files}.json"))
        if names:
            yield section, names


def page(results: Results, place: Place) -> str:
    """The whole page in Markdown; `place` says where a picture is.

    Raises:
        ValueError: the folder has no result file that is known here.
    """
    parts = [PREFACE]
    for section, names in found(results):
        parts.append(f"\n## {section.title}\n")
        for lead in (section.lead(results) if section.lead else "", section.intro):
            parts += [f"\n{lead}\n"] if lead else []
        for name in names:
            parts.append(f"\n{section.make(results, name)}\n")
            if section.drawer is not None:
                parts.append(f"\n![{section.title}]({place(name, section.drawer)})\n")
        parts += [f"\n![{section.title}]({place(picture, None)})\n" for picture in section.kept]
    if len(parts) == 1:
        raise ValueError(f"results: {results.folder} came, and no known result file is in it")
    return "".join(parts)


# ---- docs/results.md -------------------------------------------------------------------------------------------------


def _picture(folder: Path, name: str) -> Path:
    return folder / f"{name}.png"


def write_page(results: Results, path: Path, folder: Path) -> None:
    """The page, and its pictures in `folder` beside it where they are not of these files already."""
    folder.mkdir(exist_ok=True)

    def place(name: str, drawer: Drawer | None) -> str:
        if drawer is None:
            return f"{results.link}/{name}.png"
        png = _picture(folder, name)
        if not png.is_file() or pictures.drawn_from(png) != pictures.digest(results, name):
            png.write_bytes(pictures.draw(results, name, drawer))
        return _address(path, png)

    path.write_text(page(results, place))


def disagreements(results: Results, path: Path, folder: Path) -> list[str]:
    """What of the page and its pictures is not that of the result files."""
    wrong, drawn = [], {}

    def place(name: str, drawer: Drawer | None) -> str:
        if drawer is None:
            return f"{results.link}/{name}.png"
        png = drawn[name] = _picture(folder, name)
        if not png.is_file():
            wrong.append(f"{png.name} is missing")
        elif pictures.drawn_from(png) != pictures.digest(results, name):
            wrong.append(f"{png.name} was drawn from another {name}.json")
        return _address(path, png)

    text = page(results, place)
    if not path.is_file() or path.read_text() != text:
        wrong.append(f"{path.name} is not what the result files say")
    extra = {png.name for png in folder.glob("*.png")} - {png.name for png in drawn.values()}
    return wrong + [f"{name} is on no page" for name in sorted(extra)]


def _address(page: Path, png: Path) -> str:
    return Path(os.path.relpath(png, page.parent)).as_posix()


# ---- one HTML page ---------------------------------------------------------------------------------------------------

STYLE = """body { font: 16px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; color: #222; }
table { border-collapse: collapse; margin: 1em 0; font-size: 0.9em; }
th, td { border: 1px solid #ccc; padding: 0.3em 0.7em; text-align: left; font-variant-numeric: tabular-nums; }
img { max-width: 100%; } code { background: #f3f3f3; } sub { vertical-align: baseline; color: #555; }"""


def html(results: Results) -> str:
    """The page as one HTML file with its pictures inside."""
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark").enable("table").render(page(results, partial(_inside, results)))
    head = f'<meta charset="utf-8"><title>CSAT: results</title><style>\n{STYLE}\n</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}</body></html>\n'


def _inside(results: Results, name: str, drawer: Drawer | None) -> str:
    png = _picture(results.folder, name).read_bytes() if drawer is None else pictures.draw(results, name, drawer)
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
