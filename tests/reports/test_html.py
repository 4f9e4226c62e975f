"""report.html of real runs: what it says, and how a real browser shows it."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml
from PIL import Image

from fcn.errors import InputError
from fcn.metrics import METRICS
from fcn.reports import write_report
from fcn.reports.html import PICTURE_BYTES
from fcn.tracking import read_records, resumed_steps
from fcn.tracking.environment import versions
from tests.cli import ALONE, call
from tests.dist.ranks import CHECKOUT, run, started, wait_for_line

STEPS = 30
CLASSES = [
    "<b>ground</b>",
    'disc "A" & co',
    "ring' onload='x",
    "square",
    "a triangle with a rather long name",
    "x",
    "é Ж",
]
PROBE = """<!DOCTYPE html><meta charset="utf-8">
<iframe style="width: {width}px; height: 900px; border: 0" srcdoc="{page}"></iframe>
<script>onload = () => {{
  const seen = document.querySelector("iframe").contentWindow, images = [...seen.document.images]
  const answer = {{
    images: images.length, loaded: images.filter(image => image.complete && image.naturalWidth > 1).length,
    narrowest: Math.min(...images.map(image => image.getBoundingClientRect().width)),
    requests: seen.performance.getEntriesByType("resource").map(entry => entry.name),
    width: seen.innerWidth, content: seen.document.documentElement.scrollWidth, text: seen.document.body.innerText
  }}
  document.documentElement.innerHTML = "<body><pre></pre></body>"
  document.querySelector("pre").textContent = JSON.stringify(answer)
}}</script>"""
"""Looks at a page in a frame, which can be as narrow as a phone, and leaves what it found."""


class Reports(NamedTuple):
    """One run: stopped, started again and killed, started again and finished."""

    preempted: str
    dead: str
    finished: str
    folder: Path
    """As the finished run left it."""


@pytest.fixture(scope="module")
def reports(shapes_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Reports:
    where = tmp_path_factory.mktemp("reports")
    folder = where / "run <i>& \"more'"
    config = yaml.safe_load((CHECKOUT / "configs" / "quickstart.yaml").read_text())
    config["run_dir"] = str(folder)
    config["data"] = {
        "name": "folder", "root": str(shapes_root), "images": "JPEGImages", "masks": "SegmentationClass",
        "classes": CLASSES, "train": "train", "val": "val", "val_fraction": 0.3,
        "crop": [48, 48], "scale": [0.8, 1.25], "workers": 0,
    }  # fmt: skip
    config["model"]["width"] = 2
    config["train"] |= {"batch_size": 4, "steps": STEPS, "precision": "fp32", "log_every": 1}
    config["optim"] |= {"name": "sgd", "lr": 0.02, "warmup": 2}
    config["eval"] |= {"every": 10, "batch_size": 4, "pictures": 2}
    config["checkpoint"]["every"] = 5
    config["wandb"]["mode"] = "disabled"
    path = where / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    (folder / "report.html").mkdir(parents=True)  # so that it cannot be written
    with started(1, "train_ddp.py", "--config", str(path)) as process:
        wait_for_line(process, "step 12/")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75, "a report that fails stops nothing"
    assert "warning: report.html failed" in (folder / "log.txt").read_text()
    (folder / "report.html").rmdir()
    preempted = write_report(folder).read_text()
    with started(1, "train_ddp.py", "--config", str(path)) as process:
        wait_for_line(process, "step 22/")
        process.kill_all()
    call(["report", str(folder)], ALONE)
    dead = (folder / "report.html").read_text()
    run(1, "train_ddp.py", "--config", str(path))
    return Reports(preempted, dead, (folder / "report.html").read_text(), folder)


@pytest.fixture
def copied(reports: Reports, tmp_path: Path) -> Path:
    """The folder of the finished run without its report, to be broken."""
    return shutil.copytree(reports.folder, tmp_path / "run", ignore=shutil.ignore_patterns("report.html"))


@pytest.fixture(scope="session")
def browse(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict]:
    """`browse(html, width)` opens a page in a browser and says what is there, see `PROBE`."""
    program = shutil.which("chromium")
    if not program:
        pytest.skip("needs chromium (apt install chromium)")
    folder = tmp_path_factory.mktemp("chromium")

    def look(page: str, width: int = 1200) -> dict:
        path = folder / "page.html"
        # Its own policy would hide requests that it asks for.
        open_page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
        path.write_text(PROBE.format(width=width, page=html.escape(open_page)))
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1300,900"]
        with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as profile:  # it still writes there
            command = [program, *options, f"--user-data-dir={profile}", "--dump-dom", path.as_uri()]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        found = re.search(r"<pre>(.+)</pre>", done.stdout, re.DOTALL)
        assert found, f"status {done.returncode}\n{done.stdout[:500]}\n{done.stderr[-2000:]}"
        return json.loads(html.unescape(found[1]))

    return look


class Reader(HTMLParser):
    """The elements and the visible text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.parts: list[str] = []
        self.feed(page)

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attributes)))

    def handle_data(self, text: str) -> None:
        self.parts.append(text)

    @property
    def text(self) -> str:
        return " ".join(self.parts)


