"""The face of Stable Diffusion XL: what it has to itself."""

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline

from trimtab.errors import UserError
from trimtab.evaluate import sample
from trimtab.pipelines import loading

TEXTS = ["a photo of a red circle", "a photo of two stars"]


def gap(a, b):
    return (a - b).abs().max().item()


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def stock(tiny_sdxl_folder):
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
@pytest.mark.parametrize(("resolution", "guidance_scale"), [(32, 1.0), (48, 3.0)])
def test_latents_equal_those_of_stock_diffusers_and_its_euler_at_any_size(
    tiny_sdxl_folder, build_face, stock, resolution, guidance_scale
):
    face = build_face(tiny_sdxl_folder)
    start = noise(2, *face.latent_shape(resolution))
    how = {"num_inference_steps": 8, "guidance_scale": guidance_scale, "height": resolution, "width": resolution}
    expected = stock(TEXTS, latents=start, output_type="latent", **how).images
    latents = sample(face, start[None], face.time_grid(8), face.encode(TEXTS), "default", guidance_scale)
    assert gap(latents, expected) < 1e-4 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize(("spacing", "num_steps"), [("leading", 1), ("leading", 5), ("trailing", 20)])
def test_a_last_call_in_the_first_row_itself_changes_nothing_as_in_stock_diffusers(
    build_face, stock, tmp_path, spacing, num_steps
):
    table = {"beta_schedule": "scaled_linear", "num_train_timesteps": 20, "timestep_spacing": spacing}
    stock.scheduler = DDIMScheduler(**table, set_alpha_to_one=False, clip_sample=False)
    stock.save_pretrained(tmp_path)
    face, start = build_face(tmp_path), noise(1, 4, 8, 8)
    expected = stock(TEXTS[:1], latents=start, output_type="latent", num_inference_steps=num_steps, guidance_scale=1.0)
    times = face.time_grid(num_steps)
    assert face.process.timestep(times).tolist() == stock.scheduler.timesteps.tolist()
    latents = sample(face, start[None], times, face.encode(TEXTS[:1]), "default", 1.0)
    assert gap(latents, expected.images) < 1e-4 * expected.images.abs().max()


@torch.no_grad()
def test_the_network_is_told_the_size_of_the_picture(tiny_sdxl_folder, build_face, monkeypatch):
    face, told = build_face(tiny_sdxl_folder), []
    network = face.roles.network
    forward = network.forward
    monkeypatch.setattr(network, "forward", lambda **given: told.append(given["added_cond_kwargs"]) or forward(**given))
    condition = face.encode(TEXTS)
    face.predict(noise(2, 4, 8, 12), torch.tensor(0.5), condition, "default")
    assert told[0]["time_ids"].tolist() == [[32, 48, 0, 0, 32, 48]] * 2
    assert torch.equal(told[0]["text_embeds"], condition.pooled)


@torch.no_grad()
@pytest.mark.parametrize("zeros", [True, False])
def test_guidance_leads_away_from_zeros_or_the_empty_prompt_as_the_pipeline_says(
    tiny_sdxl_folder, build_face, stock, zeros
):
    face = build_face(tiny_sdxl_folder)
    for pipe in (face.pipe, stock):
        pipe.register_to_config(force_zeros_for_empty_prompt=zeros)
    face = type(face)(face.pipe, face.roles, face.precision)
    _, tokens, _, pooled = stock.encode_prompt(TEXTS[0], device="cpu")
    assert gap(face.unconditional.tokens, tokens) < 1e-6
    assert gap(face.unconditional.pooled, pooled) < 1e-6
    assert (face.unconditional.tokens.abs().max() == 0) == zeros


@torch.no_grad()
def test_an_empty_prompt_that_is_asked_for_is_encoded_even_where_zeros_stand_for_none(
    tiny_sdxl_folder, build_face, stock
):
    face = build_face(tiny_sdxl_folder)
    tokens, _, pooled, _ = stock.encode_prompt([""], device="cpu", do_classifier_free_guidance=False)
    assert gap(face.encode([""]).tokens, tokens) < 1e-6
    assert gap(face.encode([""]).pooled, pooled) < 1e-6


def test_the_grid_ends_in_clean_data_whatever_key_of_ddim_the_file_holds(tiny_sdxl_folder, build_face):
    face = build_face(tiny_sdxl_folder)
    assert face.pipe.scheduler.config.set_alpha_to_one is False
    assert face.process.timestep(face.time_grid(5)).tolist() == [801, 601, 401, 201, 1, -1]


def test_a_picture_halves_evenly_in_the_auto_encoder_and_in_the_unet(tiny_sdxl_folder):
    loading.check_resolution(str(tiny_sdxl_folder), 2048)
    with pytest.raises(UserError, match=r"resolution 20 does not suit .*; give a multiple of 8 pixels\.$"):
        loading.check_resolution(str(tiny_sdxl_folder), 20)
