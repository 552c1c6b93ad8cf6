"""The HTML report, read back and looked at in a browser."""

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from inference_pipeline.metrics import describe
from inference_pipeline.report import choose, error_map, find_runs, main, page_data
from inference_pipeline.results import ResultsError
from inference_pipeline.text_metrics import TEXT_PROTOCOLS
from scripts.tiny.make_pairs import test_records as make_test_records

ROOT = Path(__file__).parents[2]

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
)
HOSTILE = "</script><script>window.ran = 1</script><img src=x onerror='ran = 1'> {{DATA}} <b>&"
TASKS = ("denoising", "super-resolution")
SIZE = (48, 40)
"""Width and height of a restoration."""


def save(folder: Path, name: str, image: Image.Image) -> str:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    image.save(folder / "images" / name)
    return f"images/{name}"


def grey(level: int, size: tuple[int, int] = SIZE) -> Image.Image:
    return Image.new("RGB", size, (level,) * 3)


def write_sample(folder: Path, i: int, psnr: float) -> dict:
    """A black input, a truth that differs from sample to sample, a light restoration."""
    return {
        "sample_id": i,
        "main_task_type": TASKS[i % 2],
        "degrade_type": f"grade_{i % 3}",
        "input_img": [{"path": f"case_{i}.png"}],
        "message": [{"from": "human", "value": "<image>\nClean it."}],
        "saved_input_img": save(folder, f"{i}_input.png", grey(0, (12, 10))),
        "saved_output_img": save(folder, f"{i}_GT.png", grey(200 + i)),
        "pred_img": save(folder, f"{i}_pred.png", grey(180 + round(psnr) % 20)),
        "understanding_text": f"{HOSTILE} {i}",
        "prompt": f"prompt {HOSTILE}",
        "reference_text": "Noise of grade two.",
        "inference_time": 0.25,
        "psnr": psnr,
        "psnr_input": 20.0,
        "psnr_ceiling": 40.0,
        "standard:psnr": psnr + 1,
        "bleu": 100.0,
        "rouge_l": 1.0,
        "meteor": 0.981,
    }


def summary(psnr: float, n_failed: int = 0) -> dict:
    numbers = {"psnr": psnr, "psnr_input": 20.0, "psnr_ceiling": 40.0}
    numbers |= {"lpips": 1 / psnr, "lpips_input": 0.3, "standard:psnr": psnr + 1}
    numbers |= dict.fromkeys(TEXT_PROTOCOLS, psnr / 50)
    summed = {"total_samples": 5, "n_failed": n_failed, "n_equal_input": 2}
    for name, value in numbers.items():
        summed |= {f"{name}_mean": value, f"{name}_std": value / 10}
        summed[f"{name}_ci95"] = [value * 0.97, value * 1.02]
    return summed


