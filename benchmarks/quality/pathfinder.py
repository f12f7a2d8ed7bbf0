"""Pathfinder after Linsley et al. 2018: are the two discs at the ends of the same dashed curve? An own generator, as
images of 32 x 32 grey values, pixel by pixel; or the files of the Long Range Arena.

Every image has two long curves and some short ones of dashes with gaps, none nearer than `APART` pixels to another. In
a positive image the discs are at both ends of one long curve, in a negative one at an end of each. Curves are drawn
before that is decided, and only such as would have the discs equally far apart either way: neither what is drawn nor
the distance of the discs tells the classes apart.
"""

from __future__ import annotations

import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import permutations, product
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .classification import Classification, splits_of

DASH, GAP = 3.0, 2.0
"""Pixels from the first to the last point of a dash, and on to the next dash."""
APART = 4
"""Pixels of different curves differ by at least so much in one coordinate; within a curve a gap is less than that."""
DISC = 1.5  # three by three pixels
ALIKE = 0.5  # pixels
WHITE = 255
MANY = 10_000


@dataclass(frozen=True)
class Sizes:
    """side: pixels of the image. dashes: of a long curve, as Linsley et al. count its length. short: dashes of a short
    curve; distractors: at most so many of them. bend: standard deviation of the turn at a gap, in radians."""

    side: int = 32
    dashes: int = 5
    short: int = 2
    distractors: int = 3
    bend: float = 0.5


Ends = tuple[np.ndarray, np.ndarray]
Curve = tuple[np.ndarray, Ends]
"""Pixels (count, 2) and the two ends (2,)."""


def _line(start: np.ndarray, heading: float) -> np.ndarray:
    steps = np.arange(0, DASH + 0.01, 0.25)
    return start + steps[:, None] * np.array([math.cos(heading), math.sin(heading)])


def _near(free: np.ndarray, points: np.ndarray) -> bool:
    """Whether a point lies outside the image or where no further curve may go."""
    side = len(free)
    rows = np.rint(points).astype(int)
    return bool((rows < 0).any() or (rows >= side).any() or not free[rows[:, 0], rows[:, 1]].all())


def _close_off(free: np.ndarray, pixels: np.ndarray) -> None:
    for row, column in pixels:
        free[max(row - APART + 1, 0) : row + APART, max(column - APART + 1, 0) : column + APART] = False


def disc(centre: np.ndarray, side: int) -> np.ndarray:
    """Pixels within `DISC` of a point."""
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), -1)
    return grid[((grid - np.rint(centre)) ** 2).sum(-1) <= DISC**2]


def curve(rng: np.random.Generator, sizes: Sizes, free: np.ndarray, dashes: int) -> Curve | None:
    """A curve of so many dashes where `free` (side, side) allows it, with room for discs at its ends; None if this
    attempt failed."""
    margin = math.ceil(DISC)
    inner = free.copy()
    inner[:margin] = inner[-margin:] = inner[:, :margin] = inner[:, -margin:] = False
    point, heading = rng.uniform(margin, sizes.side - 1 - margin, 2), rng.uniform(0, 2 * math.pi)
    drawn: list[np.ndarray] = []
    first = point
    for _ in range(dashes):
        line = _line(point, heading)
        own = np.concatenate(drawn[:-1]) if len(drawn) > 1 else np.empty((0, 2))
        if _near(inner, line) or (len(own) and np.abs(line[:, None] - own).max(-1).min() < APART - 1):
            return None
        drawn.append(line)
        heading += float(rng.normal(0, sizes.bend))
        point = line[-1] + GAP * np.array([math.cos(heading), math.sin(heading)])
    ends = first, drawn[-1][-1]
    pixels = np.unique(np.rint(np.concatenate(drawn)).astype(int), axis=0)
    whole = np.concatenate([pixels, *(disc(end, sizes.side) for end in ends)])
    if not free[whole[:, 0], whole[:, 1]].all():
        return None
    _close_off(free, whole)
    return pixels, ends


