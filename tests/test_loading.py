"""Loading: everything that is wrong with a model or an adapter is said before a weight is read."""

import json
import re
import shutil

import pytest
from diffusers import StableDiffusion3Pipeline
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from trimtab.errors import UserError
from trimtab.pipelines import few_step, loading
from trimtab.pipelines.adapters import LORA_FILE, Adapters


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
        loading.load_for_sampling(str(model))


def test_a_folder_without_an_index_is_no_pipeline(tmp_path):
    refused(tmp_path, f"model folder '{re.escape(str(tmp_path))}' has no model_index.json; give a folder saved by")


@pytest.mark.parametrize("name", ["KandinskyPipeline", None])
def test_an_unsupported_pipeline_is_named_with_those_that_are_supported(tmp_path, name):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    refused(
        tmp_path,
        rf"is a {name}; trimtab supports StableDiffusion3Pipeline, .*, StableDiffusionXLPipeline, FluxPipeline\.$",
    )


@pytest.mark.parametrize("text", ['{"_class_name": "Stable', "", "[1, 2]"])
def test_a_damaged_index_is_named(tmp_path, text):
    (tmp_path / "model_index.json").write_text(text)
    refused(tmp_path, r"model_index\.json is not .*the model folder is damaged, fetch it again\.$")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mikro", r"'mikro' is no built-in model \(micro, micro-turbo\) and no folder here; did you mean micro\?$"),
        ("micro-trubo", r"did you mean micro-turbo\?$"),
        ("gpt2", r"and no folder here; a model on the hub is named owner/name\.$"),
        *(
            (name, f"^model folder '{name}' does not exist")
            for name in ("./missing", "../a/b", "~/sd3", "sd3/", "a/b/c")
        ),
    ],
)
def test_the_hub_is_not_asked_for_what_it_cannot_have(name, says):
    refused(name, says)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (LocalEntryNotFoundError("offline"), "is no folder here, and the hub could not be reached; check the network"),
        (
            HFValidationError("Repo id must"),
            r"not to be had from the hub \(HFValidationError\); check the name, or log in",
        ),
    ],
)
def test_what_the_hub_does_not_give_is_told_with_the_reason(monkeypatch, error, says):
    def fail(*args):
        raise error

    monkeypatch.setattr(loading, "hf_hub_download", fail)
    refused("someone/sd3", says)


@pytest.mark.parametrize("folder", ["tiny", "tiny/export"])
def test_a_run_given_as_a_model_is_told_what_to_give(tmp_path, folder):
    export = tmp_path / "tiny" / "export"
    export.mkdir(parents=True)
    (export / LORA_FILE).write_bytes(b"")
    refused(tmp_path / folder, rf"export is an adapter, given beside its model, as in `.* micro --adapter {export}`")
    (export / "model_index.json").write_text("{}")  # full weights
    if folder == "tiny":
        refused(tmp_path / folder, f"has no model_index.json; give {export}\\.$")


