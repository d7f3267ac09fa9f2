"""Batches of captioned pictures: which a step shows, that no two captions are equal, and what is kept on disk."""

import itertools
import logging
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from trimtab.captioned import Captioned, CaptionedConfig, Order
from trimtab.distributed import Processes
from trimtab.errors import StoppedTogether, UserError
from trimtab.worlds.pictures import load_pictures


@pytest.fixture(scope="module")
def face(tiny_sd_folder):
    from trimtab.pipelines import loading

    return loading.load_for_sampling(str(tiny_sd_folder))


@pytest.fixture
def folder(tmp_path):
    """Ten pictures with a caption each; two captions are equal but for their case."""
    where = tmp_path / "pictures"
    where.mkdir()
    for i in range(10):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 48, 3), np.uint8)
        Image.fromarray(pixels).save(where / f"{i}.png")
        (where / f"{i}.txt").write_text("Caption  3" if i == 4 else f"caption {i}")
    return where


@pytest.fixture
def captioned(face, folder, tmp_path):
    """Builds the maker of batches; workers only where they are asked for."""

    def build(on_error="stop", seed=0, rank=0, num_processes=1, **config):
        settings = CaptionedConfig(**{"batch_size": 3, "num_workers": 0, **config})
        pictures = load_pictures(str(folder), on_error)
        return Captioned(face, pictures, settings, 32, seed, tmp_path / "cache", Processes(rank, num_processes))

    return build


def equal(a, b):
    return (
        torch.equal(a.x0, b.x0)
        and torch.equal(a.condition.tokens, b.condition.tokens)
        and (a.text, a.index) == (b.text, b.index)
    )


# Order


def test_a_pass_shows_every_picture_once_and_no_step_one_caption_twice():
    order = Order(tuple((i % 40,) for i in range(60)), 6, seed=1)
    steps = order.epoch(0)
    assert Counter(picture for step in steps for picture, _ in step) == Counter(range(60))
    assert all(len({order.meaning(visit) for visit in step}) == 6 for step in steps)
    assert order.epoch(1) != steps
    assert order.epoch(0) == steps


def test_a_caption_of_most_pictures_is_not_shown_more_often_than_there_are_steps():
    order = Order(((0,),) * 8 + ((1,), (2,)), 2, seed=0)
    steps = order.epoch(0)
    assert len(steps) == 5
    assert all(len({order.meaning(visit) for visit in step}) == 2 for step in steps)


def test_a_picture_of_several_captions_shows_one_that_the_pass_has_not_shown_yet():
    order = Order(((0, 1),) * 2, 2, seed=3)
    assert {order.meaning(visit) for visit in order.epoch(0)[0]} == {0, 1}
    seen = {visit[1] for number in range(8) for visit in order.epoch(number)[0]}
    assert seen == {0, 1}
    for seed in range(10):
        order = Order(((0, 1), (0, 1), (2,), (3,)), 2, seed)  # of which any two captions would fill a step
        assert {order.meaning(visit) for step in order.epoch(0) for visit in step} == {0, 1, 2, 3}


def test_too_few_different_captions_are_refused():
    with pytest.raises(UserError, match=r"only 2 different captions for batches of 3 .*train_batch_size smaller"):
        Order(((0,), (1,), (0,), (0,)), 3, seed=0).epoch(0)


@pytest.mark.parametrize(
    ("meanings", "size"), [(((0,), (0, 1)), 2), (((0,), (0, 1), (1, 2), (2, 3)), 4), (((0, 1, 2),) * 3, 3)]
)
def test_where_captions_could_suffice_they_do_in_every_pass_of_every_seed(meanings, size):
    for seed in range(20):
        for number in range(5):
            order = Order(meanings, size, seed)
            steps = order.epoch(number)
            assert all(len({order.meaning(visit) for visit in step}) == size for step in steps)
            assert all(caption < len(meanings[picture]) for step in steps for picture, caption in step)


def test_steps_go_on_from_anywhere():
    order = Order(tuple((i,) for i in range(10)), 3, seed=0)
    whole = list(itertools.islice(order.steps(0), 12))
    assert list(itertools.islice(order.steps(5), 7)) == whole[5:]


# Batches


