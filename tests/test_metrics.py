"""Metrics: closed forms, independent oracles and invariances."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from trimtab.metrics import (
    bootstrap,
    bootstrap_over_tags,
    frechet_distance,
    image_statistics,
    precision_recall,
    within_prompt_diversity,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_moments(samples, mean, cov):
    """The same samples, moved so that their sample mean and sample covariance are exactly the given ones."""
    centred = samples - samples.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(centred.T.cov()), centred.T, upper=False).T
    return white @ torch.linalg.cholesky(cov).T + mean


# Fréchet distance


def test_frechet_distance_of_commuting_gaussians_is_the_closed_form():
    # Diagonal covariances commute, so tr(C_a + C_b - 2 (C_a C_b)^½) = Σ (√a_i - √b_i)².
    # Means (0,0,0) and (1,2,2): 9. Variances (1,4,9) and (4,4,1): (1-2)² + 0 + (3-1)² = 5. Together 14.
    a = with_moments(normal(50, 3), torch.zeros(3).double(), torch.diag(torch.tensor([1.0, 4.0, 9.0]).double()))
    b = with_moments(
        normal(40, 3, seed=1),
        torch.tensor([1.0, 2.0, 2.0]).double(),
        torch.diag(torch.tensor([4.0, 4.0, 1.0]).double()),
    )
    assert frechet_distance(a, b) == pytest.approx(14, abs=1e-10)


def test_frechet_distance_agrees_with_scipy_sqrtm_on_covariances_that_do_not_commute():
    a, b = normal(60, 5) @ normal(5, 5, seed=2), normal(70, 5, seed=1) @ normal(5, 5, seed=3) + 0.3
    cov_a, cov_b = np.cov(a.numpy().T), np.cov(b.numpy().T)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    oracle = ((a.mean(0) - b.mean(0)) ** 2).sum().item() + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(oracle, rel=1e-9)


def test_frechet_distance_survives_fewer_samples_than_features():
    # 20 samples in 300 dimensions: both covariances have rank 19. On orthogonal supports (turned, so that no zero is
    # exact) the cross term is 0: d² = |Δμ|² + tr C_a + tr C_b. The same set twice has d² = 0.
    a, b = torch.zeros(20, 300).double(), torch.zeros(20, 300).double()
    a[:, :100], b[:, 100:200] = normal(20, 100), normal(20, 100, seed=1)
    rotation = torch.linalg.qr(normal(300, 300, seed=2)).Q
    a, b = a @ rotation, b @ rotation
    apart = (a.mean(0) - b.mean(0)).square().sum() + a.var(0).sum() + b.var(0).sum()
    assert frechet_distance(a, b) == pytest.approx(apart.item(), rel=1e-12)
    assert frechet_distance(a, a) < 1e-9


def test_frechet_distance_is_symmetric_and_blind_to_rotation_and_shift():
    a, b = normal(30, 6), normal(25, 6, seed=1) * 2 + 1
    rotation = torch.linalg.qr(normal(6, 6, seed=2)).Q
    once = frechet_distance(a, b)
    assert frechet_distance(b, a) == pytest.approx(once, rel=1e-10)
    assert frechet_distance(a @ rotation + 5, b @ rotation + 5) == pytest.approx(once, rel=1e-10)


def test_frechet_distance_of_one_feature_is_a_difference_of_means_and_deviations():
    # Samples {0, 2} (mean 1, var 2) and {4, 8} (mean 6, var 8): 25 + (√2 - √8)² = 25 + 2 = 27.
    assert frechet_distance(torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0], [8.0]])) == pytest.approx(27)


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        (torch.zeros(1, 3), torch.zeros(5, 3), "at least 2 samples on each side; got 1 and 5"),
        (torch.zeros(4, 3), torch.zeros(5, 2), r"\(4, 3\) and \(5, 2\)"),
        (torch.full((4, 3), math.nan), torch.zeros(5, 3), "NaN"),
    ],
)
def test_frechet_distance_names_what_is_wrong(a, b, said):
    with pytest.raises(ValueError, match=said):
        frechet_distance(a, b)


# Precision and recall


def test_a_point_counts_as_covered_up_to_the_radius_of_the_third_neighbour():
    # Real points 0, 1, 2, 10 on a line; third neighbours lie at 10, 9, 8, 10. So the region is [-10, 20].
    # Fakes 20 (on the edge: inside), 20.5 (outside), 15, 16: precision 3/4.
    # Fakes' third neighbours: 20 -> 15 (5), 20.5 -> 15 (5.5), 15 -> 20.5 (5.5), 16 -> 20.5 (4.5): region [9.5, 26].
    # Of the real points only 10 is inside: recall 1/4.
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    fake = torch.tensor([[20.0], [20.5], [15.0], [16.0]])
    assert precision_recall(real, fake) == (0.75, 0.25)


def test_a_collapsed_model_has_precision_without_recall():
    real = normal(200, 4)
    collapsed = real[:1] + 1e-3 * normal(50, 4, seed=1)
    precision, recall = precision_recall(real, collapsed)
    assert precision == 1.0
    assert recall <= 1 / 200


def test_equal_sets_cover_each_other_even_when_every_point_stands_twice():
    # Each point has a twin at distance 0; with k = 1 every radius is 0 and only exact distances find the twins.
    points = (normal(40, 16) + 1000).repeat(2, 1)
    assert precision_recall(points, points.flip(0), k=1, chunk=13) == (1.0, 1.0)


def test_far_sets_do_not_cover_each_other():
    assert precision_recall(normal(20, 3), normal(20, 3, seed=1) + 100) == (0.0, 0.0)


def test_the_chunk_size_changes_nothing():
    real, fake = normal(70, 5), normal(61, 5, seed=1) * 1.1 + 0.8
    whole = precision_recall(real, fake)
    assert 0 < min(whole) < max(whole) < 1  # not a trivial case
    assert precision_recall(real, fake, chunk=7) == whole


def test_precision_and_recall_swap_with_the_sets():
    real, fake = normal(70, 5), normal(61, 5, seed=1) * 1.1 + 0.8
    assert precision_recall(fake, real) == tuple(reversed(precision_recall(real, fake)))


def test_precision_recall_needs_more_points_than_neighbours():
    with pytest.raises(ValueError, match="more than 3 samples on each side; got 9, 3"):
        precision_recall(normal(9, 2), normal(3, 2))


# Diversity


def test_diversity_is_the_mean_over_prompts_of_mean_sibling_distance():
    # Prompt 7: points 0, 3, 6 -> distances 3, 3, 6 -> mean 4. Prompt -2: (0,0), (3,4) -> 5. Prompt 1 stands alone.
    # Mean over the two prompts: 4.5 (over all pairs it would be 17/4).
    features = torch.tensor([[0.0, 0.0], [3.0, 0.0], [99.0, 9.0], [0.0, 0.0], [6.0, 0.0], [3.0, 4.0]])
    group = torch.tensor([7, 7, 1, -2, 7, -2])
    assert within_prompt_diversity(features, group) == pytest.approx(4.5)


def test_diversity_ignores_differences_between_prompts_and_the_order_of_images():
    features, group = normal(12, 3), torch.tensor([0, 1, 2] * 4)
    once = within_prompt_diversity(features, group)
    moved = features + normal(3, 3, seed=1)[group] * 100
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert within_prompt_diversity(moved, group) == pytest.approx(once)
    assert within_prompt_diversity(features[order], group[order]) == pytest.approx(once)


def test_diversity_without_siblings_is_nan():
    assert math.isnan(within_prompt_diversity(normal(3, 2), torch.arange(3)))


# Image statistics


def test_statistics_of_flat_pictures_are_known():
    # Luma of half red is 0.299 / 2, its HSV saturation 1; grey 0.1 is dark and unsaturated; one colour has no entropy.
    red, grey = torch.zeros(3, 16, 16), torch.full((3, 16, 16), 0.1)
    red[0] = 0.5
    stats = image_statistics(torch.stack([red, grey]))
    expected = {
        "brightness": [0.1495, 0.1],
        "dark_share": [1, 1],
        "saturation": [1, 0],
        "edge_density": [0, 0],
        "color_entropy": [0, 0],
    }
    assert stats.keys() == expected.keys()
    for name, values in expected.items():
        assert (stats[name] - torch.tensor(values)).abs().max() < 1e-6, name


def test_one_step_edge_marks_two_columns():
    # Left half black, right half white, 8 wide: Sobel answers in the two columns beside the step, 2/8 of the pixels.
    picture = torch.zeros(1, 3, 8, 8)
    picture[..., 4:] = 1
    stats = image_statistics(picture)
    assert stats["edge_density"].item() == 0.25
    assert image_statistics(picture.transpose(2, 3))["edge_density"].item() == 0.25
    assert stats["dark_share"].item() == 0.5


def test_the_slope_threshold_is_in_luma_per_pixel():
    # A ramp of 0.09 per pixel is no edge, one of 0.11 is (inside; the repeated border halves the slope there).
    ramp = torch.arange(8.0).expand(1, 3, 8, 8)
    assert image_statistics(ramp * 0.09)["edge_density"].item() == 0
    assert image_statistics(ramp * 0.11)["edge_density"].item() == 6 / 8


def test_entropy_of_evenly_used_colors_is_the_logarithm_of_their_number():
    # Four colours, a quarter each: 2 bits. Values inside one of the eight levels are one colour; 1.0 is the last level.
    picture = torch.zeros(1, 3, 8, 8)
    picture[0, 0, :4], picture[0, 1, :, :4] = 1.0, 0.6
    picture += 0.01 * torch.rand(picture.shape, generator=torch.Generator().manual_seed(0))
    assert image_statistics(picture)["color_entropy"].item() == pytest.approx(2)


def test_each_picture_is_measured_by_itself():
    pictures = normal(5, 3, 12, 12).float().sigmoid()
    together = image_statistics(pictures)
    alone = [image_statistics(picture[None]) for picture in pictures]
    for name, values in together.items():
        assert values.shape == (5,)
        assert (values - torch.cat([stats[name] for stats in alone])).abs().max() < 1e-6


def test_bytes_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        image_statistics(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))


# Intervals


def test_siblings_that_agree_widen_the_interval_as_few_prompts_must():
    # 30 prompts, 16 identical siblings: as much information as 30 images. Resampling images would give a quarter of
    # the width (√16). For prompt means of standard deviation s, the normal interval has half-width 1.96 s / √30.
    score = (normal(30) > 0).double()
    mean, low, high = bootstrap(score.repeat_interleave(16), torch.arange(30).repeat_interleave(16), seed=0)
    half = 1.96 * score.std(correction=0).item() / math.sqrt(30)
    assert mean == pytest.approx(score.mean().item())
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    # 400 experiments of 40 prompts with 4 correlated siblings; a level of 0.9 should hold 0 in about 90 % of them.
    # The percentile bootstrap of 40 clusters is a little narrow (about 0.885); 3 standard errors are 0.045.
    group = torch.arange(40).repeat_interleave(4)
    held = 0
    for seed in range(400):
        values = normal(40, seed=seed)[group] + normal(160, seed=1000 + seed)
        _, low, high = bootstrap(values, group, seed=seed, num_resamples=400, level=0.9)
        held += low <= 0 <= high
    assert 0.84 < held / 400 < 0.93


def test_every_tag_weighs_the_same_and_is_resampled_by_itself():
    # Tag 0: 90 images, all 1. Tag 1: 10 images, all 0. The mean of tag means is 0.5, whatever the resample, because no
    # prompt changes its tag; the plain mean is 0.9 and its interval is wide.
    values = torch.cat([torch.ones(90), torch.zeros(10)])
    group, tag = torch.arange(50).repeat_interleave(2), (torch.arange(100) >= 90).long()
    assert bootstrap_over_tags(values, group, tag, seed=0) == (0.5, 0.5, 0.5)
    plain = bootstrap(values, group, seed=0)
    assert plain.mean == pytest.approx(0.9)
    assert plain.low < 0.85


def test_prompts_of_unequal_size_keep_their_images():
    # Prompt 0 has three images of 1, prompt 1 one image of 0: the mean over images is 3/4, and the four resamples are
    # {0,0}: 1, {0,1} and {1,0}: 3/4, {1,1}: 0, with chances 1/4, 1/2, 1/4. The middle 40 % are all 3/4.
    values, group = torch.tensor([1.0, 1, 1, 0]), torch.tensor([5, 5, 5, 2])
    assert bootstrap(values, group, seed=0) == (0.75, 0.0, 1.0)
    assert bootstrap(values, group, seed=0, level=0.4) == (0.75, 0.75, 0.75)


def test_the_seed_fixes_the_interval_and_labels_do_not_matter():
    values, group = normal(60), torch.arange(60) % 12
    once = bootstrap(values, group, seed=3)
    assert bootstrap(values, group * 7 - 40, seed=3) == once
    assert bootstrap(values, group, seed=4) != once


def test_unscored_images_are_left_out_and_unknowable_bounds_are_nan():
    nan = math.nan
    assert bootstrap(torch.tensor([1.0, nan, 0.0, nan]), torch.tensor([0, 0, 1, 1]), seed=0).mean == 0.5
    alone = bootstrap(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]), seed=0)
    assert alone.mean == 0.5
    assert math.isnan(alone.low)
    assert math.isnan(alone.high)
    assert math.isnan(bootstrap(torch.tensor([nan]), torch.tensor([0]), seed=0).mean)
    assert math.isnan(bootstrap(torch.zeros(0), torch.zeros(0).long(), seed=0).mean)


def test_a_tag_that_could_not_be_scored_leaves_no_overall():
    values, tag = torch.tensor([1.0, 1.0, math.nan, math.nan]), torch.tensor([0, 0, 1, 1])
    assert math.isnan(bootstrap_over_tags(values, torch.arange(4), tag, seed=0).mean)
