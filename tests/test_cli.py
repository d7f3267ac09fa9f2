"""Bad input is one sentence on stderr and exit code 2, before any weights load; and what the recipes are."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file

from trimtab import __version__, inputs
from trimtab.cli import console, main
from trimtab.files import lock
from trimtab.pipelines import adapters, few_step, loading
from trimtab.pipelines.sd3 import SD3
from trimtab.run import RECIPES, load_config

REWARD = """
def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3))

def raises(images, prompts, metadata):
    raise ValueError("one\\n  two")
"""
HOLDER = """
import sys
from trimtab.files import lock
with lock("runs/mine"):
    print("held", flush=True)
    sys.stdin.read()
"""
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))


@pytest.fixture
def cli(monkeypatch, capsys):
    """Runs `trimtab ...` in this process: (exit code, stdout, stderr)."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["trimtab", *map(str, words)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def refused(cli, monkeypatch):
    """The sentence with which `trimtab ...` is refused; the test fails if it is more than that, or if weights load."""

    def never(*args, **kwargs):
        pytest.fail("weights were loaded before the input was checked")

    monkeypatch.setattr(SD3.PIPELINE, "from_pretrained", never)

    def call(*words):
        code, _, stderr = cli(*words)
        assert code == 2
        assert stderr.startswith("trimtab: ")
        assert stderr.endswith("\n")
        assert stderr.count("\n") == 1
        return stderr.removeprefix("trimtab: ").strip()

    return call


