"""What the faces of rectified flow share: schedulers whose times are known."""

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

from trimtab.errors import UserError
from trimtab.pipelines import few_step
from trimtab.pipelines.flux import Flux
from trimtab.pipelines.sd3 import SD3

NAME = "FlowMatchEulerDiscreteScheduler"
DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}


@pytest.mark.parametrize(
    ("face", "config"),
    [
        (SD3, {"num_train_timesteps": 1000, "shift": 3.0}),
        (SD3, few_step.flow_scheduler(4, 3.0).config),
        (SD3, few_step.flow_scheduler(1, 3.0).config),
        (Flux, {"shift": 3.0, **DYNAMIC}),
        (Flux, {"shift": 1.0, "use_dynamic_shifting": False}),
        (Flux, few_step.even_flow_scheduler(4, 1.15).config),
    ],
)
def test_published_schedulers_and_those_of_our_students_are_known(face, config):
    face.check_scheduler(NAME, config, "mine")


@pytest.mark.parametrize("face", [SD3, Flux])
@pytest.mark.parametrize(
    "change",
    [
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"shift_terminal": 0.1},
        {"invert_sigmas": True},
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
        {"num_train_timesteps": 500},
    ],
    ids=lambda change: next(iter(change)),
)
def test_one_with_other_times_is_refused_in_a_sentence(face, change):
    with pytest.raises(UserError, match=r"the scheduler of model 'mine' has .* and trimtab needs .*; take another"):
        face.check_scheduler(NAME, FlowMatchEulerDiscreteScheduler(shift=3.0, **change).config, "mine")


def test_only_flux_knows_a_shift_that_grows_with_the_picture_and_only_sd3_a_student_that_ends_anywhere():
    with pytest.raises(UserError, match="has use_dynamic_shifting=True and trimtab needs False; take another"):
        SD3.check_scheduler(NAME, DYNAMIC, "mine")
    with pytest.raises(UserError, match=r"has shift_terminal=.* and trimtab needs None; take another"):
        Flux.check_scheduler(NAME, few_step.flow_scheduler(4, 3.0).config, "mine")
