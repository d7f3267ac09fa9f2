"""Adapters: a file that does not fit is refused before a weight is read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from trimtab.errors import UserError
from trimtab.pipelines import adapters, loading
from trimtab.pipelines.soft_tokens import TokenSettings
from trimtab.roles import LoraSettings

TO_Q = "transformer.transformer_blocks.0.attn.to_q"


def adapter(folder, tensors):
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, folder / adapters.LORA_FILE)
    return str(folder)


def test_a_folder_without_the_adapters_file_is_refused(tiny_folder, tmp_path):
    with pytest.raises(UserError, match=r"no pytorch_lora_weights\.safetensors and no soft_tokens\.safe"):
        loading.check_adapters([str(tmp_path)], str(tiny_folder))


@pytest.mark.parametrize("name", ["nofolder", ""])
def test_an_adapter_that_is_not_there_is_told_before_the_hub_is_asked_for_its_model(name):
    with pytest.raises(
        UserError, match=f"adapter folder '{name}' does not exist; give the `export` folder of a run, by"
    ):
        loading.check_adapters([name], "someone/sd3")


def test_a_run_given_as_an_adapter_is_told_its_export(tiny_folder, tmp_path):
    (tmp_path / "export").mkdir()
    adapter(tmp_path / "export", {f"{TO_Q}.lora_A.weight": (4, 32)})
    with pytest.raises(UserError, match=rf"did you mean {tmp_path}/export\?"):
        loading.check_adapters([str(tmp_path)], str(tiny_folder))


@pytest.mark.parametrize(
    ("part", "shape"), [("lora_A", (4, 48)), ("lora_B", (48, 4))], ids=["wrong inputs", "wrong outputs"]
)
def test_an_adapter_of_other_widths_belongs_to_another_model(tiny_folder, tmp_path, part, shape):
    folder = adapter(tmp_path, {f"{TO_Q}.{part}.weight": shape})
    message = r"belongs to another model than .* changes transformer_blocks\.0\.attn\.to_q, which is \(32, 32\) there"
    with pytest.raises(UserError, match=message):
        loading.check_adapters([folder], str(tiny_folder))


def test_an_adapter_with_modules_that_the_model_lacks_belongs_to_another_model(tiny_folder, tmp_path):
    folder = adapter(tmp_path, {"transformer.transformer_blocks.7.attn.to_q.lora_A.weight": (4, 32)})
    with pytest.raises(
        UserError, match=r"changes transformer_blocks\.7\.attn\.to_q, which is not in it; give the model"
    ):
        loading.check_adapters([folder], str(tiny_folder))


def test_a_file_that_is_no_adapter_is_refused(tiny_folder, tmp_path):
    (tmp_path / adapters.LORA_FILE).write_bytes(b"not a safetensors file")
    with pytest.raises(UserError, match=r"pytorch_lora_weights\.safetensors"):
        loading.check_adapters([str(tmp_path)], str(tiny_folder))


def test_an_adapter_that_fits_is_found_by_folder_and_by_file(tiny_folder, tmp_path):
    folder = adapter(tmp_path, {f"{TO_Q}.lora_A.weight": (4, 32), f"{TO_Q}.lora_B.weight": (32, 4)})
    file = tmp_path / adapters.LORA_FILE
    assert loading.check_adapters([folder], str(tiny_folder)).loras == (file,)
    assert loading.check_adapters([str(file)], str(tiny_folder)).loras == (file,)


def test_soft_tokens_are_known_by_what_they_say_of_themselves_not_by_their_name(tiny_folder, tmp_path):
    face = loading.load_with_tokens(str(tiny_folder), TokenSettings(num_layers=2), num_signs=1, roles=("default",))
    face.roles.export(tmp_path, "default", {})
    renamed = (tmp_path / "soft_tokens.safetensors").rename(tmp_path / "mine.safetensors")
    assert loading.check_adapters([str(renamed)], str(tiny_folder)).tokens == renamed


def test_a_folder_may_hold_a_lora_and_soft_tokens(tiny_folder, tmp_path):
    face = loading.load_with_tokens(str(tiny_folder), TokenSettings(num_layers=2), num_signs=1, roles=("default",))
    face.roles.export(tmp_path, "default", {})
    folder = adapter(tmp_path, {f"{TO_Q}.lora_A.weight": (4, 32), f"{TO_Q}.lora_B.weight": (32, 4)})
    found = loading.check_adapters([folder], str(tiny_folder))
    assert (len(found.loras), found.tokens) == (1, tmp_path / "soft_tokens.safetensors")
    with pytest.raises(UserError, match="are both soft tokens"):
        loading.check_adapters([folder, folder], str(tiny_folder))


@pytest.mark.parametrize(
    ("tensors", "header", "message"),
    [
        ({}, None, "lacks matrices of its LoRA; it is damaged"),
        ({f"{TO_Q}.lora_A.weight": (4, 32)}, None, "lacks matrices of its LoRA; it is damaged"),
        ({"transformer.transformer_blocks.0.attn.norm_q.lora_A.weight": (4, 16)}, None, "belongs to another model"),
        ({f"{TO_Q}.lora_A.weight": (32,)}, None, "belongs to another model"),
        ({f"{TO_Q}.lora_A.weight": (4, 32), f"{TO_Q}.lora_B.weight": (32, 4)}, "[1]", "the header of .* is damaged"),
        ({f"{TO_Q}.lora_A.weight": (4, 32), f"{TO_Q}.lora_B.weight": (32, 4)}, "{", "the header of .* is damaged"),
    ],
    ids=["nothing", "half", "of a norm", "a vector", "a list", "half a header"],
)
def test_a_damaged_lora_is_one_sentence(tiny_folder, tmp_path, tensors, header, message):
    metadata = None if header is None else {adapters.LORA_METADATA: header}
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / adapters.LORA_FILE, metadata)
    with pytest.raises(UserError, match=message):
        loading.check_adapters([str(tmp_path)], str(tiny_folder))


@pytest.mark.parametrize(
    "change",
    [
        lambda about, tensors: about.pop("sites"),
        lambda about, tensors: about.update(num_layers="x"),
        lambda about, tensors: about.update(stages='["top"]'),
        lambda about, tensors: tensors.pop("base"),
        lambda about, tensors: tensors.update(base=tensors["base"][:, :1].clone()),
        lambda about, tensors: tensors.update(time=tensors["time"][:, :99].clone()),
    ],
    ids=["no sites", "no number", "no stage", "no base", "too few sites", "too few times"],
)
def test_damaged_soft_tokens_are_one_sentence(tiny_folder, tmp_path, change):
    face = loading.load_with_tokens(str(tiny_folder), TokenSettings(num_layers=2), num_signs=1, roles=("default",))
    face.roles.export(tmp_path, "default", {})
    file = tmp_path / "soft_tokens.safetensors"
    with safe_open(file, framework="pt") as tensors:
        about = tensors.metadata()
    tensors = load_file(file)
    change(about, tensors)
    save_file(tensors, file, about)
    with pytest.raises(UserError, match=r"is damaged .* again"):
        loading.check_adapters([str(tmp_path)], str(tiny_folder))


def test_a_file_of_other_tensors_is_no_adapter(tiny_folder, tmp_path):
    folder = adapter(tmp_path, {"weight": (3, 3)})
    with pytest.raises(UserError, match="belongs to another model"):
        loading.check_adapters([folder], str(tiny_folder))


def test_an_adapter_given_twice_would_count_twice_and_is_refused(tiny_folder, tmp_path):
    folder = adapter(tmp_path, {f"{TO_Q}.lora_A.weight": (4, 32), f"{TO_Q}.lora_B.weight": (32, 4)})
    (tmp_path / "link").symlink_to(folder)
    for other in (folder, tmp_path / "link", f"{folder}/../{Path(folder).name}"):
        with pytest.raises(UserError, match="was given twice"):
            loading.check_adapters([folder, str(other)], str(tiny_folder))


def test_a_lora_may_be_trained_on_soft_tokens_which_all_its_roles_then_have(tiny_folder, tmp_path):
    face = loading.load_with_tokens(str(tiny_folder), TokenSettings(num_layers=2), num_signs=1, roles=("default",))
    face.roles.banks["default"].base.data.mul_(50)
    face.roles.export(tmp_path, "default", {})
    found = loading.check_adapters([str(tmp_path)], str(tiny_folder))
    x_t, t = torch.randn(2, *face.latent_shape(face.resolution)), torch.tensor(0.5)
    with torch.no_grad():
        plain, told = (
            loading.load_for_sampling(str(tiny_folder), each).predict(x_t, t, face.encode(["a", "b"]), "default").value
            for each in (adapters.Adapters(), found)
        )
    trained = loading.load(str(tiny_folder), lora=LoraSettings(rank=2, lora_alpha=2), adapters=found)
    for role in ("ref", "default"):  # an untrained LoRA changes nothing
        value = trained.predict(x_t, t, trained.encode(["a", "b"]), role).value
        assert (value - told).abs().max() < 1e-5
        assert (value - plain).abs().max() > 1e-3
    value.square().mean().backward()
    gradients = {name: p.grad for name, p in trained.roles.parameters("default").items()}
    assert any(g is not None and g.abs().max() > 0 for g in gradients.values())


def test_an_adapter_names_its_model_and_says_so_where_it_meets_another(tiny_folder, tmp_path, caplog):
    lora, tokens = tmp_path / "lora", tmp_path / "tokens"
    loading.load(str(tiny_folder), lora=LoraSettings(rank=2, lora_alpha=2)).export(lora, "default")
    face = loading.load_with_tokens(str(tiny_folder), TokenSettings(num_layers=2), num_signs=1, roles=("default",))
    face.roles.export(tokens, "default", {})
    assert json.loads((lora / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny_folder)
    loading.check_adapters([str(lora), str(tokens)], str(tiny_folder))
    assert not caplog.messages
    copied = shutil.copytree(tiny_folder, tmp_path / "twin")
    loading.check_adapters([str(lora), str(tokens)], str(copied))
    assert caplog.messages == [
        f"adapter {str(each)!r} was trained on {str(tiny_folder)!r} and is put on {str(copied)!r}"
        for each in (lora, tokens)
    ]


def test_full_weights_name_their_model_and_not_where_it_lay(tmp_path):
    loading.load("micro", lora=None).export(tmp_path, "default")
    assert json.loads((tmp_path / "model_index.json").read_text())["_name_or_path"] == "micro"


@pytest.mark.parametrize("file", ["transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"])
def test_a_damaged_model_is_one_sentence(tiny_folder, tmp_path, file):
    folder = shutil.copytree(tiny_folder, tmp_path / "damaged")
    (folder / file).write_text("{")
    with pytest.raises(UserError, match=r"damaged .*again"):
        loading.load_for_sampling(str(folder))


def test_a_student_whose_scheduler_is_damaged_is_refused(tiny_folder, tmp_path):
    folder = adapter(tmp_path, {f"{TO_Q}.lora_A.weight": (4, 32), f"{TO_Q}.lora_B.weight": (32, 4)})
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text("{")
    with pytest.raises(UserError, match=r"scheduler_config\.json cannot be read"):
        loading.check_adapters([folder], str(tiny_folder))