@pytest.fixture
def recipe(tmp_path, monkeypatch, tiny_folder):
    """Writes a sound recipe for the tiny model, with sections replaced, into the working folder, which is tmp_path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reward.py").write_text(REWARD)
    (tmp_path / "prompts.txt").write_text("a red dog\na blue cat\n")

    def write(**sections):
        data = {
            "name": "mine",
            "method": {"name": "crd", "num_train_times": 2},
            "model": {"pretrained_model_name_or_path": str(tiny_folder), "rank": 2, "mixed_precision": "no"},
            "data": {"prompts": "prompts.txt"},
            "rewards": {"reward.py:brightness": 1.0},
            "rollout": {"num_prompts": 2, "group_size": 4, "num_inference_steps": 2},
            "training": {"max_train_steps": 1, "num_validation_prompts": 1},
        }
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(data | sections))
        return path

    return write


def write(path, text):
    Path(path).write_text(text)
    return path


# What may be said


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("rollout.group_sise=8", "did you mean rollout.group_size?"),
        ("optimizer.lr=1e-4", "learning_rate"),
        ("training.max_train_stesp=3", "did you mean training.max_train_steps?"),
        ("method.kl_bta=1", "did you mean method.kl_beta?"),
        ("group_size=3", "did you mean rollout.group_size?"),
        ("modle.rank=3", "did you mean model?"),
    ],
)
def test_a_misspelt_key_is_refused_with_the_nearest_name(refused, recipe, override, says):
    sentence = refused("train", recipe(), override)
    assert "unknown key" in sentence
    assert says in sentence


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("rollout.group_size=four", "an integer > 0"),
        ("rollout.group_size=0", "an integer > 0"),
        ("rollout.group_size=1", "give 2 or more, for samples are compared with their siblings"),
        ("rollout.group_size=2.5", "an integer > 0"),
        ("rollout.guidance_scale=-1", "a number >= 0"),
        ("rollout.num_prompts=", "an integer > 0"),
        ("evaluation.guidance_scale=-0.5", "a number >= 0"),
        ("optimizer.learning_rate=0", "a number > 0"),
        ("optimizer.adam_beta1=1", "< 1"),
        ("training.max_train_steps=0", "an integer > 0"),
        ("model.mixed_precision=fp16", '"bf16"'),
        ("model.mixed_precision=8bit", '"bf16"'),
        ("model.finetune_type=lorra", 'did you mean "lora"'),
        ("model.target_modules=to_q", "a list"),
        ("model.resolution=0", "> 0"),
        ("method={name: crd, min_time: 0.5, max_time: 0.5}", "min_time 0.5 is not below max_time 0.5"),
        ("method.name=cdr", '"crd"'),
        ("method.crd_beta=.inf", "a finite number"),
        ("method=crd", "a section"),
        ("rewards={reward.py:brightness: a lot}", "a number"),
        ("rewards=[reward.py:brightness]", "a mapping"),
        ("seed=-1", ">= 0"),
        ("name=a/b", "name"),
        ("name=..", "name"),
        ("name=", "a text"),
        ("name='a b'", "give letters, digits, _, - and dots, and begin with no - or dot"),
        ("data.pictures=''", "a text"),
        ("data.prompts=''", "name nothing; give 'blocks'"),
        ("method.name=agsm", "is a setting of crd and diffusion-nft, and method.name is agsm; leave it out"),
    ],
)
def test_a_value_of_the_wrong_type_or_out_of_range_is_refused_with_what_it_may_be(refused, recipe, override, says):
    sentence = refused("train", recipe(), override)
    assert override.split("=")[0].rpartition(".")[2] in sentence
    assert says in sentence


@pytest.mark.parametrize(
    ("name", "override", "says"),
    [
        ("crd-micro", "data.pairs=nofile.jsonl", "only method.name=drpo method.variant=offline learns from pairs"),
        ("gndm-micro-4step", "data.pairs=x.jsonl", "only method.name=drpo method.variant=offline learns from pairs"),
        ("agsm-micro", "data.pairs=x.jsonl", "only method.name=drpo method.variant=offline learns from pairs"),
        ("pretrain-micro", "data.pairs=x.jsonl", "only method.name=drpo method.variant=offline learns from pairs"),
        ("crd-micro", "data.pictures=nofolder", "only agsm, softrepa, and dmd2 with method.gan_weight above 0 learn"),
        ("dmd2-micro-4step", "data.pictures=nofolder", "and dmd2 with method.gan_weight above 0 learn from pictures"),
        ("drpo-micro-turbo-offline", "data.pictures=nofolder", "learn from pictures; leave it out"),
        ("pretrain-micro", "data.prompts=nofile.txt", "pre-training, agsm, softrepa"),
        ("agsm-micro", "data.prompts=nofile.txt", "agsm, softrepa, and drpo with method.variant=offline read none"),
        ("drpo-micro-turbo-offline", "data.prompts=nofile.txt", "method.variant=offline read none"),
        ("pretrain-micro", "rewards={nofile.py:f: 1.0}", "pretrain-micro has none"),
        ("pretrain-micro", "evaluation.suite=nofile.txt", "pretrain-micro is not evaluated"),
        ("agsm-micro", "model.finetune_type=full", "agsm trains soft tokens alone"),
    ],
)
def test_what_the_method_would_never_look_at_is_refused(refused, name, override, says):
    sentence = refused("train", name, override)
    assert sentence.startswith(f"{override.split('=')[0]}")
    assert "is given, and " in sentence
    assert says in sentence


@pytest.mark.parametrize("pixels", [72, 256])
def test_a_resolution_that_the_model_can_t_draw_is_refused(refused, recipe, tiny_folder, pixels):
    says = "a multiple of 16 pixels up to 128"
    assert says in refused("train", recipe(), f"model.resolution={pixels}")
    assert says in refused("sample", str(tiny_folder), "-p", "a photo of a star", "--resolution", str(pixels))


@pytest.mark.parametrize("schedule", ["75-0", "fast", "0-2-0-1", "0.5-0-0-1", "0-nan-0-1", "inf-0-0-1", "nan-0-0-1"])
@pytest.mark.parametrize("key", ["old_model_decay", "sampling_model_decay"])
def test_a_malformed_schedule_is_refused_with_an_example(refused, recipe, key, schedule):
    sentence = refused("train", recipe(), f"method.{key}='{schedule}'")
    assert f"method.{key}" in sentence
    assert "75-0-0.0075-0.999" in sentence


@pytest.mark.parametrize("override", ["rollout.group_size", "=3", "rollout..group_size=3", "a b=3", "-x=3"])
def test_an_override_that_is_not_key_is_value_is_refused(refused, recipe, override):
    assert "rollout.group_size=8" in refused("train", recipe(), "--", override)


@pytest.mark.parametrize("override", ["rewards={a", "name.x=3", "seed=[1, 2"])
def test_an_override_that_cannot_be_written_is_refused(refused, recipe, override):
    assert repr(override) in refused("train", recipe(), override)


# Files


def test_a_missing_recipe_is_refused_with_the_nearest_one(refused, recipe):
    assert "did you mean crd-micro" in refused("train", "crd-mirco")
    assert "no/such.yaml" in refused("train", "no/such.yaml")


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "name: a\nname: b\n", "name: [\n", "\tname: a\n"])
def test_a_recipe_that_is_no_mapping_is_refused_with_its_line(refused, recipe, tmp_path, text):
    assert "bad.yaml, line " in refused("train", write(tmp_path / "bad.yaml", text))


def test_an_incomplete_recipe_is_refused_with_what_is_missing(refused, recipe, tmp_path):
    assert "method" in refused("train", write(tmp_path / "bad.yaml", "name: a\ntraining: {max_train_steps: 1}\n"))


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("none.txt", None, "do not exist"),
        ("empty.txt", "", "is empty"),
        ("blank.txt", "\n  \n\n", "is empty"),
        ("prompts.csv", "a,b\n", "'.csv'"),
        ("bad.jsonl", '{"prompt": "a"}\n\n{"prompt": \n', "line 3 is not JSON"),
        ("bad.jsonl", '{"prompt": "a"}\n["b"]\n', "line 2 has no text under 'prompt'"),
        ("bad.jsonl", '{"promt": "a"}\n', "line 1 has no text under 'prompt'"),
        ("bad.jsonl", '{"prompt": ""}\n', "line 1 has no text under 'prompt'"),
        ("folder", "", "do not exist"),
    ],
)
@pytest.mark.parametrize("key", ["data.prompts", "evaluation.suite"])
def test_a_prompt_file_that_cannot_be_used_is_refused_with_its_line(refused, recipe, tmp_path, key, name, text, says):
    if name == "folder":
        (tmp_path / name).mkdir()
    elif text is not None:
        write(tmp_path / name, text)
    assert says in refused("train", recipe(), f"{key}={name}")


def test_latin_1_prompts_are_refused(refused, recipe, tmp_path):
    (tmp_path / "latin.txt").write_bytes("un café\n".encode("latin-1"))
    assert "UTF-8" in refused("train", recipe(), "data.prompts=latin.txt")


def test_a_folder_of_prompts_without_a_test_file_is_refused_if_pictures_of_it_are_wanted(refused, recipe, tmp_path):
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "train.txt", "a dog\na cat\n")
    assert "test" in refused("train", recipe(), "data.prompts=folder")


# Rewards


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("none.py:brightness", "there is no file"),
        ("reward.py:brightnes", "'brightnes' is missing"),
        ("reward.py", "unknown"),
        ("reward.py:", "expected 'package.module:function'"),
        ("broken.py:f", "No module named 'no_such_module'"),
        ("syntax.py:f", "SyntaxError"),
        ("number.py:f", "name a function"),
        ("signature.py:f", "images, prompts, metadata"),
        ("no_such_package.rewards:f", "No module named"),
        ("genevall", "did you mean 'geneval'"),
        ("pickscore", "unknown"),
    ],
)
def test_a_reward_that_cannot_be_had_is_refused(refused, recipe, tmp_path, name, says):
    write(tmp_path / "broken.py", "import no_such_module\n")
    write(tmp_path / "syntax.py", "def f(:\n")
    write(tmp_path / "number.py", "f = 3\n")
    write(tmp_path / "signature.py", "def f(x, y):\n    return 0\n")
    sentence = refused("train", recipe(rewards={name: 1.0}))
    assert repr(name) in sentence
    assert says in sentence


@pytest.mark.parametrize("rewards", [{}, {"reward.py:brightness": 0.0}])
def test_a_recipe_that_trains_on_nothing_is_refused(refused, recipe, rewards):
    assert "reward" in refused("train", recipe(rewards=rewards))


def test_the_advice_for_a_recipe_without_reward_can_be_followed(refused, recipe):
    advice = refused("train", recipe(rewards={})).split("for example ")[1].rstrip(".").replace("'", "")
    config = load_config(str(recipe(rewards={})), [advice])
    assert config.rewards == {"path/to/file.py:function": 1.0}


@pytest.mark.parametrize("name", ["geneval", "geneval-strict", "recognizer"])
def test_prompts_without_facts_are_refused_for_a_reward_that_needs_them(refused, recipe, name):
    sentence = refused("train", recipe(rewards={name: 1.0}))
    assert "needs facts" in sentence
    assert "prompts.txt, line 1" in sentence


def test_facts_about_another_world_are_refused(refused, recipe, tmp_path):
    line = {"prompt": "a dog", "tag": "single_object", "include": [{"class": "dog", "count": 1}]}
    write(tmp_path / "photos.jsonl", json.dumps(line) + "\n")
    assert "no 'dog' (photos.jsonl, line 1)" in refused(
        "train", recipe(rewards={"geneval": 1.0}), "data.prompts=photos.jsonl"
    )


def test_a_suite_that_the_rewards_cannot_judge_is_refused(refused, recipe):
    sentence = refused("train", recipe(rewards={"geneval": 1.0}), "data.prompts=blocks", "evaluation.suite=prompts.txt")
    assert "prompts.txt, line 1" in sentence


def test_a_column_that_a_reward_needs_and_the_prompts_lack_is_refused(refused, recipe, tmp_path, tiny_folder):
    write(tmp_path / "needy.py", "def needs(prompts, images, answer):\n    return [0.0] * len(images)\n")
    write(tmp_path / "answers.jsonl", '{"prompt": "a dog", "answer": "x"}\n' * 2)
    for words in (
        ["train", recipe(rewards={"needy.py:needs": 1.0})],
        [
            "train",
            recipe(rewards={"needy.py:needs": 1.0}),
            "data.prompts=answers.jsonl",
            "evaluation.suite=prompts.txt",
        ],
        ["evaluate", tiny_folder, "--suite", "prompts.txt", "--reward", "needy.py:needs"],
    ):
        assert "needs answer, which no prompt has; 'a red dog' (prompts.txt, line 1) has prompt" in refused(*words)


# Students


@pytest.mark.parametrize(
    ("method", "words", "says"),
    [
        ({"name": "dmdr"}, ["rewards={}", "model.finetune_type=full"], "give model.finetune_type=lora"),
        ({"name": "gndm"}, ["rewards={}", "rollout.guidance_scale=3"], "samples without guidance"),
        ({"name": "gndm"}, ["rewards={}", "rollout.noise_spread=0.5"], "from independent noise"),
        (
            {"name": "gndm"},
            ["rewards={}", "evaluation.num_inference_steps=8"],
            "a student of rollout.num_inference_steps=2 is sampled so",
        ),
        ({"name": "gndm"}, ["rewards={}", "evaluation.guidance_scale=3"], "evaluation.guidance_scale=1"),
        ({"name": "gndm"}, ["rewards={}", "optimizer.learning_rates={student: 0.1}"], "that learn are default, fake"),
        ({"name": "gndm", "reuse": 2}, ["rewards={}", "rollout.merge_lora=true"], "leave rollout.merge_lora at false"),
        ({"name": "gndm"}, [], "reward_start is 0; rewards are weighed by what a cold start shows"),
        ({"name": "gndm", "reward_start": 5}, [], "so that rewards would never count"),
        ({"name": "dmd2"}, [], "dmd2 trains on no reward"),
        ({"name": "dmdr", "reward_start": 0}, [], "'reward.py:brightness' has none"),
        (
            {"name": "dmdr", "fake_warmup": 3},
            ["optimizer.lr_warmup_steps=9"],
            "method.fake_warmup=3 is over before the learning rate",
        ),
        ({"name": "gndm", "fake_warmup": 3}, ["rewards={}", "optimizer.lr_warmup_steps=9"], "set one of them to 0"),
        ({"name": "dmd2", "normaliser": "binned"}, ["rewards={}"], "method.normaliser"),
        ({"name": "crd"}, ["optimizer.learning_rates={fake: 0.1}"], "that learn are default"),
        (
            {"name": "draft"},
            ["rollout.num_inference_steps=1", "evaluation.guidance_scale=2"],
            "give evaluation.num_inference_steps=1 evaluation.guidance_scale=1.",
        ),
    ],
)
def test_a_student_that_could_not_learn_what_is_asked_is_refused(refused, recipe, method, words, says):
    assert says in refused("train", recipe(method=method), *words)


def test_a_student_is_no_teacher_of_students(refused, recipe, tmp_path, tiny_folder):
    shutil.copytree(tiny_folder, tmp_path / "student")
    few_step.flow_scheduler(4, 1.0).save_pretrained(tmp_path / "student" / "scheduler")
    sentence = refused(
        "train", recipe(method={"name": "gndm"}), "rewards={}", "model.pretrained_model_name_or_path=student"
    )
    assert "'student' is a few-step student, and gndm begins from a model of many steps" in sentence


@pytest.mark.parametrize("name", ["crd-micro", "agsm-micro", "gndm-micro-1step"])
def test_the_built_in_student_is_no_model_of_many_steps(refused, name):
    sentence = refused("train", name, "model.pretrained_model_name_or_path=micro-turbo")
    assert "'micro-turbo' is a few-step student" in sentence


@pytest.mark.parametrize("key", ["rollout.num_inference_steps", "evaluation.base_num_inference_steps"])
def test_more_calls_than_a_models_table_has_rows_are_refused(refused, recipe, tiny_sd_folder, key):
    sentence = refused("train", recipe(), f"model.pretrained_model_name_or_path={tiny_sd_folder}", f"{key}=1001")
    assert "1001 calls of model" in sentence
    assert "a table of 1000 rows: give fewer." in sentence


@pytest.mark.parametrize(
    ("name", "own"), [("pretrain-micro-vae", "vae"), ("pretrain-micro", "micro"), ("pretrain-recognizer", "recognizer")]
)
def test_a_learning_rate_of_no_network_of_pre_training_is_refused(refused, name, own):
    assert f"the networks that learn are {own}." in refused("train", name, "optimizer.learning_rates={nets: 0.1}")


# Models and adapters


@pytest.mark.parametrize("command", ["train", "sample", "evaluate"])
@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("no/such/folder", "does not exist"),
        ("folder", "has no model_index.json"),
        ("other", "is a KandinskyPipeline; trimtab supports StableDiffusion3Pipeline"),
        ("damaged", "is not JSON"),
        ("somebody/model", "the hub could not be reached"),
    ],
)
def test_a_model_that_is_no_pipeline_of_ours_is_refused(refused, recipe, tmp_path, monkeypatch, command, model, says):
    def offline(*args, **kwargs):
        raise LocalEntryNotFoundError("no network")

    if model == "somebody/model":
        monkeypatch.setattr(loading, "hf_hub_download", offline)
    for name, index in (("folder", None), ("other", '{"_class_name": "KandinskyPipeline"}'), ("damaged", "{")):
        (tmp_path / name).mkdir()
        if index:
            write(tmp_path / name / "model_index.json", index)
    words = {
        "train": ["train", recipe(), f"model.pretrained_model_name_or_path={model}"],
        "sample": ["sample", model, "-p", "a dog"],
        "evaluate": ["evaluate", model, "--suite", "prompts.txt"],
    }
    assert says in refused(*words[command])


@pytest.mark.parametrize(
    ("name", "words", "says"),
    [
        ("crd-sd3.5-medium", [], "names no reward"),
        ("crd-sd3.5-medium", ["data.prompts=blocks", "rewards={nofile.py:f: 1.0}"], "there is no file"),
        ("drpo-sdxl-turbo", [], "names no reward"),
        ("dmd2-sdxl-4step", [], "'prompts.txt' do not exist"),
        ("agsm-sd15-coco", ["data.pictures=nofolder"], "'nofolder' are no folder"),
    ],
)
def test_what_a_recipe_reads_is_missed_before_the_hub_is_asked_for_its_model(
    refused, tmp_path, monkeypatch, name, words, says
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "hf_hub_download", lambda *args: pytest.fail("the hub was asked"))
    assert says in refused("train", name, *words)


def test_an_adapter_of_another_model_is_refused(refused, recipe, tmp_path, tiny_folder):
    name = "transformer.transformer_blocks.0.attn.to_q"
    write_adapter(tmp_path / "wide", {f"{name}.lora_A.weight": (4, 999), f"{name}.lora_B.weight": (999, 4)})
    write_adapter(tmp_path / "deep", {f"{name.replace('0', '23')}.lora_A.weight": (4, 32)})
    for adapter in ("wide", "deep"):
        for words in (["sample", tiny_folder, "-p", "a dog"], ["evaluate", tiny_folder, "--suite", "prompts.txt"]):
            assert "belongs to another model" in refused(*words, "--adapter", adapter)


def write_adapter(folder, shapes):
    folder.mkdir()
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, folder / adapters.LORA_FILE)


def test_a_folder_without_an_adapter_is_refused(refused, recipe, tiny_folder):
    assert adapters.LORA_FILE in refused("sample", tiny_folder, "-p", "a dog", "--adapter", ".")


def test_a_lora_target_that_the_network_lacks_is_refused_and_leaves_no_run_behind(refused, recipe, tmp_path):
    sentence = refused("train", recipe(), "model.target_modules=[to_q, to_z]")
    assert "LoRA target 'to_z' names no module; choose from" in sentence
    assert not (tmp_path / "runs" / "mine" / "config.yaml").exists()  # else the mended recipe could not start


# Run folders


def test_a_folder_that_holds_a_run_is_refused_without_resume(refused, recipe):
    a_run(recipe())
    assert "--resume" in refused("train", recipe())


@pytest.mark.parametrize("override", ["seed=7", "rollout.group_size=6", "optimizer.adam_beta1=0", "method.crd_beta=2"])
def test_resuming_with_another_configuration_is_refused(refused, recipe, override):
    a_run(recipe())
    assert override.split("=")[0] in refused("train", recipe(), override, "--resume")


def a_run(path):
    """The folder of a run that has begun with the recipe at `path`."""
    folder = Path("runs") / "mine"
    folder.mkdir(parents=True)
    write(folder / "config.yaml", dump_config(path))


def dump_config(path):
    from trimtab.config import dump

    return dump(load_config(str(path)))


def test_a_folder_that_another_process_holds_is_refused_with_its_number(refused, recipe, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    try:
        assert process.stdout.readline() == "held\n"
        assert f"in use by process {process.pid}" in refused("train", recipe())
    finally:
        process.communicate("")
    with lock("runs/mine"):
        pass  # and it is free again


def test_an_output_folder_that_cannot_be_made_is_refused(refused, recipe, tmp_path):
    write(tmp_path / "file", "")
    assert "file" in refused("train", recipe(), "output_dir=file")


def test_prompts_that_cannot_be_shared_by_the_processes_are_refused(refused, recipe, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "2 prompts can't be shared by 4 processes" in refused("train", recipe())


ALONE = ("train pretrain-recognizer", "pairs runs/mine", "evaluate micro", "sample micro -p star")


@pytest.mark.parametrize("words", ALONE)
def test_what_several_processes_would_do_over_and_over_is_refused(refused, recipe, monkeypatch, words):
    a_run(recipe())
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "is the work of one process, and 2 were started" in refused(*words.split())


def test_fewer_prompts_than_a_step_takes_are_told(refused, recipe, monkeypatch, caplog):
    monkeypatch.setenv("WORLD_SIZE", "4")  # so that it goes no further
    refused("train", recipe(), "rollout.num_prompts=16")
    assert "rollout.num_prompts is 16, and there are fewer, 2: each step takes all" in caplog.text


# Evaluations


@pytest.fixture
def taken(recipe, tiny_folder):
    """A folder, `taken`, that says it is an evaluation of the tiny model by `--suite prompts.txt`."""
    found = {
        "model": str(tiny_folder), "adapters": [], "suite": "prompts.txt", "images_per_prompt": 4,
        "num_inference_steps": 40, "guidance_scale": 1.0, "seed": 0, "resolution": None, "precision": "no",
        "few_step": False, "scores": {"reward.py:brightness": {}},
    }  # fmt: skip
    folder = Path("taken")
    folder.mkdir()
    write(folder / "results.json", json.dumps(found))
    return folder


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["--adapter", "lora"],
            "with adapters=[], and this one has ['lora']; ask for the same, or give --output another",
        ),
        (["--images-per-prompt", "1"], "with images_per_prompt=4, and this one has 1"),
        (["--num-inference-steps", "2"], "with num_inference_steps=40, and this one has 2"),
        (["--guidance-scale", "2"], "with guidance_scale=1.0, and this one has 2.0"),
        (["--seed", "2"], "with seed=0, and this one has 2"),
        (["--resolution", "32"], "with resolution=None, and this one has 32"),
        (["--mixed-precision", "bf16"], "with precision='no', and this one has 'bf16'"),
        (["--suite", "blocks"], "with suite='prompts.txt', and this one has 'blocks'"),
        (["--reward", "recognizer"], "holds scores of 'reward.py:brightness', which would be lost; give --reward"),
    ],
)
def test_an_evaluation_does_not_replace_another(refused, taken, tiny_folder, words, says):
    before = (taken / "results.json").read_bytes()
    assert says in refused("evaluate", tiny_folder, "--suite", "prompts.txt", "--output", taken, *words)
    assert (taken / "results.json").read_bytes() == before
    assert "model='" in refused("evaluate", "micro", "--suite", "prompts.txt", "--output", taken)


@pytest.mark.parametrize("text", ["{", "3", "[1]"])
def test_a_folder_whose_results_are_none_is_refused(refused, taken, tiny_folder, text):
    write(taken / "results.json", text)
    assert "cannot be read" in refused("evaluate", tiny_folder, "--output", taken)


def test_the_default_folder_names_the_adapters(cli, recipe, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "trimtab.inference.evaluate_model", lambda *args, **how: asked.append(args[3]) or {"scores": {}}
    )
    asked = []
    assert (
        cli("evaluate", "micro", "--adapter", "runs/mine/export", "--adapter", "lora", "--suite", "prompts.txt")[0] == 0
    )
    (tmp_path / "runs" / "full" / "export").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "runs" / "full" / "export")
    assert cli("evaluate", ".")[0] == 0
    assert [str(folder) for folder in asked] == [
        "evaluations/micro-mine-lora-prompts-cfg1-seed0",
        "evaluations/full-blocks-cfg1-seed0",
    ]


def evaluated(model, adapters, suite, folder, display, **how):
    """Stands for `inference.evaluate_model`: says something, and has nothing to show."""
    display.note("noted")
    display.progress("evaluating", 1, 1)
    return {"scores": {}}


@pytest.mark.parametrize("name", ["out[/x]dir", "out[bold]dir", "a:star:dir"])
def test_a_name_with_rich_markup_is_shown_as_it_is(cli, refused, recipe, monkeypatch, name):
    monkeypatch.setattr("trimtab.inference.evaluate_model", evaluated)
    code, stdout, stderr = cli("evaluate", "micro", "--output", name)
    assert (code, stderr) == (0, "")
    assert f" {Path(name).name} \n" in stdout  # the table's header
    assert f"{Path(name).resolve()}/results.json\n" in stdout
    assert name in refused("train", name)


@pytest.mark.parametrize(("rank", "silent"), [("0", False), ("1", True)])
def test_of_several_processes_the_first_speaks_for_all(cli, recipe, monkeypatch, rank, silent):
    monkeypatch.setattr("trimtab.inference.evaluate_model", evaluated)
    monkeypatch.setattr(console, "quiet", console.quiet)  # and back again
    monkeypatch.setenv("RANK", rank)
    code, stdout, _ = cli("evaluate", "micro")
    assert code == 0
    assert (stdout == "") is silent
    assert ("noted" in stdout and "evaluating 1/1" in stdout) is not silent


def test_a_reward_that_fails_leaves_the_pictures_and_one_line(cli, recipe, tiny_folder):
    words = ["--suite", "prompts.txt", "--reward", "reward.py:raises", "--num-inference-steps", 1, "--output", "new"]
    code, _, stderr = cli("evaluate", tiny_folder, *words)
    assert code == 1
    assert stderr.count("\n") == 1
    assert "ValueError: one two" in stderr
    assert "the pictures are in new/images" in stderr
    assert len(list(Path("new").glob("images/*/samples/*.png"))) == 2 * 4


def test_prompts_to_which_no_score_applies_are_told(cli, recipe, tiny_folder):
    words = ["--suite", "prompts.txt", "--num-inference-steps", 1, "--images-per-prompt", 1]
    _, stdout, _ = cli("evaluate", tiny_folder, *words)
    assert "no score applies to these prompts; add --reward path.py:function, or facts" in " ".join(stdout.split())
    _, stdout, _ = cli("evaluate", tiny_folder, *words, "--reward", "reward.py:brightness")
    assert "no score applies" not in stdout


def test_the_number_of_pictures_in_one_forward_may_be_given(cli, recipe, tiny_folder, monkeypatch):
    sizes, decode = [], SD3.decode
    monkeypatch.setattr(SD3, "decode", lambda self, latents: sizes.append(len(latents)) or decode(self, latents))
    words = ["-p", "a red dog", "--num-images", 3, "--num-inference-steps", 1, "--batch-size", 2]
    assert cli("sample", tiny_folder, *words)[0] == 0
    assert sizes == [2, 1]


# The command line itself


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["trian", "crd-micro"], "trian"),
        (["train"], "recipe"),
        (["train", "crd-micro", "--resmue"], "--resmue"),
        (["sample", "micro"], "--prompt"),
        (["sample", "micro", "-p", "a", "--guidance-scale", "-1"], "--guidance-scale"),
        (["sample", "micro", "-p", "a", "--guidance-scale", "inf"], "--guidance-scale': inf is not a finite number"),
        (["sample", "micro", "-p", "a", "--guidance-scale", "nan"], "--guidance-scale"),
        (["evaluate", "micro", "--guidance-scale", "inf"], "--guidance-scale': inf is not a finite number"),
        (["evaluate", "micro", "--suite", ""], "name nothing; give 'blocks'"),
        (["sample", "micro", "-p", "a", "--num-images", "0"], "--num-images"),
        (["evaluate", "micro", "--num-inference-steps", "many"], "--num-inference-steps"),
        (["evaluate", "micro", "--suite", "nowhere"], "'nowhere' do not exist"),
        (["evaluate", "micro", "--reward", "clipp"], "reward 'clipp' is unknown"),
        (["evaluate", "micro", "--mixed-precision", "fp8"], "'fp8' is unknown; give no or bf16"),
        (["sample", "micro", "-p", "a", "--mixed-precision", "half"], "'half' is unknown; give no or bf16"),
        (["sample", "micro", "-p", "a", "--output", "prompts.txt"], "prompts.txt is a file; give --output"),
        (["sample", "micro", "-p", "a", "--output", "prompts.txt/new"], "prompts.txt is a file; give --output"),
        (["evaluate", "micro", "--output", "prompts.txt"], "prompts.txt is a file; give --output"),
        (["sample", "micro", "-p", "a", "--seed", str(2**64)], "--seed"),
        (["train", "crd-micro", f"seed={2**64}"], "seed"),
        (["evaluate", "micro", "--resolution", "128", "--reward", "geneval"], "64 pixels and this model draws 128"),
        (["train", "crd-micro", "model.resolution=128"], "64 pixels and this model draws 128"),
        (
            ["train", "drpo-micro-turbo", "method.name=dpo-one-step"],
            "is a setting of drpo, and method.name is",
        ),
        (["report", "nowhere"], "nowhere"),
        (["bench", "pretrain-micro"], "pre-training"),
        (["bench", "nothing"], "no recipe"),
        (["train", "pretrain"], "did you mean pretrain-micro-vae or pretrain-micro or pretrain-recognizer?"),
        (["train", "y" * 300], "y: File name too long"),
        (["sample", "micro", "-p", "a", "--output", "/proc/new"], "folder /proc cannot be written to"),
    ],
)
def test_a_command_that_makes_no_sense_is_refused(refused, recipe, words, says):
    assert says in refused(*words)


def test_a_real_process_says_one_sentence_and_no_traceback(recipe, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "trimtab", "train", str(recipe()), "rollout.group_sise=3"],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("trimtab: ")
    assert done.stderr.count("\n") == 1


def test_the_version_is_told(cli):
    assert cli("--version") == (0, f"trimtab {__version__}\n", "")


def test_without_a_command_the_help_is_shown_and_nothing_else(cli):
    code, stdout, stderr = cli()
    assert code == 2
    assert "recipes" in stdout
    assert stderr == ""


# Recipes


def test_recipes_lists_every_recipe_with_a_line_about_it(cli):
    code, stdout, _ = cli("recipes")
    assert code == 0
    assert NAMES
    for name in NAMES:
        assert len(next(line for line in stdout.splitlines() if line.split()[:1] == [name])) > len(name) + 20


def test_a_recipe_s_description_is_told_to_its_end(cli):
    _, stdout, _ = cli("recipes")
    assert "Candidates of a prompt start near each other, so that they share a layout" in " ".join(stdout.split())


def test_recipes_are_listed_without_torch_and_the_hub_s_retries_are_not_told():
    script = """
