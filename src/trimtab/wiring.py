"""The wiring: from a recipe and what it names to a run that is ready to go."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from accelerate import Accelerator

from trimtab.batch import Prompts
from trimtab.captioned import Captioned
from trimtab.distributed import Processes
from trimtab.inputs import CAPTIONED, DISTILLATION, ONE_STEP, ONLINE, PRETRAIN, Inputs
from trimtab.learner import Learner
from trimtab.method import Method
from trimtab.pipelines import Pipeline, loading
from trimtab.recipe import RunConfig
from trimtab.rewards.composite import Composite
from trimtab.rollout import Rollouts
from trimtab.student import Student


class Display(Protocol):
    """Where a run tells how it is going."""

    def note(self, text: str) -> None: ...

    def progress(self, what: str, done: int, total: int, numbers: str = "") -> None: ...


@dataclass
class Run:
    """A run that is ready to go: everything is checked and built."""

    config: RunConfig
    folder: Path
    accelerator: Accelerator
    learner: Learner
    method: Method
    pipeline: Pipeline | None  # None: pre-training
    rewards: Composite | None  # None: none are measured
    unseen: Prompts | None  # for pictures and evaluation
    display: Display

    @property
    def result(self) -> str:
        """The role that is shown, evaluated and exported."""
        return self.config.method.result

    @property
    def sampler(self) -> str:
        """The role that draws rollouts."""
        return self.config.method.sampler

    @property
    def writes(self) -> bool:
        return self.accelerator.is_main_process


def build(config: RunConfig, folder: Path, accelerator: Accelerator, inputs: Inputs, display: Display) -> Run:
    """Load the model and put everything together, untrained; `inputs` as `check` returned them."""
    name, pipeline = config.method.name, None
    if name in PRETRAIN:
        size, precision = config.training.train_batch_size, config.model.precision
        method = PRETRAIN[name](config.method, config.seed, size, accelerator.device, precision)
    elif name in CAPTIONED:
        pipeline = _with_tokens(config, accelerator, inputs)
        method = CAPTIONED[name](config.method, pipeline, _captioned(config, folder, accelerator, inputs, pipeline))
    elif name in DISTILLATION:
        pipeline = _with_weights(config, accelerator, inputs)
        student = _student(config, accelerator, inputs, pipeline)
        shown = [_captioned(config, folder, accelerator, inputs, pipeline)] if inputs.pictures is not None else []
        method = DISTILLATION[name](config.method, pipeline, student, inputs.rewards, *shown)
    elif name in ONE_STEP:
        pipeline = _with_weights(config, accelerator, inputs)
        rollouts = _rollouts(config, accelerator, inputs, pipeline)
        shown = [inputs.pairs] if inputs.pairs is not None else []
        method = ONE_STEP[name](config.method, pipeline, rollouts, config.training.train_batch_size, *shown)
    else:
        pipeline = _with_weights(config, accelerator, inputs)
        rollouts = _rollouts(config, accelerator, inputs, pipeline)
        method = ONLINE[name](config.method, pipeline, rollouts, config.training.train_batch_size)
    if pipeline is not None and config.model.gradient_checkpointing:
        pipeline.enable_gradient_checkpointing()
    if pipeline is not None and config.model.offload_text_encoders:
        pipeline.offload_text_encoders()
    learner = Learner(method, accelerator, config.optimizer, config.training.max_train_steps)
    return Run(config, folder, accelerator, learner, method, pipeline, inputs.rewards, inputs.unseen, display)


def _with_weights(config: RunConfig, accelerator: Accelerator, inputs: Inputs) -> Pipeline:
    return loading.load(
        config.model.pretrained_model_name_or_path,
        lora=config.model.lora,
        adapters=inputs.adapters,
        trained=config.method.trained_roles,
        frozen=config.method.frozen_roles,
        precision=config.model.precision,
        device=accelerator.device,
        seed=config.seed,
    )


def _with_tokens(config: RunConfig, accelerator: Accelerator, inputs: Inputs) -> Pipeline:
    return loading.load_with_tokens(
        config.model.pretrained_model_name_or_path,
        config.method.tokens,
        num_signs=config.method.num_signs,
        roles=config.method.roles,
        merged=inputs.adapters.loras,
        precision=config.model.precision,
        device=accelerator.device,
        seed=config.seed,
    )


def _student(config: RunConfig, accelerator: Accelerator, inputs: Inputs, pipeline: Pipeline) -> Student:
    return Student(
        pipeline,
        inputs.prompts,
        config.rollout,
        config.model.resolution or pipeline.resolution,
        config.training.train_batch_size,
        config.seed,
        Processes.of(accelerator),
    )


def _rollouts(config: RunConfig, accelerator: Accelerator, inputs: Inputs, pipeline: Pipeline) -> Rollouts:
    return Rollouts(
        pipeline,
        inputs.prompts,
        inputs.rewards,
        config.rollout,
        config.model.resolution or pipeline.resolution,
        config.seed,
        Processes.of(accelerator),
    )


def _captioned(
    config: RunConfig, folder: Path, accelerator: Accelerator, inputs: Inputs, pipeline: Pipeline
) -> Captioned:
    return Captioned(
        pipeline,
        inputs.pictures,
        config.data.captioned(config.training.train_batch_size),
        config.model.resolution or pipeline.resolution,
        config.seed,
        folder.parent / "cache",
        Processes.of(accelerator),
    )