def test_a_batch_is_latents_and_captions_of_its_pictures(captioned, face):
    made = captioned(cache=False)
    batch = made.collect(0)
    assert batch.x0.shape == (3, *face.latent_shape(32))
    assert [made.pictures.captions[i][0] for i in batch.index] == list(batch.text)
    assert torch.allclose(batch.condition.tokens, face.encode(batch.text).tokens, atol=1e-5)
    mean, std = face.posterior(torch.stack([made.pictures.read(i, 32) for i in batch.index]).float() / 255)
    draws = (batch.x0 - mean) / std
    assert draws.abs().max() < 6
    assert 0.8 < draws.std() < 1.2


def test_no_step_has_equal_captions_even_by_case_and_spacing(captioned):
    made = captioned()
    for step in range(30):
        texts = [" ".join(text.casefold().split()) for text in made.collect(step).text]
        assert len(set(texts)) == 3


def test_any_step_can_be_made_first_and_workers_change_nothing(captioned):
    whole = [captioned(cache=False).collect(step) for step in range(5)]
    jumped = captioned(cache=False)
    assert equal(jumped.collect(4), whole[4])
    assert equal(jumped.collect(1), whole[1])
    working = captioned(cache=False, num_workers=1)
    assert all(equal(working.collect(step), whole[step]) for step in range(2, 5))
    assert not equal(captioned(cache=False, seed=1).collect(0), whole[0])


def test_a_picture_that_comes_again_is_drawn_anew_from_its_posterior(captioned):
    made, draws = captioned(), {}
    for step in range(6):  # two passes
        batch = made.collect(step)
        for index, x in zip(batch.index, batch.x0, strict=True):
            draws.setdefault(index, []).append(x)
    again = [each for each in draws.values() if len(each) == 2]
    assert len(again) >= 8
    assert all((a - b).abs().max() > 0 for a, b in again)


def test_a_step_goes_on_from_the_workers_of_the_one_before(captioned):
    made = captioned()
    made.collect(0)
    ahead = made._ahead
    made.collect(1)
    assert made._ahead is ahead


def test_what_is_on_disk_is_not_encoded_again_and_gives_the_same_bits(captioned, face, monkeypatch):
    cold = [captioned().collect(step) for step in range(4)]

    def never(*args):
        raise AssertionError("encoded again")

    monkeypatch.setattr(face, "posterior", never)
    monkeypatch.setattr(face, "_embed", never)
    monkeypatch.setattr(face, "_memory", {"": face._memory[""]})  # of which the shape is asked
    assert all(equal(captioned().collect(step), batch) for step, batch in enumerate(cold))


def test_no_bit_depends_on_what_else_a_cache_holds(captioned, face, tmp_path, monkeypatch):
    whole = captioned(cache=False).collect(0)
    made = captioned()
    made.collect(0)
    monkeypatch.setattr(face, "_memory", {})
    for kind in ("latents", "texts"):  # a kill between two entries of one batch
        next((tmp_path / "cache" / kind).rglob("*.safetensors")).unlink()
    assert equal(captioned().collect(0), whole)
    assert equal(made.collect(0), whole)


def test_each_picture_and_each_caption_is_encoded_alone(captioned, face, monkeypatch):
    sizes, posterior, embed = [], face.posterior, face._embed
    monkeypatch.setattr(face, "_memory", {})
    monkeypatch.setattr(face, "posterior", lambda images: sizes.append(len(images)) or posterior(images))
    monkeypatch.setattr(face, "_embed", lambda texts: sizes.append(len(texts)) or embed(texts))
    captioned(cache=False).collect(0)
    assert set(sizes) == {1}


def test_what_was_read_ahead_of_its_encoding_is_not_encoded_twice(captioned, face, monkeypatch):
    made, encoded, posterior = captioned(), [], face.posterior
    ahead = [made.reader[wanted] for wanted in itertools.islice(made.order.steps(0), 6)]  # all before the first batch
    monkeypatch.setattr(made, "_read", lambda step: ahead[step])
    monkeypatch.setattr(face, "posterior", lambda images: encoded.append(1) or posterior(images))
    shown = [index for step in range(6) for index in made.collect(step).index]
    assert len(encoded) == len(set(shown)) < len(shown)


def test_two_processes_share_a_step(captioned):
    parts = [captioned(rank=rank, num_processes=2, batch_size=2).collect(0) for rank in range(2)]
    whole = captioned(batch_size=4).collect(0)
    assert sorted(parts[0].index + parts[1].index) == sorted(whole.index)


# Broken pictures


