"""The report: one file that says what the numbers say, shows failures, and survives whatever a folder lacks."""

import base64
import io
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image
from scipy.stats import linregress

from trimtab import report
from trimtab.errors import UserError
from trimtab.metrics import Interval
from trimtab.report import curves, hacking, pictures, tables, words, write_report
from trimtab.report.card import write_card
from trimtab.report.folder import read_run
from trimtab.report.verdict import change, sentence

TAGS = ("colors", "counting")
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR42mP4z8AAAAMBAQD3A0FDAAAAAElFTkSuQmCC"
)  # one red pixel
MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"


def write_metrics(run, rows):
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def training(num_steps=40, gold=lambda u: 0.3 + 0.2 * u, images_per_step=64):
    """A quiet run: the trained reward rises from 0.2 to 0.8, the watched one follows `gold`; u goes from 0 to 1."""
    noise = np.random.default_rng(0).normal(size=(num_steps, 2)) * 0.01
    for step in range(1, num_steps + 1):
        u = step / num_steps
        proxy = 0.2 + 0.6 * u + noise[step - 1, 0]
        yield {
            "step": step,
            "reward": proxy,
            "reward_std": 0.1,
            "rewards/recognizer/mean": proxy,
            "watched/geneval/mean": gold(u) + noise[step - 1, 1],
            "frac_reward_zero_std": 0.1,
            "kl": 0.02 * u,
            "diversity": 8 - u,
            "images": images_per_step * step,
            "elapsed_seconds": 4.0 * step,
            "seconds/collect": 1.5,  # sampling and rewards are parts of it
            "seconds/sampling": 1.0,
            "seconds/rewards": 0.25,
            "seconds/forward": 2.0,
            "seconds/step": 4.0,
            "images_per_second": 16.0 if step < num_steps else 99.0,  # of the step alone
            "failed/geneval": 2 if step == 3 else 0,
        }


def rewards_only(**options):
    keys = ("step", "rewards/recognizer/mean", "watched/geneval/mean")
    return [{key: row[key] for key in keys} for row in training(**options)]


def interval(mean, half=0.05):
    return {"mean": mean, "low": mean - half, "high": mean + half}


