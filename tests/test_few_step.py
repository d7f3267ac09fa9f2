"""Students in stock diffusers: schedulers that visit a student's times, and pictures that are the same to 1/255."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    LCMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

from trimtab import inference
from trimtab.cli import Terminal
from trimtab.evaluate import Setting, generate
from trimtab.pipelines import few_step, loading
from trimtab.rewards import build
from trimtab.solvers import few_step_grid
from trimtab.worlds.files import load_prompts

STOCK = {
    "tiny_folder": StableDiffusion3Pipeline,
    "tiny_sd_folder": StableDiffusionPipeline,
    "tiny_sd21_folder": StableDiffusionPipeline,
    "tiny_sdxl_folder": StableDiffusionXLPipeline,
    "tiny_flux_folder": FluxPipeline,
}
SIZE = 64  # pixels a side; 32 is all that the UNets were made for, and FLUX's tiny one thinks that it draws 512
TEXT = "a photo of a red circle"


@pytest.mark.parametrize("shift", [1.0, 1.15, 3.0, 6.0])
@pytest.mark.parametrize("num_calls", [1, 2, 3, 4, 8])
def test_the_flow_schedulers_default_times_are_the_students(num_calls, shift, tmp_path):
    few_step.flow_scheduler(num_calls, shift).save_pretrained(tmp_path)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path)
    scheduler.set_timesteps(num_calls)
    wanted = few_step_grid(num_calls, shift)
    assert (scheduler.sigmas - wanted).abs().max() < 1e-6
    assert (scheduler.timesteps - 1000 * wanted[:-1]).abs().max() < 1e-3
    assert few_step.is_few_step(scheduler)
    assert few_step.num_calls(scheduler) == num_calls


@pytest.mark.parametrize("num_calls", [1, 2, 4])
def test_a_student_may_be_asked_for_another_number_of_calls(num_calls, build_face, tiny_folder):
    face = build_face(tiny_folder)
    face.pipe.scheduler = few_step.flow_scheduler(4, 1.0)
    times = face.few_step_grid(num_calls)
    assert len(times) == num_calls + 1
    assert (times[0], times[-1]) == (1, 0)
    assert (times.diff() < 0).all()


def test_a_models_own_scheduler_is_no_students():
    for scheduler in (FlowMatchEulerDiscreteScheduler(shift=3.0), DDIMScheduler()):
        assert not few_step.is_few_step(scheduler)
        assert few_step.num_calls(scheduler) is None
    assert few_step.is_few_step(LCMScheduler())


def test_a_table_students_scheduler_clips_nothing():
    assert few_step.table_scheduler(4, {"clip_sample": True}).config.clip_sample is False


def moved(face):
    """Its trained role away from the pre-trained one, so that a forgotten export would show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in face.roles.parameters("default").values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return face


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("family", STOCK)
def test_an_exported_student_draws_the_same_in_stock_diffusers(family, lora, build_face, request, tmp_path):
    folder = request.getfixturevalue(family)
    face = moved(build_face(folder) if lora else build_face(folder, lora=None))
    face.export(tmp_path / "export", "default", face.student_scheduler(3, SIZE))
    if lora:
        pipe = STOCK[family].from_pretrained(folder)
        pipe.load_lora_weights(tmp_path / "export")
        kind = LCMScheduler if "sd" in family else FlowMatchEulerDiscreteScheduler
        pipe.scheduler = kind.from_pretrained(tmp_path / "export" / "scheduler")
        adapters = loading.check_adapters([str(tmp_path / "export")], str(folder))
        ours = loading.load_for_sampling(str(folder), adapters)
    else:
        pipe = STOCK[family].from_pretrained(tmp_path / "export")
        ours = loading.load_for_sampling(str(tmp_path / "export"))
    assert (ours.is_student, ours.num_calls) == (True, 3)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(5)
    how = {"height": SIZE, "width": SIZE}
    how |= {"generator": torch.Generator().manual_seed(5)} if "sd" in family else {}
    stock = pipe(TEXT, num_inference_steps=3, guidance_scale=1.0, output_type="np", **how).images[0]
    images, _ = generate(
        ours, "default", prompts(), torch.zeros(1, dtype=torch.int64), [5],
        Setting(suite="", num_inference_steps=3, few_step=True, resolution=SIZE),
    )  # fmt: skip
    found = images[0].permute(1, 2, 0).numpy()
    assert found.std() > 0.01
    assert np.abs((found * 255).round() - (stock * 255).round()).max() <= 1
    trained, _ = generate(
        face, "default", prompts(), torch.zeros(1, dtype=torch.int64), [5],
        Setting(suite="", num_inference_steps=3, few_step=True, resolution=SIZE),
    )  # fmt: skip
    assert (trained - images).abs().max() <= 1.01 / 255  # what was trained is what was exported


