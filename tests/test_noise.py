"""Noise by key: the same for the same key whatever else is drawn, unrelated for any other."""

import itertools

import torch

from trimtab import noise

KEYS = list(itertools.product(range(3), repeat=4))  # (seed, step, prompt, sibling), 81 of them


def test_a_sample_s_noise_does_not_depend_on_its_batch():
    together = noise.normal(KEYS, (2, 3))
    assert together.shape == (81, 2, 3)
    assert torch.equal(together[40:41], noise.normal([KEYS[40]], (2, 3)))
    assert torch.equal(noise.uniform(KEYS, (5,))[7:8], noise.uniform([KEYS[7]], (5,)))


def test_the_global_generator_is_neither_read_nor_moved():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    noise.normal(KEYS[:2], (3,))
    assert torch.equal(torch.rand(1), expected)


def test_every_key_of_a_run_has_a_seed_of_its_own():
    tails = {noise.ROLLOUT: (), noise.TRAINING: range(3)}
    keys = [(*key, noise.ROLLOUT) for key in KEYS]
    keys += [(*key, noise.TRAINING, number) for key in KEYS for number in tails[noise.TRAINING]]
    keys += [(*key[:3], noise.TIMES) for key in KEYS[::3]] + [(*key[:2], noise.ORDER) for key in KEYS[::9]]
    seeds = {noise.generator(*key).initial_seed() for key in keys}
    assert len(seeds) == len(set(keys)) == 81 + 3 * 81 + 27 + 9


def test_noise_of_neighbouring_keys_is_uncorrelated():
    # 3240 correlations of 4096 standard normal pairs: each has standard deviation 1/64, so 5 of them is never passed.
    draws = noise.normal(KEYS, (4096,))
    off_diagonal = draws.corrcoef() - torch.eye(len(KEYS))
    assert off_diagonal.abs().max() < 5 / 64


def test_noise_is_standard_normal_and_uniform():
    # Means of n numbers within 5 standard deviations: 1 / sqrt(n) of the normal, 1 / sqrt(12 n) of the uniform.
    normal, uniform = noise.normal(KEYS, (1000,)).double(), noise.uniform(KEYS, (1000,)).double()
    n = normal.numel()
    assert abs(normal.mean()) < 5 / n**0.5
    assert abs(normal.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs(uniform.mean() - 0.5) < 5 / (12 * n) ** 0.5
    assert uniform.min() >= 0
    assert uniform.max() < 1
