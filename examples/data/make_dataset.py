"""Makes the image-text shards and the tokenizer of this folder from three public packages.

The packages, by name, with their ordinary clients (an empty folder, any Debian-like system with npm):

    apt-get download openclipart-png openclipart-svg     # 0.18+dfsg-19
    for f in openclipart-*.deb; do dpkg -x "$f" debian; done
    npm pack emoji-datasource-google@16.0.0 emojibase-data@17.0.0
    mkdir emoji emojibase
    tar xzf emoji-datasource-google-*.tgz -C emoji
    tar xzf emojibase-data-*.tgz -C emojibase
    python make_dataset.py --openclipart debian/usr/share/openclipart \
        --emoji emoji/package --emojibase emojibase/package --out examples/data

The result is the same, byte for byte, for the same packages and the same versions of Pillow and zlib.
Needs numpy, pillow, tokenizers and typer.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import io
import json
import re
import tarfile
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image

SIDE = 64
CAPTION_WORDS = 12
IMAGES_PER_CAPTION = 4
VALIDATION_SHARE = 0.15
SAMPLES_PER_SHARD = 1024
MOST_PIXELS = 30_000_000
VOCABULARY = 4096
SPECIAL_TOKENS = ["[PAD]", "[BOS]", "[EOS]", "[UNK]"]
Image.MAX_IMAGE_PIXELS = None  # `reduced` has its own limit

# Folders that hold generated stars, trademarks, or nothing a caption could tell apart.
SKIPPED_FOLDERS = (
    "shapes/stars",
    "logos",
    "unsorted/duplicates",
    "computer/icons/lemon-theme/mimetypes",
    "people/clothing/pantyhose",
    "special/examples",
)
# A contributor who titled in Italian; `known_words` sorts out what else is not English.
SKIPPED_CREATORS = ("rollandin",)
SKIPPED_WORDS = frozenset({
    "alcatel", "bmw", "cola", "gates", "hitler", "hummer", "iconset", "microsoft", "mpcad", "naked", "nazi",
    "nude", "pacman", "pepsi", "quake", "quot", "sex", "sexy", "stylized", "swastika", "tux", "xbill",
})  # fmt: skip
# Keywords of the archive's own bookkeeping, and those of the theme a picture was drawn for (spaces left out).
BOOKKEEPING = frozenset({
    "action", "actions", "activities", "aigasymbols", "appicon", "application", "applications", "apps", "art",
    "body", "buttons", "clip", "clipart", "computericon", "desktop", "domain", "etiquettetheme", "filesystem",
    "filesystems", "flattheme", "geometry", "gramastar", "hash", "hexcode", "hotelicon", "icon", "icons",
    "lemontheme", "lemonthemeicon", "magick", "mapsymbols", "mimeicon", "mimetype", "mimetypes", "misc",
    "miscellany", "object", "objects", "openclipart", "other", "public", "recreation", "shape", "shapes",
    "sign", "signs", "signsandsymbols", "special", "stock", "submission", "symbol", "symbols", "theme",
    "unitednations", "unitednationsmember", "unsorted", "unzsnu", "webpage",
})  # fmt: skip
RUN_TOGETHER = {
    "airtravel": "air travel", "arrowshape": "arrow", "beatle": "beetle", "blueman": "blue man",
    "bodypart": "body part", "bullethole": "bullet hole", "bw": "black and white", "drapeau": "flag",
    "icecream": "ice cream", "imformation": "information", "latinamerica": "latin america", "mapsym": "map symbol",
    "musicstuff": "music", "musicsym": "music", "networksym": "network", "northamerica": "north america",
    "noze": "nose", "recyclables": "recycling", "religholiday": "religious holiday", "roadsign": "road sign",
    "roadtravel": "road travel", "signalflag": "signal flag", "smileys": "smiley", "smilies": "smiley",
    "stickman": "stick man", "stickmen": "stick man", "uk": "united kingdom", "unitedstates": "united states",
    "usa": "united states", "vegitable": "vegetable", "weathersym": "weather", "xmas": "christmas",
}  # fmt: skip
CARD_RANKS = {"a": "ace", "j": "jack", "q": "queen", "k": "king", **{str(i): str(i) for i in range(2, 11)}}
CARD_SUITS = {"c": "clubs", "d": "diamonds", "h": "hearts", "s": "spades"}
TITLE_STOP_WORDS = frozenset({
    "a", "an", "and", "black", "color", "colour", "for", "in", "large", "new", "of", "old", "on", "simple",
    "small", "the", "to", "white", "with",
})  # fmt: skip


@dataclass
class Picture:
    """One image on its way to a caption: `title` and `keywords` are lower-case words."""

    key: str
    source: str
    license: str
    file: Path
    title: str
    keywords: list[str] = field(default_factory=list)
    title_from_file_name: bool = False
    webp: bytes = b""
    thumbnail: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))

    def caption(self, frequency: Counter[str]) -> str:
        """Title, then the keywords that add a word to it, the commonest first, at most CAPTION_WORDS words."""
        parts, words = [self.title], self.title.split()
        stems = {singular(word) for word in words}
        for keyword in sorted(dict.fromkeys(self.keywords), key=lambda k: (-frequency[k], k)):
            new = keyword.split()
            if all(singular(word) in stems for word in new) or len(words) + len(new) > CAPTION_WORDS:
                continue
            parts.append(keyword)
            words += new
            stems |= {singular(word) for word in new}
        return ", ".join(parts)

    def title_group(self) -> str:
        """What may not be on both sides of the split: the title's content words in any order, numbers left out."""
        words = {singular(word) for word in self.title.split() if word not in TITLE_STOP_WORDS and not word.isdigit()}
        return " ".join(sorted(words)) or self.title


def singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def plain_words(text: str) -> str:
    """Lower-case ASCII words of a title, keyword or file name: `BlueCar_(B and W)` -> `blue car black and white`."""
    text = html.unescape(text).replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    text = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", text).lower()
    text = re.sub(r"\bb\s*(?:and|&|n)\s*w\b", "bw", text)
    text = re.sub(r"'s?\b(?=\s|$)|'(?=s\b)", "", text)
    text = re.sub(r"[^a-z0-9]+", " ", text)
    text = re.sub(r"(?<=[a-z]{3})\d+\b", " ", text)
    text = re.sub(r"\b(etiquette|openclipart|openclip|clipart|plastik|icon theme)\b", " ", text)
    return " ".join(RUN_TOGETHER.get(word, word) for word in text.split())


def content_keywords(raw: Iterable[str], creator_words: set[str]) -> list[str]:
    kept = []
    for text in raw:
        if "@" in text or re.fullmatch(r".*\b0x[0-9a-f]+\s*", text):
            continue
        words = plain_words(text)
        tokens = words.split()
        if (
            not 1 <= len(tokens) <= 3
            or words.replace(" ", "") in BOOKKEEPING
            or any(t in creator_words or t.isdigit() for t in tokens)
        ):
            continue
        kept.append(words)
    return kept


# --- Debian's openclipart ---


def svg_metadata(root: Path, stem: str) -> dict[str, object] | None:
    """Title, keywords, creator and licence of the twin SVG (Dublin Core in RDF; many files are not well-formed XML)."""
    file = next((f for suffix in (".svg", ".svg.gz", ".svgz") if (f := root / "svg" / (stem + suffix)).exists()), None)
    if file is None:
        return None
    data = file.read_bytes()
    text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8", "replace")
    found = re.search(r"<metadata.*?</metadata>", text, re.DOTALL)
    if found is None:
        return None
    block = found.group(0)

    def first(pattern: str) -> str:
        match = re.search(pattern, block, re.DOTALL)
        return html.unescape(match.group(1)).strip() if match else ""

    return {
        "title": first(r"<dc:title>(.*?)</dc:title>"),
        "keywords": re.findall(r"<rdf:li>(.*?)</rdf:li>", first(r"<dc:subject>(.*?)</dc:subject>"), re.DOTALL),
        "creator": first(r"<dc:creator>.*?<dc:title>(.*?)</dc:title>"),
        "license": first(r'license rdf:resource="(.*?)"'),
    }