def pictures_of(page: str) -> list[str]:
    """The alternative texts of a page's pictures, in their order."""
    return [attributes["alt"] or "" for name, attributes in Reader(page).elements if name == "img"]


def test_a_finished_run_is_told_with_its_scores(reports):
    text = Reader(reports.finished).text
    summary = json.loads((reports.folder / "summary.json").read_text())
    assert "finished" in text
    assert f"step {STEPS} of {STEPS}" in text
    for key, metric in METRICS.items():
        assert metric.title in text
        assert f"{summary[key]:.4f}" in text
    assert f"Best mIoU: {summary['best']['miou']:.4f} at step {summary['best']['step']}" in text
    matrix = np.array(json.loads((reports.folder / "scores_val.json").read_text())["confusion_matrix"])
    for place, name in enumerate(CLASSES):
        hit, label, found = matrix[place, place], matrix[place].sum(), matrix[:, place].sum()
        parts = [(hit, label + found - hit), (2 * hit, label + found), (hit, found), (hit, label)]
        cells = ["absent" if not whole else f"{part / whole:.4f}" for part, whole in parts]
        shown = r"\s+".join([re.escape(name), *map(re.escape, cells), rf"{100 * label / matrix.sum():.2f}%"])
        assert re.search(shown, text), "IoU, Dice, precision, recall, share of the labels"
    scores = json.loads((reports.folder / "scores_val.json").read_text())
    image, score = min(scores["image_miou"], key=lambda pair: pair[1])
    assert re.search(rf"image\s+mIoU\s+{re.escape(image)}\s+{score:.4f}", text), "the worst image leads"


def test_a_class_that_is_ignored_has_no_score_in_the_table_either(copied):
    path = copied / "scores_val.json"
    details = json.loads(path.read_text())
    assert details["ignore_index"] == 255
    details["confusion_matrix"][0] = [0] * len(CLASSES)
    assert sum(row[0] for row in details["confusion_matrix"]), "predicted for others"
    for ignored, score in ((255, r"\d\.\d{4}"), (0, "absent")):
        path.write_text(json.dumps(details | {"ignore_index": ignored}))
        text = Reader(write_report(copied).read_text()).text
        assert re.search(rf"{CLASSES[0]}\s+{score}\s+{score}\s+{score}\s+absent\s+0.00%", text)


def test_it_says_what_ran_and_with_what(reports):
    text = Reader(reports.finished).text
    assert re.search(r"unet, [\d,]+ parameters", text)
    assert "1 x CPU" in text
    assert "global batch 4 = 1 process x 4 images" in text
    assert "lr: 0.02" in text, "the config"
    for name, version in versions().items():
        assert f"{name} {version}" in text
    assert json.loads((reports.folder / "summary.json").read_text())["versions"] == versions()


def test_what_happened_to_the_run_is_there_and_its_progress_is_not(reports):
    text = Reader(reports.finished).text
    assert re.search(r"\s+1\d\s+warning\s+report.html failed; training goes on without \(IsADirectoryError", text)
    assert re.search(r"\s+1\d\s+stop\s+by a signal, after saving", text)
    assert re.search(rf"\s+{STEPS}\s+finish\s", text)
    assert "images/s  ETA" not in text
    steps = resumed_steps(read_records(reports.folder / "metrics.jsonl"))
    assert len(steps) == 2
    assert re.search(rf"resumed at step\s+{steps[0]}, {steps[1]}\s", text)
    for step in steps:
        assert re.search(rf"\s+{step}\s+resume\s+from \S+", text)
        assert f"checkpoints/step_{step:08d}.pt" in text


