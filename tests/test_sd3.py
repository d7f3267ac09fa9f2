"""The face of Stable Diffusion 3: the same numbers as stock diffusers, from the prompt to the exported weights."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from peft import PeftModel
from PIL import Image

from trimtab import inference
from trimtab.batch import Prompts, Rollout
from trimtab.evaluate import sample
from trimtab.methods.crd import CRD, CRDConfig
from trimtab.pipelines.sd3 import MAX_TEXT_TOKENS, WeightedAttention
from trimtab.rollout import RolloutConfig

TEXTS = ["a photo of a red circle", "a photo of two stars"]
SEEDS = [3, 4]
QUIET = SimpleNamespace(note=lambda text: None, progress=lambda *args: None)


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


@pytest.fixture(scope="module")
def face(tiny):
    """Only to be read."""
    return tiny()


@pytest.fixture
def stock(tiny_folder):
    pipe = StableDiffusion3Pipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def stock_flow(stock, x_t, t, network=None):
    """The output of diffusers' own network and attention over every text token."""
    tokens, _, pooled, _ = stock.encode_prompt(TEXTS, TEXTS, TEXTS, do_classifier_free_guidance=False)
    assert tokens.shape[1] == stock.tokenizer_max_length + MAX_TEXT_TOKENS
    inputs = {"hidden_states": x_t, "timestep": 1000 * t, "encoder_hidden_states": tokens, "pooled_projections": pooled}
    return (network or stock.transformer)(**inputs, return_dict=False)[0]


@pytest.fixture
def point():
    """x_t and t of two samples."""
    return noise(2, 8, 8, 8), torch.tensor([0.3, 0.9])


# Prompts and attention


@torch.no_grad()
def test_folded_text_tokens_give_the_output_of_all_of_them(face, stock, point):
    condition = face.encode(TEXTS)
    assert condition.tokens.shape[1] == stock.tokenizer_max_length + 1
    assert gap(face.predict(*point, condition, "default").flow, stock_flow(stock, *point)) < 1e-5


@torch.no_grad()
def test_folding_holds_without_a_t5_encoder_too(tiny, stock, point):
    face = tiny()
    face.pipe.text_encoder_3 = stock.text_encoder_3 = None
    absent = type(face)(face.pipe, face.roles, face.precision)
    assert absent.encode(TEXTS).tokens.shape[1] == stock.tokenizer_max_length + 1
    assert gap(absent.predict(*point, absent.encode(TEXTS), "default").flow, stock_flow(stock, *point)) < 1e-5


def test_tokens_of_a_t5_that_reads_are_not_folded(tiny):
    face = tiny()
    face.pipe.text_encoder_3.config.vocab_size = 2
    reading = type(face)(face.pipe, face.roles, face.precision)
    assert reading.encode(TEXTS).weight is None
    assert reading.encode(TEXTS).tokens.shape[1] == face.pipe.tokenizer_max_length + MAX_TEXT_TOKENS


@torch.no_grad()
@pytest.mark.parametrize("qk_norm", ["rms_norm", None])
def test_unweighted_attention_is_stock_attention_in_dual_blocks_too(qk_norm):
    torch.manual_seed(0)
    width = {"joint_attention_dim": 16, "caption_projection_dim": 32, "pooled_projection_dim": 8}
    heads = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "dual_attention_layers": (0,)}
    network = SD3Transformer2DModel(sample_size=8, in_channels=4, out_channels=4, qk_norm=qk_norm, **width, **heads)
    inputs = {
        "hidden_states": noise(2, 4, 8, 8),
        "encoder_hidden_states": noise(2, 5, 16),
        "pooled_projections": noise(2, 8),
        "timestep": torch.tensor([10.0, 900.0]),
    }
    before = network(**inputs).sample
    network.set_attn_processor(WeightedAttention())
    assert gap(network(**inputs).sample, before) < 1e-5


def test_encode_asks_the_text_encoders_once_for_each_distinct_prompt(tiny, monkeypatch):
    face, asked = tiny(), []
    embed = face._embed
    monkeypatch.setattr(face, "_embed", lambda texts: asked.append(list(texts)) or embed(texts))
    first, second = face.encode([TEXTS[0], TEXTS[1], TEXTS[0]]), face.encode([TEXTS[1], "a star"])
    assert asked == [[TEXTS[0]], [TEXTS[1]], ["a star"]]  # alone, so that its bits are the same in any company
    assert torch.equal(first.tokens[0], first.tokens[2])
    assert torch.equal(first.pooled[1], second.pooled[0])
    assert gap(second.tokens, embed([TEXTS[1], "a star"]).tokens) < 1e-6


