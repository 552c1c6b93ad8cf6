"""What `check_dataset.py` writes: a text, a table, a sheet of pairs."""

import argparse
import csv
import string
import textwrap
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from data.images import ImageError
from data.records import RecordError
from data.stream import Dataset, Planner
from data.tasks import open_image

from .dataset_checks import VOLUME, Checker, Finding

REPORT, TABLE, SHEET = "report.txt", "report.csv", "contact_sheet.png"
TILE, LINE = 192, 16
"""Pixels of a picture's sides, and of a line of text."""
FONT, NO_LETTER = "DejaVuSans.ttf", "\uffff"
"""More letters than the font that comes with Pillow, and what no font has."""
MAX_SHOWN = 4
"""Images of a record on the sheet."""


def write(
    args: argparse.Namespace,
    checker: Checker,
    findings: Sequence[Finding],
    lengths: Sequence[Counter[int]],
    notes: Sequence[str],
) -> str:
    """Writes the files; returns the report without its findings."""
    planner, folder = checker.planner, args.output_dir
    try:
        packs = packing(planner, args.num_packs)
    except ValueError as error:
        packs = f"packing: {error}"
    text = "\n".join([summary(checker, findings, lengths), packs, *notes, ""])
    (folder / REPORT).write_text("\n".join([text, *map(str, findings), ""]))
    with (folder / TABLE).open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["dataset", "file", "line", "reason", "message"])
        for dataset, source, reason, message in findings:
            table.writerow([checker.sets[dataset].name, *source.rsplit(":", 1), reason, message])
    contact_sheet(planner.datasets, args.num_pairs, args.data_seed).save(folder / SHEET)
    return f"{text}{len(findings)} findings: {folder / REPORT}, {TABLE}, {SHEET}"


def summary(checker: Checker, findings: Sequence[Finding], lengths: Sequence[Counter[int]]) -> str:
    """Records, findings by reason and token lengths of every data set."""
    rows = [["data set", "records", "good", "tokens: least", "median", "95 %", "most", "findings"]]
    for number, (dataset, counts) in enumerate(zip(checker.sets, lengths, strict=True)):
        own = [found for found in findings if found.dataset == number]
        bad = len({found.source for found in own if found.reason != VOLUME})
        reasons = Counter(found.reason for found in own)
        tokens = np.repeat(sorted(counts), [counts[n] for n in sorted(counts)])
        of_tokens = np.quantile(tokens, (0, 0.5, 0.95, 1), method="higher") if counts else "----"
        told = ", ".join(f"{reason} {n}" for reason, n in sorted(reasons.items()))
        total = len(dataset.records)
        rows.append([dataset.name, *map(str, (total, total - bad, *of_tokens)), told])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)


def packing(planner: Planner, packs: int) -> str:
    """How full the first packs of the stream are; raises ValueError when there are none."""
    packs = max(packs, 1)
    found = [planner.next_pack() for _ in range(packs)]
    tokens, samples = (sum(draw.tokens for p in found for draw in p), sum(map(len, found)))
    most = planner.config.max_num_tokens
    share = tokens / (packs * most)
    return f"packing: {share:.1%} of max_num_tokens={most}, {samples / packs:.1f} samples a pack"


def contact_sheet(datasets: Sequence[Dataset], count: int, seed: int) -> Image.Image:
    """Random records that can be read: their images, inputs first, and their texts."""
    rng, strips = np.random.default_rng(seed), list[Image.Image]()
    sizes = [(dataset, len(dataset.records)) for dataset in datasets]
    drawn = [(d, int(i)) for d, n in sizes for i in rng.choice(n, min(n, 4 * count), False)]
    for place in rng.permutation(len(drawn)):
        with suppress(RecordError, ImageError):
            strips.append(_strip(*drawn[place]))
        if len(strips) == count:
            break
    sheet = Image.new("RGB", ((MAX_SHOWN + 2) * TILE, max(1, len(strips) * TILE)), "white")
    for place, strip in enumerate(strips):
        sheet.paste(strip, (0, place * TILE))
    return sheet


def _strip(dataset: Dataset, index: int) -> Image.Image:
    record = dataset.records[index]
    shown = [*record.inputs, *record.outputs][:MAX_SHOWN]
    strip = Image.new("RGB", ((MAX_SHOWN + 2) * TILE, TILE), "white")
    for place, ref in enumerate(shown):
        image = open_image(dataset.folder, ref)
        strip.paste(ImageOps.contain(image, (TILE - LINE, TILE - LINE)), (place * TILE, 0))
    name = f"{dataset.name}:{record.source.rpartition(':')[2]}"
    said = [name, *(f"{who}: {text}" for who, text in record.messages)]
    place = len(shown) * TILE
    columns = (strip.width - place) * 2 // LINE
    font, drawn = _font(), ImageDraw.Draw(strip)
    lines = [line for text in said for line in textwrap.wrap(drawable(text, font), columns)]
    for row, line in enumerate(lines[: TILE // LINE]):
        drawn.text((place, row * LINE), line, fill="black", font=font)
    return strip


def _font() -> ImageFont.FreeTypeFont:
    size = LINE * 3 // 4
    with suppress(OSError):  # where it is not installed
        return ImageFont.truetype(FONT, size)
    return ImageFont.load_default(size)  # type: ignore[return-value]


def drawable(text: str, font: ImageFont.FreeTypeFont) -> str:
    """The text, with escapes for what the font would draw as boxes."""
    box = bytes(font.getmask(NO_LETTER))
    boxes = (c for c in {*text} - {*string.whitespace} if bytes(font.getmask(c)) == box)
    return text.translate({ord(c): c.encode("ascii", "backslashreplace").decode() for c in boxes})