def broken(folder, *numbers):
    """Whole headers, so that only decoding tells."""
    for number in numbers:
        file = folder / f"{number}.png"
        file.write_bytes(file.read_bytes()[:600])


def test_a_picture_that_proves_broken_is_replaced_named_once_and_counted(captioned, folder, caplog):
    broken(folder, 2, 7)
    made = captioned(on_error="skip")
    with caplog.at_level(logging.WARNING):
        batches = [made.collect(step) for step in range(9)]
    assert all(len(batch) == 3 and not {2, 7} & set(batch.index) for batch in batches)
    assert len([record for record in caplog.records if "2.png" in record.message]) == 1
    assert made.log()["skipped_pictures"] == 2


def test_processes_replace_broken_pictures_by_different_ones(captioned, folder):
    broken(folder, 2, 7, 9)
    pair = [captioned(on_error="skip", rank=rank, num_processes=2, batch_size=2) for rank in range(2)]
    for step in range(12):
        first, second = (made.collect(step).index for made in pair)
        assert not set(first) & set(second), step


def test_a_picture_that_proves_broken_stops_the_run_by_default(captioned, folder):
    broken(folder, *range(10))
    with pytest.raises(UserError, match=r"\.png cannot be decoded .*data\.on_error=skip"):
        captioned().collect(0)


def test_when_too_few_pictures_are_left_the_run_stops(captioned, folder):
    broken(folder, *range(8))
    with pytest.raises(UserError, match="only 2 pictures are left for a batch of 3, 8 are broken"):
        captioned(on_error="skip").collect(0)


def test_pictures_left_out_by_their_header_are_counted(captioned, folder):
    (folder / "3.txt").write_text(" \n")
    assert captioned(on_error="skip").log()["skipped_pictures"] == 1


def test_what_was_found_broken_is_remembered_by_a_resumed_run(captioned, folder, caplog):
    broken(folder, 2)
    first = captioned(on_error="skip")
    for step in range(4):
        first.collect(step)
    again = captioned(on_error="skip")
    again.load_state_dict(first.state_dict())
    assert again.log() == first.log()
    assert again.log()["skipped_pictures"] == 1
    (folder / "9.png").unlink()
    (folder / "9.txt").unlink()
    with caplog.at_level(logging.WARNING):
        captioned(on_error="skip").load_state_dict(first.state_dict())
    assert "not those of the interrupted run" in caplog.text


def test_what_any_process_finds_broken_all_count_once_and_remember_after_a_resume(captioned, folder, caplog):
    broken(folder, 2, 7)
    pair = [captioned(on_error="skip", rank=rank, num_processes=2, batch_size=2) for rank in range(2)]
    for step in range(6):
        together(pair, step)
        assert pair[0].broken == pair[1].broken  # whoever came upon them
    assert [made.log()["skipped_pictures"] for made in pair] == [2, 2]
    again = [captioned(on_error="skip", rank=rank, num_processes=2, batch_size=2) for rank in range(2)]
    for made in again:
        made.load_state_dict(pair[0].state_dict())  # the first process wrote it
    caplog.clear()
    for step in range(6, 12):
        together(again, step)
    assert [made.log()["skipped_pictures"] for made in again] == [2, 2]
    assert "left out" not in caplog.text


def together(pair, step):
    """A step of two processes, each in a thread, which exchange their rows at a barrier."""
    rows, barrier = [None, None], threading.Barrier(2, timeout=30)

    def gathering(rank):
        def gather(own):
            rows[rank] = own
            barrier.wait()
            found = torch.cat(rows)
            barrier.wait()
            return found

        return gather

    with ThreadPoolExecutor(2) as threads:
        for rank, made in enumerate(pair):
            made.processes = Processes(rank, 2, gathering(rank))
        list(threads.map(lambda made: made.collect(step), pair))


def test_where_one_process_cannot_go_on_all_stop(captioned, folder):
    other = captioned(num_processes=2, batch_size=2, num_workers=0)
    other.processes = Processes(0, 2, lambda own: torch.cat([own, torch.ones_like(own)]))
    with pytest.raises(StoppedTogether, match="another process had to stop, and says why"):
        other.collect(0)
    broken(folder, *range(10))
    other.processes = Processes(0, 2, lambda own: torch.cat([own, torch.zeros_like(own)]))
    with pytest.raises(StoppedTogether, match="cannot be decoded"):
        other.collect(1)