# Sampling


@pytest.mark.parametrize(("guidance_scale", "shift"), [(1.0, 1.0), (3.0, 1.0), (3.0, 3.0)])
def test_latents_equal_those_of_stock_diffusers_for_the_same_seeds(tiny, stock, guidance_scale, shift):
    face = tiny()
    face.pipe.scheduler = stock.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    how = {"num_inference_steps": 7, "guidance_scale": guidance_scale, "output_type": "latent"}
    expected = stock(TEXTS, generator=[torch.Generator().manual_seed(seed) for seed in SEEDS], **how).images
    start = torch.stack([noise(8, 8, 8, seed=seed) for seed in SEEDS])
    with torch.no_grad():
        latents = sample(face, start[None], face.time_grid(7), face.encode(TEXTS), "default", guidance_scale)
    assert gap(latents, expected) < 1e-4


@torch.no_grad()
def test_guidance_goes_from_the_empty_prompt_towards_the_prompt(face, point):
    cond = face.predict(*point, face.encode(TEXTS), "default").flow
    uncond = face.predict(*point, face.encode(["", ""]), "default").flow
    guided = face.predict(*point, face.encode(TEXTS), "default", 3.0).flow
    assert gap(guided, uncond + 3 * (cond - uncond)) < 1e-5
    assert gap(guided, cond) > 1e-3


@torch.no_grad()
def test_one_time_for_all_is_the_same_as_one_each(face, point):
    x_t, condition = point[0], face.encode(TEXTS)
    one, each = (face.predict(x_t, t, condition, "default").flow for t in (torch.tensor(0.4), torch.full((2,), 0.4)))
    assert torch.equal(one, each)


@torch.no_grad()
def test_pictures_and_latents_convert_as_in_stock_diffusers(tiny, stock):
    face, latents = tiny(), noise(2, 8, 8, 8)  # sums of a channels-last VAE go in another order
    for pipe in (face.pipe, stock):
        pipe.vae.register_to_config(scaling_factor=0.7, shift_factor=0.2)
    decoded = stock.vae.decode(latents / 0.7 + 0.2).sample
    images = face.decode(latents)
    assert gap(images, stock.image_processor.postprocess(decoded, output_type="pt")) < 1e-4
    expected = (stock.vae.encode(images * 2 - 1).latent_dist.mode() - 0.2) * 0.7
    assert gap(face.encode_images(images), expected) < 1e-4


@torch.no_grad()
def test_in_bfloat16_predictions_are_close_and_trained_weights_stay_float32(tiny, face, point):
    half = tiny(precision=torch.bfloat16)
    assert {p.dtype for p in half.roles.parameters("default").values()} == {torch.float32}
    assert half.pipe.transformer.proj_out.weight.dtype == torch.bfloat16
    flow, exact = (f.predict(*point, f.encode(TEXTS), "default").flow for f in (half, face))
    assert flow.dtype == torch.float32
    assert gap(flow, exact) < 0.05 * exact.abs().max()


# Export


@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory):
    """A face whose LoRA does something, and its export; lora_alpha is four times the rank."""
    face, folder = tiny(frozen=("old",)), tmp_path_factory.mktemp("export")
    shaken(face.roles, "default", "old")
    face.export(folder, "default")
    return face, folder


def test_an_exported_lora_paints_the_same_picture_in_stock_diffusers(exported, tiny_folder, stock, tmp_path):
    _, folder = exported
    how = {"num_inference_steps": 4, "guidance_scale": 2.0}

    def stock_picture():
        made = stock(TEXTS[0], generator=torch.Generator().manual_seed(5), **how).images[0]
        return np.asarray(made, dtype=int)

    before = stock_picture()
    stock.load_lora_weights(folder)
    expected = stock_picture()
    assert np.abs(expected - before).max() > 8  # so that a LoRA which is not there, or too strong, would be seen
    (file,) = inference.sample(
        str(tiny_folder), [str(folder)], TEXTS[:1], tmp_path, QUIET, images_per_prompt=1, seed=5, **how
    )
    assert np.abs(np.asarray(Image.open(file), dtype=int) - expected).max() <= 1


