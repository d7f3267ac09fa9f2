"""Pre-training of micro: how its blind tokens are let in."""

import pytest
import torch

from trimtab.methods.pretrain import PretrainMicro, PretrainMicroConfig
from trimtab.pipelines.loading import BUILT_IN


@pytest.fixture(scope="module")
def method():
    config = PretrainMicroConfig(
        name="pretrain-micro", vae=str(BUILT_IN["micro"] / "vae"), num_scenes=8, train_batch_size=2, blind_steps=10
    )
    return PretrainMicro(config, 0, torch.device("cpu"), torch.float32)


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
