"""What the faces of Stable Diffusion's UNets share: stock diffusers' numbers, and schedulers whose times are known."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)
from peft import PeftModel

from trimtab.errors import UserError
from trimtab.evaluate import sample
from trimtab.pipelines import loading, unet

TEXTS = ["a photo of a red circle", "a photo of two stars"]
SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def gap(a, b):
    return (a - b).abs().max().item()


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shaken(roles, *names):
    """Random weights in these roles, so that no LoRA is zero and no two roles are equal."""
    for seed, name in enumerate(names):
        generator = torch.Generator().manual_seed(seed)
        for parameter in roles.parameters(name).values():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.fixture(params=["sd", "sd21", "sdxl"], scope="module")
def model(request, build_face):
    """A folder, its face only to be read, and what builds another one and diffusers' own."""
    folder = request.getfixturevalue(f"tiny_{request.param}_folder")

    def stock(folder=folder):
        pipe = DiffusionPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return SimpleNamespace(folder=folder, read=build_face(folder), face=partial(build_face, folder), stock=stock)


@pytest.fixture
def point():
    """x_t and t of two samples: the table's rows 299 and 899."""
    return noise(2, 4, 8, 8), torch.tensor([0.3, 0.9])


@torch.no_grad()
def stock_output(stock, x_t, rows, network=None):
    """What diffusers' own network says, given the same prompts."""
    tokens, _, *pooled = stock.encode_prompt(
        TEXTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    size = torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 2)
    added = {"added_cond_kwargs": {"text_embeds": pooled[0], "time_ids": size}} if pooled else {}
    return (network or stock.unet)(x_t, rows, tokens, **added, return_dict=False)[0]


# The numbers of stock diffusers


@torch.no_grad()
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_sampling_equals_that_of_stock_diffusers_in_latents_and_pictures(model, guidance_scale):
    face, stock, start = model.read, model.stock(), noise(2, 4, 8, 8)
    how = {"num_inference_steps": 10, "guidance_scale": guidance_scale}
    latents = sample(face, start[None], face.time_grid(10), face.encode(TEXTS), "default", guidance_scale)
    assert gap(latents, stock(TEXTS, latents=start, output_type="latent", **how).images) < 1e-4
    assert gap(face.decode(latents), stock(TEXTS, latents=start, output_type="pt", **how).images) < 1 / 255


@torch.no_grad()
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_pndm_is_followed_call_by_call(model, build_face, tmp_path, prediction_type, num_steps):
    stock, start = model.stock(), noise(2, 4, 8, 8)
    stock.scheduler = PNDMScheduler(**SD15, skip_prk_steps=True, prediction_type=prediction_type)
    stock.save_pretrained(tmp_path)
    face, how = build_face(tmp_path), {"num_inference_steps": num_steps, "guidance_scale": 2.0}
    ours = sample(face, start[None], face.time_grid(num_steps), face.encode(TEXTS), "default", 2.0)
    theirs = stock(TEXTS, latents=start, output_type="latent", **how).images
    assert gap(ours, theirs) < 1e-4 * theirs.abs().max()


