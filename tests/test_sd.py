"""The face of Stable Diffusion 1.x and 2.x: what it has to itself."""

import json
import shutil

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
)

from trimtab import inference
from trimtab.batch import Prompts
from trimtab.errors import UserError
from trimtab.evaluate import Setting, generate, sample
from trimtab.pipelines import loading
from trimtab.pipelines.sd import SD
from trimtab.solvers import ode

SCHEDULER = "scheduler/scheduler_config.json"


@pytest.fixture
def changed(tiny_sd_folder, tmp_path):
    """A copy of the tiny folder in which one JSON file says something else."""

    def copy(file, **changes):
        shutil.copytree(tiny_sd_folder, tmp_path, dirs_exist_ok=True)
        path = tmp_path / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return tmp_path

    return copy


@pytest.fixture
def no_weights(monkeypatch):
    def read(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", read)


def test_a_condition_has_no_pooled_text_and_is_indexed_without(tiny_sd_folder, build_face):
    face = build_face(tiny_sd_folder)
    condition = face.encode(["a star", "a ring"])
    assert condition.pooled is None
    assert torch.equal(condition[torch.tensor([1, 0])].tokens, face.encode(["a ring", "a star"]).tokens)
    assert condition[torch.tensor([1])].expand(3).pooled is None
    assert torch.equal(face.unconditional.tokens, face.encode([""]).tokens)


def test_sizes_are_those_of_the_folder(tiny_sd_folder, build_face):
    face = build_face(tiny_sd_folder)
    assert face.resolution == 32
    assert face.latent_shape(48) == (4, 12, 12)
    assert face.decode(torch.zeros(1, *face.latent_shape(48))).shape == (1, 3, 48, 48)


@pytest.mark.parametrize(("name", "kind"), [("tiny_sd_folder", "eps"), ("tiny_sd21_folder", "v")])
def test_the_folder_says_what_the_network_predicts_and_that_sampling_ends_in_the_first_row(
    request, build_face, name, kind
):
    face = build_face(request.getfixturevalue(name))
    assert face.kind == kind
    assert face.process.timestep(face.time_grid(5)).tolist() == [801, 601, 401, 201, 1, 0]


def test_a_folder_saved_for_pictures_to_pictures_is_the_same_model(changed, build_face, tiny_sd_folder):
    face = build_face(changed("model_index.json", _class_name="StableDiffusionImg2ImgPipeline"))
    assert isinstance(face, SD)
    assert type(face.pipe) is StableDiffusionPipeline


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            SCHEDULER,
            {"prediction_type": "sample"},
            "has prediction_type='sample' and trimtab needs 'epsilon' or 'v_pred",
        ),
        (SCHEDULER, {"timestep_spacing": "linspace"}, "has timestep_spacing='linspace' and trimtab needs 'leading' or"),
        (
            "model_index.json",
            {"scheduler": ["diffusers", "UniPCMultistepScheduler"]},
            "has a UniPCMultistepScheduler; give it one of DDIM",
        ),
    ],
)
@pytest.mark.usefixtures("no_weights")
def test_a_scheduler_that_is_not_understood_is_refused_before_weights_are_read(changed, file, change, message):
    folder = str(changed(file, **change))
    for door in (loading.resolve, lambda name: loading.load(name, lora=None)):
        with pytest.raises(UserError, match=message):
            door(folder)


@pytest.mark.usefixtures("no_weights")
def test_a_picture_halves_evenly_in_the_auto_encoder_and_in_the_unet(tiny_sd_folder):
    for resolution in (None, 8, 32, 4096):
        loading.check_resolution(str(tiny_sd_folder), resolution)
    with pytest.raises(UserError, match=r"resolution 36 does not suit .*; give a multiple of 8 pixels\.$"):
        loading.check_resolution(str(tiny_sd_folder), 36)


@pytest.mark.usefixtures("no_weights")
def test_more_calls_than_the_table_has_rows_are_refused_before_weights_load(tiny_sd_folder, tmp_path):
    loading.check_calls(str(tiny_sd_folder), None, 999)
    for calls in (1001, 1000):  # its rows begin at 1
        with pytest.raises(UserError, match=f"^{calls} calls of model .* are asked for; .*: give fewer"):
            loading.check_calls(str(tiny_sd_folder), 4, calls)
    with pytest.raises(UserError, match="1001 calls of model"):
        inference.sample(str(tiny_sd_folder), [], ["a"], tmp_path / "out", None, num_inference_steps=1001)


