"""The figures of the page: scores with intervals, and what happened during training."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from trimtab.report.drawing import DASHES, MARK, MARKERS, MUTED, RULE, SERIES, Chart, svg
from trimtab.report.folder import RunFolder
from trimtab.report.hacking import CRITERION, Span, hacked, proxy_and_gold, reward_name
from trimtab.report.words import listed, number

MAX_POINTS = 300
LINES = {  # key in metrics.jsonl -> (title, unit, what to look at)
    "kl": (
        "Distance from the anchor",
        "kl",
        "Each method has its own anchor: in DiffusionNFT the starting model, and a slow rise is the price of learning;"
        " in CRD that model with guidance, so that the distance falls at first; for an auto-encoder a standard normal."
        " A sudden rise means that the anchor no longer holds.",
    ),
    "relative_misfit": (
        "How far the student is from its teacher",
        "difference of teacher and fake, in units of their error",
        "It starts at what guidance alone makes, and should fall.",
    ),
    "loss/fake": (
        "Loss of the fake network",
        "denoising error",
        "It should stay flat. A rise means that the student runs from the fake.",
    ),
    "gate": (
        "Gate of the rewards",
        "factor",
        "Near its floor, rewards want more than the student may leave its teacher for.",
    ),
    "distance": (
        "How far candidates are from what the generator made before",
        "root mean square, in units of their siblings' spread",
        "DrPO's drift never ends by itself. Where this grows and a reward that is not trained on does not, stop.",
    ),
    "diversity": (
        "Diversity among siblings, as latents",
        "distance of latents",
        "How much the images of one prompt differ, as latents; evaluations measure it in features."
        " A fall towards zero means one and the same picture every time.",
    ),
    "frac_reward_zero_std": (
        "Prompts without a signal",
        "share of prompts",
        "Where all siblings get the same reward, nothing is learned. Near 1, training has stopped.",
    ),
}


def training_charts(runs: Sequence[RunFolder]) -> list[Chart]:
    """What can be drawn from metrics.jsonl. runs[0] is the run of the page; the others are compared with it."""
    charts = [_reward_chart(runs), _proxy_gold_chart(runs)]
    charts += [_line_chart(runs, key, *texts) for key, texts in LINES.items()]
    charts.append(_seconds_chart(runs[0]))
    return [chart for chart in charts if chart]


def scores_chart(run: RunFolder) -> Chart | None:
    """Headline score by tag with its interval, a marker per model; None without tags."""
    tags = list(dict.fromkeys(tag for each in run.evaluations.values() for tag in each.tags(run.headline)))
    if not tags:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _draw_intervals(axes, run, tags)
        axes.axhline(len(tags) - 0.5, color=RULE, linewidth=0.8)
        axes.set_yticks(range(len(tags) + 1), [*(tag.replace("_", " ") for tag in tags), "overall"])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.grid(axis="x")
        axes.set_xlabel(f"{run.headline} score, higher is better")
        figure.legend(loc="outside lower left", ncols=3, handletextpad=0.2, columnspacing=1.2)

    alt = f"{run.headline} score by kind of prompt with intervals; the table holds the numbers."
    caption = "Markers are means, bars 95% intervals over prompts. Look for kinds that moved the other way."
    return Chart("Score by kind of prompt", svg(draw, "scores", 1.2 + 0.34 * (len(tags) + 1), alt), caption)


def _draw_intervals(axes: Axes, run: RunFolder, tags: list[str]) -> None:
    labels = list(run.evaluations)
    for i, (label, each) in enumerate(run.evaluations.items()):
        by_tag = each.tags(run.headline)
        values = dict(enumerate(by_tag.get(tag) for tag in tags)) | {len(tags): each.overall(run.headline)}
        rows = np.array([row for row, value in values.items() if value])
        rows = rows + 0.18 * (i - (len(labels) - 1) / 2)
        mean, low, high = np.array([value for value in values.values() if value]).T  # (rows,) each
        color = _label_color(labels, label)
        axes.hlines(rows, low, high, color=color, linewidth=1.6)
        axes.plot(mean, rows, MARKERS[i % len(MARKERS)], color=color, markersize=4.5, label=label)


def _label_color(labels: Sequence[str], label: str) -> str:
    """Grey before training, the first colour after it."""
    fixed = {"trained": SERIES[0], "base": MUTED, "base-guided": SERIES[1]}
    others = [name for name in labels if name not in fixed]
    return fixed.get(label) or SERIES[2 + others.index(label) % 3]


def _reward_chart(runs: Sequence[RunFolder]) -> Chart | None:
    """The band is drawn for a run alone, with one reward: of several, some methods log the deviation of another sum."""
    caption, band = "What training maximises: it should rise, then settle.", ""
    if len(runs) == 1 and "reward_std" in runs[0].metrics and len(runs[0].names("rewards")) < 2:
        caption += (
            " The band is one standard deviation over all images of a step, those of easy and hard prompts alike."
        )
        band = "reward_std"
    return _line_chart(runs, "reward", "Reward during training", "mean reward", caption, band)


def _line_chart(
    runs: Sequence[RunFolder], key: str, title: str, unit: str, caption: str, band: str = ""
) -> Chart | None:
    if not any(key in run.metrics for run in runs):
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _draw_runs(axes, runs, key, band)
        axes.set_ylabel(unit)
        _finish_x(axes, runs)

    drawing = svg(draw, key, 2.5, f"{title}: {_summary(runs, key)}")
    return Chart(title, drawing, f"{caption} {_how_smoothed(runs, key)}")


def _proxy_gold_chart(runs: Sequence[RunFolder]) -> Chart | None:
    keys = proxy_and_gold(runs[0])
    if keys is None:
        return None
    proxy, watched = keys
    spans = hacked(runs[0], _x_key(runs))

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1 + len(watched), sharex=True)
        _draw_runs(panels[0], runs, proxy)
        panels[0].set_ylabel(f"{reward_name(proxy)}, trained on")
        for axes, gold in zip(panels[1:], watched, strict=True):
            _draw_runs(axes, runs, gold, legend=False)
            axes.set_ylabel(f"{reward_name(gold)}, watched")
            for span in spans.get(gold, []):
                panels[0].axvspan(*span, color=MARK, alpha=0.16, linewidth=0)
                axes.axvspan(*span, color=MARK, alpha=0.16, linewidth=0)
        _finish_x(panels[-1], runs)

    names = listed([reward_name(gold) for gold in watched])
    caption = (
        f"Trained on: {reward_name(proxy)}. Only watched, to show what that misses: {names}. {_marked(spans, runs)}"
    )
    alt = " ".join(f"{reward_name(key)}: {_summary(runs, key)}" for key in [proxy, *watched])
    drawing = svg(draw, "proxy-gold", 1.0 + 1.45 * (1 + len(watched)), alt)
    return Chart("Trained reward and watched reward", drawing, caption)


def _marked(spans: dict[str, list[Span]], runs: Sequence[RunFolder]) -> str:
    looked_at = f" (for {runs[0].name} only)" if len(runs) > 1 else ""
    if not spans:
        return f"It would be shaded where {CRITERION}; that happens nowhere{looked_at}."
    return f"Shaded{looked_at} where {CRITERION}: there the reward is being hacked."


def _draw_runs(axes: Axes, runs: Sequence[RunFolder], key: str, band: str = "", legend: bool = True) -> None:
    """Each run's values thin, their running mean thick; the band only for a run alone."""
    for i, run in enumerate(runs):
        if key not in run.metrics:
            continue
        x, y = thinned(run.metrics[_x_key(runs)], run.metrics[key])
        color, alone = SERIES[i % len(SERIES)], len(runs) == 1
        smooth = running_mean(y)
        if alone and band in run.metrics:
            _, spread = thinned(run.metrics[_x_key(runs)], run.metrics[band], where=run.metrics[key])
            axes.fill_between(x, smooth - running_mean(spread), smooth + running_mean(spread), color=color, alpha=0.12)
        point = "o" if len(x) == 1 else ""  # which makes no line
        axes.plot(x, y, point, color=color, alpha=0.35 if alone else 0.15, linewidth=0.7)
        axes.plot(x, smooth, color=color, linestyle=DASHES[i % len(DASHES)], label=run.name)
    if legend and len(runs) > 1:
        axes.legend(loc="best")


