"""Pre-training of micro: how its blind tokens are let in."""

import pytest
import torch
from accelerate import Accelerator

from trimtab import inputs, wiring
from trimtab.methods.pretrain import PretrainMicro, PretrainMicroConfig, PretrainVAE, PretrainVAEConfig, _cells
from trimtab.pipelines.loading import BUILT_IN
from trimtab.run import load_config
from trimtab.worlds import blocks


@pytest.fixture(scope="module")
def method():
    config = PretrainMicroConfig(
        name="pretrain-micro", vae=str(BUILT_IN["micro"] / "vae"), num_scenes=8, blind_steps=10
    )
    return PretrainMicro(config, 0, 2, torch.device("cpu"), torch.float32)


def test_batches_are_of_the_size_that_training_has(method):
    ((x0, captions, *_),) = method.collect(0)
    assert len(x0) == len(captions) == 2


@pytest.mark.parametrize(("step", "count"), [(0, 1.0), (5, 16.0), (10, 256.0), (99, 256.0)])
def test_the_blind_tokens_count_once_at_first_and_all_in_the_end(method, monkeypatch, step, count):
    counts, predict = [], method.face.predict

    def watched(x_t, t, condition, role):
        counts.append(condition.weight)
        return predict(x_t, t, condition, role)

    monkeypatch.setattr(method.face, "predict", watched)
    (batch,) = method.collect(step)
    (loss,) = method.losses(batch)
    assert loss.value.isfinite()
    assert counts[0].tolist() == [1.0] * 12 + [count]


@pytest.mark.parametrize(("step", "moved"), [(0, 9 / 10), (90, 9 / 100), (10**6, 0.001)])
def test_the_average_follows_the_slower_the_later(method, step, moved):
    own, average = next(method.network.parameters()), next(method.average.parameters())
    average.copy_(own.detach() - 1)
    method.after_step(step)
    assert (average - own + 1).mean().item() == pytest.approx(moved, abs=1e-5)


def test_a_cell_holds_the_shape_and_the_colour_whose_centre_it_has():
    white = (1.0, 1.0, 1.0)
    cells = _cells(blocks.Scene((blocks.Block("square", "blue", 20.0, 60.0, 9.0),), white, white))  # x, y
    assert (cells[0] != 0).nonzero().tolist() == (cells[1] != -1).nonzero().tolist() == [[7, 2]]
    shape, color = cells[:, 7, 2].tolist()
    assert (blocks.SHAPES[shape - 1], list(blocks.COLORS)[color]) == ("square", "blue")


def test_the_recognizers_batches_are_of_that_size_and_wiring_takes_it_from_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config("pretrain-recognizer", ["method.num_scenes=12", "training.train_batch_size=3"])
    run = wiring.build(config, tmp_path / "run", Accelerator(cpu=True), inputs.Inputs(), None)
    ((images, cells),) = run.method.collect(0)
    assert len(images) == len(cells) == 3


def test_the_auto_encoders_batches_are_of_that_size():
    method = PretrainVAE(PretrainVAEConfig(name="pretrain-vae", num_scenes=9), 0, 3, torch.device("cpu"), torch.float32)
    ((images, _),) = method.collect(0)
    assert len(images) == 3