def write_run(folder: Path, name: str, step: int | None, psnr: float, **settings: object) -> Path:
    """A result folder of ten samples; the ninth failed. Sample i has `psnr` + i dB."""
    results = [write_sample(folder, i, psnr + i) for i in range(10)]
    for key in ("saved_input_img", "psnr"):
        del results[8][key]
    results[8]["error"] = f"ValueError: {HOSTILE}"
    statistics = {
        "protocol": "medq",
        "overall": summary(psnr, n_failed=1),
        "by_task_type": {TASKS[0]: summary(psnr, n_failed=1), TASKS[1]: summary(psnr + 2)},
        "by_degrade_type": {f"grade_{n}": summary(psnr + n) for n in range(3)},
    }
    common = {"model_id": name, "step": step, "split": f"test {HOSTILE}", "seed": 42}
    common |= {"protocols": ["medq", "standard"], "sampling": {"num_timesteps": 5}}
    (folder / "settings.json").write_text(json.dumps(common | settings))
    (folder / "statistics.json").write_text(json.dumps(statistics))
    lines = "".join(json.dumps(result) + "\n" for result in results)
    (folder / "results.jsonl").write_text(lines.replace('"bleu": 0.5', '"bleu": NaN', 1))
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of one run, the second the best, and a checkpoint of another test set."""
    root = tmp_path_factory.mktemp("results")
    for step, psnr in ((1000, 26.0), (2000, 29.0), (3000, 28.0)):
        write_run(root / f"{step:07}", f"run {HOSTILE}/{step:07}", step, psnr)
    write_run(root / "elsewhere", "base", None, 25.0, split="other")
    return root


def data_of(*folders: Path, max_bytes: int = 2**30) -> dict:
    return page_data(find_runs([*folders]), 0.2, max_bytes)


def test_error_map_is_the_absolute_error_up_to_white():
    truth = np.full((2, 3, 3), 100, np.uint8)
    restored = truth.copy()
    restored[0, 0] = 110, 120, 90  # mean absolute error 40 / 3
    restored[1, 2] = 200
    maps = [
        np.asarray(error_map(Image.fromarray(restored), Image.fromarray(truth), white))
        for white in (0.2, 1.0)
    ]
    np.testing.assert_array_equal(maps[0], [[67, 0, 0], [0, 0, 255]])
    np.testing.assert_array_equal(maps[1], [[13, 0, 0], [0, 0, 100]])
    with pytest.raises(ResultsError, match=r"\(48, 40\) beside a truth of \(4, 4\)"):
        error_map(grey(0), grey(0, (4, 4)), 0.2)


@pytest.mark.parametrize(
    ("ranked", "expected"),
    [
        ([5], {"only": 5}),
        ([5, 3], {"worst": 5, "best": 3}),
        ([5, 3, 8], {"worst": 5, "median": 3, "best": 8}),
        ([5, 3, 8, 1], {"worst": 5, "median": 3, "best": 1}),
    ],
)
def test_chosen_samples(ranked, expected):
    assert choose(ranked) == expected
    assert [*choose(ranked).values()] == sorted(expected.values(), key=ranked.index)


def test_samples_are_those_of_the_last_checkpoint_in_every_checkpoint(results):
    data = data_of(results)
    assert [t["runs"] for t in data["tests"]] == [[0, 1, 2], [3]]
    # Sample i has i dB more than the first; even ones are of the first task; the ninth failed.
    chosen = [(s["test"], s["task"], s["place"], s["sample_id"]) for s in data["samples"]]
    places = ("worst", "median", "best")
    assert chosen == [
        (test, task, place, i)
        for test in (0, 1)
        for task, ids in zip(TASKS, ((0, 2, 6), (1, 5, 9)), strict=True)
        for place, i in zip(places, ids, strict=True)
    ]
    for sample in data["samples"]:
        shown = sample["restorations"]
        assert [r["run"] for r in shown] == data["tests"][sample["test"]]["runs"]
        assert len({r["images"]["truth"] for r in shown}) == 1
    assert data["samples"][0]["restorations"][0]["numbers"]["psnr"] == 26.0


def test_a_bound_on_the_images_keeps_the_last_checkpoints_medians(results):
    whole = data_of(results)
    assert whole["left_out"] == 0
    total = sum(map(len, whole["images"].values()))
    for share in (0.3, 0.6):
        data = data_of(results, max_bytes=int(share * total))
        there = [(s["place"], r["run"]) for s in data["samples"] for r in s["restorations"]]
        assert sum(map(len, data["images"].values())) <= share * total
        assert data["left_out"] == 24 - len(there) > 0
        assert [run for place, run in there if place == "median"].count(2) == 2
    assert data_of(results, max_bytes=0)["samples"] == []


def test_another_test_set_is_no_neighbour(tmp_path):
    for name, samples in (("a", 10), ("b", 10), ("c", 4)):
        folder = write_run(tmp_path / name, name, None, 25.0)
        lines = (folder / "results.jsonl").read_text().splitlines(keepends=True)
        (folder / "results.jsonl").write_text("".join(lines[:samples]))
    assert [t["runs"] for t in data_of(tmp_path)["tests"]] == [[0, 1], [2]]
    assert len(data_of(tmp_path, tmp_path / "a", tmp_path / "a")["runs"]) == 3
    nested = shutil.copytree(tmp_path / "a", tmp_path / "b" / "nested")
    assert len(data_of(tmp_path / "b")["runs"]) == 2
    shutil.rmtree(nested)
    for name, mark in (("a", "one"), ("b", "other")):
        path = tmp_path / name / "results.jsonl"
        old = '{"sample_id": 1, '
        path.write_text(path.read_text().replace(old, f'{old}"images": "{mark}", '))
    assert [t["runs"] for t in data_of(tmp_path)["tests"]] == [[0], [1], [2]]


@pytest.mark.parametrize(
    ("inputs", "shown"),
    [
        ("case_4.png", "case_4.png"),
        ({"path": "case_4.png"}, "case_4.png"),
        (["case_4.png"], "case_4.png"),
        ([], None),
        (None, None),
    ],
)
def test_results_of_the_users_own_scripts(tmp_path, inputs, shown):
    """These name an input alone, by its path or with its size."""
    path = write_run(tmp_path, "run", None, 25.0) / "results.jsonl"
    results = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(r | {"input_img": inputs}) + "\n" for r in results))
    data = data_of(tmp_path)
    assert {card["input"] for card in data["samples"]} == {shown}
    assert [failed["input"] for failed in data["runs"][0]["failed"]] == [shown]


@pytest.mark.parametrize(
    ("odd", "told"),
    [
        ({"prompt": None, "message": "Clean it."}, "AttributeError: 'str'"),
        ({"prompt": None, "message": {"from": "human", "value": "x"}}, "KeyError: 0"),
        ({"prompt": None, "message": ["x"]}, "AttributeError: 'str'"),
        ({"pred_img": None}, "TypeError: unsupported operand"),
        ({"pred_img": ...}, "KeyError: 'pred_img'"),
        ({"pred_img": "images/2_input.png"}, "ResultsError: a restoration of (12, 10) beside"),
    ],
)
def test_an_odd_result_costs_its_sample(tmp_path, capsys, odd, told):
    path = write_run(tmp_path, "run", None, 25.0) / "results.jsonl"
    results = [json.loads(line) for line in path.read_text().splitlines()]
    results[2] = {k: v for k, v in (results[2] | odd).items() if v is not ...}
    path.write_text("".join(json.dumps(r) + "\n" for r in results))
    data = data_of(tmp_path)
    # The median of the first task is left out, with its images.
    assert [card["sample_id"] for card in data["samples"]] == [0, 6, 1, 5, 9]
    shown = [r["images"].values() for card in data["samples"] for r in card["restorations"]]
    assert {*data["images"]} == {key for keys in shown for key in keys}
    assert f"WARNING: sample 2 is left out: {told}" in capsys.readouterr().err


def test_names_of_samples_may_be_numbers_and_texts(tmp_path):
    path = write_run(tmp_path, "run", None, 25.0) / "results.jsonl"
    results = [json.loads(line) | {"psnr": 30.0} for line in path.read_text().splitlines()[:4]]
    results[2]["sample_id"] = "two"
    path.write_text("".join(json.dumps(r) + "\n" for r in results))
    assert [card["sample_id"] for card in data_of(tmp_path)["samples"]] == [0, "two", 1, 3]


def test_what_no_report_can_be_made_of(tmp_path, capsys):
    folder = write_run(tmp_path / "run", "run", None, 25.0)
    with pytest.raises(ResultsError, match="images: neither results.jsonl there nor"):
        find_runs([folder / "images"])
    path = folder / "results.jsonl"
    whole = path.read_text()
    path.write_text(whole.replace('{"sample_id": 1,', '{"sample_id": 1', 1))
    with pytest.raises(ResultsError, match=r"run/results\.jsonl:2: Expecting"):
        find_runs([tmp_path])
    path.write_text(whole)
    (folder / "images" / "2_pred.png").rename(folder / "elsewhere.png")
    assert 2 not in [card["sample_id"] for card in data_of(folder)["samples"]]
    assert "sample 2 is left out" in capsys.readouterr().err
    for name, text, what in (
        ("results.jsonl", "5", "no object"),
        ("results.jsonl", "{}", "no sample_id"),
        ("statistics.json", "{}", "no overall, by_task_type"),
    ):
        path = folder / name
        before = path.read_text()
        path.write_text(text + "\n")
        with pytest.raises(ResultsError, match=rf"run/{name}:1: {what}: not written by"):
            find_runs([tmp_path])
        path.write_text(before)
    (folder / "statistics.json").unlink()
    with pytest.raises(ResultsError, match="run: no statistics.json: let the batch inference"):
        find_runs([tmp_path])
    (folder / "settings.json").unlink()
    with pytest.raises(FileNotFoundError, match="No such file .*run/statistics.json"):
        find_runs([tmp_path])


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert Path(CHROMIUM).exists(), "install the browser: make setup, or apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET.split())
        yield browser
        browser.close()


class Opened:
    """A report in the browser, with everything that it asked for and complained about."""

    def __init__(self, browser: Browser, path: Path) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page: Page = browser.new_page(viewport={"width": 1300, "height": 1000})
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.card = self.page.locator(".card").first
        self.uri = path.as_uri()

    def widths(self) -> list[float]:
        """Of the first card's images, in pixels of the screen and in units of their panes."""
        images = self.card.locator(".pane img").all()
        script = "e => e.getBoundingClientRect().width / e.closest('.pane').clientWidth"
        return [image.evaluate(script) for image in images]


