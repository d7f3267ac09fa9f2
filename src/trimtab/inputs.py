"""What a recipe names, read, and refused where it does not fit, before any weight loads. It knows every method."""

import logging
from dataclasses import dataclass, field, replace

from trimtab.batch import Prompts
from trimtab.distributed import check_one_process, num_processes
from trimtab.errors import UserError
from trimtab.methods import agsm, crd, diffusion_nft, dmd2, dmdr, dpo_one_step, draft, drpo, gndm, pretrain, softrepa
from trimtab.pipelines import features, loading
from trimtab.pipelines.adapters import Adapters
from trimtab.recipe import RunConfig
from trimtab.rewards import build as build_rewards
from trimtab.rewards import check as check_rewards
from trimtab.rewards import check_side
from trimtab.rewards.composite import Composite
from trimtab.roles import check_targets
from trimtab.worlds.files import load_prompts
from trimtab.worlds.pairs import Pairs, load_pairs
from trimtab.worlds.pictures import Pictures, load_pictures

logger = logging.getLogger(__name__)

ONLINE = {"crd": crd.CRD, "diffusion-nft": diffusion_nft.DiffusionNFT}  # prompts and rewards; trains weights
CAPTIONED = {"agsm": agsm.AGSM, "softrepa": softrepa.SoftREPA}  # pictures with captions; trains soft tokens
DISTILLATION = {
    "dmd2": dmd2.DMD2,
    "dmdr": dmdr.DMDR,
    "gndm": gndm.GNDM,
}  # prompts, and maybe rewards; trains a student and its fake
ONE_STEP = {  # prompts and rewards, or pairs; trains a generator of one call
    "drpo": drpo.DrPO,
    "dpo-one-step": dpo_one_step.DPOOneStep,
    "draft": draft.DRaFT,
}
PRETRAIN = {
    "pretrain-vae": pretrain.PretrainVAE,
    "pretrain-micro": pretrain.PretrainMicro,
    "pretrain-recognizer": pretrain.PretrainRecognizer,
}
READS_PAIRS = "only method.name=drpo method.variant=offline learns from pairs"
READS_PICTURES = "only agsm, softrepa, and dmd2 with method.gan_weight above 0 learn from pictures"
READS_NO_PROMPTS = "pre-training, agsm, softrepa, and drpo with method.variant=offline read none"


@dataclass(frozen=True)
class Inputs:
    """What a recipe reads beside its model: prompts and rewards, or captioned pictures; pre-training draws its own."""

    prompts: Prompts | None = None
    rewards: Composite | None = None
    pictures: Pictures | None = None
    pairs: Pairs | None = None
    unseen: Prompts | None = None  # for pictures and evaluation; of the test split, where there is one
    adapters: Adapters = field(default_factory=Adapters)  # what changes the model before it is trained

    def hashes(self, config: RunConfig) -> dict[str, str]:
        """What is learnt from and evaluated, each as one number, as `config.yaml` keeps it."""
        suite = None if config.evaluation.suite is None else self.unseen
        read = {"prompts": self.prompts, "pairs": self.pairs, "suite": suite}
        return {f"{name}_sha256": each.sha256() for name, each in read.items() if each is not None}


def check(config: RunConfig) -> Inputs:
    """Read what the recipe names and be certain of the model: all that can fail before weights load."""
    _check_read(config)
    strange = set(config.optimizer.learning_rates) - set(config.method.trained_roles)
    if strange:
        known = ", ".join(config.method.trained_roles)
        raise UserError(f"optimizer.learning_rates names {min(strange)!r}; the networks that learn are {known}.")
    if config.method.name in PRETRAIN:
        check_one_process(config.method.name)
        return Inputs()
    kinds = {
        **dict.fromkeys(CAPTIONED, _captioned_inputs),
        **dict.fromkeys(DISTILLATION, _distillation_inputs),
        **dict.fromkeys(ONE_STEP, _one_step_inputs),
    }
    inputs = kinds.get(config.method.name, _online_inputs)(config)  # first: the hub may take its time over the model
    return replace(inputs, adapters=_check_model(config))