@torch.no_grad()
def test_an_exported_lora_is_the_same_network_in_stock_diffusers(exported, stock, point):
    face, folder = exported
    stock.load_lora_weights(folder)
    flow = face.predict(*point, face.encode(TEXTS), "default").flow
    assert gap(stock_flow(stock, *point), flow) < 1e-4


@torch.no_grad()
def test_an_exported_lora_is_the_same_network_in_peft(exported, stock, point):
    face, folder = exported
    base = stock_flow(stock, *point)
    network = PeftModel.from_pretrained(stock.transformer, folder)
    flow = face.predict(*point, face.encode(TEXTS), "default").flow
    assert gap(flow, base) > 0.1
    assert gap(stock_flow(stock, *point, network), flow) < 1e-4


@torch.no_grad()
def test_full_fine_tuning_exports_a_pipeline_that_stock_loads(tiny, point, tmp_path):
    face = tiny(lora=None, frozen=("old",))
    shaken(face.roles, "default")
    face.export(tmp_path, "default")
    flow = face.predict(*point, face.encode(TEXTS), "default").flow
    assert gap(flow, face.predict(*point, face.encode(TEXTS), "old").flow) > 0.1
    assert gap(stock_flow(StableDiffusion3Pipeline.from_pretrained(tmp_path), *point), flow) < 1e-4


@pytest.mark.parametrize("name", ["tiny_folder", "tiny_sd_folder", "tiny_sdxl_folder", "tiny_flux_folder"])
def test_full_weights_of_a_run_in_bf16_load_in_stock_diffusers_whose_text_encoders_are_the_models_own(
    name, request, build_face, tmp_path, caplog
):
    folder = request.getfixturevalue(name)
    face = build_face(folder, lora=None, precision=torch.bfloat16)
    parts = dict(face.pipe.components)
    face.export(tmp_path, "default")
    assert face.pipe.components == parts
    pipe, base = DiffusionPipeline.from_pretrained(tmp_path), DiffusionPipeline.from_pretrained(folder)
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        if getattr(pipe, part, None) is not None:
            own, expected = (getattr(each, part).state_dict() for each in (pipe, base))
            assert all(torch.equal(own[key], tensor) for key, tensor in expected.items())
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe("a red circle", num_inference_steps=1).images) == 1
    for encoder in (parts["text_encoder"], parts.get("text_encoder_2")):
        if encoder is not None:
            encoder.config._name_or_path = encoder.name_or_path = str(tmp_path / "gone")
    face.export(tmp_path / "again", "default")
    assert "text_encoder" in caplog.text
    assert "the model's own files are gone" in caplog.text


# Training


def crd_gradient(face, batch_size):
    """The gradient of CRD's whole loss of a rollout of two prompts with four and two siblings."""
    shaken(face.roles, "default", "old", "sampler")
    group, sibling = torch.tensor([0, 1, 0, 0, 1, 0]), torch.tensor([0, 0, 1, 2, 1, 3])
    advantage = noise(6, seed=2)
    prompts = Prompts(tuple(TEXTS), ({}, {}), (0, 1))
    latents = noise(6, 8, 8, 8, seed=1)
    columns = {"reward": advantage.sigmoid(), "scaled": advantage, "advantage": advantage}
    rollout = Rollout(prompts, face.encode(TEXTS), latents, group, sibling, **columns, seed=0, step=0)
    rollouts = SimpleNamespace(
        config=RolloutConfig(num_inference_steps=4),
        time_grid=lambda: face.time_grid(4),
        mean_length=len,
        training_scale=1.0,
    )
    method = CRD(CRDConfig(num_train_times=2, kl_cfg=2.0), face, rollouts, batch_size)
    inputs = list(face.roles.parameters("default").values())
    for loss in method.losses(rollout):
        loss.value.backward(inputs=inputs)
    return torch.cat([p.grad.flatten() for p in inputs])


@pytest.fixture(scope="module")
def plain_gradient(tiny):
    return crd_gradient(tiny(frozen=("old", "sampler")), batch_size=6)