@pytest.fixture(scope="module")
def report(results: Path) -> Path:
    path = results / "pages" / "report.html"
    main([str(results), "--output", str(path)])
    return path


@pytest.fixture
def opened(browser: Browser, report: Path) -> Iterator[Opened]:
    opened = Opened(browser, report)
    yield opened
    assert opened.complaints == []
    assert opened.requests == [opened.uri]
    opened.page.close()


def broken_images(page: Page) -> list[str]:
    script = "all => all.filter(e => !(e.complete && e.naturalWidth > 0)).map(e => e.alt)"
    return page.locator("img").evaluate_all(script)


def dark_share(pane: Locator) -> float:
    """Share of the columns that are dark in the middle row, of a black and a light image."""
    row = np.asarray(Image.open(io.BytesIO(pane.screenshot())).convert("L"))[30]
    return float((row < 60).mean())


def test_everything_is_shown_and_no_text_is_run(opened, report):
    page = opened.page
    assert page.locator("img").count() == 12 * 6
    assert broken_images(page) == []
    text = page.locator("body").inner_text()
    assert text.count(HOSTILE) > 12 * 2
    assert page.evaluate("window.ran") is None
    assert page.locator("script").count() == 2
    assert page.locator("main b:not(caption b)").count() == 0
    assert "Noise of grade two." in text
    failed = page.locator("#failed tbody tr").all_inner_texts()
    assert len(failed) == 4
    assert all("case_8.png" in line and "ValueError: " + HOSTILE in line for line in failed)
    page.locator("#settings summary").first.click()
    assert page.locator("#settings tbody tr", has_text="sampling.num_timesteps").first.is_visible()
    html = report.read_text()
    assert html.count("{{DATA}}") == html.count(HOSTILE.replace("<", "\\u003c")) > 0