def test_a_preempted_run_is_told_so(reports):
    text = Reader(reports.preempted).text
    assert re.search(r"preempted\s+step 1\d of 30", text)
    assert re.search(r"val\s+\d\.\d{4}", text), "the score of step 10"


def test_a_run_that_was_started_again_and_killed_is_not_told_as_preempted(reports):
    text = Reader(reports.dead).text
    assert re.search(r"dead: killed, .*\s+step 2\d of 30", text)
    assert not re.search(r"preempted\s+step", text)


@pytest.mark.parametrize("state", ["preempted", "dead", "finished"])
def test_pictures_of_a_run(reports, state):
    shown = pictures_of(getattr(reports, state))
    assert sum(text.startswith("Of the pixels of each label") for text in shown) == 1
    assert sum(text.startswith("At step") for text in shown) == 1
    assert sum(text.startswith("The images with the lowest mIoU") for text in shown) == (state == "finished")
    assert len(shown) == 6 + (state == "finished"), "and four curves"


@pytest.mark.parametrize("state", ["preempted", "dead", "finished"])
def test_the_page_needs_nothing_but_itself(reports, state):
    page = getattr(reports, state)
    elements = Reader(page).elements
    assert {name for name, _ in elements} & {"script", "link", "iframe", "object", "b", "i", "form"} == set()
    for _, attributes in elements:
        assert not [key for key in attributes if key.startswith("on") or key in ("href", "srcset")]
        assert attributes.get("src", "data:").startswith("data:")
    assert "url(" not in page
    assert "@import" not in page
    policies = [one["content"] for _, one in elements if one.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert len(page) < 4e6


@pytest.mark.parametrize("state", ["preempted", "dead", "finished"])
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_it_all_without_a_request_at_any_width(reports, browse, state, width):
    page = getattr(reports, state)
    seen = browse(page, width)
    assert seen["width"] == width
    assert seen["content"] <= width, "wider things scroll by themselves"
    assert seen["loaded"] == seen["images"] == len(pictures_of(page))
    assert seen["requests"] == []
    assert seen["narrowest"] >= 330, "no picture is too small to be read"
    for name in (reports.folder.name, *CLASSES):
        assert name in seen["text"]


def test_the_browser_would_see_a_request_a_broken_picture_and_a_page_that_is_too_wide(browse):
    """What the test above looks for can be found."""
    page = '<div style="width: 2000px"><img src="http://127.0.0.1:9/x.png"><img src="data:image/png;base64,AAAA"></div>'
    seen = browse(f"<!DOCTYPE html><html><body>{page}</body></html>", 390)
    assert seen["images"] == 2
    assert seen["loaded"] == 0
    assert seen["content"] > 390
    assert len(seen["requests"]) == 1


@pytest.mark.parametrize(
    ("missing", "still_there"),
    [
        (["config.yaml"], "finished"),
        (["metrics.jsonl"], "finished"),
        (["summary.json"], "finished"),  # by the ranks' last heartbeats
        (["summary.json", "heartbeat"], "running, killed or crashed"),
        (["scores_val.json"], "Best mIoU"),
        (["pictures"], "precision"),
        (["log.txt"], "precision"),
        (["log.txt", "metrics.jsonl", "summary.json", "scores_val.json", "pictures", "heartbeat"], "No split has been"),
        (["log.txt", "config.yaml", "summary.json", "scores_val.json", "pictures", "heartbeat"], "Best mIoU"),
    ],
)
def test_what_is_missing_is_left_out(copied, missing, still_there):
    for name in missing:
        path = copied / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert still_there in Reader(write_report(copied).read_text()).text


def test_the_heat_map_is_drawn_again_where_it_is_missing(copied):
    shutil.rmtree(copied / "pictures")
    shown = pictures_of(write_report(copied).read_text())
    assert sum(text.startswith("Of the pixels of each label") for text in shown) == 1
    assert len(shown) == 5


@pytest.mark.parametrize(("age_s", "quarters"), [(-10, 1), (10, 4)])
def test_a_picture_that_is_older_than_its_numbers_is_drawn_again(copied, age_s, quarters):
    drawn, numbers = copied / "pictures" / "curves.png", copied / "metrics.jsonl"
    Image.new("RGB", (800, 600), "red").save(drawn)
    os.utime(drawn, (numbers.stat().st_mtime - age_s,) * 2)
    elements = Reader(write_report(copied).read_text()).elements
    assert len({attributes["src"] for name, attributes in elements if name == "img"} - {None}) == 3 + quarters


def test_steps_beyond_the_summary_are_of_a_later_start(copied):
    shutil.rmtree(copied / "heartbeat")
    assert "finished" in Reader(write_report(copied).read_text()).text
    last = [line for line in (copied / "metrics.jsonl").read_text().splitlines() if '"train"' in line][-1]
    with (copied / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**json.loads(last), "step": STEPS + 1, "steps": 2 * STEPS}) + "\n")
    assert re.search(r"running, killed or crashed\s+step 31 of 60", Reader(write_report(copied).read_text()).text)


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "scores_val.json", "config.yaml", "pictures/*.png"])
@pytest.mark.parametrize("keep", [0, 0.5])
def test_files_that_are_cut_stop_no_report(copied, name, keep):
    for path in copied.glob(name):
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * keep)])
    page = write_report(copied).read_text()
    assert "Written" in Reader(page).text
    if name.startswith("pictures"):
        assert "cannot be read" in page
        assert len(pictures_of(page)) == 5, "heat map and curves are drawn again"