def thinned(x: np.ndarray, y: np.ndarray, where: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """At most MAX_POINTS points, each the mean over neighbouring steps; steps without a value are passed over."""
    known = np.isfinite(x) & np.isfinite(y if where is None else where)
    if not known.any():
        return x[:0], y[:0]
    parts = min(MAX_POINTS, int(known.sum()))
    means = [[part.mean() for part in np.array_split(values[known], parts)] for values in (x, y)]
    return np.array(means[0]), np.array(means[1])


def running_mean(y: np.ndarray) -> np.ndarray:
    """Centred, over a tenth of the points (an odd number); at the ends over those that there are."""
    half = len(y) // 20
    return np.array([y[max(0, i - half) : i + half + 1].mean() for i in range(len(y))])


def _how_smoothed(runs: Sequence[RunFolder], key: str) -> str:
    longest = max(np.isfinite(run.metrics[key]).sum() for run in runs if key in run.metrics)
    return "Thick: running mean over a tenth of the run." if longest >= 20 else ""


def _x_key(runs: Sequence[RunFolder]) -> str:
    """Runs with other batch sizes compare by images seen; a run alone is read by its steps."""
    return "images" if len(runs) > 1 and all("images" in run.metrics for run in runs) else "step"


def _finish_x(axes: Axes, runs: Sequence[RunFolder]) -> None:
    by_images = _x_key(runs) == "images"
    axes.set_xlabel("training images" if by_images else "step")
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 2.5, 5, 10), integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(EngFormatter(sep="\N{NARROW NO-BREAK SPACE}"))
    axes.margins(x=0.01)


