"""The face of FLUX.1: what it has to itself, against stock diffusers."""

import pytest
import torch
from diffusers import FluxPipeline

from trimtab.batch import Prompts
from trimtab.errors import UserError
from trimtab.evaluate import sample
from trimtab.methods.crd import CRD, CRDConfig
from trimtab.methods.diffusion_nft import DiffusionNFT, DiffusionNFTConfig
from trimtab.pipelines import loading
from trimtab.rewards.composite import Composite
from trimtab.roles import LoraSettings
from trimtab.rollout import RolloutConfig, Rollouts

TEXTS = ["a photo of a red circle", "a photo of two stars"]


def gap(a, b):
    return (a - b).abs().max().item()


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed(latents):
    """As the pipeline wants them."""
    return FluxPipeline._pack_latents(latents, *latents.shape)


@pytest.fixture
def stock(tiny_flux_folder):
    pipe = FluxPipeline.from_pretrained(tiny_flux_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
@pytest.mark.parametrize(("resolution", "guidance_scale"), [(32, 1.0), (48, 3.5)])
def test_latents_equal_those_of_stock_diffusers_at_any_size_and_guidance(
    tiny_flux_folder, build_face, stock, resolution, guidance_scale
):
    face = build_face(tiny_flux_folder)
    start = noise(2, *face.latent_shape(resolution))
    how = {"num_inference_steps": 5, "guidance_scale": guidance_scale, "height": resolution, "width": resolution}
    expected = stock(TEXTS, latents=packed(start), output_type="latent", **how).images
    times = face.time_grid(5, resolution)
    assert gap(stock.scheduler.sigmas, times) < 1e-6
    latents = sample(face, start[None], times, face.encode(TEXTS), "default", guidance_scale)
    assert gap(packed(latents), expected) < 1e-4 * expected.abs().max()


@torch.no_grad()
def test_guidance_is_an_input_that_matters_and_takes_one_pass(tiny_flux_folder, build_face, monkeypatch):
    face, passes = build_face(tiny_flux_folder), []
    x_t, t, condition = noise(2, *face.latent_shape(32)), torch.tensor(0.5), face.encode(TEXTS)
    forward = face.roles.network.forward
    monkeypatch.setattr(face.roles.network, "forward", lambda **given: passes.append(given) or forward(**given))
    one, four = (face.predict(x_t, t, condition, "default", w).flow for w in (1.0, 4.0))
    assert gap(one, four) > 1e-4
    assert [given["guidance"].tolist() for given in passes] == [[1, 1], [4, 4]]
    assert all(len(given["hidden_states"]) == 2 for given in passes)


@torch.no_grad()
def test_without_that_input_guidance_is_the_usual_one(tiny_flux_folder, build_face, stock, tmp_path):
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(1)
    stock.register_modules(
        transformer=FluxTransformer2DModel.from_config(stock.transformer.config, guidance_embeds=False)
    )
    stock.save_pretrained(tmp_path)
    face = build_face(tmp_path)
    start = noise(2, *face.latent_shape(32))
    how = {"num_inference_steps": 3, "true_cfg_scale": 2.5, "negative_prompt": ["", ""], "height": 32, "width": 32}
    expected = stock(TEXTS, latents=packed(start), output_type="latent", **how).images
    latents = sample(face, start[None], face.time_grid(3, 32), face.encode(TEXTS), "default", 2.5)
    assert gap(packed(latents), expected) < 1e-4 * expected.abs().max()


@torch.no_grad()
def test_the_places_of_tokens_are_built_where_the_latents_are(tiny_flux_folder, build_face):
    """And so not on the CPU, from where they would be copied at every call."""
    face = build_face(tiny_flux_folder)
    x_t, t, condition = noise(2, *face.latent_shape(32)), torch.tensor(0.5), face.encode(TEXTS)
    expected = face.predict(x_t, t, condition, "default").flow
    with torch.device("meta"):  # where a tensor lies that is not told where
        assert torch.equal(face.predict(x_t, t, condition, "default").flow, expected)


def test_the_shift_grows_with_the_size_and_a_students_is_that_of_its_own(tiny_flux_folder, build_face):
    face = build_face(tiny_flux_folder)
    small, large = (face.time_grid(4, resolution)[1].item() for resolution in (32, 512))
    assert small < large
    scheduler = face.student_scheduler(4, 512)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=0.1)
    assert gap(scheduler.sigmas, face.few_step_grid(4, 512)) < 1e-6


def test_a_size_that_does_not_pack_is_refused(tiny_flux_folder):
    loading.check_resolution(str(tiny_flux_folder), 48)
    with pytest.raises(UserError, match="a multiple of 8 pixels"):
        loading.check_resolution(str(tiny_flux_folder), 36)


@torch.no_grad()
def test_pictures_are_those_of_stock_diffusers(tiny_flux_folder, build_face, stock):
    face, latents = build_face(tiny_flux_folder), noise(2, 4, 8, 8)
    config = stock.vae.config
    decoded = stock.vae.decode(latents / config.scaling_factor + config.shift_factor).sample
    assert gap(face.decode(latents), stock.image_processor.postprocess(decoded, output_type="pt")) < 1e-5


def test_a_network_that_is_told_its_guidance_is_trained_under_the_one_it_sampled_with(tiny_flux_folder, tiny):
    face = loading.load(str(tiny_flux_folder), lora=LoraSettings(rank=2, lora_alpha=4), frozen=("old", "sampler"))
    assert face.training_scale(3.5) == 3.5
    assert tiny().training_scale(3.5) == 1.0
    prompts, asked = Prompts(("a star",), ({},), (0,)), []
    config = RolloutConfig(num_prompts=1, group_size=2, num_inference_steps=1, guidance_scale=3.5)
    mine = Composite({"mine": (lambda images, prompts, metadata: images.mean((1, 2, 3)), 1.0)})
    rollouts = Rollouts(face, prompts, mine, config, face.resolution, seed=0)
    forward = face._output
    kinds = [(CRD, CRDConfig(num_train_times=1, kl_cfg=scale)) for scale in (4.5, 1)]  # 1: no more than its own
    for kind, settings in (*kinds, (DiffusionNFT, DiffusionNFTConfig())):
        method = kind(settings, face, rollouts, 2)
        (batch, *_) = [part for part in method.collect(0) if len(part)]
        asked.clear()
        face._output = lambda role, x_t, t, condition, *scale: (
            asked.append((role, *scale)) or forward(role, x_t, t, condition, *scale)
        )
        next(iter(method.losses(batch)))
        face._output = forward
        anchor = {("ref", 4.5 if settings == kinds[0][1] else 3.5)}
        assert set(asked) == {("default", 3.5), ("old", 3.5)} | anchor