def _check_model(config: RunConfig) -> Adapters:
    """UserError unless the model is there and can be trained so; the adapters below what is trained."""
    model = config.model.pretrained_model_name_or_path
    loading.resolve(model)
    loading.check_resolution(model, config.model.resolution)
    evaluation = config.evaluation
    calls = (evaluation.num_inference_steps, evaluation.base_num_inference_steps, config.rollout.num_inference_steps)
    loading.check_calls(model, *calls)
    if config.model.lora is not None and config.model.target_modules is not None:
        check_targets(loading.skeleton(model), config.model.target_modules)
    adapters = loading.check_adapters(config.model.adapters, model)
    _check_tokens_below(config, adapters)
    if config.method.name not in ONE_STEP:
        loading.check_many_steps(model, adapters, config.method.name)
    if config.method.name in CAPTIONED:
        loading.check_tokens(config.method.tokens, model, from_text=config.method.tokens_start == "empty-prompt")
    check_side(config.rewards, lambda: config.model.resolution or loading.resolution(model))
    if isinstance(config.method, drpo.DrPOConfig):
        side = config.model.resolution or loading.resolution(model)
        features.check(config.method.features, loading.skeleton(model), side)
    if config.method.name in ONE_STEP:
        loading.check_one_call(model, adapters, config.method.name)  # last, for it may only warn
    return adapters


def _check_read(config: RunConfig) -> None:
    """UserError for what a recipe names and its method would never look at, be it right or wrong."""
    name, data = config.method.name, config.data
    drawing, captioned = name in PRETRAIN, name in CAPTIONED
    pictures = captioned or config.method.wants_pictures
    offline = config.method.learns_from_pairs
    in_vain = {
        "data.pairs": (data.pairs is not None and not offline, READS_PAIRS),
        "data.pictures": (data.pictures != "blocks" and not pictures, READS_PICTURES),
        "data.prompts": (data.prompts != "blocks" and (drawing or captioned or offline), READS_NO_PROMPTS),
        "rewards": (bool(config.rewards) and drawing, f"{name} has none"),
        "evaluation.suite": (config.evaluation.suite is not None and drawing, f"{name} is not evaluated"),
        "model.finetune_type=full": (config.model.lora is None and captioned, f"{name} trains soft tokens alone"),
    }
    for key, (given, why) in in_vain.items():
        if given:
            raise UserError(f"{key} is given, and {why}; leave it out.")


def _check_tokens_below(config: RunConfig, adapters: Adapters) -> None:
    """UserError unless what is trained can stand on the soft tokens that the recipe names."""
    if adapters.tokens is None:
        return
    if config.method.name in CAPTIONED or config.model.finetune_type != "lora" or config.model.gradient_checkpointing:
        raise UserError(
            f"{adapters.tokens} holds soft tokens, on which a LoRA can be trained, without gradient checkpointing, and "
            "neither full weights nor other tokens; leave them out of model.adapters."
        )


def _online_inputs(config: RunConfig) -> Inputs:
    if not config.rewards:
        raise UserError("the recipe names no reward; add one, for example rewards='{path/to/file.py:function: 1.0}'.")
    if config.rollout.group_size < 2 and config.method.name != "draft":  # which compares nothing
        raise UserError("rollout.group_size is 1; give 2 or more, for samples are compared with their siblings.")
    prompts = _prompts(config)
    unseen = load_prompts(config.evaluation.suite or config.data.prompts, "test") if _shows(config) else None
    return Inputs(prompts=prompts, rewards=_rewards(config, prompts, unseen), unseen=unseen)


def _distillation_inputs(config: RunConfig) -> Inputs:
    if (config.rollout.guidance_scale, config.rollout.solver_order, config.rollout.noise_spread) != (1, 1, 1):
        raise UserError(
            "a few-step student samples without guidance and from independent noise; leave rollout.guidance_scale, "
            "solver_order and noise_spread at 1."
        )
    calls = config.rollout.num_inference_steps
    if config.evaluation.num_inference_steps not in (None, calls) or config.evaluation.guidance_scale != 1:
        raise UserError(
            f"a student of rollout.num_inference_steps={calls} is sampled so, and without guidance; give "
            f"evaluation.num_inference_steps={calls} evaluation.guidance_scale=1."
        )
    if config.method.fake_warmup and config.optimizer.lr_warmup_steps:
        raise UserError(
            f"method.fake_warmup={config.method.fake_warmup} is over before the learning rate, which grows over "
            f"optimizer.lr_warmup_steps={config.optimizer.lr_warmup_steps} steps, has begun to; set one of them to 0."
        )
    if config.rollout.merge_lora and isinstance(config.method, gndm.GNDMConfig) and config.method.reuse > 1:
        raise UserError(
            "a rollout that is used again is compared with what drew it, to more digits than merged weights keep; "
            "leave rollout.merge_lora at false, or method.reuse at 1."
        )
    if config.method.name == "dmdr" and config.model.finetune_type != "lora":
        raise UserError("dmdr's teacher and fake share one LoRA; give model.finetune_type=lora.")
    prompts = _prompts(config)
    unseen = load_prompts(config.evaluation.suite or config.data.prompts, "test") if _shows(config) else None
    rewards = _rewards(config, prompts, unseen) if config.rewards else None
    pictures = None
    if config.method.wants_pictures:
        pictures = load_pictures(config.data.pictures, config.data.on_error)
    if rewards is not None:
        calls, size = config.rollout.num_inference_steps, config.rollout.group_size
        steps = config.training.max_train_steps
        DISTILLATION[config.method.name].check_rewards(config.method, rewards, calls, size, steps)
    return Inputs(prompts=prompts, rewards=rewards, pictures=pictures, unseen=unseen)


