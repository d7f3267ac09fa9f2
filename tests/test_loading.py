"""Loading: everything that is wrong with a model or an adapter is said before a weight is read."""

import json
import re

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors.torch import save_file

from trimtab.errors import UserError
from trimtab.pipelines import loading

TO_Q = "transformer.transformer_blocks.0.attn.to_q"


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    """Reading weights, or asking the network, fails the test."""

    def read(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(StableDiffusion3Pipeline, "from_pretrained", read)
    monkeypatch.setattr(loading, "hf_hub_download", read)


def refused(model, message):
    with pytest.raises(UserError, match=message):
        loading.load(str(model), lora=None)
    with pytest.raises(UserError, match=message):
        loading.load_for_sampling(str(model), None)


def test_a_folder_without_an_index_is_no_pipeline(tmp_path):
    refused(tmp_path, f"model folder '{re.escape(str(tmp_path))}' has no model_index.json; give a folder saved by")


@pytest.mark.parametrize("name", ["FluxPipeline", None])
def test_an_unsupported_pipeline_is_named_with_those_that_are_supported(tmp_path, name):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    refused(tmp_path, rf"is a {name}; trimtab supports StableDiffusion3Pipeline, .*, StableDiffusionXLPipeline\.$")


@pytest.mark.parametrize("text", ['{"_class_name": "Stable', "", "[1, 2]"])
def test_a_damaged_index_is_named(tmp_path, text):
    (tmp_path / "model_index.json").write_text(text)
    refused(tmp_path, r"model_index\.json is not .*the model folder is damaged, fetch it again\.$")


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("offline"), HFValidationError("Repo id must")])
def test_an_unknown_name_is_told_the_built_in_ones(monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(loading, "hf_hub_download", fail)
    refused(
        "mikro", rf"'mikro' is no built-in model \(micro\), no folder, .*\({type(error).__name__}\); check the name"
    )


def test_a_name_on_the_hub_is_judged_by_its_index_alone(monkeypatch, tmp_path):
    (tmp_path / "index").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    asked = []
    monkeypatch.setattr(loading, "hf_hub_download", lambda *args: asked.append(args) or str(tmp_path / "index"))
    assert loading.resolve("someone/sd3") == "someone/sd3"
    assert asked == [("someone/sd3", "model_index.json")]


# Adapters


def adapter(folder, tensors):
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, folder / loading.LORA_FILE)
    return str(folder)


def test_a_folder_without_the_adapters_file_is_refused(tiny_folder, tmp_path):
    with pytest.raises(UserError, match=r"has no pytorch_lora_weights\.safetensors; give the `export` folder of a run"):
        loading.check_adapter(str(tmp_path), str(tiny_folder))


@pytest.mark.parametrize(
    ("part", "shape"), [("lora_A", (4, 48)), ("lora_B", (48, 4))], ids=["wrong inputs", "wrong outputs"]
)
def test_an_adapter_of_other_widths_belongs_to_another_model(tiny_folder, tmp_path, part, shape):
    folder = adapter(tmp_path, {f"{TO_Q}.{part}.weight": shape})
    message = r"belongs to another model than .* changes transformer_blocks\.0\.attn\.to_q, which is \(32, 32\) there"
    with pytest.raises(UserError, match=message):
        loading.check_adapter(folder, str(tiny_folder))


def test_an_adapter_with_modules_that_the_model_lacks_belongs_to_another_model(tiny_folder, tmp_path):
    folder = adapter(tmp_path, {"transformer.transformer_blocks.7.attn.to_q.lora_A.weight": (4, 32)})
    with pytest.raises(
        UserError, match=r"changes transformer_blocks\.7\.attn\.to_q, which is not in it; give the model"
    ):
        loading.check_adapter(folder, str(tiny_folder))


def test_a_file_that_is_no_adapter_is_refused(tiny_folder, tmp_path):
    (tmp_path / loading.LORA_FILE).write_bytes(b"not a safetensors file")
    with pytest.raises(UserError, match=r"pytorch_lora_weights\.safetensors"):
        loading.check_adapter(str(tmp_path), str(tiny_folder))


def test_an_adapter_that_fits_is_found_by_folder_and_by_file(tiny_folder, tmp_path):
    folder = adapter(tmp_path, {f"{TO_Q}.lora_A.weight": (4, 32), f"{TO_Q}.lora_B.weight": (32, 4)})
    file = tmp_path / loading.LORA_FILE
    assert loading.check_adapter(folder, str(tiny_folder)) == loading.check_adapter(str(file), str(tiny_folder)) == file
