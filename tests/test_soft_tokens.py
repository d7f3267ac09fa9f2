"""Soft tokens on small random pipelines of the three families: what they change, and that nothing else is changed."""

import hashlib
import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

import trimtab
from trimtab.errors import UserError
from trimtab.evaluate import sample
from trimtab.pipelines import loading, soft_tokens
from trimtab.pipelines.soft_tokens import (
    NEGATIVE,
    POSITIVE,
    Injection,
    SoftTokens,
    TokenBank,
    TokenSettings,
)
from trimtab.pipelines.token_files import check_file, metadata, read_bank

SETTINGS = TokenSettings(num_tokens=3, num_layers=2)
TEXTS = ["a photo of a red circle", "a photo of two stars"]
FAMILIES = ["tiny_folder", "tiny_sd_folder", "tiny_sdxl_folder"]


def open_face(folder, num_signs=2, roles=("default", "average"), settings=SETTINGS):
    return loading.load_with_tokens(str(folder), settings, num_signs=num_signs, roles=roles)


@pytest.fixture(params=FAMILIES)
def model(request):
    """A folder, its face with tokens large enough to matter, and two points with a condition each."""
    folder = request.getfixturevalue(request.param)
    face = open_face(folder)
    loud(face.roles)
    x_t = noise(2, *face.latent_shape(face.resolution))
    return SimpleNamespace(folder=folder, face=face, x_t=x_t, t=torch.tensor([0.3, 0.9]), condition=face.encode(TEXTS))


def loud(tokens):
    for seed, bank in enumerate(tokens.banks.values()):
        for parameter in bank.parameters():
            parameter.data = noise(*parameter.shape, seed=seed + 1)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gap(a, b):
    return (a - b).abs().max().item()