def test_events_without_their_fields_stop_no_report(copied):
    with (copied / "metrics.jsonl").open("a") as file:
        for kind in ("start", "resume", "warning", "note", "failure", "stop", "finish"):
            file.write(json.dumps({"event": kind, "step": STEPS}) + "\n")
    assert "Written" in Reader(write_report(copied).read_text()).text


def test_a_large_picture_is_made_small(copied):
    noise = np.random.default_rng(0).integers(0, 256, (2400, 1480, 3), np.uint8)
    Image.fromarray(noise).save(copied / "pictures" / "val_99999999.png")
    page = write_report(copied).read_text()
    assert "At step 99999999" in page
    assert max(len(attributes.get("src", "")) for _, attributes in Reader(page).elements) < 1.4 * PICTURE_BYTES


def test_a_folder_that_is_no_run_is_named_in_a_line(tmp_path):
    with pytest.raises(InputError, match=r"no run is there .*; give a directory that training wrote") as caught:
        call(["report", str(tmp_path / "nothing")], ALONE)
    assert "\n" not in str(caught.value)


def test_a_report_that_cannot_be_written_is_one_line(copied):
    (copied / "report.html").mkdir()
    with pytest.raises(InputError, match=r"run: cannot be written \(.*\); free space there, or choose a folder"):
        call(["report", str(copied)], ALONE)


def test_an_old_report_stays_until_the_new_one_is_complete(copied):
    write_report(copied)
    assert [path.name for path in copied.glob("*report*")] == ["report.html"]
    assert not list(copied.glob(".*"))


def test_events_beyond_a_page_are_left_out_in_the_middle(copied):
    with (copied / "metrics.jsonl").open("a") as file:
        for number in range(300):
            record = {"event": "warning", "step": STEPS, "time": "2026-01-01 00:00:00", "text": f"<number {number}>"}
            file.write(json.dumps(record) + "\n")
    text = Reader(write_report(copied).read_text()).text
    assert re.search(r"\d+ events are left out; see metrics.jsonl", text)
    assert "<number 299>" in text
    assert "<number 200>" in text
    assert "<number 150>" not in text
    assert re.search(r"\sstart\s+30 steps", text), "the first ones stay"


def test_evaluate_draws_what_the_run_drew(reports, tmp_path, capsys):
    """The same network, images and settings: the same pictures, byte for byte."""
    drawn = tmp_path / "a" / "pictures"
    assert call(["evaluate", "--checkpoint", str(reports.folder), "--pictures", str(drawn)], ALONE) == 0
    names = ["val_00000030.png", "val_confusion.png", "val_worst.png"]
    assert sorted(path.name for path in drawn.iterdir()) == names
    for name in names:
        assert (drawn / name).read_bytes() == (reports.folder / "pictures" / name).read_bytes(), name
    only = tmp_path / "only"
    call(["evaluate", "--checkpoint", str(reports.folder), "--pictures", str(only), "eval.pictures=0"], ALONE)
    assert [path.name for path in only.iterdir()] == ["val_confusion.png"]


def test_evaluate_looks_first_whether_pictures_can_be_written(reports, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"--pictures .*file: cannot be written"):
        call(["evaluate", "--checkpoint", str(reports.folder), "--pictures", str(tmp_path / "file")], ALONE)
    assert "mIoU" not in capsys.readouterr().out
