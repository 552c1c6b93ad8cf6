"""Questions about images as VLMEvalKit keeps them -> answers in the form that it reads back.

    python -m inference_pipeline.vlmevalkit --model_path configs/tiny/checkpoint \\
        --tsv questions.tsv --output_dir answers

In: a table with a header in UTF-8, cells parted by tabs and quoted as pandas does. `index` names
the row; `image` holds the base64 of an image file, a list of such (`['...', '...']`) or the index
of another row with the same images; where it is empty, `image_path` holds a path or a list of
paths, relative to the table's folder. `question`, and optionally `hint`, options in `A`, `B`, ...
(multiple choice), `answer` (the right letter) and any other column.
Out: `<model>_<table>.tsv`, every row and column but `image`, with `prediction` and `error`.
"""

import argparse
import ast
import base64
import csv
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
from PIL import Image
from rich.progress import Progress

from data.config import nearest
from data.files import NamedBytes
from data.images import read_image
from modeling.bagel.generation import TextConfig

from .restorer import Restorer
from .results import claim, command, digest, locked, mark_of, replace_text

Row = dict[str, str]
Request = tuple[list[Image.Image], str]
"""Images and prompt."""
REQUEST = "Answer with the letter of the correct option only."
MAX_REFERENCE = 64
"""Longest `image` cell that is the index of another row; encoded images are longer."""
MAX_CELL = 2**31 - 1
"""Characters; the csv module's own limit is below an encoded image."""
# "A" before another word is an article, except where no article can stand.
ARTICLE = r"A(?=[ \t]+(?!(?:and|as|because|but|for|is|nor|or|since)\b)\w)"
LETTER = re.compile(rf"(?<![\w'’-])(?!{ARTICLE})([A-Z])(?![\w'’-])")


def read_rows(path: Path) -> list[Row]:
    """The rows of a table. Raises ValueError where it cannot be read or lacks a column."""
    csv.field_size_limit(MAX_CELL)
    with path.open(newline="", encoding="utf-8-sig") as file:
        try:
            rows = list(csv.DictReader(file, dialect="excel-tab", restkey="", restval=""))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: no table: {error}") from error
    columns = {*rows[0]} if rows else set()
    image = "image_path" if "image_path" in columns else "image"
    for name in sorted({"index", "question", image} - columns):
        raise ValueError(f"{path}: no rows with a column {name!r}: {nearest(name, columns)}")
    return rows


def cells(row: Row, column: str) -> list[str]:
    """The strings of a cell that holds none, one, or a list of them."""
    text = row.get(column, "").strip()
    return [str(s) for s in ast.literal_eval(text)] if text[:1] == "[" else [text] * bool(text)


def images(row: Row, shared: dict[str, Row], folder: Path) -> Iterator[Image.Image]:
    """The images of a row and of the `shared` rows (by index) that it names."""
    for text in (encoded := cells(row, "image")):
        if len(text) > MAX_REFERENCE:
            content = base64.b64decode("".join(text.split()), validate=True)
            yield read_image(NamedBytes(content, "encoded image"))
        elif text in shared:
            yield from images(shared[text], {}, folder)
        else:
            raise ValueError(f"{text!r} is not the index of a row with images of its own")
    if not encoded:
        yield from (read_image(folder / path) for path in cells(row, "image_path"))


def options(row: Row) -> dict[str, str]:
    """Letter -> text; empty for an open question."""
    return {name: text for name, text in row.items() if re.fullmatch("[A-Z]", name) and text}


def request(row: Row, rows: dict[str, Row], folder: Path) -> Request:
    """Images and prompt of a row, see `images`; raises ValueError that names the column."""
    if row.get("") or not row["question"].strip():
        raise ValueError("question: empty, or a tab stands in a cell without quotes")
    if rows[row["index"]] is not row:
        raise ValueError(f"index: {row['index']!r} is that of an earlier row")
    try:
        if not (found := [*images(row, rows, folder)]):
            raise ValueError("the row has none")
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(f"image: {error}") from error
    hint = [f"Hint: {row['hint']}"] if row.get("hint") else []
    choices = [f"{letter}. {text}" for letter, text in options(row).items()]
    return found, "\n".join([*hint, row["question"], *choices, *[REQUEST] * bool(choices)])


def letters(prediction: str, row: Row) -> set[str]:
    """The options that a prediction names by letter; none or several leave it undecided."""
    alone = re.fullmatch(r"\W*([a-z])\W*", prediction)
    return {*LETTER.findall(alone[1].upper() if alone else prediction)} & options(row).keys()


def accuracy(rows: list[Row]) -> str:
    """Share of right answers among the questions whose letter is known, and what became of all."""
    count: Counter[str] = Counter()
    for row in rows:
        key, found = row.get("answer", "").strip().upper(), letters(row["prediction"], row)
        undecided = "ambiguous" if found else "without a letter"
        decided = ("right" if found == {key} else "wrong") if len(found) == 1 else undecided
        if key in options(row):
            count["failed" if row["error"] else decided] += 1
    share = f"{count['right'] / count.total():.1%}" if count else "unknown"
    parts = ", ".join(f"{n} {kind}" for kind, n in count.most_common()) or "none"
    return f"accuracy {share} of {count.total()} questions with an answer: {parts}"