def _summary(runs: Sequence[RunFolder], key: str) -> str:
    """'run-a from 0.20 to 0.61', for those who can't see the line."""
    texts = []
    for run in runs:
        values = run.metrics.get(key, np.array([]))
        values = values[np.isfinite(values)]
        if len(values):
            texts.append(f"{run.name} from {number(values[0])} to {number(values[-1])}")
    return f"{listed(texts)}."


def _seconds_chart(run: RunFolder) -> Chart | None:
    means = {k.removeprefix("seconds/"): np.nanmean(v) for k, v in run.metrics.items() if k.startswith("seconds/")}
    total = means.pop("step", 0.0)
    if not total:
        return None
    if "collect" in means:  # which holds the sampling and the rewards of methods that say how long these took
        means["collect"] = max(0.0, means["collect"] - means.get("sampling", 0.0) - means.get("rewards", 0.0))
    means["other"] = max(0.0, total - sum(means.values()))
    phases = {name: means[name] for name in sorted(means, key=means.get, reverse=True) if means[name] > total / 1000}

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        bars = axes.barh(list(phases), list(phases.values()), height=0.6, color=SERIES[0])
        axes.bar_label(bars, [f"{number(value)} s, {value / total:.0%}" for value in phases.values()], padding=4)
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.margins(x=0.28)
        axes.set_xlim(left=0)
        axes.set_xlabel("seconds per step, mean")

    alt = "Seconds per step: " + listed([f"{name} {number(value)}" for name, value in phases.items()]) + "."
    caption = f"{number(total)} seconds per step. The longest bar is the one to shorten, or to move to another machine."
    return Chart("Where the time goes", svg(draw, "seconds", 1.0 + 0.34 * len(phases), alt), caption)