def long_curves(rng: np.random.Generator, sizes: Sizes) -> tuple[np.ndarray, list[Curve], Ends]:
    """What is free beside two long curves, the two, and an end of each that lie as far apart as the ends of the first,
    to `ALIKE` pixels."""
    while True:
        free = np.ones((sizes.side, sizes.side), dtype=bool)
        found: list[Curve] = []
        for _ in range(60):
            made = curve(rng, sizes, free, sizes.dashes)
            found += [] if made is None else [made]
            if len(found) == 2:
                break
        for (_, own), (_, other) in permutations(found, 2):
            for pair in product(own, other):
                if abs(_distance(*pair) - _distance(*own)) <= ALIKE:
                    return free, found if own is found[0][1] else found[::-1], pair


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    return math.hypot(*(one - other))


def image(rng: np.random.Generator, sizes: Sizes, connected: bool) -> np.ndarray:
    """(side, side) uint8, black but for dashes and discs."""
    free, found, apart = long_curves(rng, sizes)
    for _ in range(8 * sizes.distractors):
        made = curve(rng, sizes, free, sizes.short) if len(found) < 2 + sizes.distractors else None
        found += [] if made is None else [made]
    picture = np.zeros((sizes.side, sizes.side), dtype=np.uint8)
    marked = found[0][1] if connected else apart
    for pixels in (*(pixels for pixels, _ in found), *(disc(end, sizes.side) for end in marked)):
        picture[pixels[:, 0], pixels[:, 1]] = WHITE
    return picture


def _numbered(job: tuple[int, int, Sizes, bool]) -> np.ndarray:
    seed, number, sizes, connected = job
    return image(np.random.default_rng((seed, number)), sizes, connected)


def _all(jobs: list[tuple[int, int, Sizes, bool]]) -> list[np.ndarray]:
    """The images, by several processes where they are many."""
    if len(jobs) < MANY:
        return [_numbered(job) for job in jobs]
    with ProcessPoolExecutor(mp_context=get_context("forkserver")) as pool:
        return list(pool.map(_numbered, jobs, chunksize=200))


def pathfinder(sizes: Sizes, counts: tuple[int, int, int], seed: int = 0) -> Classification:
    """Train, validation and test images, positive and negative ones in random order, half of each."""
    total = sum(counts)
    order = np.random.default_rng(seed).permutation(total)
    labels = torch.from_numpy((order % 2).astype(np.int64))
    jobs = [(seed, number, sizes, bool(label)) for number, label in enumerate(labels)]
    made = _all(jobs)
    tokens = torch.from_numpy(np.stack(made)).flatten(1)
    about = (
        f"Pathfinder, own generator, {sizes.side} x {sizes.side}, two curves of {sizes.dashes} dashes and up to "
        f"{sizes.distractors} of {sizes.short}"
    )
    parts = splits_of(tokens, None, labels, counts)
    return Classification("pathfinder", about, 2, 256, *parts, grid=(sizes.side, sizes.side))


# ---- the files of LRA ------------------------------------------------------------------------------------------------


def lra_pathfinder(folder: Path, side: int, counts: tuple[int, int, int], seed: int = 0) -> Classification:
    """Images of one of LRA's sets, such as pathfinder64/curv_contour_length_14, in an order by the seed.

    A line of metadata/*.npy, which is text, is: folder, file, number, label and more.

    Raises:
        ValueError: no such files, too few of them, or images of another size.
    """
    lines = [line.split() for path in sorted(folder.glob("metadata/*.npy")) for line in path.read_text().splitlines()]
    if len(lines) < sum(counts):
        raise ValueError(f"{folder.name}: {len(lines)} images in its metadata/*.npy, at least {sum(counts)} are needed")
    order = np.random.default_rng(seed).permutation(len(lines))[: sum(counts)]
    made = np.stack([_lra_image(folder / lines[i][0] / lines[i][1], side) for i in order])
    labels = torch.tensor([int(lines[i][3]) for i in order])
    parts = splits_of(torch.from_numpy(made).flatten(1), None, labels, counts)
    about = f"Pathfinder, the files of LRA, {side} x {side}"
    return Classification("pathfinder", about, 2, 256, *parts, grid=(side, side))


def _lra_image(path: Path, side: int) -> np.ndarray:
    try:
        with Image.open(path) as opened:
            picture = np.asarray(opened.convert("L"))
    except OSError as error:
        raise ValueError(f"{path.name}: {error.strerror or error}") from None
    if picture.shape != (side, side):
        raise ValueError(f"{path.name}: {picture.shape} pixels came, {side} x {side} are accepted")
    return picture
