"""One HTML page over result folders: numbers, curves, samples, failures and settings.

    python -m inference_pipeline.report build/demo/before build/demo/after --output report.html

The page holds all that it shows. Means and intervals are those of every statistics.json.
"""

import argparse
import base64
import hashlib
import io
import json
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .metrics import PROTOCOLS, describe
from .results import RESULTS, ResultsError, command, read_results, read_settings, read_statistics
from .summary import input_paths, same_sample
from .text_metrics import TEXT_PROTOCOLS

TEMPLATE = Path(__file__).with_name("report.html")
RANKED_BY = "psnr"
"""The number that chooses the samples shown."""
PLACES = ("only", "median", "worst", "best")
"""Samples shown of every task; the bound on the page's size drops the last of these first."""
FILES = {"input": "saved_input_img", "truth": "saved_output_img", "restored": "pred_img"}
"""Images of a sample -> their keys in results.jsonl."""
Json = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One result folder: a checkpoint on a test set."""

    folder: Path
    settings: Json
    statistics: Json
    results: dict[int, Json]
    """By sample id."""

    def beside(self, other: "Run") -> bool:
        """Whether numbers may stand side by side: one name, samples of one name and content."""
        same = self.settings["split"] == other.settings["split"]
        same = same and self.results.keys() == other.results.keys()
        return same and all(same_sample(r, other.results[i]) for i, r in self.results.items())

    def ranked(self) -> dict[str, list[int]]:
        """Ids of the restored samples of every task, the worst first."""
        tasks: dict[str, list[int]] = defaultdict(list)
        good = [(r[RANKED_BY], i) for i, r in self.results.items() if r.get(RANKED_BY) is not None]
        for _, i in sorted(good, key=lambda ranked: ranked[0]):
            tasks[str(self.results[i].get("main_task_type"))].append(i)
        return tasks


def find_runs(folders: list[Path]) -> list[Run]:
    """The result folders among `folders` and below them, each once.

    Raises ResultsError where there is none, and as `read_run` does.
    """
    found: dict[Path, Run] = {}
    for folder in folders:
        places = sorted(path.parent for path in folder.rglob(RESULTS))
        if not places:
            raise ResultsError(f"{folder}: neither {RESULTS} there nor in a folder below it")
        for place in places:
            found.setdefault(place.resolve(), read_run(place))
    return [*found.values()]


def read_run(folder: Path) -> Run:
    """Raises ResultsError that names the file and the line, FileNotFoundError for a file."""
    results = {result["sample_id"]: result for result in read_results(folder)}
    return Run(folder, read_settings(folder), read_statistics(folder), results)


@dataclass
class Album:
    """Images as data URIs by a hash of their content, each once, within a bound."""

    max_bytes: int
    uris: dict[str, str] = field(default_factory=dict)
    left_out: int = 0
    """Restorations that did not fit."""

    def add(self, pngs: list[bytes]) -> list[str] | None:
        """Keys of all images; None where they would not fit, and then none is kept."""
        keys = [hashlib.sha256(png).hexdigest()[:16] for png in pngs]
        uris = ("data:image/png;base64," + base64.b64encode(png).decode() for png in pngs)
        together = self.uris | dict(zip(keys, uris, strict=True))
        if sum(map(len, together.values())) > self.max_bytes:
            self.left_out += 1
            return None
        self.uris = together
        return keys


def error_map(restored: Image.Image, truth: Image.Image, white: float) -> Image.Image:
    """Mean absolute error of the channels, 8-bit grey; `white` of the full range is white."""
    if restored.size != truth.size:
        raise ResultsError(f"a restoration of {restored.size} beside a truth of {truth.size}")
    a, b = (np.asarray(image.convert("RGB"), dtype=np.float64) for image in (restored, truth))
    error = np.abs(a - b).mean(axis=2) / white
    return Image.fromarray(np.clip(error, 0, 255).round().astype(np.uint8))


def choose(ranked: list[int]) -> dict[str, int]:
    """Place -> sample id, the worst first; fewer where there are fewer than three samples."""
    if len(ranked) == 1:
        return {"only": ranked[0]}
    middle = {"median": ranked[(len(ranked) - 1) // 2]} if len(ranked) > 2 else {}
    return {"worst": ranked[0]} | middle | {"best": ranked[-1]}


def show(run: Run, result: Json, album: Album, white: float) -> Json | None:
    """One restoration for the page; None if its images do not fit."""
    files = {name: run.folder / result[key] for name, key in FILES.items()}
    prompt = result.get("prompt") or (result.get("message") or [{}])[0].get("value")
    with Image.open(files["restored"]) as restored, Image.open(files["truth"]) as truth:
        size, errors, stream = restored.size, error_map(restored, truth, white), io.BytesIO()
    errors.save(stream, "PNG", optimize=True)
    keys = album.add([*(path.read_bytes() for path in files.values()), stream.getvalue()])
    if keys is None:
        return None
    return {
        "images": dict(zip((*files, "error"), keys, strict=True)),
        "size": size,
        "numbers": {k: v for k, v in result.items() if f"{k}_mean" in run.statistics["overall"]},
        "assessment": result.get("understanding_text"),
        "reference": result.get("reference_text"),
        "prompt": prompt,
        "seconds": result.get("inference_time"),
    }


def samples(tests: list[list[int]], runs: list[Run], album: Album, white: float) -> list[Json]:
    """Worst, median and best sample of every task by the last run of its test set, in all runs."""
    cards: list[Json] = []
    for t, last in enumerate(runs[members[-1]] for members in tests):
        for task, ranked in sorted(last.ranked().items()):
            for place, i in choose(ranked).items():
                about = _description(last.results[i]) | {"test": t, "task": task, "place": place}
                cards.append(about | {"restorations": []})
    wanted = sorted(
        (back, PLACES.index(card["place"]), n, index)
        for n, card in enumerate(cards)
        for back, index in enumerate(reversed(tests[card["test"]]))
    )
    for _, _, n, index in wanted:
        result = runs[index].results[i := cards[n]["sample_id"]]
        try:
            if "error" not in result and (shown := show(runs[index], result, album, white)):
                cards[n]["restorations"].insert(0, {"run": index} | shown)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            told = f"{type(error).__name__}: {error}"
            print(f"WARNING: sample {i} is left out: {told}", file=sys.stderr)
    return [card for card in cards if card["restorations"]]


def _description(result: Json) -> Json:
    return {
        "sample_id": result["sample_id"],
        "input": next(iter(input_paths(result)), None),
        "degradation": result.get("degrade_type"),
        "error": result.get("error"),
    }


def page_data(runs: list[Run], white: float, max_bytes: int) -> Json:
    """Everything that the page shows, ready for JSON."""
    sets: list[list[int]] = []
    for index, run in enumerate(runs):
        fitting = [members for members in sets if all(run.beside(runs[i]) for i in members)]
        if not fitting:
            sets.append([])
            fitting = sets[-1:]
        fitting[0].append(index)
    album = Album(max_bytes)
    return {
        "created": datetime.now(UTC).isoformat(timespec="minutes"),
        "ranked_by": RANKED_BY,
        "error_white": white,
        "max_megabytes": max_bytes / 2**20,
        "samples": samples(sets, runs, album, white),
        "left_out": album.left_out,
        "images": album.uris,
        "protocols": {p: f"protocol {describe(p)}" for p in PROTOCOLS} | TEXT_PROTOCOLS,
        "tests": [{"split": runs[ids[0]].settings["split"], "runs": ids} for ids in sets],
        "runs": [
            {
                "name": run.settings["model_id"],
                "folder": str(run.folder),
                "step": run.settings.get("step"),
                "protocols": run.settings["protocols"],
                "settings": run.settings,
                "statistics": run.statistics,
                "failed": [_description(r) for r in run.results.values() if "error" in r],
            }
            for run in runs
        ],
    }


def render(data: Json) -> str:
    """The page. Only the template's own script may run in it, whatever the texts hold."""
    page = TEMPLATE.read_text(encoding="utf-8")
    script = page.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    block = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    return page.replace("{{SCRIPT_SHA256}}", digest).replace("{{DATA}}", block)


def main(argv: list[str] | None = None) -> None:
    shape = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False, formatter_class=shape
    )
    add = parser.add_argument
    add("folders", nargs="+", type=Path, help="result folders, or folders of such")
    add("--output", type=Path, required=True, help="the page to write")
    add("--error_white", type=float, default=0.2, help="error shown white, share of the range")
    add("--max_megabytes", type=float, default=64, help="bound on the images in the page")
    args = parser.parse_args(argv)
    if not 0 < args.error_white <= 1:
        parser.error(f"--error_white {args.error_white} is not in (0, 1]")
    data = page_data(find_runs(args.folders), args.error_white, round(args.max_megabytes * 2**20))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(render(data), encoding="utf-8")
    print(f"{args.output}: {len(data['runs'])} result folders, {len(data['samples'])} samples")
    if data["left_out"]:
        print(f"{data['left_out']} restorations left out by --max_megabytes {args.max_megabytes}")


if __name__ == "__main__":
    command(main)