def test_a_text_that_reached_the_page_could_not_run(opened):
    """The policy alone stops a script, were one to come in."""
    opened.page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'),"
        "{textContent: 'window.ran = 1'}))"
    )
    assert opened.page.evaluate("window.ran") is None
    assert len(opened.complaints) == 1
    assert "Content Security Policy" in opened.complaints.pop()


def test_tables_mark_the_best(opened):
    tables = opened.page.locator("#numbers > .scroll table")
    captions = tables.locator("caption").all_inner_texts()
    assert captions[:2] == [
        f"PSNR in dB · protocol {describe('medq')} · higher is better",
        f"LPIPS · protocol {describe('medq')} · lower is better",
    ]
    text = opened.page.locator("#numbers details", has_text="Text of the assessments").first
    text.locator("summary").click()
    assert text.locator("caption").all_inner_texts() == [
        f"{name} · {protocol} · higher is better"
        for name, protocol in zip(
            ("BLEU", "ROUGE-L", "METEOR"), TEXT_PROTOCOLS.values(), strict=True
        )
    ]
    best = tables.nth(0).locator(".best").all_inner_texts()
    assert best == ["29.00 ★[28.13, 29.58]", "31.00 ★[30.07, 31.62]"]
    assert tables.nth(1).locator(".best").all_inner_texts()[0].startswith("0.034 ★")
    assert [table.locator("small", has_text="2 equal").count() for table in tables.all()[:2]] == [
        6,
        0,
    ]
    rows = tables.nth(0).locator("tbody tr").all_inner_texts()
    assert [row.split("\t")[-1] for row in rows] == ["1 of 5"] * 3 + ["0 of 5"] * 3
    # One checkpoint of a test set is not the best of anything.
    assert tables.nth(3).locator(".best").count() == 0
    other = opened.page.locator("#numbers details", has_text="Protocol standard").first
    other.locator("summary").click()
    assert "30.00 ★" in other.locator("table").first.inner_text()