def write_evaluation(run, label, strict, recognizer=None, with_images=True, half=0.05, setting=None, **changes):
    """strict: {tag: [verdict of each prompt]}, one image each; seeds and prompts agree between labels.

    `setting` is what results.json says of the sampling; by default nothing."""
    folder = run / "evaluation" / label
    folder.mkdir(parents=True)
    rows, index = [], 0
    for tag, verdicts in strict.items():
        for verdict in verdicts:
            file = f"images/{index:05d}/samples/0000.png"
            row = {"prompt": f"a photo of thing {index}", "tag": tag, "prompt_index": index, "sibling": 0}
            row |= {"seed": 100 + index, "strict": verdict, "reason": "" if verdict else "found none", "file": file}
            row |= {"recognizer": recognizer} if recognizer is not None else {}
            (folder / file).parent.mkdir(parents=True)
            (folder / file).write_bytes(PNG)
            rows.append(row | changes)
            index += 1
    if with_images:
        (folder / "images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tags = {tag: interval(float(np.mean(verdicts)), half) for tag, verdicts in strict.items()}
    scores = {"strict": {"overall": interval(np.mean([tag["mean"] for tag in tags.values()]), half), "tags": tags}}
    if recognizer is not None:
        scores["recognizer"] = {"overall": interval(recognizer), "tags": {}}
    statistics = {"brightness": 0.5 if label == "base" else 0.2, "saturation": 0.4}
    results = {"scores": scores, "image_statistics": statistics, "diversity": 8.0, "frechet_distance": 12.5}
    results |= {"precision_recall": {"precision": 0.8, "recall": 0.6}, "versions": {"torch": "2.13.0"}}
    (folder / "results.json").write_text(json.dumps(results | (setting or {})))


def change_results(run, label, **changes):
    """Overwrites keys of an evaluation's results.json."""
    file = run / "evaluation" / label / "results.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def sampled(num_inference_steps, guidance_scale, few_step=False, resolution=None, precision="no"):
    """What `evaluate` writes of how its pictures were made."""
    return {
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "few_step": few_step,
        "resolution": resolution,
        "precision": precision,
    }


def write_samples(run, steps=(0, 50, 100)):
    (run / "samples").mkdir(parents=True)
    for step in steps:
        Image.new("RGB", (128, 128), (step, 0, 0)).save(run / "samples" / f"step-{step:06d}.png")


def verdicts(num_right, num=20):
    return {tag: [1.0] * num_right + [0.0] * (num - num_right) for tag in TAGS}


def write_all(run):
    """Everything a run can hold; better after training."""
    write_metrics(run, training())
    (run / "config.yaml").write_text("command: trimtab train demo seed=1\nlr: 0.001\nversions:\n  trimtab: 0.1.0\n")
    write_evaluation(run, "base", verdicts(6), recognizer=0.4)
    write_evaluation(run, "base-guided", verdicts(12), recognizer=0.5)
    write_evaluation(run, "trained", verdicts(15), recognizer=0.7)
    write_samples(run)
    return run


@pytest.fixture
def run(tmp_path):
    return write_all(tmp_path / "runs" / "full")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return page_of(write_all(tmp_path_factory.mktemp("runs") / "full"))


class Page(HTMLParser):
    """What a reader of the page gets: tags with their attributes, and text."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags, self.text = [], ""
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def headings(self):
        return re.findall(r"<h2>(.*?)</h2>", self.source)


def page_of(run, **options):
    return Page(write_report(run, **options))


# The page stands alone


def test_the_page_loads_nothing(page):
    addresses = [value for _, a in page.tags for name, value in a.items() if name in ("src", "href", "xlink:href")]
    assert addresses
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in addresses)
    assert not {"script", "link", "iframe", "object"} & {name for name, _ in page.tags}
    assert not re.findall(r"@import|url\((?!#)", page.source)


def test_every_picture_is_inside_the_page_and_described(page):
    images = page.all("img")
    assert len(images) == 12 * 3 + 3  # twelve cases under three labels, three grids
    for image in images:
        file = io.BytesIO(base64.b64decode(image["src"].removeprefix("data:image/png;base64,")))
        assert Image.open(file).size == (int(image["width"]), int(image["height"]))
        assert image["alt"]
    charts = page.all("svg")
    assert len(charts) == 7
    assert all(chart["role"] == "img" and chart["aria-label"] for chart in charts)


def test_charts_take_their_colors_from_the_page_and_keep_their_ids_apart(page):
    assert not re.findall(r"#0[1-5]0[1-5]0[1-5]", page.source)  # no stand-in is left
    for variable in set(re.findall(r"var\((--[\w-]+)\)", page.source)):
        assert f"{variable}:" in page.source
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for reference in re.findall(r'(?:url\(|href=")#([\w-]+)', page.source):
        assert reference in ids


def test_the_same_folder_gives_the_same_bytes(tmp_path):
    write_all(tmp_path)
    write_metrics(tmp_path, rewards_only())
    first = write_report(tmp_path).read_bytes()
    assert write_report(tmp_path).read_bytes() == first


def test_text_from_outside_is_escaped(tmp_path):
    run = tmp_path / "a$b$ <i>"
    attack = "<script>alert('x')</script>"
    write_metrics(run, [{"step": 1, "reward": 0.5}])
    write_evaluation(run, "trained", {attack: [1.0, 0.0]}, prompt=attack, reason=attack)
    (run / "config.yaml").write_text(f"command: {attack}\n")
    page = page_of(run)
    assert not page.all("script")
    assert not page.all("i")
    assert page.text.count(attack) >= 6  # prompts, reasons, tag, config, command: there as text
    assert "a$b$ <i>" in page.text


def test_a_report_that_fails_leaves_the_old_one_alone(run):
    (run / "report.html").write_text("old")
    (run / "metrics.jsonl").write_text("{broken\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 1, is not valid JSON"):
        write_report(run)
    assert (run / "report.html").read_text() == "old"
    assert [file.name for file in run.iterdir() if "report" in file.name] == ["report.html"]


def test_the_page_goes_where_it_is_asked_to(tmp_path):
    run, output = tmp_path / "run", tmp_path / "new" / "page.html"
    write_samples(run)
    assert write_report(run, output) == output
    assert [file.name for file in output.parent.iterdir()] == ["page.html"]
    assert [file.name for file in run.iterdir()] == ["samples"]
    assert write_report(run) == run / "report.html"


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("", "is a folder; give --output the name of a file, such as .*report.html"),
        ("config.yaml", "config.yaml is a file already, and no page; give --output a name that ends in .html"),
        ("config.yaml/page.html", "cannot be made below .*config.yaml, which is a file; give --output another name"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_page_is_made(run, output, said, monkeypatch):
    monkeypatch.setattr(report, "_page", lambda *_: pytest.fail("the page was made first"))
    with pytest.raises(UserError, match=said):
        write_report(run, run / output)


# Parts that are missing

PARTS = {
    "metrics": (lambda run: write_metrics(run, training()), ["Curves"]),
    "one step": (lambda run: write_metrics(run, training(1)), ["Curves"]),
    "step alone": (lambda run: write_metrics(run, [{"step": 1}, {"step": 2, "kl": None}]), []),
    "config": (lambda run: (run / "config.yaml").write_text("lr: 1\n"), ["How to get this again"]),
    "samples": (write_samples, ["While training"]),
    "one model": (
        lambda run: write_evaluation(run, "base", verdicts(3)),
        ["Scores", "Same prompt, same seed", "Drift watch", "How to get this again"],
    ),
    "no images": (
        lambda run: write_evaluation(run, "trained", verdicts(3), with_images=False),
        ["Scores", "Drift watch", "How to get this again"],
    ),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_alone_makes_a_page_of_its_own_sections(part, tmp_path):
    write, headings = PARTS[part]
    write(tmp_path)
    page = page_of(tmp_path)
    assert page.headings() == headings
    assert 'class="verdict"' in page.source


def test_a_full_run_has_every_section_in_order(page):
    assert page.headings() == [
        "Before and after",
        "Same prompt, same seed",
        "While training",
        "Curves",
        "Drift watch",
        "How to get this again",
    ]


def test_folders_with_nothing_to_report_are_refused(tmp_path):
    with pytest.raises(UserError, match="holds nothing to report"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        write_report(tmp_path / "absent")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("config.yaml", "a: [1\n", "not valid YAML"),
        ("config.yaml", "- 1\n", "holds a list, expected keys"),
        ("metrics.jsonl", '{"step": 1}\n[2]\n', "line 2, holds a list"),
        ("metrics.jsonl", '{"step": 1}\n{"kl": 2}\n', "line 2, has no whole number as 'step'"),
        ("evaluation/base/results.json", "{}", "no 'scores'"),
        ("evaluation/base/results.json", '{"scores": [1]}', "no 'scores'"),
        ("evaluation/base/images.jsonl", '{"prompt": "a"}\n', "line 1, does not describe an image"),
    ],
)
def test_files_that_cannot_be_read_are_named_with_their_line(file, text, said, tmp_path):
    write_evaluation(tmp_path, "base", {"one": [1.0]})
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        write_report(tmp_path)
    assert file in str(caught.value)


@pytest.mark.parametrize("file", ["config.yaml", "metrics.jsonl", "evaluation/base/images.jsonl"])
def test_text_that_is_not_utf8_is_refused(file, tmp_path):
    write_evaluation(tmp_path, "base", {"one": [1.0]})
    (tmp_path / file).write_bytes("name: Käse\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"is not UTF-8 text .*; restore it") as caught:
        write_report(tmp_path)
    assert file in str(caught.value)


# The verdict


def two_models(tmp_path, before, after, **options):
    write_evaluation(tmp_path, "base", before, **options)
    write_evaluation(tmp_path, "trained", after, **options)
    return read_run(tmp_path)


def test_better_is_said_with_the_change_and_its_interval(run):
    # 6 of 20 before, 15 of 20 after, in both tags: 0.30, 0.75, +0.45; nine of 20 prompts per tag changed, so the
    # standard error is √(0.45 · 0.55 / 40) = 0.079 and the interval about 0.45 ± 0.15. Guided: three prompts fewer.
    text = sentence(read_run(run))
    assert text.startswith("Better: the strict score rose from 0.30 (base) to 0.75 (trained), a change of +0.45 (95%")
    low, high = map(float, re.search(rf"interval ([\d.]+){DASH}([\d.]+)\)", text).groups())
    assert low == pytest.approx(0.30, abs=0.03)
    assert high == pytest.approx(0.60, abs=0.03)
    assert text.endswith("; that is above the untrained model with guidance (0.60).")


def test_worse_is_said_and_called_hacking_when_the_trained_reward_rose(tmp_path):
    write_evaluation(tmp_path, "base", verdicts(15), recognizer=0.4)
    write_evaluation(tmp_path, "trained", verdicts(6), recognizer=0.7)
    text = sentence(read_run(tmp_path))
    assert text.startswith(f"Worse: the strict score fell from 0.75 (base) to 0.30 (trained), a change of {MINUS}0.45")
    assert "hacked" not in text  # nothing says what it was trained on
    write_metrics(tmp_path, training())
    text = sentence(read_run(tmp_path))
    assert text.endswith(", while recognizer, which it was trained on, rose: the reward was hacked.")


def test_a_change_that_may_be_chance_is_not_called_better(tmp_path):
    # One prompt of forty gained: the resampled mean change is 0 with probability (39/40)^40 = 0.36.
    before, after = verdicts(10), verdicts(10)
    after["colors"][15] = 1.0
    text = sentence(two_models(tmp_path, before, after))
    assert text.startswith("No clear difference: the strict score went from 0.50 (base) to 0.53 (trained)")
    assert re.search(rf"the change of \+0.03 \(95% interval 0.00{DASH}0.\d\d\) may be chance", text)


def test_pairs_tell_what_two_overlapping_intervals_cannot(tmp_path):
    # Four of twenty prompts per tag gained and none lost; the separate intervals (± 0.2) overlap widely.
    found = two_models(tmp_path / "pairs", verdicts(8), verdicts(12), half=0.2)
    assert sentence(found).startswith("Better:")
    alone = two_models(tmp_path / "alone", verdicts(8), verdicts(12), half=0.2, with_images=False)
    assert sentence(alone).startswith("No clear difference:")
    assert "two intervals overlap" in sentence(alone)


def test_without_pairs_intervals_that_do_not_overlap_decide(tmp_path):
    better = two_models(tmp_path / "up", verdicts(5), verdicts(15), with_images=False)
    worse = two_models(tmp_path / "down", verdicts(15), verdicts(5), with_images=False)
    assert sentence(better).startswith("Better:")
    assert sentence(worse).startswith("Worse:")
    assert "do not overlap" in sentence(better)


def test_images_of_other_seeds_are_no_pairs(tmp_path):
    write_evaluation(tmp_path, "base", verdicts(8))
    write_evaluation(tmp_path, "trained", verdicts(12), seed=7)
    run = read_run(tmp_path)
    assert change(run.reference, run.subject, "strict").difference is None


def test_the_change_of_a_tag_is_that_of_its_own_images(tmp_path):
    run = two_models(tmp_path, verdicts(10), verdicts(10) | {"colors": [1.0] * 20})
    moved = {tag: change(run.reference, run.subject, "strict", tag).difference.mean for tag in TAGS}
    assert moved == {"colors": pytest.approx(0.5), "counting": 0}


def test_five_prompts_prove_nothing_even_if_all_improve(tmp_path):
    five = two_models(tmp_path / "five", {"one": [0.0] * 5}, {"one": [1.0] * 5})
    six = two_models(tmp_path / "six", {"one": [0.0] * 6}, {"one": [1.0] * 6})
    assert sentence(five).startswith("No clear difference:")
    assert "too few prompts" in sentence(five)
    assert sentence(six).startswith("Better:")


def test_without_an_evaluation_the_reward_is_reported_but_not_trusted(tmp_path):
    write_metrics(tmp_path, [{"step": i, "reward": i / 50} for i in range(1, 101)])
    text = sentence(read_run(tmp_path))
    # first tenth 0.02 ... 0.20, mean 0.11; last tenth 1.82 ... 2.00, mean 1.91
    assert text.startswith("Not evaluated: the training reward went from 0.11 to 1.91 over 100 steps")
    assert "does not show that the pictures are better" in text


def test_one_evaluated_model_is_compared_with_nothing(tmp_path):
    write_evaluation(tmp_path, "base", verdicts(6))
    assert sentence(read_run(tmp_path)).startswith(
        "Nothing to compare with: only 'base' was evaluated, strict score 0.30"
    )


@pytest.mark.parametrize("other", ["base", "trained"])
def test_a_guided_base_is_not_compared_with_itself(other, tmp_path):
    write_evaluation(tmp_path, other, verdicts(6))
    write_evaluation(tmp_path, "base-guided", verdicts(12))
    assert "untrained model with guidance" not in sentence(read_run(tmp_path))


def test_an_evaluation_that_scored_nothing_still_shows_its_pictures(tmp_path):
    two_models(tmp_path, {"all": [0.0] * 14}, {"all": [0.0] * 14})
    for label in ("base", "trained"):
        change_results(tmp_path, label, scores={})
    assert sentence(read_run(tmp_path)).startswith("Not judged: nothing was scored")
    page = page_of(tmp_path)
    assert page.headings() == ["Same prompt, same seed", "Drift watch", "How to get this again"]
    assert len(page.all("img")) == 12 * 2
    assert "Of 14 images 14 not scored. Shown are" in page.text
    assert "wrong" not in page.text
    (tmp_path / "config.yaml").write_text(RECIPE)
    card = ModelCard.load(write_card(tmp_path)).text
    assert "nothing was scored" in card
    assert "| overall |" not in card
    assert "| brightness |" in card


def test_one_of_two_models_without_scores_leaves_the_change_open(tmp_path):
    two_models(tmp_path, verdicts(3), verdicts(3))
    change_results(tmp_path, "base", scores={})
    assert f"went from {DASH} (base) to 0.15 (trained)" in sentence(read_run(tmp_path))
    assert "Before and after" in page_of(tmp_path).headings()


def test_models_stand_in_their_order_whatever_their_names(tmp_path):
    for label in ("zeta", "trained", "alpha", "base-guided", "base"):
        write_evaluation(tmp_path, label, verdicts(3))
    assert list(read_run(tmp_path).evaluations) == ["base", "base-guided", "trained", "alpha", "zeta"]


def test_sampling_that_differs_is_said_in_the_verdict(tmp_path):
    student, guided = sampled(1, 1.0, few_step=True), sampled(30, 3.0)
    write_evaluation(tmp_path / "a", "base", verdicts(6), setting=student)
    write_evaluation(tmp_path / "a", "base-guided", verdicts(12), setting=guided)
    write_evaluation(tmp_path / "a", "trained", verdicts(15), setting=student)
    text = sentence(read_run(tmp_path / "a"))
    assert "from 0.30 (base) to 0.75 (trained), a change" in text  # these two were sampled alike
    assert text.endswith("untrained model with guidance (0.60: 30 steps, w = 3, against 1 call, w = 1).")
    write_evaluation(tmp_path / "b", "base", verdicts(6), setting=guided)
    write_evaluation(tmp_path / "b", "trained", verdicts(15), setting=student)
    text = sentence(read_run(tmp_path / "b"))
    assert "from 0.30 (base, 30 steps, w = 3) to 0.75 (trained, 1 call, w = 1), a change" in text


def test_each_column_says_how_its_pictures_were_made(tmp_path):
    write_evaluation(tmp_path, "base", verdicts(6), setting=sampled(30, 3.5, resolution=1024, precision="bf16"))
    write_evaluation(tmp_path, "trained", verdicts(15), setting=sampled(4, 1.0, few_step=True))
    (tmp_path / "config.yaml").write_text(RECIPE)
    heads = re.findall(r"<thead>.*?</thead>", page_of(tmp_path).source)
    assert len(heads) == 2  # scores and drift
    for head in heads:
        assert "base<small>30 steps, w\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}3.5, 1024 px, bf16</small></th>" in head
        assert "trained<small>4 calls, w\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}1</small></th>" in head
    card = ModelCard.load(write_card(tmp_path)).text
    assert "| | base (30 steps, w = 3.5, 1024 px, bf16) | trained (4 calls, w = 1) | change |" in card
    assert "w is the scale of guidance" in card


# The pictures


def test_cases_that_got_worse_come_first_and_are_shown_with_reasons(tmp_path):
    # Tag 'one': prompt 3 got worse, prompts 0 and 1 stay wrong. Whatever else is shown, prompt 3 leads.
    two_models(tmp_path, {"one": [0.0, 0.0, 1.0, 1.0]}, {"one": [0.0, 0.0, 1.0, 0.0]})
    shown = pictures.comparisons(read_run(tmp_path))
    assert (shown[0].prompt, shown[0].outcome) == ("a photo of thing 3", "got worse")
    assert [(shot.label, shot.score, shot.reason) for shot in shown[0].shots] == [
        ("base", 1.0, ""),
        ("trained", 0.0, "found none"),
    ]
    page = page_of(tmp_path)
    assert "Of 4 images 1 still right, 1 got worse, 2 still wrong." in page.text
    assert "found none" in page.text


def test_every_tag_shows_as_many_failures_as_successes(run):
    shown = pictures.comparisons(read_run(run))
    for tag in TAGS:
        of_tag = [case.outcome for case in shown if case.tag == tag]
        assert of_tag == ["still wrong"] * 3 + ["got better"] * 3


def test_a_tag_without_failures_shows_more_successes(tmp_path):
    two_models(tmp_path, {"one": [0.0] * 9, "two": [0.0] * 9}, {"one": [1.0] * 9, "two": [0.0] * 9})
    shown = pictures.comparisons(read_run(tmp_path))
    assert [case.outcome for case in shown] == ["got better"] * 6 + ["still wrong"] * 6


def test_the_choice_goes_by_change_then_sibling_then_prompt_number():
    # (prompt, sibling): worse (1,1), (2,0); wrong (0,0). Change before no change, sibling 0 before 1.
    outcome = {
        (1, 1, 0, "b"): "got worse",
        (2, 0, 0, "c"): "got worse",
        (0, 0, 0, "a"): "still wrong",
        (4, 0, 0, "e"): "still right",
        (3, 0, 0, "d"): "got better",
    }
    chosen = pictures.choose(outcome, dict.fromkeys(outcome, "tag"))
    assert [key[3] for key in chosen] == ["c", "b", "a", "d", "e"]
    assert list(pictures.choose(dict(reversed(outcome.items())), dict.fromkeys(outcome, "tag"))) == list(chosen)
    by_tag = pictures.choose(outcome, {key: "late" if key[0] > 0 else "early" for key in outcome})
    assert next(iter(by_tag))[3] == "a"  # tags stand in the order of their first prompt


def test_images_that_could_not_be_scored_are_not_chosen_as_right_or_wrong(tmp_path):
    two_models(tmp_path, {"one": [math.nan, 0.0, 1.0]}, {"one": [1.0, math.nan, 1.0]})
    assert list(pictures.outcomes(read_run(tmp_path)).values()) == ["still right"]


def test_small_pictures_keep_their_pixels_and_large_ones_are_scaled_down(tmp_path):
    for size in (64, 512):
        Image.new("RGB", (size, size // 2)).save(tmp_path / f"{size}.png")
    small, large = (pictures.embed(tmp_path / f"{size}.png", 128) for size in (64, 512))
    assert (small.width, small.height, small.pixelated) == (64, 32, True)
    assert (large.width, large.height, large.pixelated) == (256, 128, False)
    assert pictures.embed(tmp_path / "absent.png", 128).source == ""


def test_a_lost_picture_is_said_to_be_lost(tmp_path):
    two_models(tmp_path, {"one": [0.0, 0.0]}, {"one": [1.0, 0.0]})
    (tmp_path / "evaluation" / "trained" / "images" / "00001" / "samples" / "0000.png").unlink()
    page = page_of(tmp_path)
    assert page.text.count("picture file is missing") == 1
    assert len(page.all("img")) == 3


def test_a_damaged_picture_is_said_to_be_lost(tmp_path):
    # Cut off in the middle, no picture at all, and a chunk whose name was overwritten: Pillow answers each in its way.
    noisy = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "PNG")
    whole = file.getvalue()
    overwritten = whole.replace(b"IDAT", b"\xff\x00\x01\x02", 1)
    two_models(tmp_path, {"one": [0.0] * 4}, {"one": [1.0] * 4})
    for index, damaged in enumerate((whole[:900], b"lost", overwritten, b"")):
        path = tmp_path / f"evaluation/trained/images/{index:05d}/samples/0000.png"
        path.write_bytes(damaged)
    page = page_of(tmp_path)
    assert page.text.count("picture file is missing or damaged") == 4
    assert len(page.all("img")) == 4


def test_the_strip_shows_first_middle_and_last_step(tmp_path):
    write_samples(tmp_path, steps=(0, 9, 20, 100, 200))
    (tmp_path / "samples" / "step-last.png").write_bytes(b"not a step")
    assert [step for step, _ in pictures.strip(read_run(tmp_path))] == ["step 0", "step 20", "step 200"]


# Proxy against gold


def test_the_span_where_proxy_rises_and_gold_falls_is_found():
    # Gold rises to step 50 and falls after; windows of 25 steps. One that lies wholly in the second half must be
    # marked, one that lies wholly in the first must not.
    step = np.arange(100.0)
    noise = np.random.default_rng(0).normal(size=(2, 100)) * 0.01
    proxy, gold = step / 100 + noise[0], -np.abs(step - 50) / 100 + noise[1]
    ((first, last),) = hacking.hacked_spans(step, proxy, gold)
    assert 37 <= first <= 51
    assert last == 99


def test_no_span_when_gold_rises_too_or_the_proxy_falls_with_it():
    step = np.arange(100.0)
    noise = np.random.default_rng(0).normal(size=(2, 100)) * 0.01
    for slope in ((1, 1), (-1, -1), (-1, 1)):
        assert hacking.hacked_spans(step, slope[0] * step / 100 + noise[0], slope[1] * step / 100 + noise[1]) == []


def test_noise_alone_is_rarely_marked():
    # A flat gold beside a proxy that rises for sure, 200 times. One window of 25 points falls by four standard errors
    # with a chance of 0.03 % (t, 23 degrees of freedom); a run has 76 windows that overlap, so about 1 % of the runs.
    step, marked = np.arange(100.0), 0
    for seed in range(200):
        noise = np.random.default_rng(seed).normal(size=(2, 100))
        marked += bool(hacking.hacked_spans(step, step + noise[0], noise[1]))
    assert marked <= 6


def test_slopes_are_in_units_of_the_standard_error_of_a_regression():
    x, y = np.arange(12.0), np.random.default_rng(0).normal(size=12)
    line = linregress(x, y)
    assert hacking._slopes(x, y, 12) == pytest.approx([line.slope / line.stderr])


def test_spans_do_not_depend_on_units_and_skip_steps_without_a_value():
    step = np.arange(80.0)
    noise = np.random.default_rng(1).normal(size=(2, 80)) * 0.02
    proxy, gold = step / 80 + noise[0], -np.maximum(step - 30, 0) / 80 + noise[1]
    spans = hacking.hacked_spans(step, proxy, gold)
    assert spans
    assert hacking.hacked_spans(step, 100 * proxy - 7, 0.01 * gold + 3) == spans
    sparse = np.where(step % 2 == 0, gold, math.nan)
    assert hacking.hacked_spans(step, proxy, sparse) == hacking.hacked_spans(step[::2], proxy[::2], gold[::2])
    assert hacking.hacked_spans(step[:9], step[:9], -step[:9]) == []  # nine points are too few
    assert hacking.hacked_spans(step[:10], step[:10], -step[:10]) == [(0.0, 9.0)]


def test_hacking_is_shaded_and_said_at_the_top(tmp_path):
    write_metrics(tmp_path / "bad", rewards_only(gold=lambda u: 0.5 - 0.4 * u))
    write_metrics(tmp_path / "good", rewards_only())
    bad, good = page_of(tmp_path / "bad"), page_of(tmp_path / "good")
    assert f"Reward hacking in steps 1{DASH}40: recognizer, which is trained on, rose while geneval" in bad.text
    assert "Reward hacking" not in good.text
    assert "there the reward is being hacked" in bad.text
    assert "that happens nowhere" in good.text
    shaded = [page.source.count("fill: var(--mark)") for page in (bad, good)]
    assert shaded == [2, 0]  # in both panels


def test_several_trained_rewards_stand_behind_their_sum(tmp_path):
    rows = [row | {"rewards/clip/mean": 0.3} for row in training(2)]
    write_metrics(tmp_path, rows)
    assert hacking.proxy_and_gold(read_run(tmp_path)) == ("reward", ["watched/geneval/mean"])


# Curves and tables


def test_a_resumed_step_counts_once_and_an_unfinished_line_not_yet(tmp_path):
    lines = ['{"step": 1, "kl": 1.0}', '{"step": 3, "kl": null}', '{"step": 2, "kl": 9.0}', '{"step": 2, "kl": 2.0}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "k')
    metrics = read_run(tmp_path).metrics
    assert metrics["step"].tolist() == [1, 2, 3]
    assert metrics["kl"][:2].tolist() == [1, 2]
    assert math.isnan(metrics["kl"][2])


def test_what_an_evaluation_adds_to_a_step_leaves_the_rest_of_it(tmp_path):
    write_metrics(tmp_path, [{"step": 1, "reward": 0.5}, {"step": 1, "eval/trained/strict": 0.4}])
    metrics = read_run(tmp_path).metrics
    assert (metrics["reward"].tolist(), metrics["eval/trained/strict"].tolist()) == ([0.5], [0.4])


def test_long_curves_are_thinned_to_means_of_neighbours():
    x, y = curves.thinned(np.arange(1000.0), np.tile([0.0, 1.0], 500))
    assert len(x) == len(y) == curves.MAX_POINTS
    assert (x[0], x[-1]) == (1.5, 998.0)  # means of 0 ... 3 and of 997 ... 999: 1000 points in 100 fours and 200 threes
    assert y.min() == pytest.approx(1 / 3)
    sparse = np.array([1.0, math.nan, 3.0])
    assert [part.tolist() for part in curves.thinned(np.arange(3.0), sparse)] == [[0, 2], [1, 3]]


def test_the_running_mean_keeps_lines_and_halves_no_end():
    # Centred windows leave a straight line as it is, but for the ends, where they are cut on one side.
    line = np.arange(60.0)
    smooth = curves.running_mean(line)
    assert np.abs(smooth[3:-3] - line[3:-3]).max() < 1e-12
    assert smooth[0] == 1.5  # mean of 0, 1, 2, 3
    assert np.abs(curves.running_mean(np.ones(60)) - 1).max() < 1e-12


def test_the_distance_from_the_anchor_is_true_of_every_anchor(page):
    caption = caption_of(page, "Distance from the anchor")
    assert "in DiffusionNFT the starting model" in caption
    assert "in CRD that model with guidance, so that the distance falls at first" in caption
    assert "Distance from the starting model" not in page.text


def test_the_band_is_over_all_images_of_a_step(tmp_path):
    write_metrics(tmp_path / "one", training())
    page = page_of(tmp_path / "one")
    assert "one standard deviation over all images of a step" in caption_of(page, "Reward during training")
    assert "among siblings" not in caption_of(page, "Reward during training")
    # Of several rewards drpo logs the deviation of what they are worth together, which is not that of their sum.
    write_metrics(tmp_path / "two", [row | {"rewards/clip/mean": 0.3} for row in training()])
    assert "standard deviation" not in caption_of(page_of(tmp_path / "two"), "Reward during training")


def test_the_band_has_the_steps_of_its_line(tmp_path):
    rows = [{"step": step, "reward": None if step == 3 else 0.5, "reward_std": 0.1} for step in range(1, 9)]
    write_metrics(tmp_path, rows)
    (chart,) = curves.training_charts([read_run(tmp_path)])  # a band of another length could not be drawn
    assert "The band is" in chart.caption


def test_the_two_diversities_are_told_apart(page):
    assert "latents" in caption_of(page, "Diversity among siblings, as latents")
    assert "diversity among siblings, as features" in page.text
    assert not re.findall(r"[Dd]iversity among siblings(?!, as)", page.source)


def caption_of(page, title):
    (found,) = re.findall(rf"<h3>{title}</h3>.*?<figcaption>(.*?)</figcaption>", page.source, re.S)
    return found


@pytest.mark.parametrize(("num_steps", "ticks"), [(1, ["1"]), (2, ["1", "2"])])
def test_short_runs_have_whole_steps_on_their_axes_and_something_to_see(num_steps, ticks, tmp_path):
    write_metrics(tmp_path, training(num_steps))
    source = page_of(tmp_path).source
    assert re.findall(r'id="kl-xtick_\d+">.*?<text[^>]*>([^<]*)</text>', source, re.S) == ticks
    chart = source.split('aria-label="Distance from the anchor')[1].split("</svg>")[0]
    marked = bool(re.search(r"<use [^>]*fill: var\(--series-1\)", chart))
    assert marked == (num_steps == 1)  # one point makes no line


def test_compared_runs_share_the_axes_and_the_table(run, tmp_path):
    other = tmp_path / "runs" / "other"
    write_metrics(other, training(images_per_step=32))
    write_evaluation(other, "trained", verdicts(10))
    page = page_of(run, compare=[other])
    assert page.headings()[3] == "Compared runs"
    table = page.source.split("<h2>Compared runs</h2>")[1].split("</table>")[0]
    rows = [re.sub(r"<.*?>|\u2060", " ", row).split() for row in table.split("<tr")[2:]]
    assert [row[-7:] for row in rows] == [
        ["0.70", DASH, "0.80", "0.80", "2,560", "3", "min"],
        ["0.45", DASH, "0.55", "0.80", "1,280", "3", "min"],
    ]
    reward = next(chart["aria-label"] for chart in page.all("svg") if chart["aria-label"].startswith("Reward during"))
    assert "full from" in reward
    assert "other from" in reward
    axes = re.findall(r">(training images|step)</text>", page.source)
    assert axes
    assert set(axes) == {"training images"}  # runs of unlike batch size are compared by images


def test_runs_of_which_one_counts_no_images_are_compared_by_steps(tmp_path):
    for name, counted in (("a", {"images": 8}), ("b", {})):
        write_metrics(tmp_path / name, [{"step": step, "reward": 0.5} | counted for step in (1, 2)])
    (chart,) = curves.training_charts([read_run(tmp_path / name) for name in "ab"])
    assert re.findall(r">(training images|step)</text>", chart.svg) == ["step"]


def test_drift_is_marked_only_where_the_look_moved_far(page):
    # Brightness 0.5 -> 0.2 is -60 %; saturation does not move.
    drift = page.source.split("<h2>Drift watch</h2>")[1].split("</table>")[0]
    rows = {row.split("</th>")[0].split(">")[-1]: row for row in drift.split("<tr")[2:]}
    assert f"{MINUS}60%" in rows["brightness"]
    assert "◆" in rows["brightness"]
    assert "◆" not in rows["saturation"]
    assert f"The look changed by more than 25% of its start: brightness {MINUS}60%." in page.text


@pytest.mark.parametrize(
    ("name", "before", "after", "shown", "marked"),
    [
        ("dark_share", 4e-6, 0.005, "+0.00", False),  # 20 of 64 x 64 pixels
        ("dark_share", 4e-6, 0.02, "+0.02", True),
        ("dark_share", 0.0, 0.02, "+0.02", True),
        ("dark_share", 0.02, 0.026, "+30%", False),  # relatively far, and 25 pixels
        ("edge_density", 0.06, 0.08, "+33%", True),
        ("saturation", 0.5, 0.3, f"{MINUS}40%", True),
        ("color_entropy", 0.02, 0.09, "+0.07", False),
        ("color_entropy", 4.0, 1.8, f"{MINUS}55%", True),
        ("contrast", 0.001, 0.002, "+100%", True),  # a statistic without a known scale
        ("contrast", 0.0, 0.0, "+0.00", False),
    ],
)
def test_a_change_too_small_to_see_is_not_marked_however_small_its_start(name, before, after, shown, marked, tmp_path):
    two_models(tmp_path, {"one": [0.0]}, {"one": [0.0]})
    for label, value in (("base", before), ("trained", after)):
        change_results(tmp_path, label, image_statistics={name: value})
    run = read_run(tmp_path)
    (cell,) = [row.cells[-1] for row in tables.drift_rows(run) if row.name == tables.DRIFT.get(name, name)]
    assert (cell.value, cell.tone) == (shown, "flag" if marked else "")
    assert any("The look changed" in warning for warning in tables.warnings(run)) == marked


def test_a_large_change_of_quality_is_no_alarm(tmp_path):
    two_models(tmp_path, {"one": [0.0]}, {"one": [0.0]})
    change_results(tmp_path, "trained", frechet_distance=50.0, diversity=50.0)
    tones = {row.name: row.cells[-1].tone for row in tables.drift_rows(read_run(tmp_path))}
    assert (tones[tables.DRIFT["frechet_distance"]], tones[tables.DRIFT["diversity"]]) == ("", "flag")


def test_the_head_says_how_fast_the_whole_run_was(page):
    # 40 steps of 64 images in 160 s; the last step's own rate, 99 images/s, is not the run's
    assert "40 steps · 2,560 training images · 3 min · 16 images/s" in page.text


def test_one_is_counted_in_the_singular(tmp_path):
    write_metrics(tmp_path, training(1, images_per_step=1))
    page = page_of(tmp_path)
    assert "1 step · 1 training image · 4 s" in page.text
    assert "over 1 step," in page.text
    write_evaluation(tmp_path, "base", {"one": [1.0]})
    assert "Of 1 image 1 right." in page_of(tmp_path).text


def test_parts_of_a_step_add_up_to_it_and_none_counts_twice(page):
    (chart,) = [each for each in page.all("svg") if each["aria-label"].startswith("Seconds per step")]
    assert chart["aria-label"] == ("Seconds per step: forward 2, sampling 1, other 0.5, collect 0.25 and rewards 0.25.")
    assert "4 seconds per step." in page.text


def test_images_that_could_not_be_scored_are_counted(page):
    assert "Images that geneval could not score in training: 2." in page.text


def test_config_command_and_versions_are_on_the_page(page):
    assert "lr: 0.001" in page.text
    assert "trimtab train demo seed=1" in page.text
    assert [item for item in ("trimtab", "0.1.0", "torch", "2.13.0") if item not in page.text] == []


def test_numbers_are_written_for_readers():
    assert words.score(-0.126) == f"{MINUS}0.13"
    assert words.number(0.00483) == "0.00483"
    assert words.signed(0.5) == "+0.50"
    assert words.percent(-0.536) == f"{MINUS}54%"
    assert words.bounds(Interval(0.5, 0.4, 0.6)) == f"0.40{DASH}0.60"
    assert words.bounds(Interval(0.0, -0.1, 0.1)) == f"{MINUS}0.10 to 0.10"
    assert words.bounds(Interval(0.5, math.nan, math.nan)) == ""
    assert words.score(math.nan) == words.percent(math.inf) == DASH
    assert [words.duration(seconds) for seconds in (90, 600, 36000)] == ["90 s", "10 min", "10.0 h"]
    assert words.listed(["a"]) == "a"
    assert words.listed(["a", "b", "c"]) == "a, b and c"


# The model card


RECIPE = """
method: {name: drpo}
model:
  pretrained_model_name_or_path: stabilityai/sd-turbo
  adapters: [runs/tokens/export]
  finetune_type: lora
  resolution: 512
rollout: {num_inference_steps: 1}
"""


def test_the_card_of_an_export_names_its_model_and_says_how_to_sample_it_and_what_it_scores(run):
    (run / "config.yaml").write_text(RECIPE)
    change_results(run, "trained", **sampled(4, 2.5, resolution=512, precision="bf16"))
    card = ModelCard.load(write_card(run))
    assert (card.data.base_model, card.data.library_name) == ("stabilityai/sd-turbo", "diffusers")
    assert "drpo" in card.data.tags
    how = "--num-inference-steps 4 --guidance-scale 2.5 --resolution 512 --mixed-precision bf16"
    assert f"trimtab sample stabilityai/sd-turbo --adapter runs/tokens/export --adapter . {how} -p" in card.text
    assert "| overall | 0.30 (" in card.text
    assert "| | base | base-guided | trained (" in card.text
    assert "adapters: [runs/tokens/export]" in card.text  # the recipe


def test_the_card_of_full_weights_that_were_not_evaluated(tmp_path):
    write_metrics(tmp_path, training())
    (tmp_path / "config.yaml").write_text(RECIPE.replace("lora", "full"))
    card = ModelCard.load(write_card(tmp_path))
    assert "trimtab sample . --num-inference-steps 1 --resolution 512 -p" in card.text
    assert "| |" not in card.text