def checksum(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for tensor in network.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def value(model, role="default", rows=slice(None)):
    return model.face.predict(model.x_t[rows], model.t[rows], model.condition[rows], role).value


# The formula


def test_a_token_is_the_base_of_its_sign_and_site_and_the_time_of_its_ten_timesteps():
    bank = TokenBank(2, 3, 5, SETTINGS)
    timestep, sign = torch.tensor([0.0, 9.9, 10.0, 999.0, 1000.0]), torch.tensor([0, 1, 0, 1, 1])
    tokens = bank(2, timestep, sign)
    for row, bucket in enumerate([0, 0, 1, 99, 99]):
        assert torch.equal(tokens[row], bank.base[sign[row], 2] + bank.time[0, bucket, 2])


def test_a_time_table_for_each_sign_is_a_choice():
    bank = TokenBank(2, 1, 5, TokenSettings(separate_times=True))
    plus, minus = bank(0, torch.tensor([500.0, 500.0]), torch.tensor([0, 1]))
    assert torch.allclose(minus - bank.base[1, 0], bank.time[1, 50].expand(4, 5))
    assert torch.allclose(plus - bank.base[0, 0], bank.time[0, 50].expand(4, 5))


@pytest.mark.parametrize(
    ("num_signs", "sites", "width", "separate", "number"),
    [
        (2, 1, 768, False, 82_944),
        (2, 1, 2048, False, 221_184),
        (2, 5, 1536, False, 829_440),
        (2, 5, 1536, True, 1_597_440),
        (1, 1, 768, False, 79_872),
    ],
)
def test_published_sizes(num_signs, sites, width, separate, number):
    bank = TokenBank(num_signs, sites, width, TokenSettings(separate_times=separate))
    assert sum(parameter.numel() for parameter in bank.parameters()) == number


def test_fresh_tokens_are_small_and_a_seed_draws_the_same():
    one, same, other = (TokenBank(2, 5, 64, SETTINGS, seed) for seed in (0, 0, 1))
    assert one.base.std().item() == pytest.approx(0.02, rel=0.1)
    assert one.time.std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(one.base, same.base)
    assert not torch.equal(one.base, other.base)


# What the network does with them


@torch.no_grad()
def test_without_tokens_the_network_computes_bit_for_bit_what_it_always_did(model):
    plain = loading.load_for_sampling(str(model.folder))
    expected = plain.predict(model.x_t, model.t, model.condition, "default").value
    assert gap(value(model), expected) > 1e-3
    assert torch.equal(value(model, "ref"), expected)
    model.face.roles.injection.remove()
    assert torch.equal(value(model), expected)


@torch.no_grad()
def test_each_row_gets_the_tokens_of_its_sign_and_time(model):
    banks = model.face.roles
    with banks.signs(torch.tensor([POSITIVE, NEGATIVE])):
        mixed = value(model)
    assert gap(mixed[:1], value(model, rows=slice(0, 1))) < 1e-5
    with banks.signs(torch.tensor([NEGATIVE])):
        assert gap(mixed[1:], value(model, rows=slice(1, 2))) < 1e-5
    assert gap(mixed[1:], value(model, rows=slice(1, 2))) > 1e-3


@torch.no_grad()
def test_guidance_gives_both_branches_the_tokens_of_their_row(model):
    sign = torch.tensor([NEGATIVE, POSITIVE])
    with model.face.roles.signs(sign):
        both = model.face.predict(model.x_t, model.t, model.condition, "default", 3.0).value
        cond = value(model)
        null = model.face.unconditional.expand(2)
        uncond = model.face.predict(model.x_t, model.t, null, "default").value
    assert gap(both, uncond + 3 * (cond - uncond)) < 1e-4


def test_signs_that_do_not_fit_the_rows_are_an_error(model):
    with model.face.roles.signs(torch.tensor([0, 1, 0])), pytest.raises(ValueError, match="3 signs do not fit 2 rows"):
        value(model)


@torch.no_grad()
def test_after_every_block_the_text_of_an_mmdit_is_as_long_as_before(tiny_folder):
    face = open_face(tiny_folder)
    texts = []
    for block in face.roles.network.transformer_blocks:
        block.register_forward_hook(lambda block, args, output: texts.append(output[0]))
    condition = face.encode(TEXTS)
    face.predict(noise(2, *face.latent_shape(face.resolution)), torch.tensor(0.5), condition, "default")
    assert texts[0].shape == (2, condition.tokens.shape[1], face.roles.network.inner_dim)
    assert texts[1] is None  # the last block of an MMDiT has no text left


@torch.no_grad()
def test_an_mmdit_does_not_mind_whether_they_stand_before_its_text_or_after(tiny_folder, monkeypatch):
    face = open_face(tiny_folder)
    loud(face.roles)
    how = {
        "hidden_states": noise(2, *face.latent_shape(face.resolution)),
        "encoder_hidden_states": noise(2, 7, face.roles.network.config.joint_attention_dim),
        "pooled_projections": face.encode(TEXTS).pooled,
        "timestep": torch.tensor([300.0, 900.0]),
    }
    expected = face.roles("default", **how).sample

    def before(self, call, text):
        return torch.cat([call.tokens(self.site, text), text], dim=1)

    def cut(self, block, args, output):
        text, pixels = output
        return None if text is None else text[:, SETTINGS.num_tokens :], pixels

    monkeypatch.setattr(soft_tokens._Inserted, "_joined", before)
    monkeypatch.setattr(Injection, "_cut", cut)
    other = open_face(tiny_folder)
    loud(other.roles)
    assert gap(other.roles("default", **how).sample, expected) < 1e-5


# Gradients


def gradients(face, model, sign=(0, 1)):
    bank = face.roles.banks["default"]
    bank.zero_grad()
    with face.roles.signs(torch.tensor(sign)):
        face.predict(model.x_t, model.t, model.condition, "default").value.square().mean().backward()
    return [parameter.grad.clone() for parameter in bank.parameters()]


def test_a_sign_has_a_gradient_from_its_rows_alone_and_the_time_table_from_all(model):
    base, time = gradients(model.face, model, (0, 0))
    assert base[0].abs().max() > 0
    assert base[1].abs().max() == 0
    assert len(time[0].abs().amax((1, 2)).nonzero()) == 2  # a row for each of the two times
    assert gradients(model.face, model, (1, 1))[0][0].abs().max() == 0


def test_gradient_checkpointing_changes_no_gradient_even_if_another_bank_was_called_in_between(model, monkeypatch):
    expected = gradients(model.face, model)
    face, segments = open_face(model.folder), []
    checkpoint = soft_tokens.checkpoint
    monkeypatch.setattr(soft_tokens, "checkpoint", lambda *args, **how: segments.append(0) or checkpoint(*args, **how))
    loud(face.roles)
    face.roles.enable_gradient_checkpointing()
    bank = face.roles.banks["default"]
    with face.roles.signs(torch.tensor([0, 1])):
        out = face.predict(model.x_t, model.t, model.condition, "default").value
    with torch.no_grad():
        face.predict(model.x_t, model.t + 0.05, model.condition, "average")
    out.square().mean().backward()
    assert len(segments) >= 2
    for parameter, want in zip(bank.parameters(), expected, strict=True):
        assert gap(parameter.grad, want) <= 1e-6 * want.abs().max()


def test_only_the_first_role_learns_and_the_backbone_never(model):
    tokens = model.face.roles
    before = checksum(tokens.network)
    optimizer = torch.optim.AdamW(tokens.banks["default"].parameters(), 1e-2)
    for _ in range(3):
        value(model).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        tokens.blend("average", "default", 0.9)
    assert checksum(tokens.network) == before
    assert not any(parameter.requires_grad for parameter in tokens.network.parameters())
    assert not any(parameter.requires_grad for parameter in tokens.banks["average"].parameters())


def test_four_pairs_can_be_learnt_by_heart(tiny_sd_folder):
    face = open_face(tiny_sd_folder, num_signs=1, roles=("default",))
    x_t, wanted = noise(4, 4, 8, 8), noise(4, 4, 8, 8, seed=1)
    condition = face.encode(["one", "two", "three", "four"])
    optimizer = torch.optim.AdamW(face.roles.banks["default"].parameters(), 2e-2)

    def error(role):
        return (face.predict(x_t, torch.tensor(0.5), condition, role).value - wanted).square().mean()

    base = error("ref").item()
    for _ in range(60):
        error("default").backward()
        optimizer.step()
        optimizer.zero_grad()
    assert error("default").item() < base - 0.01


# Roles


def test_the_average_starts_as_a_copy_and_moves_by_its_share(model):
    tokens = open_face(model.folder).roles
    assert torch.equal(tokens.banks["average"].base, tokens.banks["default"].base)
    old = tokens.banks["average"].base.clone()
    tokens.banks["default"].base.data += 1
    tokens.blend("average", "default", 0.75)
    assert gap(tokens.banks["average"].base, old + 0.25) < 1e-6


def test_a_state_is_taken_back_whole(model):
    other = open_face(model.folder).roles
    other.load_state_dict(model.face.roles.state_dict())
    for role, bank in model.face.roles.banks.items():
        assert torch.equal(other.banks[role].time, bank.time)


def test_an_unknown_role_is_an_error(model):
    with pytest.raises(ValueError, match="role 'old' does not exist"):
        value(model, "old")


def test_tokens_can_start_at_a_text_token_of_a_unet(tiny_sd_folder):
    face = open_face(tiny_sd_folder)
    first = face.encode([""]).tokens[0, 0]
    face.roles.start_at(first)
    for bank in face.roles.banks.values():
        assert torch.equal(bank.base, first.expand_as(bank.base))


# Files, and ordinary pipelines


@torch.no_grad()
def test_an_ordinary_pipeline_draws_with_the_tokens_what_the_face_draws_and_takes_them_off_again(model, tmp_path):
    face = model.face
    face.roles.export(tmp_path, "default", {"method": "agsm"})
    pipe = DiffusionPipeline.from_pretrained(model.folder)
    pipe.set_progress_bar_config(disable=True)
    how = {"num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "pt", "latents": model.x_t}
    plain = pipe(TEXTS, **how).images
    trimtab.load_soft_tokens(pipe, tmp_path)
    drawn = pipe(TEXTS, **how).images
    assert gap(drawn, plain) > 2 / 255
    if face.NETWORK == "transformer":  # a UNet's published scheduler takes other steps than ours
        own = face.decode(sample(face, model.x_t[None], face.time_grid(4), model.condition, "default", 2.0))
        assert gap(drawn, own) < 1 / 255
    trimtab.unload_soft_tokens(pipe)
    trimtab.unload_soft_tokens(pipe)
    assert torch.equal(pipe(TEXTS, **how).images, plain)


@torch.no_grad()
def test_loading_twice_replaces_the_tokens(model, tmp_path):
    for role in ("default", "average"):
        model.face.roles.export(tmp_path / role, role, {})
    plain = loading.load_for_sampling(str(model.folder))
    for role in ("default", "average"):
        trimtab.load_soft_tokens(plain.pipe, tmp_path / role)
    assert torch.equal(plain.predict(model.x_t, model.t, model.condition, "x").value, value(model, "average"))


@torch.no_grad()
def test_tokens_stack_with_a_lora(tiny_folder, tiny, tmp_path):
    adapted = tiny()
    for seed, parameter in enumerate(adapted.roles.parameters("default").values()):
        parameter.data += 0.1 * noise(*parameter.shape, seed=seed)
    adapted.export(tmp_path / "lora", "default")
    files = loading.check_adapters([str(tmp_path / "lora")], str(tiny_folder))
    face = loading.load_with_tokens(
        str(tiny_folder), SETTINGS, num_signs=1, roles=("default",), merged=files.loras, seed=3
    )
    loud(face.roles)
    face.roles.export(tmp_path / "tokens", "default", {})
    x_t, condition = noise(2, *face.latent_shape(face.resolution)), face.encode(TEXTS)
    expected = face.predict(x_t, torch.tensor(0.5), condition, "default").value

    both = loading.check_adapters([str(tmp_path / "tokens"), str(tmp_path / "lora")], str(tiny_folder))
    stacked = loading.load_for_sampling(str(tiny_folder), both)
    assert gap(stacked.predict(x_t, torch.tensor(0.5), condition, "default").value, expected) < 1e-5

    pipe = DiffusionPipeline.from_pretrained(tiny_folder)
    pipe.load_lora_weights(tmp_path / "lora")
    trimtab.load_soft_tokens(pipe, tmp_path / "tokens")
    pipe.set_progress_bar_config(disable=True)
    images = pipe(TEXTS, latents=x_t, num_inference_steps=3, guidance_scale=1.0, output_type="pt").images
    assert gap(images, face.decode(sample(face, x_t[None], face.time_grid(3), condition, "default", 1.0))) < 1 / 255


def test_a_file_says_what_it_fits_and_comes_back_as_it_was(model, tmp_path):
    tokens = model.face.roles
    tokens.export(tmp_path, "default", {"method": "agsm"})
    about = metadata(tmp_path / soft_tokens.FILE)
    assert about["architecture"] == type(tokens.network).__name__
    assert (about["base_model"], about["method"]) == (str(model.folder), "agsm")
    assert json.loads(about["shapes"])["base"] == list(tokens.banks["default"].base.shape)
    assert json.loads(about["sites"]) == list(tokens.injection.sites.names)
    bank, settings = read_bank(loading.skeleton(str(model.folder)), tmp_path)
    assert settings == SETTINGS
    assert torch.equal(bank.base, tokens.banks["default"].base)
    assert torch.equal(bank.time, tokens.banks["default"].time)


def test_tokens_of_another_architecture_or_size_are_refused(tiny_folder, tiny_sd_folder, tiny_sdxl_folder, tmp_path):
    folders = (tiny_folder, tiny_sd_folder, tiny_sdxl_folder)
    for made in folders:
        open_face(made).roles.export(tmp_path / made.name, "default", {})
    for made in folders:
        for used in folders:
            if made != used:
                with pytest.raises(UserError, match=r"holds soft tokens for a .*, and this model is a .*; give theirs"):
                    check_file(loading.skeleton(str(used)), tmp_path / made.name / soft_tokens.FILE)


def test_files_that_hold_no_tokens_are_refused(tiny_folder, tmp_path, tiny):
    network = loading.skeleton(str(tiny_folder))
    with pytest.raises(UserError, match="can't be read as soft tokens"):
        read_bank(network, tmp_path)
    (tmp_path / soft_tokens.FILE).write_bytes(b"no")
    with pytest.raises(UserError, match="can't be read as soft tokens"):
        read_bank(network, tmp_path)
    tiny().export(tmp_path, "default")
    (tmp_path / "pytorch_lora_weights.safetensors").rename(tmp_path / soft_tokens.FILE)
    with pytest.raises(UserError, match="holds no soft tokens of trimtab's"):
        read_bank(network, tmp_path)


def test_what_has_no_place_for_tokens_is_refused(tiny_folder, tiny_sd_folder):
    with pytest.raises(UserError, match="9 layers of soft tokens do not fit a model of 2 blocks"):
        loading.check_tokens(TokenSettings(num_layers=9), str(tiny_folder))
    loading.check_tokens(TokenSettings(stages=("mid",)), str(tiny_sd_folder), from_text=True)
    with pytest.raises(UserError, match=r"tokens of width 32 can't start as text of model .*, whose width is 128; set"):
        loading.check_tokens(TokenSettings(num_layers=2), str(tiny_folder), from_text=True)
    with pytest.raises(UserError, match="and this model is a Linear"):
        SoftTokens(nn.Linear(1, 1), SETTINGS, num_signs=1)
    with pytest.raises(UserError, match="neither a transformer nor a unet"):
        trimtab.load_soft_tokens(SimpleNamespace(), "nowhere")