@pytest.mark.parametrize("lora", ["lora", "full"])
def test_gradient_checkpointing_does_not_change_the_gradient(tiny, plain_gradient, lora):
    settings = {} if lora == "lora" else {"lora": None}
    face = tiny(frozen=("old", "sampler"), **settings)
    face.roles.enable_gradient_checkpointing()
    assert face.roles.network.gradient_checkpointing
    expected = plain_gradient if lora == "lora" else crd_gradient(tiny(frozen=("old", "sampler"), **settings), 6)
    assert gap(crd_gradient(face, batch_size=6), expected) < 1e-6 * expected.abs().max()


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_neither_micro_batches_nor_groups_that_do_not_fit_one_change_the_gradient(tiny, plain_gradient, batch_size):
    gradient = crd_gradient(tiny(frozen=("old", "sampler")), batch_size)
    assert gap(gradient, plain_gradient) < 1e-4 * plain_gradient.abs().max()


def test_pictures_pass_a_gradient_to_latents_that_want_one_beyond_the_limits_too(tiny):
    face, latents = tiny(), 3 * noise(2, 8, 8, 8)
    assert not face.decode(latents).requires_grad
    expected = face.decode(latents)
    assert (expected == 0).any()  # so that a limit is in play
    wanted = latents.clone().requires_grad_()
    images = face.decode(wanted)
    assert gap(images.detach(), expected) < 1e-6
    (gradient,) = torch.autograd.grad(images.sum(), wanted)
    vae = face.pipe.vae
    raw = vae.decode(wanted / vae.config.scaling_factor + vae.config.shift_factor).sample / 2 + 0.5
    (unlimited,) = torch.autograd.grad(raw.sum(), wanted)
    assert gap(gradient, unlimited) < 1e-4 * unlimited.abs().max()


@torch.no_grad()
def test_all_copies_of_a_fully_trained_network_count_tokens_alike(tiny_folder, tiny, point):
    face = tiny(lora=None, frozen=("old",))
    condition = face.encode(TEXTS)
    assert condition.weight.max() == 256
    first, *others = (face.predict(*point, condition, role).value for role in ("default", "old", "ref"))
    assert all(torch.equal(first, other) for other in others)


def test_prompts_are_remembered_up_to_a_limit(tiny, monkeypatch):
    face, texts = tiny(), [f"a picture of {i}" for i in range(6)]
    one = face.encode(texts[:1]).tokens.nbytes
    monkeypatch.setattr("trimtab.pipelines.face.REMEMBERED", 3 * one)
    asked, embed = [], face._embed
    monkeypatch.setattr(face, "_embed", lambda texts: asked.append(*texts) or embed(texts))
    whole = face.encode(texts)
    assert len(face._memory) == 3
    asked.clear()
    again = face.encode(texts[::-1])
    assert asked == texts[2::-1]
    assert torch.equal(again.tokens, whole.tokens.flip(0))


def test_text_encoders_are_away_but_while_new_prompts_are_embedded(tiny, monkeypatch):
    face, plain = tiny(), tiny()
    encoders = [face.pipe.text_encoder, face.pipe.text_encoder_2, face.pipe.text_encoder_3]
    moves = []
    for encoder in encoders:
        monkeypatch.setattr(encoder, "to", lambda where, encoder=encoder: moves.append(str(where)) or encoder)
    monkeypatch.setattr(face, "_embed", lambda texts, embed=face._embed: moves.append(texts[0]) or embed(texts))
    face.device = torch.device("cpu", 0)  # told from main memory by its name
    face.offload_text_encoders()
    assert moves == ["cpu"] * 3
    moves.clear()
    found = face.encode([TEXTS[0], "a ring", TEXTS[0]])
    assert moves == ["cpu:0"] * 3 + [TEXTS[0], "a ring"] + ["cpu"] * 3
    assert torch.equal(found.tokens, plain.encode([TEXTS[0], "a ring", TEXTS[0]]).tokens)
    moves.clear()
    face.encode(["a ring", TEXTS[0]])
    assert moves == []  # what is remembered moves nothing
    face.embed(["a ring"])
    assert moves == ["cpu:0"] * 3 + ["a ring"] + ["cpu"] * 3
    moves.clear()
    monkeypatch.setattr(face, "_embed", lambda texts: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        face.encode(["a heart"])
    assert moves == ["cpu:0"] * 3 + ["cpu"] * 3