@torch.no_grad()
def test_a_prediction_is_the_networks_own_and_knows_what_the_scheduler_derives(model, point):
    face, stock = model.read, model.stock()
    x_t, t = point
    prediction = face.predict(x_t, t, face.encode(TEXTS), "default")
    output = stock_output(stock, x_t, torch.tensor([299, 899]))
    assert prediction.kind == {"epsilon": "eps", "v_prediction": "v"}[stock.scheduler.config.prediction_type]
    assert gap(prediction.value, output) < 1e-5
    scheduler = DDIMScheduler.from_config(stock.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(10)
    for i, row in enumerate([299, 899]):
        derived = scheduler.step(output[i], row, x_t[i]).pred_original_sample
        assert gap(prediction.x0[i], derived) < 1e-4 * derived.abs().max()


@torch.no_grad()
def test_guidance_goes_from_the_unconditional_towards_the_prompt(model, point):
    face, condition = model.read, model.read.encode(TEXTS)
    cond = face.predict(*point, condition, "default").value
    uncond = face.predict(*point, face.unconditional.expand(2), "default").value
    guided = face.predict(*point, condition, "default", 3.0).value
    assert gap(guided, uncond + 3 * (cond - uncond)) < 1e-5
    assert gap(guided, cond) > 1e-3


@torch.no_grad()
def test_one_time_for_all_is_the_same_as_one_each(model, point):
    face = model.read
    one, each = (
        face.predict(point[0], t, face.encode(TEXTS), "default") for t in (torch.tensor(0.4), torch.full((2,), 0.4))
    )
    assert torch.equal(one.value, each.value)
    assert torch.equal(one.flow, each.flow)


def test_encode_asks_the_text_encoders_once_for_each_distinct_prompt(model, monkeypatch):
    face, asked = model.face(), []
    embed = face._embed
    monkeypatch.setattr(face, "_embed", lambda texts: asked.append(list(texts)) or embed(texts))
    first, second = face.encode([TEXTS[0], TEXTS[1], TEXTS[0]]), face.encode([TEXTS[1], "a star"])
    assert asked == [[TEXTS[0]], [TEXTS[1]], ["a star"]]  # alone, so that its bits are the same in any company
    assert torch.equal(first.tokens[0], first.tokens[2])
    assert gap(first.tokens[0], first.tokens[1]) > 1e-3
    assert gap(second.tokens, embed([TEXTS[1], "a star"]).tokens) < 1e-6


@torch.no_grad()
def test_pictures_become_the_mean_and_spread_of_stock_diffusers_latents(model):
    face, vae = model.read, model.stock().vae
    images = noise(2, 3, 32, 32).sigmoid()
    expected, scale = vae.encode(images * 2 - 1).latent_dist, vae.config.scaling_factor
    mean, std = face.posterior(images)
    assert torch.equal(face.encode_images(images), mean)
    assert gap(mean, expected.mean * scale) < 1e-6
    assert gap(std, expected.std * scale) < 1e-6


# Weights


@torch.no_grad()
def test_in_bfloat16_predictions_are_close_and_trained_weights_stay_float32(model, point):
    half, face = model.face(precision=torch.bfloat16), model.read
    assert {p.dtype for p in half.roles.parameters("default").values()} == {torch.float32}
    assert half.roles.network.conv_out.weight.dtype == torch.bfloat16
    value, exact = (f.predict(*point, f.encode(TEXTS), "default").value for f in (half, face))
    assert value.dtype == torch.float32
    assert gap(value, exact) < 0.05 * exact.abs().max()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_equal_weights_predict_equal_bits_with_and_without_gradient(model, point, precision):
    """CRD's log-ratio of the trained and the old role must start at 0."""
    face = model.face(frozen=("old",), precision=precision)
    learning = face.predict(*point, face.encode(TEXTS), "default").value
    with torch.no_grad():
        assert torch.equal(learning, face.predict(*point, face.encode(TEXTS), "old").value)


def test_a_gradient_reaches_the_lora_of_every_attention_and_nothing_else(model, point):
    face = model.face(frozen=("old",))
    shaken(face.roles, "default")
    face.predict(*point, face.encode(TEXTS), "default", 2.0).value.square().mean().backward()
    own = face.roles.parameters("default")
    attention = {name.rpartition(".lora_")[0] for name in own}
    assert attention == {
        n for n, _ in face.roles.network.named_modules() if n.endswith(unet.ATTENTION) and "lora" not in n
    }
    assert all(p.grad.abs().max() > 0 for p in own.values())
    everything = [p for part in face.pipe.components.values() if hasattr(part, "parameters") for p in part.parameters()]
    assert {id(p) for p in everything if p.grad is not None} == {id(p) for p in own.values()}


def test_gradient_checkpointing_does_not_change_the_gradient(model, point):
    def gradient(face):
        shaken(face.roles, "default")
        face.predict(*point, face.encode(TEXTS), "default").flow.square().mean().backward()
        return torch.cat([p.grad.flatten() for p in face.roles.parameters("default").values()])

    face = model.face()
    face.roles.enable_gradient_checkpointing()
    assert any(getattr(module, "gradient_checkpointing", False) for module in face.roles.network.modules())
    expected = gradient(model.face())
    assert gap(gradient(face), expected) < 1e-6 * expected.abs().max()


@torch.no_grad()
def test_an_exported_lora_paints_the_same_picture_in_stock_diffusers_in_peft_and_merged(model, point, tmp_path):
    face, stock, start = model.face(), model.stock(), noise(2, 4, 8, 8)
    shaken(face.roles, "default")
    face.export(tmp_path, "default")

    def picture(face, role="default"):
        return face.decode(sample(face, start[None], face.time_grid(4), face.encode(TEXTS), role, 2.0))

    expected = picture(face)
    assert gap(expected, picture(face, "ref")) > 8 / 255  # else a LoRA which is not there would go unseen
    how = {"num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "pt"}
    stock.load_lora_weights(tmp_path)
    assert gap(stock(TEXTS, latents=start, **how).images, expected) < 1 / 255
    files = loading.check_adapters([str(tmp_path)], str(model.folder))
    assert gap(picture(loading.load_for_sampling(str(model.folder), files)), expected) < 1 / 255
    plain = model.stock()
    network = PeftModel.from_pretrained(plain.unet, tmp_path)
    value = face.predict(*point, face.encode(TEXTS), "default").value
    assert gap(stock_output(plain, point[0], torch.tensor([299, 899]), network), value) < 1e-4


@torch.no_grad()
def test_full_fine_tuning_exports_any_role_as_a_pipeline_that_stock_loads(model, point, tmp_path):
    face = model.face(lora=None, frozen=("old",))
    shaken(face.roles, "default", "old")
    for role in ("default", "old"):
        face.export(tmp_path / role, role)
        value = face.predict(*point, face.encode(TEXTS), role).value
        assert gap(stock_output(model.stock(tmp_path / role), point[0], torch.tensor([299, 899])), value) < 1e-4
    before, after = (DiffusionPipeline.load_config(folder) for folder in (model.folder, tmp_path / "old"))
    assert {**after, "_name_or_path": None} == {**before, "_name_or_path": None}


# Schedulers


@pytest.mark.parametrize("num_steps", [1, 4, 20])
@pytest.mark.parametrize(
    ("scheduler", "last"),
    [
        (PNDMScheduler(**SD15, skip_prk_steps=True), 0),
        (PNDMScheduler(**SD15, skip_prk_steps=True, set_alpha_to_one=True), -1),
        (DDIMScheduler(**SD15, set_alpha_to_one=False, prediction_type="v_prediction"), 0),
        (DDIMScheduler(**SD15, timestep_spacing="trailing", rescale_betas_zero_snr=True), -1),
        (EulerDiscreteScheduler(**SD15, timestep_spacing="leading"), -1),
        (EulerDiscreteScheduler(**SD15, timestep_spacing="leading", final_sigmas_type="sigma_min"), 0),
        (EulerDiscreteScheduler(**SD15, timestep_spacing="trailing"), -1),
        (EulerAncestralDiscreteScheduler(**SD15, timestep_spacing="trailing"), -1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_grid_is_the_rows_that_the_scheduler_visits_and_where_it_ends(scheduler, last, num_steps):
    scheduler.set_timesteps(num_steps)
    rows = list(dict.fromkeys(scheduler.timesteps.tolist()))  # PNDM visits one twice
    process = unet.process(scheduler, torch.device("cpu"))
    assert process.timestep(unet.time_grid(scheduler, num_steps)).tolist() == [*rows, last]
    assert torch.equal(process.alphas_cumprod, scheduler.alphas_cumprod)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        (
            "UniPCMultistepScheduler",
            {},
            "model 'mine' has a UniPCMultistepScheduler; give it one of DDIMScheduler, PNDM",
        ),
        ("PNDMScheduler", {}, "has skip_prk_steps=False and trimtab needs True"),
        ("LCMScheduler", {}, "has original_inference_steps=50 and trimtab needs 1000"),
        (None, {}, "model 'mine' has a None; give it one of"),
        (
            "DDIMScheduler",
            {"prediction_type": "sample"},
            "prediction_type='sample' and trimtab needs 'epsilon' or 'v_pr",
        ),
        (
            "EulerDiscreteScheduler",
            {},
            "timestep_spacing='linspace' and trimtab needs 'leading' or 'trailing'; take an",
        ),
        (
            "EulerDiscreteScheduler",
            {"timestep_spacing": "leading", "use_karras_sigmas": True},
            "use_karras_sigmas=True",
        ),
        ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "timestep_type": "continuous"}, "needs 'discrete'"),
    ],
)
def test_a_scheduler_whose_times_are_unknown_is_refused(name, config, message):
    with pytest.raises(UserError, match=message):
        unet.UNet.check_scheduler(name, config, "mine")


def test_keys_that_the_scheduler_does_not_read_are_none_of_our_business():
    unet.UNet.check_scheduler("DDIMScheduler", {"use_karras_sigmas": True, "timestep_type": "continuous"}, "mine")
    unet.UNet.check_scheduler("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}, "mine")
