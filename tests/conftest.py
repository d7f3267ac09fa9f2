"""A real but tiny pipeline on disk, and quiet libraries."""

import os

import pytest
from hypothesis import settings

os.environ["TQDM_DISABLE"] = "1"
settings.register_profile("trimtab", deadline=None)  # a busy machine is no failure
settings.load_profile("trimtab")

# Heavy imports stand inside the fixtures: whoever runs only the mathematics should not wait for diffusers.


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """An SD3 pipeline with random float32 weights: micro, but for a transformer of two blocks and width 32."""
    import torch
    from diffusers import SD3Transformer2DModel

    from trimtab.pipelines import micro

    pipe = micro.build(seed=0)
    small = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "caption_projection_dim": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.register_modules(transformer=SD3Transformer2DModel.from_config(pipe.transformer.config, **small))
        with torch.no_grad():
            pipe.vae.decoder.conv_out.weight.mul_(8)  # at random weights pictures are grey, and all alike
    folder = tmp_path_factory.mktemp("tiny")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    """Builds trimtab's face of the tiny pipeline, float32 unless told otherwise; `lora=None` is full fine-tuning."""
    import torch

    from trimtab.pipelines.loading import load
    from trimtab.roles import LoraSettings

    def build(lora=LoraSettings(rank=4, lora_alpha=16), frozen=(), precision=torch.float32):  # noqa: B008
        return load(str(tiny_folder), lora=lora, frozen=frozen, precision=precision)

    return build
