"""What a set of images is like: distance to reference images, coverage, diversity, plain picture statistics, intervals.

Pure functions of tensors: features come from whoever calls, so that any feature map can be used.
"""

from trimtab.metrics.coverage import PrecisionRecall, precision_recall
from trimtab.metrics.diversity import within_prompt_diversity
from trimtab.metrics.frechet import frechet_distance
from trimtab.metrics.image_stats import image_statistics
from trimtab.metrics.intervals import Interval, bootstrap, bootstrap_over_tags

__all__ = [
    "Interval",
    "PrecisionRecall",
    "bootstrap",
    "bootstrap_over_tags",
    "frechet_distance",
    "image_statistics",
    "precision_recall",
    "within_prompt_diversity",
]