def test_curves_follow_the_means(opened):
    charts = opened.page.locator("#curves svg")
    assert charts.count() == 2 + len(TEXT_PROTOCOLS)
    assert charts.nth(0).locator("path.curve").count() == len(TASKS)
    points = charts.nth(0).locator("circle").all()
    titles = [point.locator("title").text_content() for point in points]
    assert titles[:3] == [
        f"denoising, step {step}: {mean}.00" for step, mean in ((1000, 26), (2000, 29), (3000, 28))
    ]
    x, y = ([float(point.get_attribute(name)) for point in points[:3]] for name in ("cx", "cy"))
    assert x[1] - x[0] == pytest.approx(x[2] - x[1])
    assert (y[0] - y[1]) / (y[2] - y[1]) == pytest.approx(3)


def test_slider_moves_the_clip(opened):
    pane, clip = opened.card.locator(".compare"), opened.card.locator(".clip")
    pane.scroll_into_view_if_needed()
    box = pane.bounding_box()
    mouse, y = opened.page.mouse, box["y"] + box["height"] / 2

    def clipped() -> float:
        """Percent cut off at the right."""
        style = clip.evaluate("e => getComputedStyle(e).clipPath")
        assert style.startswith("inset(0px ")
        return float(style.split()[1].rstrip("%)")) if "%" in style else 0.0

    assert clipped() == 50
    mouse.click(box["x"] + 0.25 * box["width"], y)
    assert clipped() == pytest.approx(75, abs=1)
    assert dark_share(pane) == pytest.approx(0.25, abs=0.02)
    mouse.move(box["x"] + 0.25 * box["width"], y)
    mouse.down()
    mouse.move(box["x"] + 0.5 * box["width"], y)
    mouse.move(box["x"] + 0.8 * box["width"], y)
    mouse.up()
    assert clipped() == pytest.approx(20, abs=1)
    assert dark_share(pane) == pytest.approx(0.8, abs=0.02)
    before = clipped()
    opened.page.keyboard.press("ArrowRight")
    assert clipped() == pytest.approx(before - 1)
    opened.page.keyboard.press("Home")
    assert clipped() == 100


def test_zoom_enlarges_all_images_of_a_card_together(opened):
    page, card = opened.page, opened.card
    assert opened.widths() == [1.0] * 6
    assert card.locator("img").first.evaluate("e => getComputedStyle(e).imageRendering") == (
        "pixelated"
    )
    card.get_by_role("button", name="zoom in").click()
    assert opened.widths() == [2.0] * 6
    assert card.locator(".level").inner_text() == "×2"
    pane = card.locator(".four .pane").first
    pane.scroll_into_view_if_needed()
    card.get_by_role("button", name="whole image").click()
    box, mouse = pane.bounding_box(), page.mouse
    left = "e => e.getBoundingClientRect().x"
    x, y = round(box["x"]) + 40, box["y"] + 30
    mouse.move(x, y)
    page.keyboard.down("Control")
    mouse.wheel(0, -400)
    page.keyboard.up("Control")
    expect(card.locator(".level")).to_have_text("×4")
    assert opened.widths() == pytest.approx([4.0] * 6)
    under_pointer = x - 4 * (x - box["x"])  # what lies there stays there
    assert pane.locator("img").evaluate(left) == pytest.approx(under_pointer, abs=0.5)
    mouse.down()
    mouse.move(x - 30, y)
    mouse.up()
    assert pane.locator("img").evaluate(left) == pytest.approx(under_pointer - 30, abs=0.5)
    card.locator(".four").focus()
    page.keyboard.press("0")
    assert opened.widths() == [1.0] * 6
    scrolled = page.evaluate("scrollY")
    mouse.wheel(0, -200)
    for _ in range(100):
        if page.evaluate("scrollY") == scrolled:
            page.wait_for_timeout(100)
    assert page.evaluate("scrollY") < scrolled  # the wheel alone scrolls the page
    assert opened.widths() == [1.0] * 6


