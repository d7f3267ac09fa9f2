"""Real but tiny pipelines on disk, and quiet libraries."""

import os
import threading
from functools import partial

import pytest
from hypothesis import settings

os.environ["TQDM_DISABLE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # there are two of us, and small networks gain nothing from more threads
    os.environ.setdefault("OMP_NUM_THREADS", "1")
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
def tiny_sd_folder(tmp_path_factory):
    """The same as Stable Diffusion 1.5: a UNet of two levels, width 32, and the scheduler of the published folder."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextModel

    def build(tokenizer, config):
        return StableDiffusionPipeline(
            unet=_unet(("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=config.hidden_size),
            scheduler=PNDMScheduler(**TABLE, skip_prk_steps=True, steps_offset=1),
            vae=_vae(0.18215),
            text_encoder=CLIPTextModel(config).eval(),
            tokenizer=tokenizer,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    return _saved(build, tmp_path_factory.mktemp("tiny-sd"))


@pytest.fixture(scope="session")
def tiny_sd21_folder(tiny_sd_folder, tmp_path_factory):
    """The same with the scheduler of Stable Diffusion 2.1: its network predicts v."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    folder = tmp_path_factory.mktemp("tiny-sd21")
    settings = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "prediction_type": "v_prediction"}
    scheduler = DDIMScheduler(**TABLE, **settings)
    StableDiffusionPipeline.from_pretrained(tiny_sd_folder, scheduler=scheduler).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sdxl_folder(tmp_path_factory):
    """The same as Stable Diffusion XL, whose scheduler's file holds a key that only other schedulers read."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    def build(tokenizer, config):
        added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "use_linear_projection": True}
        added["projection_class_embeddings_input_dim"] = 6 * 8 + config.projection_dim
        scheduler = TABLE | {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}
        return StableDiffusionXLPipeline(
            unet=_unet(("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=2 * config.hidden_size, **added),
            scheduler=EulerDiscreteScheduler.from_config(scheduler),
            vae=_vae(0.13025),
            text_encoder=CLIPTextModel(config).eval(),
            text_encoder_2=CLIPTextModelWithProjection(config).eval(),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
        )

    return _saved(build, tmp_path_factory.mktemp("tiny-sdxl"))


TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # of every Stable Diffusion


@pytest.fixture(scope="session")
def tiny_flux_folder(tmp_path_factory):
    """The same as FLUX.1-dev: guidance is an input, latents are packed, and the shift grows with the size."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel, T5Config, T5EncoderModel

    def build(tokenizer, config):
        t5 = T5Config(
            vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
            pad_token_id=0, eos_token_id=1,
        )  # fmt: skip
        transformer = FluxTransformer2DModel(
            in_channels=16, num_layers=2, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, pooled_projection_dim=config.hidden_size, axes_dims_rope=(4, 6, 6),
            guidance_embeds=True,
        )  # fmt: skip
        vae = _vae(0.3611)
        vae.register_to_config(shift_factor=0.1159)
        pipe = FluxPipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=vae,
            text_encoder=CLIPTextModel(config).eval(),
            tokenizer=tokenizer,
            text_encoder_2=T5EncoderModel(t5).eval(),
            tokenizer_2=tokenizer,
        )
        with torch.no_grad():
            transformer.proj_out.weight.mul_(3)
        return pipe

    return _saved(build, tmp_path_factory.mktemp("tiny-flux"))


def _saved(build, folder):
    """The folder, with the pipeline that `build(tokenizer, CLIP's config)` makes of random weights."""
    import torch

    from trimtab.pipelines import micro

    small = micro.build(seed=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        build(small.tokenizer, small.text_encoder.config).save_pretrained(folder)
    return folder


def _unet(down, **settings):
    """Two levels on 8 x 8 latents."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(32, 32),
        down_block_types=down,
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
        attention_head_dim=4,
        norm_num_groups=8,
        **settings,
    ).eval()


def _vae(scaling_factor):
    """From 32 x 32 pixels to 8 x 8 latents."""
    import torch
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        sample_size=32,
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=8,
        scaling_factor=scaling_factor,
    )
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(4)  # for pictures with contrast
    return vae.eval()


@pytest.fixture(scope="session")
def build_face():
    """Builds trimtab's face of a folder, float32 unless told otherwise; `lora=None` is full fine-tuning."""
    import torch

    from trimtab.pipelines.loading import load
    from trimtab.roles import LoraSettings

    def build(folder, lora=LoraSettings(rank=4, lora_alpha=16), frozen=(), precision=torch.float32):  # noqa: B008
        return load(str(folder), lora=lora, frozen=frozen, precision=precision)

    return build


@pytest.fixture(scope="session")
def tiny(tiny_folder, build_face):
    """Builds the face of the tiny SD3."""
    return partial(build_face, tiny_folder)


@pytest.fixture(scope="session")
def tokens_of(tiny_folder):
    """Builds a method of soft tokens on the tiny SD3, from its configuration: four captioned pictures, loud tokens."""
    import torch

    from trimtab.batch import Captions
    from trimtab.methods import agsm, softrepa
    from trimtab.pipelines import loading
    from trimtab.pipelines.soft_tokens import TokenSettings

    class Captioned:
        seed = 0

        def __init__(self, pipeline):
            texts = ("a red circle", "two stars", "a blue square", "a cat")
            shape = (4, *pipeline.latent_shape(pipeline.resolution))
            x0 = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            self.batch = Captions(x0, pipeline.encode(texts), texts, (0, 1, 2, 3), seed=0, step=0)

        def log(self):
            return {}

    class Built:
        def __init__(self, config):
            self.pipeline = loading.load_with_tokens(
                str(tiny_folder), TokenSettings(num_layers=2), num_signs=config.num_signs, roles=config.roles
            )
            banks = self.pipeline.roles.banks
            for seed, parameter in enumerate(banks["default"].parameters()):
                parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            for bank in banks.values():
                bank.load_state_dict(banks["default"].state_dict())
            captioned = Captioned(self.pipeline)
            self.batch = captioned.batch
            self.method = {"agsm": agsm.AGSM, "softrepa": softrepa.SoftREPA}[config.name](
                config, self.pipeline, captioned
            )

        def loss(self, step=0):
            from dataclasses import replace

            return sum(loss.value for loss in self.method.losses(replace(self.batch, step=step)))

        def gradients(self):
            bank = self.pipeline.roles.banks["default"].requires_grad_(True)
            bank.zero_grad()
            self.loss().backward()
            return [parameter.grad.clone() for parameter in bank.parameters()]

        def rows_with_gradient(self):
            counted = []
            predict = self.pipeline.predict

            def counting(x_t, *args, **kwargs):
                counted.append(len(x_t) if torch.is_grad_enabled() else 0)
                return predict(x_t, *args, **kwargs)

            self.pipeline.predict = counting
            self.loss()
            self.pipeline.predict = predict
            return sum(counted)

    return Built


@pytest.fixture
def gathers():
    """What two ranks, a thread each, gather by: it waits for the other and, like a collective, wants equal shapes."""
    import torch

    meeting, given = threading.Barrier(2), {}

    def gather(rank, x):
        given[rank] = x
        meeting.wait(timeout=60)
        if given[0].shape != given[1].shape:
            raise RuntimeError(f"ranks gather {tuple(given[0].shape)} and {tuple(given[1].shape)}")
        both = torch.cat([given[0], given[1]])
        meeting.wait(timeout=60)
        return both

    return [partial(gather, rank) for rank in range(2)]