@pytest.mark.usefixtures("no_weights")
def test_an_adapter_of_sd3_belongs_to_another_model(tiny_sd_folder, tiny, tmp_path):
    tiny().export(tmp_path, "default")
    with pytest.raises(UserError, match=r"changes transformer_blocks\..*, which is not in it; give the model"):
        loading.check_adapters([str(tmp_path)], str(tiny_sd_folder))


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, EulerAncestralDiscreteScheduler])
@pytest.mark.parametrize("family", ["tiny_sd_folder", "tiny_sdxl_folder"])
def test_a_turbos_one_call_is_that_of_the_stock_pipeline(request, tmp_path, family, kind):
    stock = DiffusionPipeline.from_pretrained(request.getfixturevalue(family))
    stock.scheduler = kind.from_config(stock.scheduler.config, timestep_spacing="trailing")
    stock.save_pretrained(tmp_path)
    stock.set_progress_bar_config(disable=True)
    face = loading.load_for_sampling(str(tmp_path))
    noise = torch.randn(1, *face.latent_shape(face.resolution), generator=torch.Generator().manual_seed(4))
    side = face.resolution
    settings = {"num_inference_steps": 1, "guidance_scale": 0.0, "height": side, "width": side, "output_type": "latent"}
    with torch.no_grad():
        theirs = stock("a star", latents=noise, **settings).images
        times, condition = face.time_grid(1), face.encode(["a star"])
        ours = sample(face, noise[None], times, condition, "default", 1.0)
        unscaled = ode(lambda x, t: face.predict(x, t, condition, "default"), noise, times)
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    assert (unscaled - theirs).abs().max() > 5e-4 * theirs.abs().max()  # Euler's 0.9977 of unit noise is not nothing


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("num_steps", [2, 4, 7])
def test_the_noise_of_ancestral_euler_is_added_where_stock_diffusers_adds_it(
    tiny_sd_folder, tmp_path, kind, spacing, num_steps
):
    stock = DiffusionPipeline.from_pretrained(tiny_sd_folder)
    settings = {"timestep_spacing": spacing, "prediction_type": kind}
    stock.scheduler = EulerAncestralDiscreteScheduler.from_config(stock.scheduler.config, **settings)
    stock.save_pretrained(tmp_path)
    stock.set_progress_bar_config(disable=True)
    face = loading.load_for_sampling(str(tmp_path))
    prompts, side = Prompts(("a star", "a cat"), ({}, {}), (0, 1)), face.resolution
    setting = Setting(suite="", images_per_prompt=1, num_inference_steps=num_steps, guidance_scale=2.0)
    _, ours = generate(face, "default", prompts, torch.arange(2), [5, 6], setting)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    with torch.no_grad():
        theirs = stock(
            list(prompts.text),
            num_inference_steps=num_steps,
            guidance_scale=2.0,
            height=side,
            width=side,
            generator=generators,
            output_type="latent",
        ).images
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("name", ["tiny_sd_folder", "tiny_sdxl_folder"])
def test_before_the_first_row_the_network_is_told_the_first(request, build_face, name):
    face = build_face(request.getfixturevalue(name))
    x_t, condition = torch.randn(1, *face.latent_shape(face.resolution)), face.encode(["a cat"])
    with torch.no_grad():
        early, first = (face.predict(x_t, torch.tensor(t), condition, "default").value for t in (0.0004, 0.001))
    assert torch.equal(early, first)


def scheduled(folder, to, drop=(), **changes):
    copy = shutil.copytree(folder, to)
    file = copy / "scheduler" / "scheduler_config.json"
    kept = {key: value for key, value in json.loads(file.read_text()).items() if key not in drop}
    file.write_text(json.dumps(kept | changes))
    index = json.loads((copy / "model_index.json").read_text())
    if "_class_name" in changes:
        (copy / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", changes["_class_name"]]}))
    return str(copy)


def test_calls_are_counted_in_the_models_own_table(tiny_sd_folder, tmp_path):
    short = scheduled(tiny_sd_folder, tmp_path / "short", num_train_timesteps=100)
    loading.check_calls(short, 99)
    with pytest.raises(UserError, match="101 calls of model"):
        loading.check_calls(short, 101)
    lcm = scheduled(
        tiny_sd_folder,
        tmp_path / "lcm",
        _class_name="LCMScheduler",
        original_inference_steps=1000,
        timestep_spacing="leading",
    )
    loading.check_calls(lcm, 1000)  # a student's rows begin at 999, whatever steps_offset says


def test_a_spacing_that_is_not_written_down_is_diffusers_own(tiny_sd_folder, tmp_path):
    plain = scheduled(tiny_sd_folder, tmp_path / "plain", drop=("timestep_spacing",))  # as runwayml's SD 1.5 is
    with pytest.raises(UserError, match="1000 calls of model"):
        loading.check_calls(plain, 1000)


def test_more_calls_in_an_evaluation_by_hand(tiny_sd_folder, tmp_path):
    suite, model = tmp_path / "prompts.txt", str(tiny_sd_folder)
    suite.write_text("a red circle\n")
    with pytest.raises(UserError, match="1001 calls of model"):
        inference.evaluate_model(model, [], str(suite), tmp_path / "out", None, num_inference_steps=1001)