def prompts():
    from trimtab.batch import Prompts

    return Prompts((TEXT,), ({},), (0,))


@pytest.fixture(scope="module")
def turbo():
    return loading.load_for_sampling("micro-turbo")


def test_the_built_in_student_draws_the_same_in_stock_diffusers(turbo):
    student = loading.STUDENTS["micro-turbo"]
    pipe = StableDiffusion3Pipeline.from_pretrained(
        loading.BUILT_IN["micro"],
        transformer=SD3Transformer2DModel.from_pretrained(student / "transformer", dtype=torch.float32),
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(student / "scheduler"),
        dtype=torch.float32,
    )
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    stock = pipe(TEXT, num_inference_steps=1, guidance_scale=1.0, output_type="np", generator=generator).images[0]
    assert (turbo.is_student, turbo.num_calls) == (True, 1)
    setting = Setting(suite="", num_inference_steps=1, few_step=True)
    images, _ = generate(turbo, "default", prompts(), torch.zeros(1, dtype=torch.int64), [5], setting)
    found = images[0].permute(1, 2, 0).numpy()
    assert found.std() > 0.01
    assert np.abs((found * 255).round() - (stock * 255).round()).max() <= 1


def test_pictures_decoded_in_parts_are_each_its_own_and_lie_as_a_rewards_view_expects(turbo):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(19, *turbo.latent_shape(turbo.resolution), generator=generator)  # two parts
    images = turbo.decode(latents)
    assert images.shape == (19, 3, SIZE, SIZE)
    assert images.is_contiguous()
    alone = torch.cat([turbo.decode(one[None]) for one in latents])
    torch.testing.assert_close(images, alone, rtol=0, atol=1e-5)
    assert turbo.encode_images(images[:2]).is_contiguous()
    assert turbo.decode(latents[:2].requires_grad_()).is_contiguous()


def test_the_built_in_student_draws_what_it_is_asked_for(turbo):
    asked = load_prompts("blocks", "test")
    asked = asked[[i for i, line in enumerate(asked.metadata) if line["tag"] == "single_object"]]
    place = torch.arange(len(asked)).repeat_interleave(4)
    setting = Setting(suite="", num_inference_steps=1, few_step=True)
    images, _ = generate(turbo, "default", asked, place, list(range(len(place))), setting)
    reward = build({"geneval": 1.0}, asked)
    scored = reward.score(images, [asked.text[i] for i in place], [dict(asked.metadata[i]) for i in place], place)
    assert scored.total.mean() > 0.75  # 0.875 with other noises, and 0.08 for micro in one call


@pytest.mark.parametrize(("asked", "says"), [({}, 0), ({"num_inference_steps": 2}, 1), ({"guidance_scale": 3.0}, 1)])
def test_a_student_that_is_asked_for_what_it_was_not_made_for_says_so(tmp_path, caplog, asked, says):
    with Terminal() as display:
        (file,) = inference.sample("micro-turbo", [], [TEXT], tmp_path, display, images_per_prompt=1, **asked)
    assert file.is_file()
    assert sum("was made for 1 call(s) without guidance" in line for line in caplog.messages) == says