def boilerplate_titles(titles: dict[str, str]) -> set[str]:
    """Titles of a collection, not of a picture: shared by five or more files of four or more names (digits aside)."""
    names: dict[str, list[str]] = defaultdict(list)
    for stem, title in titles.items():
        names[title].append(re.sub(r"[\d_ -]+", "", Path(stem).name.lower()))
    return {title for title, stems in names.items() if not title or (len(stems) >= 5 and len(set(stems)) >= 4)}


def file_name_title(stem: str, creator_words: set[str]) -> str:
    """Words of a file name without its theme's prefix and (often cut off) author: `bb_mail_new`, `pan_frouke_01`."""
    name = re.sub(
        r"^(aiga|bb|b|bs|gnome|gtk|stock|mime|sport|advertising)[_-]+", "", Path(stem).name, flags=re.IGNORECASE
    )
    name = re.sub(r"^(gtk-stock|gnome-mime|stock)[_-]", "", name)
    words = re.sub(r"[_-]?symbol_\w*bwh$|_0_", " ", name)
    tokens = plain_words(words).split()
    while tokens and (
        tokens[-1].isdigit() or len(tokens[-1]) == 1 or any(w.startswith(tokens[-1]) for w in creator_words)
    ):
        tokens.pop()
    return " ".join(t for t in tokens if t not in creator_words)


def card_title(stem: str) -> str | None:
    match = re.fullmatch(r"(white|bordered|ornamental|simple)_([cdhs])_(\w+)", Path(stem).name)
    if match is None or match[3] not in CARD_RANKS:
        return None
    return f"{CARD_RANKS[match[3]]} of {CARD_SUITS[match[2]]} playing card {match[1]}"


def openclipart_pictures(root: Path) -> list[Picture]:
    metadata = {}
    for file in sorted((root / "png").rglob("*.png")):
        stem = file.relative_to(root / "png").with_suffix("").as_posix()
        if not stem.startswith(SKIPPED_FOLDERS) and (found := svg_metadata(root, stem)) is not None:
            metadata[stem] = found
    boilerplate = boilerplate_titles({stem: str(m["title"]).lower() for stem, m in metadata.items()})
    pictures = []
    for stem, m in metadata.items():
        creator_words = set(plain_words(str(m["creator"])).split())
        public_domain = re.search(
            r"public-?domain", str(m["license"]), re.I
        )  # four files of the archive say GPL, 61 say nothing
        if not public_domain or any(name in creator_words for name in SKIPPED_CREATORS):
            continue
        title = str(m["title"]).lower()
        from_name = title in boilerplate or (title.startswith("clipart by") and "flags/" not in stem)
        raw = re.sub(r"^clipart by .*? - ", "", str(m["title"]), flags=re.IGNORECASE)
        words = card_title(stem) or (file_name_title(stem, creator_words) if from_name else plain_words(raw))
        words = re.sub(r"( \d+)+$", "", words)
        folders = stem.split("/")[:-1]
        keywords = content_keywords([*m["keywords"], *folders], creator_words)  # type: ignore[misc]
        if "signs_and_symbols/flags/" in stem and "flag" not in words:
            words += " flag"
        key = "clipart-" + hashlib.sha256(stem.encode()).hexdigest()[:12]
        pictures.append(
            Picture(
                key, f"openclipart:{stem}", "public domain", root / "png" / f"{stem}.png", words, keywords, from_name
            )
        )
    return pictures


# --- Noto Emoji ---


def emoji_pictures(images: Path, labels: Path) -> list[Picture]:
    named = {e["hexcode"].replace("-FE0F", ""): e for e in json.loads((labels / "en" / "data.json").read_text("utf-8"))}
    pictures = []
    for entry in json.loads((images / "emoji.json").read_text("utf-8")):
        label = named.get(entry["unified"].replace("-FE0F", ""))
        if label is None or not entry["has_img_google"] or entry["category"] == "Component":
            continue
        title = re.sub(r"^flag: (.*)", r"\1 flag", label["label"])
        topic = re.sub(r"(-other|other-|place-)", "-", entry["subcategory"]).replace("-", " ")
        keywords = content_keywords([*topic.split(), *label.get("tags", [])], set())
        keywords = [k for k in keywords if len(k) > 2 or entry["category"] != "Flags"]
        file = images / "img" / "google" / "64" / entry["image"]
        key = "emoji-" + entry["unified"].lower()
        pictures.append(
            Picture(key, f"noto-emoji:{entry['unified']}", "Apache-2.0", file, plain_words(title), keywords)
        )
    return pictures