def test_another_checkpoint_and_the_truth_are_shown_instead(opened):
    card, restored = opened.card, opened.card.locator(".compare > img")
    row = card.locator(".numbers .chosen").first
    last = restored.get_attribute("src")
    assert "28.00" in row.inner_text()
    card.locator(".numbers input").nth(0).check()
    assert restored.get_attribute("src") != last
    assert "26.00" in row.inner_text()
    assert card.locator(".clip img").get_attribute("alt") == "input"
    card.get_by_label("truth", exact=True).check()
    assert card.locator(".clip img").get_attribute("alt") == "truth"
    truth = card.locator(".four img[alt=truth]").get_attribute("src")
    assert card.locator(".clip img").get_attribute("src") == truth


def test_numbers_of_a_sample_fit_beside_its_images(opened):
    opened.page.set_viewport_size({"width": 1200, "height": 1000})
    image, text = opened.card.locator(".words .scroll").all()
    head = image.locator("tbody th").first
    assert (head.inner_text(), head.evaluate("e => e.clientHeight") < 30) == (
        "degraded input",
        True,
    )
    assert text.locator("thead th").all_inner_texts() == ["", "BLEU", "ROUGE-L", "METEOR"]
    assert text.locator(".chosen td").all_inner_texts() == ["100.0", "1.000", "0.981"]
    for table in (image, text):
        assert table.evaluate("e => e.scrollWidth - e.clientWidth") == 0


def test_dark_and_printed(opened):
    page = opened.page
    script = "getComputedStyle(document.body).backgroundColor"

    def paper() -> float:
        colour = page.evaluate(script)
        return float(np.mean([int(v) for v in colour[4:-1].split(",")]))

    assert paper() > 240
    page.emulate_media(color_scheme="dark")
    assert paper() < 40
    page.emulate_media(color_scheme="dark", media="print")
    assert paper() > 240
    folds = page.locator("details")
    assert not any(folds.evaluate_all("all => all.map(e => e.open)"))
    assert page.pdf().startswith(b"%PDF")
    assert all(folds.evaluate_all("all => all.map(e => e.open)"))


def test_report_of_real_restorations(browser, tmp_path):
    """The batch inference's own folder: two samples of the checkpoint that ships."""
    records = make_test_records(tmp_path / "pairs", every=20)[:2]
    annotations = tmp_path / "pairs" / "held_out.jsonl"
    annotations.write_text("".join(json.dumps(record) + "\n" for record in records))
    options = {
        "model_path": ROOT / "configs" / "tiny" / "checkpoint",
        "annotation_file": annotations,
        "image_root": tmp_path / "pairs",
        "output_dir": tmp_path / "results",
        "num_timesteps": 2,
        "max_text_tokens": 8,
    }
    script = ROOT / "inference_pipeline" / "MedQ-Uni_run_batch_test2.py"
    arguments = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    subprocess.run([sys.executable, str(script), *arguments], check=True, cwd=tmp_path)
    report = tmp_path / "report.html"
    command = [sys.executable, "-m", "inference_pipeline.report", str(tmp_path / "results")]
    done = subprocess.run(
        [*command, "--output", str(report)], check=True, cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == f"{report}: 1 result folders, 2 samples\n"
    opened = Opened(browser, report)
    assert broken_images(opened.page) == []
    text = opened.page.locator("body").inner_text()
    statistics = json.loads((tmp_path / "results" / "statistics.json").read_text())
    for summary in statistics["by_task_type"].values():
        assert f"{summary['psnr_mean']:.2f}" in text
    assert "Test set held_out" in text
    assert opened.complaints == []
    assert opened.requests == [report.as_uri()]