def run(
    restorer: Restorer, tsv: Path, output_dir: Path, text: TextConfig, batch_size: int = 1
) -> list[Row]:
    """Asks what is not answered yet and writes the table; its rows, with `prediction` and `error`.

    Raises ResumeError when `output_dir` holds answers by other settings or another run is there.
    """
    with locked(output_dir):
        rows, model = read_rows(tsv), _claim_folder(restorer, tsv, output_dir, text)
        table, log = output_dir / f"{model}_{tsv.stem}.tsv", output_dir / "answers.jsonl"
        table.unlink(missing_ok=True)  # until every question has been asked
        by_index = {row["index"]: row for row in reversed(rows)}
        done = _answered(log, rows, by_index, tsv.parent)
        with log.open("a", buffering=1) as file, Progress() as bar:
            bar.add_task("answering", total=len(rows), completed=len(done))
            answers = _Answers(restorer, text, rows, by_index, tsv.parent, done, file, bar)
            while todo := [place for place in range(len(rows)) if place not in done]:
                answers.ask(todo, batch_size)
        rows = [r | {k: done[i][k] for k in ("prediction", "error")} for i, r in enumerate(rows)]
        _write_table(table, rows)
        return rows


def _answered(log: Path, rows: list[Row], shared: dict[str, Row], folder: Path) -> dict[int, Row]:
    """Answers of earlier runs by the places of their rows; the log holds no others any more.

    Neither a line that a kill cut off counts, nor a failed row, nor files that have changed since.
    """
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    done = {place: answer for place, answer in map(json.loads, lines) if not answer["error"]}
    for place in [*done]:
        if _files(rows[place], shared, folder) not in ("", done[place].get("files")):
            del done[place]
    replace_text(log, "".join(json.dumps(item) + "\n" for item in done.items()))
    return done


def _write_table(path: Path, rows: list[Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as sheet:
        columns = [name for name in rows[0] if name not in ("image", "")]
        writer = csv.DictWriter(sheet, columns, dialect="excel-tab", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


@dataclass(frozen=True)
class _Answers:
    """What rows are asked with, and where their answers go."""

    restorer: Restorer
    text: TextConfig
    rows: list[Row]
    by_index: dict[str, Row]
    folder: Path
    """Of the paths in the rows."""
    done: dict[int, Row]
    """Prediction, error and digest of the files, by the place of the row."""
    log: TextIO
    bar: Progress

    def ask(self, places: list[int], batch_size: int) -> None:
        """Where a batch fails, its questions go on alone; then some `places` are left."""
        asked: list[int] = []
        requests = self._requests(places, asked)
        try:
            for i, answer in self.restorer.answers(requests, self.text, batch_size=batch_size):
                self._record(asked[i], answer)
        except (ValueError, RuntimeError, OSError) as error:
            if len(places) == 1:
                self._record(places[0], error=f"{type(error).__name__}: {error}")
                return
            for place in [place for place in asked if place not in self.done] or places[:1]:
                self.ask([place], 1)

    def _requests(self, places: list[int], asked: list[int]) -> Iterator[Request]:
        """Of the rows that are good, whose places `asked` gets."""
        for place in places:
            try:
                wanted = request(self.rows[place], self.by_index, self.folder)
            except ValueError as error:
                self._record(place, error=str(error))
                continue
            asked.append(place)
            yield wanted

    def _record(self, place: int, prediction: str = "", error: str = "") -> None:
        files = _files(self.rows[place], self.by_index, self.folder)
        self.done[place] = {"prediction": prediction, "error": error, "files": files}
        self.log.write(json.dumps([place, self.done[place]]) + "\n")
        self.bar.update(self.bar.task_ids[0], completed=len(self.done))


def _files(row: Row, shared: dict[str, Row], folder: Path) -> str:
    """Digest of the image files that a row names, see `images`; empty where one cannot be read."""
    try:
        rows = [shared[text] for text in cells(row, "image") if text in shared] or [row]
        paths = [p for r in rows if not cells(r, "image") for p in cells(r, "image_path")]
        return digest(*((folder / path).read_bytes() for path in paths))
    except (OSError, ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return ""


def _claim_folder(restorer: Restorer, tsv: Path, output_dir: Path, text: TextConfig) -> str:
    """Name of the model; `claim` with what changes an answer."""
    settings = mark_of(restorer.report, restorer.model.dtype) | {
        "questions": digest(tsv.read_bytes()),
        "text": vars(text),
        "request": REQUEST,
    }
    claim(output_dir, settings)
    return "_".join(Path(restorer.report.folder).resolve().parts[-2:])


def main(argv: list[str] | None = None) -> int:
    """0 when every question was answered, 1 when some failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model_path", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--tsv", type=Path, required=True, help="table of questions")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--max_text_tokens", type=int, default=TextConfig.max_new_tokens)
    args = parser.parse_args(argv)
    read_rows(args.tsv)  # before a large model is loaded in vain
    restorer = Restorer.load(args.model_path, device="cuda" if torch.cuda.is_available() else "cpu")
    text = TextConfig(max_new_tokens=args.max_text_tokens)
    rows = run(restorer, args.tsv, args.output_dir, text, args.batch_size)
    failed = sum(bool(row["error"]) for row in rows)
    print(restorer.report, f"{len(rows)} questions, {failed} failed", accuracy(rows), sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    command(main)
