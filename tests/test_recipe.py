"""Recipes: all that are built in are sound, and those named after a publication say what it says."""

import pytest
from pydantic import ValidationError

from trimtab import inputs, run
from trimtab.inputs import CAPTIONED, DISTILLATION, ONE_STEP, ONLINE, PRETRAIN
from trimtab.optimizer import lr_factor
from trimtab.recipe import DataConfig, ModelConfig

RECIPES = sorted(path.stem for path in run.RECIPES.glob("*.yaml"))
COCO = [name for name in RECIPES if name.endswith("-coco")]


@pytest.mark.parametrize("name", RECIPES)
def test_a_built_in_recipe_is_sound_and_named_after_its_file(name):
    config = run.load_config(name)
    assert config.name == name
    assert config.method.name in {**ONLINE, **CAPTIONED, **DISTILLATION, **ONE_STEP, **PRETRAIN}


@pytest.mark.parametrize("name", RECIPES)
def test_a_built_in_recipe_names_nothing_that_its_method_would_never_look_at(name):
    config = run.load_config(name)
    inputs._check_read(config)
    assert not (getattr(config.method, "fake_warmup", 0) and config.optimizer.lr_warmup_steps)


@pytest.mark.parametrize("name", COCO)
def test_the_published_settings_that_all_soft_tokens_share(name):
    config = run.load_config(name)
    assert config.method.tokens.num_tokens == 4
    assert config.model.resolution == 512
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.adam_weight_decay, optimizer.adam_epsilon) == (1e-3, 1e-4, 1e-8)
    assert (optimizer.adam_beta1, optimizer.adam_beta2) == (0.9, 0.999)


def test_the_published_settings_of_agsm():
    sd15, sdxl, sd3 = (run.load_config(f"agsm-{model}-coco") for model in ("sd15", "sdxl", "sd3"))
    assert [(c.method.gamma_pos, c.method.gamma_neg) for c in (sd15, sdxl, sd3)] == [(1, 1), (1, 1), (1, 0.1)]
    assert [c.training.max_train_steps for c in (sd15, sdxl, sd3)] == [100_000, 1_000, 100_000]
    assert all(c.training.train_batch_size == 4 for c in (sd15, sdxl, sd3))
    assert all((c.method.temperature, c.method.ema_decay) == (0.1, 0.9999) for c in (sd15, sdxl, sd3))
    assert sd15.method.tokens_start == "empty-prompt"
    assert (sd15.method.tokens.stages, sd3.method.tokens.num_layers) == (("down", "mid"), 5)
    for config in (sd15, sd3):  # a cycle of the learning rate is 10,000 steps
        steps = config.training.max_train_steps
        assert lr_factor(config.optimizer, 10_000, steps) == 1
        assert lr_factor(config.optimizer, 9_999, steps) < 1e-6


def test_the_published_settings_of_softrepa():
    sd15, sdxl, sd3 = (run.load_config(f"softrepa-{model}-coco") for model in ("sd15", "sdxl", "sd3"))
    assert [c.training.train_batch_size for c in (sd15, sdxl, sd3)] == [8, 8, 4]
    assert [c.method.denoising_weight for c in (sd15, sdxl, sd3)] == [10, 10, 0]
    assert all((c.method.temperature, c.method.logit_scale) == (0.07, 4.0) for c in (sd15, sdxl, sd3))
    assert (sd15.method.tokens.stages, sdxl.method.tokens.stages) == (("down",), ("down", "mid"))


@pytest.mark.parametrize(
    ("section", "values"),
    [(ModelConfig, {"rank": 0}), (ModelConfig, {"target_modules": []}), (DataConfig, {"on_error": "ignore"})],
)
def test_values_out_of_range_are_refused(section, values):
    with pytest.raises(ValidationError):
        section(**values)


def test_the_published_settings_of_dmd2():
    sd15, sdxl = (run.load_config(name) for name in ("dmd2-sd15-1step", "dmd2-sdxl-4step"))
    assert [c.method.fake_updates for c in (sd15, sdxl)] == [10, 5]
    assert [c.method.real_guidance_scale for c in (sd15, sdxl)] == [1.75, 8]
    assert [c.rollout.num_prompts * c.rollout.group_size for c in (sd15, sdxl)] == [2048, 128]
    assert [c.optimizer.learning_rate for c in (sd15, sdxl)] == [1e-5, 5e-5]
    assert (sdxl.model.rank, sdxl.model.lora_alpha) == (64, 8)
    # Their loops count updates of the fake: 39,000 and, for the LoRA, 16,000.
    assert [c.training.max_train_steps * c.method.fake_updates for c in (sd15, sdxl)] == [39_000, 16_000]
    assert all(
        (c.method.min_time, c.method.max_time, c.method.times) == (0.02, 0.98, "independent") for c in (sd15, sdxl)
    )
    assert all(c.method.normaliser == "sample" for c in (sd15, sdxl))


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith(("gndm", "dmd"))])
def test_a_students_recipe_says_its_calls_once_and_its_name_says_them_too(name):
    config = run.load_config(name)
    assert f"{config.rollout.num_inference_steps}step" in name
    assert (config.evaluation.num_inference_steps, config.evaluation.guidance_scale) == (None, 1)
