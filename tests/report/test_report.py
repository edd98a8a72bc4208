"""The page of runs: every part is there or says why not, charts show the numbers, and foreign text stays text."""

import json
import math
import re
import shlex
import shutil
from collections.abc import Iterable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dora_vl.cli import main
from dora_vl.evaluation.predictions import Prediction
from dora_vl.evaluation.scores.scored import ItemScore
from dora_vl.evaluation.test_sets import AnswerScore, SetResult
from dora_vl.report.report import SECTIONS
from dora_vl.report.run_record import confusion, low_and_high
from dora_vl.report.views import MOST_POINTS, Chart, Series, chart
from dora_vl.run.settings import settings_of
from dora_vl.run.settings_parser import read_run
from tests.report.conftest import HOSTILE
from tests.serving.browser import browser

VOID = {"meta", "img", "br", "input"}  # a path or a use of a drawing closes itself


class Page(HTMLParser):
    """A page's elements; every one that opens must close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += f"{data} "

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def reported(*runs: Path, to: Path, more: tuple[str, ...] = ()) -> Page:
    main(["report", *map(str, runs), "--to", str(to), *more])
    return Page(to.read_text(encoding="utf-8"))


def test_a_run_of_a_llava_shows_every_part(llava_run: Path, tmp_path: Path) -> None:
    page, metrics = reported(llava_run, to=tmp_path / "page.html"), json.loads((llava_run / "metrics.json").read_text())
    entry = metrics["sets"]["train"]
    accuracy, (low, high) = entry["metrics"]["accuracy"]["value"], entry["metrics"]["accuracy"]["interval_95"]
    assert f"{accuracy:.2f} {low:.2f} to {high:.2f}" in " ".join(page.words.split())
    assert f"{round((1 - accuracy / 100) * entry['n'])} of {entry['n']} answers are wrong" in page.words
    assert {attributes.get("id") for attributes in page.all("h2")} == {name for name, _ in SECTIONS}
    charts = " ".join(attributes["aria-label"] or "" for attributes in page.all("figure"))
    titles = ("loss,", "learning rate by part,", "gradient norm,", "throughput,", "padding,", "memory,")
    assert all(title in charts for title in titles)
    for words in ("step 0", "step 2", "step 6", "dora.magnitude", "projector", "transformers", "adapter.method"):
        assert words in page.words, words
    shown = [attributes["data-is"] for attributes in page.all("div") if "data-is" in attributes]
    assert shown.count("right") == round(accuracy / 100 * entry["n"]) == entry["n"] - shown.count("wrong")
    part = entry["baselines"]["untrained_base"]
    assert f"the untrained base {part['n']} {part['value']:.2f}" in " ".join(page.words.split())
    assert "Perplexity of other text" in page.words
    pictures = [attributes["src"] or "" for attributes in page.all("img")]
    assert len(pictures) >= 4
    assert all(source.startswith("data:image/png;base64,") for source in pictures)
    assert (tmp_path / "page.html").stat().st_size < 5e6


def test_kinds_and_what_a_score_is_compared_with_stand_below_it(copied: Path, tmp_path: Path) -> None:
    metrics = json.loads((copied / "metrics.json").read_text())
    entry = metrics["sets"]["train"]
    entry["metrics"]["kind/seldom"] = {"value": 50.0, "interval_95": None, "n": 8}
    part = entry["baselines"]["exchanged_pictures"]
    entry["baselines"]["warning"] = "the answers do not look"
    kinds = {"which colour?": {"n": 9, "readable": 7, "learned": 5}, "how many?": {"n": 6, "learned": 1}}
    probe = {"value": 70.0, "interval_95": None, "n": 9, "questions": kinds}
    entry["baselines"]["readable"] = probe
    (copied / "metrics.json").write_text(json.dumps(metrics))
    words = " ".join(reported(copied, to=tmp_path / "page.html").words.split())
    low, high = part["interval_95"]
    assert f"with pictures exchanged {part['n']} {part['value']:.2f} {low:.2f} to {high:.2f}" in words
    assert "copied, train: the answers do not look." in words
    assert "copied, which colour?: readable 7, learned 5 of 9." in words
    assert all(part in words for part in ("copied, how many?: ", "learned 1 of 6."))
    assert "kind/seldom 8 50.00" in words


def test_the_command_that_repeats_a_run_is_one(copied: Path, tmp_path: Path) -> None:
    page = reported(copied, to=tmp_path / "page.html").words
    (line,) = re.findall(r"dora-vl train (\S+ --training\.output_dir \S+)", page)
    file, *words = shlex.split(line)
    settings = json.loads((copied / "settings.json").read_text())
    again = settings_of(read_run([f"--config={file}", *words]))
    assert again["training"].pop("output_dir") == f"{copied}-again"
    del settings["training"]["output_dir"]
    assert settings == {name: again[name] for name in settings}
    plan = json.loads((copied / "plan.json").read_text())
    (copied / "plan.json").write_text(json.dumps({**plan, "ranks": 4}))
    assert "deepspeed --num_gpus 4 --module dora_vl.cli train" in reported(copied, to=tmp_path / "page.html").words


def test_a_browser_shows_the_answers_that_are_asked_for(copied: Path, tmp_path: Path) -> None:
    scores = rows_of(copied / "scores.jsonl")
    for number, score in enumerate(scores):
        score |= {"share": float(number % 3 == 0), "kind": "odd" if number % 2 else "even", "truth": f"word {number}"}
    write_rows(copied / "scores.jsonl", scores)
    reported(copied, to=tmp_path / "page.html")
    right = {number for number in range(len(scores)) if number % 3 == 0}
    with browser() as opened:
        page = opened.new_page()
        page.goto((tmp_path / "page.html").as_uri())
        items, filters = page.locator(".item:visible"), page.locator(".filter")
        assert items.count() == len(scores) - len(right)
        filters.get_by_text("right", exact=True).click()
        assert items.count() == len(right)
        filters.locator("select").select_option("even")
        assert items.count() == sum(number % 2 == 0 for number in right)
        filters.locator("input").fill("WORD 6")
        assert ["word 6" in text for text in items.all_inner_texts()] == [True]
        filters.get_by_text("all", exact=True).click()
        filters.locator("input").fill("nothing")
        assert items.count() == 0


def test_a_run_of_a_vlbart(vlbart_run: Path, tmp_path: Path) -> None:
    page = reported(vlbart_run, to=tmp_path / "page.html")
    for words in ("vqav2", "tvqa", "what is it", "what is said?", "evaluation.image_folder names no folder"):
        assert words in page.words, words
    assert page.words.count("with pictures exchanged") == 2
    assert len(page.all("svg")) >= 6
    steps = [line["step"] for line in rows_of(vlbart_run / "watched" / "answers.jsonl")]
    assert (steps[0], steps[-1]) == (0, json.loads((vlbart_run / "metrics.json").read_text())["train_steps"])


def test_two_runs_side_by_side(llava_run: Path, other_run: Path, tmp_path: Path) -> None:
    for name, folder in (("ours", llava_run), ("theirs", other_run)):
        (tmp_path / name).symlink_to(folder)
    labels = ("--label", "ours", "--label", "theirs")
    main(["report", str(tmp_path / "ours"), str(tmp_path / "theirs"), *labels])  # neither run's own report is replaced
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "against ours" in page.words
    assert "What differs" in page.words
    differing = page.words.split("What differs")[1].split("All other settings")[0]
    assert {"adapter.method", "training.learning_rate", "training.output_dir"} <= set(differing.split())
    assert "model.base" not in differing.split()
    assert "theirs: training, smoothed" in page.words
    sets = [json.loads((folder / "metrics.json").read_text())["sets"] for folder in (other_run, llava_run)]
    first, second = (of_run["train"]["metrics"]["accuracy"]["value"] for of_run in sets)
    assert f"{first - second:+.2f} (" in page.words


def test_no_host_is_asked_and_foreign_text_is_text(copied: Path, tmp_path: Path) -> None:
    predictions, scores = rows_of(copied / "predictions.jsonl"), rows_of(copied / "scores.jsonl")
    predictions[0] |= {"prediction": HOSTILE, "question": HOSTILE}
    score = next(line for line in scores if line["id"] == predictions[0]["id"])
    score |= {"share": 0.0, "answer": f"is {HOSTILE}", "truth": f"not {HOSTILE}", "kind": HOSTILE}
    answers = rows_of(copied / "watched" / "answers.jsonl")
    answers[0]["answers"] = dict.fromkeys(answers[0]["answers"], HOSTILE + " half a pair \ud83d")
    for name, rows in (("predictions", predictions), ("scores", scores), ("watched/answers", answers)):
        write_rows(copied / f"{name}.jsonl", rows)
    settings = json.loads((copied / "settings.json").read_text())
    settings["model"]["base"] = HOSTILE
    (copied / "settings.json").write_text(json.dumps(settings))
    (copied / "skipped.jsonl").write_text(json.dumps({"id": HOSTILE, "reason": HOSTILE}) + "\n")
    with (copied / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": 6, f"learning_rate/{HOSTILE}": 0.5}) + "\n")
    page = reported(copied, to=tmp_path / "page.html", more=("--label", HOSTILE))
    assert page.words.count(HOSTILE) >= 6
    assert len(page.all("script")) == 1
    names = ("src", "href", "srcset", "action", "data", "poster", "xlink:href")
    values = [str(found[name]) for _, found in page.found for name in names if name in found]
    assert [value for value in values if not value.startswith(("data:image/", "#"))] == []
    assert not any(name.startswith("on") for _, attributes in page.found for name in attributes)
    policy = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"]
    (style,) = re.findall(r"<style>(.*?)</style>", (tmp_path / "page.html").read_text(), re.DOTALL)
    assert not re.search(r"url\(|@import", style)


def test_rewards_and_drawn_answers_are_shown(copied: Path, tmp_path: Path) -> None:
    more = {"rewards/mean": 0.25, "log_probs/kl": 0.01, "rewards/margin": -1.0, "rewards/accuracy": 0.02}
    lines = enumerate(rows_of(copied / "log.jsonl"))
    logged = [{**line, **{key: value * n for key, value in more.items()}} for n, line in lines]
    write_rows(copied / "log.jsonl", logged)
    settings = json.loads((copied / "settings.json").read_text())
    (copied / "settings.json").write_text(json.dumps({**settings, "objective": {"loss": {"dpo": 1, "sft": 0.2}}}))
    answers = [{"text": text, "reward": reward} for text, reward in ((HOSTILE, 0.0), ("teal", 0.75), (HOSTILE, 0.0))]
    drawn = {"step": 4, "id": "q", "question": "Which hue?", "truth": "teal", "answers": answers}
    (copied / "drawn.jsonl").write_text(json.dumps(drawn) + "\n")
    page = reported(copied, to=tmp_path / "page.html")
    words = " ".join(page.words.split())
    for shown in ("Which hue?", "teal 0.75", f"{' '.join(HOSTILE.split())} 0, 2 times", "log-probabilities nats", "kl"):
        assert shown in words
    for chart_and_unit in ("margin chosen answer's", "accuracy of pairs share with", "loss dpo + 0.2 sft"):
        assert chart_and_unit in words
    assert "nats per answer token" not in words


def test_what_is_missing_says_so(copied: Path, tmp_path: Path) -> None:
    for name in ("plan.json", "predictions.jsonl", "metrics.json", "settings.json", "skipped.jsonl"):
        (copied / name).unlink()
    shutil.rmtree(copied / "watched")
    shutil.rmtree(copied / "adapter")
    kept = {"step", "loss", "learning_rate"}
    old = [{key: line[key] for key in kept & line.keys()} for line in rows_of(copied / "log.jsonl")]
    write_rows(copied / "log.jsonl", old)
    page = reported(copied, to=tmp_path / "page.html")
    for words in (
        "no predictions.jsonl",
        "no fixed questions",
        "No chart of memory",
        "no plan.json",
        "no settings.json",
    ):
        assert words in page.words, words
    assert {attributes.get("id") for attributes in page.all("h2")} == {name for name, _ in SECTIONS}


def test_bad_input_ends_with_status_2_and_leaves_no_file(llava_run: Path, tmp_path: Path) -> None:
    to, run = tmp_path / "out" / "page.html", str(llava_run)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for words in (
        [str(tmp_path / "nothing"), "--to", str(to)],
        [run, str(tmp_path / "empty"), "--to", str(to)],
        [run, "--label", "a", "--label", "b", "--to", str(to)],
        [run, "--to", str(tmp_path / "page.pdf")],
        [run, "--to", str(tmp_path / "file" / "page.html")],
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["report", *words])
    assert not to.parent.exists()
    assert not list(tmp_path.glob("**/*.html")) + list(tmp_path.glob("**/.*"))


# Where a chart's lines are; confusion and wrong answers counted by hand.


def places(drawn: Chart, colour: int) -> list[tuple[float, float]]:
    (path,) = re.findall(rf'd="([^"]*)" [^>]*stroke: var\(--c{colour}\)', drawn.svg)
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path)]


def test_a_line_is_where_its_numbers_are() -> None:
    drawn = chart("t", [Series(name="a", x=[10.0, 20.0, 30.0], y=[0.0, 50.0, 100.0])], y_label="y", zero=True)
    left, right, top, bottom = drawn.data["box"]
    low, high = drawn.data["x"]
    x = [left + (value - low) / (high - low) * (right - left) for value in (10, 20, 30)]
    y = [bottom - value / drawn.data["y"][1] * (bottom - top) for value in (0, 50, 100)]
    assert places(drawn, 0) == [pytest.approx(point, abs=0.01) for point in zip(x, y, strict=True)]
    assert drawn.data["y"][0] == 0
    assert drawn.legend == ()


def test_a_logarithmic_axis() -> None:
    drawn = chart("t", [Series(name="a", x=[0.0, 1.0, 2.0], y=[0.01, 0.1, 1.0])], y_label="y", log=True)
    first, second, third = (y for _, y in places(drawn, 0))
    assert first - second == pytest.approx(second - third, abs=0.02)


def test_long_lines_are_thinned_to_means_and_gaps_left_out() -> None:
    x = [float(number) for number in range(10 * MOST_POINTS)]
    drawn = chart("t", [Series(name="a", x=x, y=[number % 2 for number in x])], y_label="y")
    (series,) = drawn.data["series"]
    assert (len(series["x"]), set(series["y"])) == (MOST_POINTS, {0.5})
    gaps = chart("t", [Series(name="a", x=[1.0, 2.0, 3.0], y=[1.0, math.nan, 2.0])], y_label="y")
    assert gaps is not None
    assert len(places(gaps, 0)) == 2
    assert chart("t", [Series(name="a", x=[1.0], y=[math.inf])], y_label="y") is None


def item(truth: str, answer: str, kind: str = "", *, share: float | None = None) -> AnswerScore:
    right = float(truth == answer) if share is None else share
    score = ItemScore(unit="", share=right, columns={}, failed=not answer)
    return AnswerScore(score=score, kind=kind, truth=truth, answer=answer)


def of_set(items: Mapping[str, AnswerScore], headline: str = "accuracy") -> SetResult:
    predictions = {name: Prediction(id=name) for name in items}
    return SetResult(name="s", entry={"headline": headline}, scored=None, items=items, predictions=predictions)


def test_confusion_counts_by_hand() -> None:
    pairs = [("yes", "yes"), ("yes", "no"), ("yes", "Yes."), ("no", "no"), ("no", "a boat"), ("yes", "yes")]
    items = {str(number): item(*pair) for number, pair in enumerate([*pairs, ("yes", "")])}  # the last has no answer
    matrix = confusion("t", of_set(items))
    assert matrix is not None
    assert matrix.labels == ("yes", "no")
    assert matrix.columns == ("yes", "no", "other")
    assert matrix.counts == ((3, 1, 0), (0, 1, 1))
    others = [item("yes", "yep", share=1.0), item("no", "nope", share=0.6)] * 2  # right in other words, in part
    for headline, said_yes in (("accuracy", (0, 2, 0)), ("cider", (0, 0, 2))):
        matrix = confusion("t", of_set({str(number): each for number, each in enumerate(others)}, headline))
        assert matrix is not None
        assert (matrix.columns, matrix.counts) == (("no", "yes", "other"), ((0, 0, 2), said_yes))
    assert confusion("t", of_set({str(number): item(f"answer {number}", "x") for number in range(6)})) is None


def test_wrong_and_right_answers_come_of_every_kind_in_turn() -> None:
    items = {"right": item("x", "x", "b")} | {f"{kind}{n}": item("x", "y", kind) for kind, n in ("a1", "a2", "b1")}
    wrong, right = low_and_high(of_set(items))
    assert ([row.id for row, _ in wrong], [row.id for row, _ in right]) == (["a1", "b1", "a2"], ["right"])
    shares = {"low": 0.9, "lower": 0.7, "high": 1.6}
    graded = of_set({name: item("x", "x", share=share) for name, share in shares.items()}, headline="CIDEr")
    low, high = low_and_high(graded)
    assert ([row.id for row, _ in low], [row.id for row, _ in high]) == (["lower", "low"], ["high"])