def _one_step_inputs(config: RunConfig) -> Inputs:
    rollout, evaluation, method = config.rollout, config.evaluation, config.method
    plain = rollout.guidance_scale == 1 and rollout.solver_order == 1 and not rollout.merge_lora
    if rollout.num_inference_steps != 1 or not plain:
        raise UserError(
            f"{method.name} trains a generator of one call, without guidance, on its own samples to the bit; give "
            "rollout.num_inference_steps=1, and leave guidance_scale, solver_order and merge_lora as they are."
        )
    if evaluation.num_inference_steps not in (None, 1) or evaluation.guidance_scale != 1:
        raise UserError(
            "a generator of one call is sampled so; give evaluation.num_inference_steps=1 evaluation.guidance_scale=1."
        )
    if method.learns_from_pairs:
        if rollout.group_size < 2:
            raise UserError("rollout.group_size is 1; give 2 or more: distances among candidates are the unit.")
        return _offline_inputs(config)
    inputs = _online_inputs(config)
    if isinstance(method, draft.DRaFTConfig):
        draft.DRaFT.check_rewards(inputs.rewards)
    else:
        needed, there = method.num_positive + method.num_negative, rollout.group_size
        rounds = ""
        if isinstance(method, drpo.DrPOConfig) and method.variant == "binary":
            there, rounds = there * method.num_rounds, f" in {method.num_rounds} rounds"
        if needed > there:
            raise UserError(
                f"method.num_positive and num_negative are {needed} together and a prompt has {there} candidates"
                f"{rounds}; none is among the best and the worst at once: make rollout.group_size larger."
            )
    return inputs


def _offline_inputs(config: RunConfig) -> Inputs:
    if config.data.pairs is None:
        raise UserError("method.variant=offline learns from pairs; give data.pairs=a .jsonl or .parquet file.")
    pairs = load_pairs(config.data.pairs, config.data.on_error)
    _check_share(config, pairs.prompts)
    unseen = pairs.prompts if config.evaluation.suite is None else load_prompts(config.evaluation.suite, "test")
    rewards = _rewards(config, unseen, unseen) if config.rewards else None
    return Inputs(prompts=pairs.prompts, pairs=pairs, rewards=rewards, unseen=unseen)


def _prompts(config: RunConfig) -> Prompts:
    prompts = load_prompts(config.data.prompts)
    _check_share(config, prompts)
    return prompts


def _check_share(config: RunConfig, prompts: Prompts) -> None:
    """UserError unless the prompts of a step can be shared by the processes."""
    wanted = config.rollout.num_prompts
    size = min(len(prompts), wanted)
    if size < wanted:
        logger.warning("rollout.num_prompts is %d, and there are fewer, %d: each step takes all", wanted, size)
    processes = num_processes()
    if size % processes:
        raise UserError(
            f"a rollout of {size} prompts can't be shared by {processes} processes, each of which takes whole prompts; "
            f"make rollout.num_prompts a multiple of {processes} that the prompts suffice for."
        )


def _captioned_inputs(config: RunConfig) -> Inputs:
    if config.training.train_batch_size < 2:
        raise UserError("training.train_batch_size is 1; give 2 or more, for a picture meets the captions of others.")
    pictures = load_pictures(config.data.pictures, config.data.on_error)
    if config.evaluation.suite is not None:
        unseen = load_prompts(config.evaluation.suite, "test")
    else:  # captions of its own are all that is known of what its user wants to see
        texts = tuple(dict.fromkeys(captions[0] for captions in pictures.captions))
        unseen = Prompts(texts, tuple({} for _ in texts), tuple(range(len(texts))))
    return Inputs(
        pictures=pictures, rewards=_rewards(config, unseen, unseen) if config.rewards else None, unseen=unseen
    )


def _shows(config: RunConfig) -> bool:
    return config.evaluation.suite is not None or config.training.num_validation_prompts > 0


def _rewards(config: RunConfig, prompts: Prompts, unseen: Prompts | None) -> Composite:
    """The rewards, once it is certain that they can score the suite's prompts, too."""
    built = build_rewards(config.rewards, prompts)
    if config.evaluation.suite is not None and unseen is not prompts:
        check_rewards(built, unseen)
    return built