def test_a_name_on_the_hub_is_judged_by_its_index_and_scheduler_alone(monkeypatch, tiny_folder):
    asked = []
    monkeypatch.setattr(loading, "hf_hub_download", lambda model, file: asked.append(file) or str(tiny_folder / file))
    assert loading.resolve("someone/sd3") == "someone/sd3"
    assert asked == ["model_index.json", "scheduler/scheduler_config.json"]


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, "has a DPMSolverMultistepScheduler; give it one of"),
        ("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}, "use_karras_sigmas=True and trimtab needs Fa"),
    ],
)
@pytest.mark.parametrize("family", ["tiny_folder", "tiny_flux_folder"])
def test_a_flow_model_whose_times_are_unknown_is_refused(request, tmp_path, family, name, config, message):
    index = json.loads((request.getfixturevalue(family) / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", name]}))
    (tmp_path / "scheduler").mkdir()
    (tmp_path / loading.SCHEDULER).write_text(json.dumps(config))
    refused(tmp_path, message)


@pytest.mark.parametrize("student", [True, False])
def test_a_students_lora_is_known_by_the_scheduler_beside_it(tmp_path, tiny_folder, student):
    adapters = Adapters((tmp_path / "mine" / LORA_FILE,))  # given as the folder or as the file
    if not student:
        loading.check_many_steps(str(tiny_folder), adapters, "crd")
        return
    few_step.flow_scheduler(1, 1.0).save_pretrained(tmp_path / "mine" / "scheduler")
    with pytest.raises(UserError, match=r"adapter '.*mine' is a few-step student, and crd begins from"):
        loading.check_many_steps(str(tiny_folder), adapters, "crd")


@pytest.mark.parametrize(
    ("name", "config", "refused"),
    [
        ("PNDMScheduler", {"timestep_spacing": "leading", "steps_offset": 1, "skip_prk_steps": True}, True),
        ("DDIMScheduler", {}, True),
        ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, False),  # as SD-Turbo and SDXL-Turbo have it
        ("LCMScheduler", {"original_inference_steps": 1000}, False),
    ],
)
def test_the_one_call_of_a_unet_is_made_at_noise_or_refused(
    tmp_path, tiny_sd_folder, caplog, monkeypatch, name, config, refused
):
    (tmp_path / "scheduler").mkdir()
    index = json.loads((tiny_sd_folder / "model_index.json").read_text()) | {"scheduler": ["diffusers", name]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / loading.SCHEDULER).write_text(json.dumps(config | {"_class_name": name}))
    monkeypatch.setattr(loading, "hf_hub_download", lambda model, file: str(tmp_path / file))
    for model in (str(tmp_path), "stabilityai/sd-turbo"):
        if refused:
            with pytest.raises(UserError, match=r"drpo calls its generator once, .* where there is hardly any noise"):
                loading.check_one_call(model, Adapters(), "drpo")
        else:
            loading.check_one_call(model, Adapters(), "drpo")
    few_step.flow_scheduler(1, 1.0).save_pretrained(tmp_path / "mine" / "scheduler")  # a student's LoRA brings its own
    loading.check_one_call(str(tmp_path), Adapters((tmp_path / "mine" / LORA_FILE,)), "drpo")
    assert not caplog.messages


@pytest.mark.parametrize("by_lora", [True, False])
def test_a_student_of_several_calls_is_no_generator_of_one(tmp_path, tiny_folder, by_lora):
    folder = tmp_path / "mine"
    if not by_lora:
        shutil.copytree(tiny_folder, folder)
    few_step.flow_scheduler(4, 1.0).save_pretrained(folder / "scheduler")
    adapters = Adapters((folder / LORA_FILE,)) if by_lora else Adapters()
    model = str(tiny_folder if by_lora else folder)
    with pytest.raises(UserError, match=r"(adapter|model) '.*mine' is a student of 4 calls, and drpo trains .* of one"):
        loading.check_one_call(model, adapters, "drpo")
    with pytest.raises(UserError, match=r"give the one that it was made from\.$"):  # and no method of one call
        loading.check_many_steps(model, adapters, "crd")


@pytest.mark.parametrize(
    ("model", "warnings"), [("micro", 1), ("someone/sd3", 1), ("micro-turbo", 0), ("stabilityai/sd3.5-large-turbo", 0)]
)
def test_a_transformer_of_which_nothing_says_that_few_calls_are_enough_is_told(
    tmp_path, tiny_folder, caplog, monkeypatch, model, warnings
):
    monkeypatch.setattr(loading, "hf_hub_download", lambda model, file: str(tiny_folder / file))
    loading.check_one_call(model, Adapters(), "drpo")
    assert len(caplog.messages) == warnings
    assert all(f"nothing says that model '{model}' draws well in few calls" in line for line in caplog.messages)
    few_step.flow_scheduler(1, 1.0).save_pretrained(tmp_path / "mine" / "scheduler")
    loading.check_one_call(model, Adapters((tmp_path / "mine" / LORA_FILE,)), "drpo")
    assert len(caplog.messages) == warnings


def test_a_flow_is_sampled_in_any_number_of_calls(tiny_folder):
    loading.check_calls(str(tiny_folder), 2000)
    loading.check_calls("micro", 2000)