# --- captions worth keeping ---


def known_words(pictures: list[Picture]) -> set[str]:
    """The set's own English words: all of the emoji labels and tags, and those that three or more openclipart pictures
    were given in titles or keywords."""
    counts: Counter[str] = Counter()
    for picture in pictures:
        weight = 3 if picture.source.startswith("noto-emoji") else 1
        words = {
            w
            for text in ([] if picture.title_from_file_name else [picture.title]) + picture.keywords
            for w in text.split()
        }
        counts.update({word: weight for word in words})
    return {word for word, n in counts.items() if n >= 3 and len(word) > 2} | {"of", "no", "up", "tv", "cd", "and"}


def has_useful_caption(picture: Picture, known: set[str], frequency: Counter[str]) -> bool:
    words = picture.title.split()
    if len(words) > 8 or not any(len(w) > 2 and w.isalpha() for w in words) or words[-1] == "theme":
        return False
    share = sum(w in known or w.isdigit() for w in words) / len(words)
    if share < (1 if picture.title_from_file_name else 0.5):
        return False
    return len(picture.caption(frequency)) > 2


# --- pixels ---


def reduced(file: Path) -> Image.Image | None:
    """The picture over white, padded to a square, SIDE x SIDE RGB; None for the few files of hundreds of megapixels."""
    with Image.open(file) as opened:
        if opened.width * opened.height > MOST_PIXELS:
            return None
        image = opened.convert("RGBA")
    box = image.getchannel("A").point([0] * 8 + [255] * 248).getbbox()
    image = image.crop(box) if box else image
    side = max(image.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0)


def add_pixels(picture: Picture) -> bool:
    """Fills in the encoded image and its thumbnail; False for a picture with next to nothing on it, or too big."""
    image = reduced(picture.file)
    if image is None:
        return False
    pixels = np.asarray(image, dtype=np.float32)
    if pixels.std() < 6:
        return False
    tiny = np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=np.float32)
    picture.thumbnail = (tiny / np.float32(255)).reshape(-1)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=85, method=6)
    picture.webp = buffer.getvalue()
    return True


def near_duplicates(pictures: list[Picture], limit: float = 0.02) -> list[tuple[int, int]]:
    """Pairs whose 8x8 RGB thumbnails differ by less than `limit` (RMS, of 1)."""
    thumbnails = np.stack([p.thumbnail for p in pictures])  # (n, 192)
    squares = (thumbnails**2).sum(1)
    pairs = []
    for start in range(0, len(pictures), 512):
        block = thumbnails[start : start + 512]
        distance = squares[start : start + 512, None] + squares[None] - 2 * block @ thumbnails.T
        for i, j in np.argwhere(distance < limit**2 * thumbnails.shape[1]):
            if start + i < j:
                pairs.append((int(start + i), int(j)))
    return pairs


# --- split and shards ---