import logging, sys
from trimtab import __version__
from trimtab.cli import console, main
main()
assert "torch" not in sys.modules
from huggingface_hub import hf_hub_download
assert not logging.getLogger("huggingface_hub").isEnabledFor(logging.WARNING)
"""
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_VERBOSITY"}
    done = subprocess.run(
        [sys.executable, "-c", script, "recipes"], capture_output=True, text=True, check=False, env=env
    )
    assert done.stderr == ""
    assert done.returncode == 0


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_sound_and_named_after_its_file(name):
    assert load_config(name).name == name
    assert load_config(str(RECIPES / f"{name}.yaml")) == load_config(name)


def test_more_calls_of_an_evaluation_than_the_table_has_rows_are_refused(refused, recipe, tiny_sd_folder):
    model = f"model.pretrained_model_name_or_path={tiny_sd_folder}"
    assert "1001 calls of model" in refused("train", recipe(), model, "evaluation.num_inference_steps=1001")


def test_draft_may_draw_one_picture_a_prompt_whatever_is_watched(recipe):
    Path("smooth.py").write_text(
        "class Light:\n"
        "    def __call__(self, images, prompts, metadata):\n        return images.mean((1, 2, 3))\n"
        "    with_gradient = __call__\n"
        "light = Light()\n"
    )
    found = inputs.check(
        load_config(
            str(recipe(method={"name": "draft"}, rewards={"smooth.py:light": 1.0, "reward.py:brightness": 0.0})),
            ["rollout.group_size=1", "rollout.num_inference_steps=1"],
        )
    )
    assert list(found.rewards.watched) == ["reward.py:brightness"]
