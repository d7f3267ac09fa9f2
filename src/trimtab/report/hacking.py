"""Where a run began to please its reward and no longer its purpose: the trained reward rises, a watched one falls."""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from trimtab.report.folder import RunFolder
from trimtab.report.words import listed

STANDARD_ERRORS = 4  # three would mark one run in ten whose watched reward only jitters: a run has many windows
CRITERION = (
    "a straight line fitted to a quarter of the run (at least ten points) rises for the trained reward"
    f" and falls for the watched one, each by more than {STANDARD_ERRORS} standard errors"
)

Span = tuple[float, float]


def proxy_and_gold(run: RunFolder) -> tuple[str, list[str]] | None:
    """Keys of the reward that is trained on and of those that are only watched; None when one side is missing."""
    trained, watched = run.names("rewards"), [f"watched/{name}/mean" for name in run.names("watched")]
    proxy = f"rewards/{trained[0]}/mean" if len(trained) == 1 else "reward"
    return (proxy, watched) if watched and proxy in run.metrics else None


def hacked(run: RunFolder, x: str = "step") -> dict[str, list[Span]]:
    """Key of each watched reward that was traded away -> the spans where; x is the key that spans are counted in."""
    keys = proxy_and_gold(run)
    if keys is None:
        return {}
    proxy, watched = keys
    spans = {gold: hacked_spans(run.metrics[x], run.metrics[proxy], run.metrics[gold]) for gold in watched}
    return {gold: found for gold, found in spans.items() if found}


def warnings(run: RunFolder) -> list[str]:
    """A sentence for each reward that was traded away."""
    sentences = []
    for gold, spans in hacked(run).items():
        proxy = proxy_and_gold(run)[0]
        where = listed([f"{first:,.0f}\N{EN DASH}{last:,.0f}" for first, last in spans])
        sentences.append(
            f"Reward hacking in steps {where}: {reward_name(proxy)}, which is trained on, rose"
            f" while {reward_name(gold)}, which is only watched, fell."
        )
    return sentences


def reward_name(key: str) -> str:
    """'clip' of rewards/clip/mean; a key without a family is its own name."""
    return key.partition("/")[2].removesuffix("/mean") or key


def hacked_spans(x: np.ndarray, proxy: np.ndarray, gold: np.ndarray) -> list[Span]:
    """Stretches (first x, last x) in which the proxy rises while the gold falls; all (N,), NaN where not measured.

    A window counts when CRITERION holds in it; windows that overlap are joined.
    """
    known = np.isfinite(x) & np.isfinite(proxy) & np.isfinite(gold)
    x, proxy, gold = x[known], proxy[known], gold[known]
    width = max(10, len(x) // 4)
    if len(x) < width:
        return []
    rises, falls = _slopes(x, proxy, width) > STANDARD_ERRORS, _slopes(x, gold, width) < -STANDARD_ERRORS
    spans: list[Span] = []
    for start in np.flatnonzero(rises & falls):
        first, last = float(x[start]), float(x[start + width - 1])
        joined = spans and first <= spans[-1][1]
        spans = [*spans[:-1], (spans[-1][0], last)] if joined else [*spans, (first, last)]
    return spans


def _slopes(x: np.ndarray, y: np.ndarray, width: int) -> np.ndarray:
    """Least-squares slope of each window, in units of its standard error, (N - width + 1,)."""
    x, y = sliding_window_view(x, width), sliding_window_view(y, width)  # (N - width + 1, width)
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    spread = (x * x).sum(1)
    slope = (x * y).sum(1) / spread
    error = np.sqrt(((y - slope[:, None] * x) ** 2).sum(1) / (width - 2) / spread)
    with np.errstate(divide="ignore", invalid="ignore"):
        return slope / error  # infinite for points on a line; NaN, so neither up nor down, where y is constant