def split_groups(pictures: list[Picture], pairs: list[tuple[int, int]]) -> list[str]:
    """A group name per picture: pictures that share a title group or look alike share it (union-find)."""
    parent = list(range(len(pictures)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[str, int] = {}
    same_title = [(first.setdefault(picture.title_group(), i), i) for i, picture in enumerate(pictures)]
    for i, j in same_title + pairs:
        a, b = sorted((root(i), root(j)))
        parent[b] = a
    return [pictures[root(i)].title_group() for i in range(len(pictures))]


def order(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def is_validation(group: str) -> bool:
    return int(order("split " + group)[:8], 16) / 2**32 < VALIDATION_SHARE


def write_shard(file: Path, pictures: list[Picture], captions: dict[str, str]) -> None:
    """A WebDataset shard in gzip (tar pads every member to 512 bytes: most of so small a set). No time, no owner."""
    with (
        file.open("wb") as raw,
        gzip.GzipFile("", "wb", 9, raw, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as tar,
    ):
        for p in pictures:
            facts = {"title": p.title, "source": p.source, "license": p.license}
            members = {
                "webp": p.webp,
                "txt": captions[p.key].encode(),
                "json": json.dumps(facts, sort_keys=True).encode(),
            }
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{p.key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def write_split(out: Path, name: str, pictures: list[Picture], captions: dict[str, str]) -> None:
    for old in out.glob(f"{name}-*.tar.gz"):
        old.unlink()
    pictures = sorted(pictures, key=lambda p: order(p.key))
    shards = max(1, -(-len(pictures) // SAMPLES_PER_SHARD))
    for i in range(shards):
        write_shard(out / f"{name}-{i:06d}.tar.gz", pictures[i::shards], captions)


def train_tokenizer(out: Path, captions: list[str]) -> int:
    """Byte-level BPE over the train captions; adds [BOS] ... [EOS] itself. Returns the vocabulary's size."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=3,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(captions), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[(t, tokenizer.token_to_id(t)) for t in ("[BOS]", "[EOS]")]
    )
    tokenizer.save(str(out / "tokenizer.json"))
    return tokenizer.get_vocab_size()


def select(pictures: list[Picture]) -> tuple[list[Picture], dict[str, str]]:
    """Pictures with a useful caption and something to see, no copies, at most IMAGES_PER_CAPTION to a caption; and the
    captions by key."""
    known = known_words(pictures)
    frequency = Counter(k for p in pictures for k in set(p.keywords))
    pictures = [p for p in pictures if SKIPPED_WORDS.isdisjoint(f"{p.title} {' '.join(p.keywords)}".split())]
    for p in pictures:
        p.keywords = [k for k in p.keywords if all(w in known for w in k.split())]
    pictures = [p for p in pictures if has_useful_caption(p, known, frequency)]
    kept: list[Picture] = []
    captions: dict[str, str] = {}
    images_of: Counter[str] = Counter()
    seen: set[tuple[str, bytes]] = set()
    for p in sorted(pictures, key=lambda p: order(p.key)):
        caption = p.caption(frequency)
        if images_of[caption] < IMAGES_PER_CAPTION and add_pixels(p) and (p.title, p.webp) not in seen:
            images_of[caption] += 1
            seen.add((p.title, p.webp))
            captions[p.key] = caption
            kept.append(p)
    return kept, captions


def main(
    openclipart: Annotated[
        Path, typer.Option(help="usr/share/openclipart of the unpacked openclipart-png and -svg", exists=True)
    ],
    emoji: Annotated[Path, typer.Option(help="folder `package` of emoji-datasource-google", exists=True)],
    emojibase: Annotated[Path, typer.Option(help="folder `package` of emojibase-data", exists=True)],
    out: Annotated[Path, typer.Option(help="where shards, tokenizer and counts.json go", exists=True)] = Path(
        __file__
    ).parent,
) -> None:
    """Write train-*.tar.gz, val-*.tar.gz, tokenizer.json and counts.json."""
    pictures, captions = select(openclipart_pictures(openclipart) + emoji_pictures(emoji, emojibase))
    groups = split_groups(pictures, near_duplicates(pictures))
    validation = [p for p, g in zip(pictures, groups, strict=True) if is_validation(g)]
    train = [p for p, g in zip(pictures, groups, strict=True) if not is_validation(g)]
    write_split(out, "train", train, captions)
    write_split(out, "val", validation, captions)
    vocabulary = train_tokenizer(out, [captions[p.key] for p in train])
    counts: dict[str, object] = {"vocabulary": vocabulary, "largest group": Counter(groups).most_common(1)[0][1]}
    for name, part in (("train", train), ("val", validation)):
        counts[name] = {
            "pairs": len(part),
            "distinct titles": len({p.title for p in part}),
            "distinct captions": len({captions[p.key] for p in part}),
            "openclipart": sum(p.source.startswith("openclipart") for p in part),
            "noto-emoji": sum(p.source.startswith("noto-emoji") for p in part),
        }
    (out / "counts.json").write_text(json.dumps(counts, indent=2) + "\n")
    typer.echo(json.dumps(counts, indent=2))


if __name__ == "__main__":
    typer.run(main)
