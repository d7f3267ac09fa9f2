"""A recipe becomes a run folder; a run that is killed and resumed is the run that was not."""

import json
import math
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from diffusers import SD3Transformer2DModel
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trimtab import bench, checkpoint, inputs, run, wiring
from trimtab.cli import main
from trimtab.distributed import Processes
from trimtab.errors import UserError
from trimtab.learner import Learner
from trimtab.rewards.composite import Composite
from trimtab.rollout import Rollouts

REWARD = """
def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3)).tolist()

class Smooth:
    def __call__(self, images, prompts, metadata):
        return self.with_gradient(images, prompts, metadata)

    def with_gradient(self, images, prompts, metadata):
        return images.mean((1, 2, 3))

smooth = Smooth()

def weighted(prompts, images, weight):
    return [w * image.convert("L").getpixel((5, 5)) for w, image in zip(weight, images)]
"""
CAPTIONED = {  # sections of a recipe that learns soft tokens from pictures
    "method": {"name": "agsm", "tokens": {"num_tokens": 2, "num_layers": 2}},
    "data": {"prompts": "blocks", "pictures": "pictures", "num_workers": 0},
    "rewards": {},
    "training": {"train_batch_size": 4},
}
METHODS = {
    "crd": {"method": {"name": "crd", "num_train_times": 2}},
    "diffusion-nft": {"method": {"name": "diffusion-nft", "num_train_times": 2}},
    "agsm": CAPTIONED,
    "dmd2": {"method": {"name": "dmd2", "fake_updates": 2}, "rewards": {}},
    "dmd2, judged": {
        "method": {"name": "dmd2", "fake_updates": 1, "gan_weight": 0.01, "real_guidance_scale": 2.0},
        "rewards": {},
        "data": {"prompts": "prompts.txt", "pictures": "pictures", "num_workers": 0},
    },
    "dmdr": {"method": {"name": "dmdr", "fake_updates": 1, "dynamic_steps": 3}, "rewards": {}},
    "gndm": {
        "method": {
            "name": "gndm",
            "fake_updates": 1,
            "fake_warmup": 1,
            "reuse": 2,
            "ema_decay": 0.5,
            "reward_start": 2,
            "calibration": 1,
            "normaliser": "binned",
        }
    },
    "drpo": {
        "method": {"name": "drpo", "num_positive": 1, "num_negative": 1, "features": {"kind": "teacher"}},
        "rollout": {"num_inference_steps": 1},
    },
    "drpo, offline": {
        "method": {"name": "drpo", "variant": "offline", "features": {"kind": "latents"}, "token_mode": "per_location"},
        "rewards": {},
        "data": {"prompts": "blocks", "pairs": "pairs.jsonl"},
        "rollout": {"num_inference_steps": 1},
        "training": {"train_batch_size": 3},
    },
    "dpo-one-step": {
        "method": {"name": "dpo-one-step", "num_positive": 1, "num_negative": 2},
        "rollout": {"num_inference_steps": 1},
    },
    "draft": {
        "method": {"name": "draft", "latent_weight": 0.1},
        "rewards": {"reward.py:smooth": 1.0, "reward.py:brightness": 0.0},
        "rollout": {"num_inference_steps": 1},
    },
    "softrepa": CAPTIONED | {"method": CAPTIONED["method"] | {"name": "softrepa"}},
}
OFFLINE = {"name": "drpo", "variant": "offline"}
CLOCK = ("seconds/", "elapsed_seconds", "images_per_second")  # what differs between two equal runs
STEPS = 4


class Silent:
    def note(self, text):
        pass

    def progress(self, what, done, total, numbers=""):
        pass


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty working folder with a reward file and prompts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "reward.py").write_text(REWARD)
    (tmp_path / "prompts.txt").write_text("a photo of a red circle\na photo of two stars\n")
    lines = [{"prompt": "one", "weight": 0.25}, {"prompt": "two", "weight": 0.5}, {"prompt": "three", "weight": 1.0}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "pictures").mkdir()
    for i in range(9):
        Image.new("RGB", (70, 64), (25 * i, 120, 200 - 20 * i)).save(tmp_path / "pictures" / f"{i}.png")
        (tmp_path / "pictures" / f"{i}.txt").write_text(f"number {i}")
    pairs = [
        {"prompt": name, "chosen": f"pictures/{i}.png", "rejected": [f"pictures/{i + 1}.png", f"pictures/{i + 2}.png"]}
        for i, name in enumerate(("one", "two", "three"))
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in pairs))
    return tmp_path


@pytest.fixture
def recipe(workplace, tiny_folder):
    """Writes a recipe for the tiny model: 2 prompts x 4 siblings; keywords change whole sections' keys."""

    def write(**changes):
        data = {
            "name": "mine",
            "seed": 3,
            "method": {"name": "crd", "num_train_times": 2, "kl_cfg": 2.0},
            "model": {
                "pretrained_model_name_or_path": str(tiny_folder), "rank": 2, "lora_alpha": 4, "mixed_precision": "no"
            },
            "data": {"prompts": "prompts.txt"},
            "rewards": {"reward.py:brightness": 1.0},
            "rollout": {"num_prompts": 2, "group_size": 4, "num_inference_steps": 2},
            "optimizer": {"learning_rate": 1e-2},
            "training": {
                "max_train_steps": STEPS, "train_batch_size": 8, "checkpointing_steps": 1,
                "validation_steps": 2, "num_validation_prompts": 2,
            },
        }  # fmt: skip
        for section, change in changes.items():
            replaces = section in ("method", "rewards", "evaluation") or not isinstance(change, dict)
            data[section] = change if replaces else data[section] | change
        path = workplace / "mine.yaml"
        path.write_text(yaml.safe_dump(data))
        return path

    return write


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


def metrics(folder="runs/mine"):
    """The steps of metrics.jsonl without what a clock says."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "updates" in line]
    return [{key: value for key, value in line.items() if not key.startswith(CLOCK)} for line in steps]


def weights(folder="runs/mine"):
    """Everything that the export and the last checkpoint hold, as bytes."""
    folder = Path(folder)
    files = [*folder.glob("export/*.safetensors"), checkpoint.latest(folder) / "state.safetensors"]
    return {
        (file.parent.name, file.name, name): tensor.numpy().tobytes()
        for file in files
        for name, tensor in load_file(file).items()
    }


def gap(a, b):
    return (a - b).abs().max().item()


# What a run leaves behind


def test_a_run_leaves_all_that_it_promises_and_resuming_it_only_prints_the_results(recipe, cli):
    suite = {"suite": "prompts.txt", "images_per_prompt": 2, "num_inference_steps": 2, "base_guidance_scale": 2.0}
    path = recipe(evaluation=suite, training={"max_train_steps": 3})
    code, stdout, stderr = cli("train", path)
    assert (code, stderr) == (0, "")
    assert "report.html" in stdout
    folder = Path("runs/mine")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["rollout"]["group_size"] == 4
    assert config["optimizer"]["adam_beta2"] == 0.999  # defaults are written, too
    assert config["command"] == f"trimtab train {path}"
    assert set(config["versions"]) >= {"torch", "diffusers", "trimtab"}
    assert_metrics(metrics(), (folder / "metrics.jsonl").read_text())
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("reward")] == [1, 2, 3]
    assert {file.name for file in (folder / "samples").iterdir()} == {f"step-00000{n}.png" for n in (0, 2, 3)}
    assert {file.name for file in folder.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}  # the last two
    exported = {"pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json", "README.md"}
    assert {file.name for file in (folder / "export").iterdir()} >= exported
    for label in ("base", "base-guided", "trained"):
        results = json.loads((folder / "evaluation" / label / "results.json").read_text())
        assert results["num_images"] == 4
        assert {"strict", "reward.py:brightness"} <= set(results["scores"])
    assert "</html>" in (folder / "report.html").read_text()
    evaluated = [line for line in map(json.loads, (folder / "metrics.jsonl").open()) if "lr" not in line]
    assert [line["step"] for line in evaluated] == [0, 0, 3]
    assert evaluated[2]["eval/trained/strict"] == results["scores"]["strict"]["overall"]["mean"]

    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert "eval/trained" in lines[-1]
    (folder / "metrics.jsonl").write_text("".join(lines[:-1]))  # as if killed when all was evaluated, and not yet told
    assert cli("train", path, "--resume")[0] == 0
    assert (folder / "metrics.jsonl").read_text() == "".join(lines)

    before = weights(), metrics(), (folder / "evaluation/trained/results.json").read_bytes()
    code, again, _ = cli("train", path, "--resume")
    assert code == 0
    assert "trained" in again
    assert "strict" in again
    assert (weights(), metrics(), (folder / "evaluation/trained/results.json").read_bytes()) == before


def assert_metrics(lines, text):
    named = {
        "step", "reward", "reward_std", "rewards/reward.py:brightness/mean", "frac_reward_zero_std", "kl", "loss",
        "grad_norm", "lr", "failed/reward.py:brightness",
    }  # fmt: skip
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(named <= set(line) for line in lines)
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert all(f'"{key}' in text for key in ("seconds/sampling", "seconds/rewards", "seconds/backward", *CLOCK))


def test_a_method_whose_log_ratio_is_measured_against_the_old_policy_starts_at_none(recipe):
    # At the first update theta is old, bit for bit, although one was evaluated with gradient: q is exactly 0. The first
    # of two updates is half of the step's mean, so look at a run with one.
    path = recipe(method={"name": "crd", "num_train_times": 2, "updates_per_step": 1}, training={"max_train_steps": 1})
    run.train(run.load_config(str(path)), Silent())
    assert metrics()[0]["implicit_reward_std"] == 0


def test_sampling_with_the_lora_merged_draws_the_same_pictures(recipe):
    for merged in (False, True):
        config = run.load_config(str(recipe(name=f"merged-{merged}".lower())), [f"rollout.merge_lora={merged}".lower()])
        run.train(config, Silent())
    plain, merged = metrics("runs/merged-false"), metrics("runs/merged-true")
    for one, other in zip(plain, merged, strict=True):
        assert one["reward"] == pytest.approx(other["reward"], abs=1e-4)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_diffusion_nft_recipe_runs(recipe, precision):
    path = recipe(method={"name": "diffusion-nft", "num_train_times": 2}, model={"mixed_precision": precision})
    run.train(run.load_config(str(path)), Silent())
    assert [line["step"] for line in metrics()] == list(range(1, STEPS + 1))
    assert metrics()[0]["old_deviate"] == 0
    assert metrics()[-1]["old_deviate"] > 0


def test_full_fine_tuning_exports_a_pipeline_whose_weights_have_moved(recipe, tiny_folder):
    path = recipe(model={"finetune_type": "full"}, optimizer={"learning_rate": 1e-4}, training={"max_train_steps": 2})
    run.train(run.load_config(str(path)), Silent())
    before, after = (
        SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer").state_dict()
        for folder in (tiny_folder, "runs/mine/export")
    )
    assert 1e-6 < max(gap(before[name], after[name]) for name in before) < 1e-2
    assert "StableDiffusion3Pipeline" in Path("runs/mine/export/model_index.json").read_text()


def test_lines_of_jsonl_reach_a_reward_as_columns(recipe):
    path = recipe(data={"prompts": "prompts.jsonl"}, rewards={"reward.py:weighted": 1.0})
    run.train(run.load_config(str(path), ["rollout.num_prompts=3", "training.max_train_steps=1"]), Silent())
    assert metrics()[0]["images"] == 12
    assert metrics()[0]["rewards/reward.py:weighted/mean"] > 0


def test_soft_tokens_are_learnt_from_a_folder_evaluated_and_drawn_with(recipe, cli, tiny):
    tiny().export(Path("lora"), "default")
    suite = {"suite": "prompts.txt", "images_per_prompt": 2, "num_inference_steps": 2, "base_guidance_scale": None}
    path = recipe(**CAPTIONED | {"evaluation": suite}, model={"adapters": ["lora"]})
    code, stdout, stderr = cli("train", path)
    assert (code, stderr) == (0, "")
    assert "report.html" in stdout
    lines = metrics()
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert {"loss", "weight_matched", "win_rate", "token_norm/positive", "skipped_pictures"} <= set(lines[0])
    results = json.loads(Path("runs/mine/evaluation/trained/results.json").read_text())
    assert results["adapters"] == ["lora", "export"]
    assert {file.name for file in Path("runs/cache").iterdir()} == {"latents", "texts"}
    words = ["sample", path.parent / "model", "-p", "number 3", "--num-inference-steps", "2"]
    words[1] = yaml.safe_load(path.read_text())["model"]["pretrained_model_name_or_path"]
    drawn = []
    for i, adapters in enumerate([["lora"], ["lora", "runs/mine/export"]]):
        options = [word for adapter in adapters for word in ("--adapter", adapter)]
        assert cli(*words, "--output", f"drawn{i}", *options)[0] == 0
        drawn.append(next(Path(f"drawn{i}").iterdir()).read_bytes())
    assert drawn[0] != drawn[1]


def test_a_captioned_run_without_a_suite_shows_captions_of_its_own(recipe):
    run.train(run.load_config(str(recipe(**CAPTIONED)), ["training.num_validation_prompts=9"]), Silent())
    size = Image.open("runs/mine/samples/step-000004.png").size
    assert size[0] == size[1] == 3 * 64


def test_pictures_that_cannot_be_used_stop_a_run_or_are_left_out_and_counted(recipe, cli):
    Path("pictures/3.txt").write_text("")
    path = recipe(**CAPTIONED)
    code, _, stderr = cli("train", path)
    assert code == 2
    assert "3.png" in stderr
    assert "data.on_error=skip" in stderr
    assert cli("train", path, "data.on_error=skip")[0] == 0
    assert metrics()[-1]["skipped_pictures"] == 1


def test_the_cure_that_a_broken_picture_s_error_names_works_at_the_resume(recipe, cli):
    for i in range(9):  # whole headers, so that only decoding tells
        file = Path(f"pictures/{i}.png")
        pixels = torch.randint(0, 255, (64, 70, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(file)
        if i in (4, 5):
            file.write_bytes(file.read_bytes()[:2000])
    path = recipe(**CAPTIONED)
    code, _, stderr = cli("train", path)
    assert code == 1
    assert "data.on_error=skip" in stderr
    assert cli("train", path, "--resume", "data.on_error=skip")[0] == 0
    assert metrics()[-1]["step"] == STEPS


def test_one_picture_a_step_is_refused_where_captions_are_compared(recipe, cli):
    code, _, stderr = cli("train", recipe(**CAPTIONED), "training.train_batch_size=1")
    assert code == 2
    assert "give 2 or more" in stderr


def test_tokens_cannot_be_merged_before_training(recipe, cli):
    assert cli("train", recipe(**CAPTIONED | {"name": "first"}))[0] == 0
    code, _, stderr = cli("train", recipe(**CAPTIONED), 'model.adapters=["runs/first/export"]')
    assert code == 2
    assert "holds soft tokens, on which a LoRA can be trained" in stderr


def test_a_run_that_cannot_start_leaves_its_name_free(recipe):
    path = recipe(training={"max_train_steps": 1})
    with pytest.raises(run.UserError, match="to_z"):
        run.train(run.load_config(str(path), ["model.target_modules=[to_z]"]), Silent())
    run.train(run.load_config(str(path)), Silent())


# Kill and resume


def go(recipe, die=None):
    """In a process of its own: the run, resumed if there is one; with `die` it kills itself in the middle of a save."""
    torch.set_num_threads(1)
    if die is not None:
        _die_in(*die)
    run.train(run.load_config(recipe), Silent(), resume=True)


def _die_in(name, number):
    """SIGKILL instead of the `number`-th call of one of checkpoint's functions."""
    function, calls = getattr(checkpoint, name), iter(range(1, 1000))

    def counted(*args):
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)

    setattr(checkpoint, name, counted)


@pytest.fixture(scope="module")
def spawned():
    """Starts `go` in a new process, forked from one that has imported trimtab and done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trimtab.run"])

    def start(*args, target=go):
        process = context.Process(target=target, args=args)
        process.start()
        return process

    return start


def finished(spawned, path):
    process = spawned(str(path))
    process.join()
    return process.exitcode


def test_processes_that_see_different_checkpoints_all_stop(spawned, tmp_path):
    checkpoint.save(tmp_path / "0" / "checkpoint-100", {})
    processes = [spawned(rank, str(tmp_path), target=resume_apart) for rank in range(2)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]


def resume_apart(rank: int, folder: str) -> None:
    """Each process looks into a folder of its own, as on two machines that share no file system."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    processes = Processes.of(Accelerator(cpu=True))
    with pytest.raises(run.UserError, match=rf"/{rank} at steps 100, 0; .* that all machines share"):
        run._saved(Path(folder) / str(rank), processes)
    shared = run._saved(Path(folder) / "0", processes)
    assert shared.name == "checkpoint-100"
    torch.distributed.destroy_process_group()


def test_what_fails_on_one_process_stops_both_after_the_run_is_saved(recipe, spawned, tmp_path):
    Path("judge.py").write_text(
        "import os\ncalls = []\ndef score(images, prompts, metadata):\n    calls.append(1)\n"
        "    assert len(calls) < 3 or os.environ['RANK'] == '0', 'no server'\n    return images.mean((1, 2, 3))\n"
    )
    path = recipe(rewards={"judge.py:score": 1.0}, training={"checkpointing_steps": 9})
    processes = [spawned(rank, str(tmp_path), str(path), target=fail_on_one) for rank in range(2)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]


def fail_on_one(rank: int, folder: str, path: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    save = run._save
    run._save = lambda each: time.sleep(2) or save(each)
    said = ("another process had to stop, and says why", "reward 'judge.py:score' failed for all 4 .*no server.*")[rank]
    with pytest.raises(run.RunStopped, match=f"{said}; the run is saved at step 2, mend this and --resume"):
        run.train(run.load_config(path), Silent())
    assert checkpoint.latest(Path("runs/mine")).name == "checkpoint-2"  # by then
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("method", METHODS)
def test_killed_and_resumed_equals_not_killed_bit_for_bit(recipe, spawned, method):
    path = recipe(**METHODS[method], name="whole")
    started = time.perf_counter()
    assert finished(spawned, path) == 0
    seconds = time.perf_counter() - started

    path = recipe(**METHODS[method])
    # While tensors are written (the first file of a save that goes to disk), before the tree is, and before the rename.
    for die in [("to_disk", 1), ("atomic_write", 1), ("_put_in_place", 2), ("prune", 1)]:
        process = spawned(str(path), die)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    delays = random.Random(0)
    for _ in range(3):
        process = spawned(str(path))
        time.sleep(delays.uniform(0, seconds))
        process.kill()
        process.join()
    assert finished(spawned, path) == 0
    assert metrics("runs/mine") == metrics("runs/whole")
    assert [line["step"] for line in metrics()] == list(range(1, STEPS + 1))
    killed, whole = weights("runs/mine"), weights("runs/whole")
    assert killed.keys() == whole.keys()
    assert not [name for name in whole if killed[name] != whole[name]]


# The same gradient, however it is computed


@pytest.fixture
def ready(recipe):
    """Builds a method, its trained role moved away from the old one, so that no term is zero."""

    def build(**method):
        name = {} if "name" in method else {"name": "crd", "kl_cfg": 2.0}
        config = run.load_config(str(recipe(method={"num_train_times": 2, **name, **method})))
        config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"advantage_std": "pooled"})})
        built = wiring.build(config, Path("unused"), Accelerator(cpu=True), inputs.check(config), Silent())
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in built.learner.parameters["default"].values():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        return built.method

    return build


FREE = [name for name in METHODS if name not in ("agsm", "softrepa", "dmd2, judged")]  # to take any number at a time


@pytest.mark.parametrize("name", FREE)
def test_what_is_logged_does_not_depend_on_how_many_samples_fit_into_a_pass(recipe, name):
    """Packs of unequal sizes, and groups that take two passes."""
    path, found = str(recipe(**METHODS[name])), []
    changes = ["rollout.num_prompts=3", "rollout.group_size=4"]
    changes += [] if METHODS[name]["method"].get("variant") == "offline" else ["data.prompts=blocks"]
    for size in (64, 8, 3):
        config = run.load_config(path, [f"training.train_batch_size={size}", *changes])
        built = wiring.build(config, Path("unused"), Accelerator(cpu=True), inputs.check(config), Silent())
        records = built.learner.run()
        metrics = [next(records).metrics for _ in range(2)][-1]  # the first step has no distance from what was old
        found.append({key: value for key, value in metrics.items() if not key.startswith(CLOCK)})
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=2e-3, abs=1e-5, nan_ok=True)


def test_text_encoders_are_offloaded_where_the_recipe_says_so(recipe):
    for wanted in (False, True):
        config = run.load_config(str(recipe(model={"offload_text_encoders": wanted})))
        built = wiring.build(config, Path("unused"), Accelerator(cpu=True), inputs.check(config), Silent())
        assert len(built.pipeline._offloaded) == 3 * wanted


def test_a_teacher_is_shown_in_its_own_number_of_steps_beside_its_student(recipe, monkeypatch):
    suite = {"suite": "prompts.txt", "images_per_prompt": 1, "base_guidance_scale": 2.0}
    asked = []
    monkeypatch.setattr(run, "_evaluate", lambda _, label, role, setting: asked.append((label, setting)))
    for changes, teachers in (({}, 40), ({"base_num_inference_steps": 9}, 9)):
        config = run.load_config(str(recipe(**METHODS["dmd2"], evaluation=suite | changes)))
        built = wiring.build(config, Path("unused"), Accelerator(cpu=True), inputs.check(config), Silent())
        run._evaluate_base(built)
        (_, base), (label, best) = asked[-2:]
        assert label == "base-guided"
        assert (base.num_inference_steps, base.few_step, base.guidance_scale) == (2, True, 1.0)
        assert (best.num_inference_steps, best.few_step, best.guidance_scale) == (teachers, False, 2.0)


def test_gradient_checkpointing_is_asked_of_the_network_and_of_the_auto_encoder(recipe):
    config = run.load_config(str(recipe(model={"gradient_checkpointing": True})))
    built = wiring.build(config, Path("unused"), Accelerator(cpu=True), inputs.check(config), Silent())
    assert built.pipeline.pipe.transformer.gradient_checkpointing
    assert built.pipeline.pipe.vae.decoder.gradient_checkpointing


def gradient(method, rollout):
    """All gradients of a batch as one vector."""
    parameters = list(method.trained()["default"].values())
    total = [torch.zeros_like(p) for p in parameters]
    for loss in method.losses(rollout):
        for sum_, part in zip(total, torch.autograd.grad(loss.value, parameters), strict=True):
            sum_ += part
    return torch.cat([part.flatten() for part in total])


def collected(method):
    (rollout,) = method.collect(0)
    return rollout


@pytest.mark.parametrize(
    "method",
    [
        {},
        {"crd_loss_type": "bce"},
        {"weight_temp": 0.5},
        {"adaptive_logp": False, "reward_adaptive_kl": "off"},
        {"name": "diffusion-nft"},
    ],
    ids=str,
)
def test_the_size_of_a_micro_batch_changes_no_gradient(ready, method):
    own = ready(updates_per_step=1, **method)
    rollout = collected(own)
    whole, *others = (gradient(replace(own, batch_size=size), rollout) for size in (8, 4, 3, 1))
    assert whole.abs().max() > 1e-4
    for other in others:  # one group at a time, and groups in parts
        assert gap(whole, other) < 1e-5 * whole.abs().max()


@pytest.mark.parametrize("weight_temp", [-1.0, 0.5])
def test_a_constant_on_all_rewards_of_a_prompt_changes_no_gradient(ready, weight_temp):
    # Powers of two, so that the sums are exact. The anchor follows the advantage: the raw reward would rightly matter.
    method = ready(updates_per_step=1, reward_adaptive_kl="advantage", weight_temp=weight_temp)
    scores = torch.tensor([1, 5, 2, 0, 3, 3, 7, 1]) / 8

    def with_constants(*constants):
        offset = torch.tensor(constants).repeat_interleave(4)
        rewards = Composite({"fixed": (lambda images, prompts, metadata: scores + offset, 1.0)})
        return replace(method, rollouts=replace(method.rollouts, rewards=rewards))

    plain, moved = (gradient(own, collected(own)) for own in (with_constants(0.0, 0.0), with_constants(4.0, -16.0)))
    assert plain.abs().max() > 1e-4
    assert gap(plain, moved) < 1e-4 * plain.abs().max()


# Rewards that fail

ONCE = """
calls = 0

def f(images, prompts, metadata):
    global calls
    calls += 1
    scores = images.mean((1, 2, 3)).tolist()
    {trouble}
    return scores
"""
# Call 1 is step 1. In step 2 the batch fails in call 2 and its pictures are asked one by one, in calls 3 to 10.
RAISES = "if calls in (2, 5): raise ValueError('the scorer choked')"
IS_NAN = "if calls == 2: scores[3] = float('nan')"


@pytest.mark.parametrize("trouble", [RAISES, IS_NAN])
def test_a_reward_that_fails_for_one_picture_costs_that_picture(recipe, workplace, trouble):
    (workplace / "once.py").write_text(ONCE.format(trouble=trouble))
    path = recipe(rewards={"once.py:f": 1.0}, training={"max_train_steps": 3})
    run.train(run.load_config(str(path)), Silent())
    assert [line["failed/once.py:f"] for line in metrics()] == [0, 1, 0]
    assert all(math.isfinite(line["loss"]) for line in metrics())


def test_a_full_disk_is_one_sentence_and_leaves_the_checkpoint_before(recipe, workplace, cli, monkeypatch):
    path = str(recipe(training={"max_train_steps": 3, "checkpointing_steps": 1}))
    asked: list = []

    def full(tensors, file, *args, **kwargs):
        save_file(tensors, file, *args, **kwargs)
        asked.append(file)
        if len(asked) > 1:
            raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint.safetensors.torch, "save_file", full)
    code, _, error = cli("train", path)
    assert code == 1
    said = "checkpoint-2 could not be written (I/O error: No space left on device (os error 28)); checkpoint-1 is"
    assert said in error
    assert len(asked) == 2  # it was not tried once more
    assert [file.name for file in (workplace / "runs/mine").glob("checkpoint-*")] == ["checkpoint-1"]
    monkeypatch.setattr(checkpoint.safetensors.torch, "save_file", save_file)
    assert cli("train", path, "--resume")[0] == 0


@pytest.mark.parametrize(
    ("trouble", "says"),
    [
        ("if calls > 1: raise ValueError('no credit left')", "no credit left"),
        ("if calls > 1: scores = [float('nan')] * len(scores)", "0 of 8 pictures were scored"),
        ("if calls > 1: scores.pop()", "returned 7 scores for 8 images"),
    ],
)
def test_a_reward_that_fails_for_all_stops_the_run_until_it_is_mended(recipe, workplace, cli, trouble, says):
    (workplace / "once.py").write_text(ONCE.format(trouble=trouble))
    path = recipe(rewards={"once.py:f": 1.0}, training={"max_train_steps": 3, "checkpointing_steps": 100})
    code, _, stderr = cli("train", path)
    assert code == 1
    assert stderr.startswith("trimtab: ")
    assert stderr.count("\n") == 1
    assert says in stderr
    assert "step 1" in stderr
    assert checkpoint.latest("runs/mine").name == "checkpoint-1"
    (workplace / "once.py").write_text(ONCE.format(trouble=""))
    code, stdout, _ = cli("train", path, "--resume")
    assert code == 0
    assert "resumed from" in stdout
    assert [line["step"] for line in metrics()] == [1, 2, 3]


def test_an_update_whose_gradient_is_not_finite_is_skipped_and_counted(ready):
    # Learner and rollouts together: one spoilt latent makes one update vanish, and nothing else.
    method = ready()
    learner = Learner(method, Accelerator(cpu=True), run.RunConfig.model_fields["optimizer"].default, 1)
    collect = method.rollouts.collect

    class Spoilt:
        config, time_grid = method.rollouts.config, method.rollouts.time_grid
        mean_length, training_scale = method.rollouts.mean_length, 1.0

        def collect(self, step, role):
            rollout, log = collect(step, role)
            rollout.latents[0] = torch.nan
            return rollout, log

    learner.method = replace(method, rollouts=Spoilt())
    before = {name: p.detach().clone() for name, p in learner.parameters["default"].items()}
    (record,) = learner.run()
    assert record.metrics["skipped_updates"] == 1
    assert record.metrics["updates"] == 2
    assert all(p.isfinite().all() for p in learner.parameters["default"].values())
    assert max(gap(p.detach(), before[name]) for name, p in learner.parameters["default"].items()) > 0


@pytest.mark.parametrize("method", ["crd", "agsm"])
def test_what_bench_times_is_no_part_of_the_first_update(recipe, monkeypatch, method):
    def totals(running, *_):
        networks = running.learner.parameters.values()
        left.extend(p.grad is not None for network in networks for p in network.values())
        return defaultdict(lambda: 1.0)

    left = []
    monkeypatch.setattr(bench, "REPEATS", 1)
    monkeypatch.setattr(bench, "_totals", totals)
    bench.bench(run.load_config(recipe(**METHODS[method])), Silent(), 1)
    assert left
    assert not any(left)


def test_bench_times_the_network_at_the_size_of_the_recipe(recipe, monkeypatch):
    path = recipe(**METHODS["crd"])
    config = run.load_config(path, ["model.resolution=32", "training.train_batch_size=3"])
    seen = []
    monkeypatch.setattr(bench, "REPEATS", 1)
    monkeypatch.setattr(bench, "_totals", lambda *_: defaultdict(lambda: 1.0))
    monkeypatch.setattr(bench, "_rate", lambda call, size, device: seen.append((call(), size)) or 1.0)
    bench.bench(config, Silent(), 1)
    assert seen[0][0].shape[0] == seen[0][1] == 3
    assert seen[0][0].shape[2:] == (4, 4)  # the auto-encoder makes 8 pixels one


# Candidates as preferences


def test_pairs_are_what_the_run_saw_and_train_offline(recipe, cli):
    rollout = {"num_inference_steps": 1}
    path = recipe(**METHODS["drpo"], training={"max_train_steps": 2, "checkpoints_total_limit": None})
    assert cli("train", path)[0] == 0
    seen = [line["reward"] for line in metrics() if "reward" in line]
    for step in (0, 1):
        code, out, _ = cli("pairs", "runs/mine", "--step", step, "--num-pairs", 2, "--output", f"pairs{step}")
        assert code == 0
        assert "pairs.jsonl" in out
        lines = [json.loads(line) for line in Path(f"pairs{step}/pairs.jsonl").read_text().splitlines()]
        assert {line["prompt"] for line in lines} == {"a photo of a red circle", "a photo of two stars"}
        scores = [score for line in lines for side in ("chosen", "rejected") for score in line[f"{side}_scores"]]
        assert sum(scores) / len(scores) == pytest.approx(seen[step], rel=1e-5)  # two and two are all four candidates
        for line in lines:
            assert min(line["chosen_scores"]) > max(line["rejected_scores"])
            for side in ("chosen", "rejected"):
                for name, score in zip(line[side], line[f"{side}_scores"], strict=True):
                    pixels = torch.tensor(list(Image.open(Path(f"pairs{step}") / name).tobytes())) / 255
                    assert pixels.mean().item() == pytest.approx(score, abs=1 / 255)
    offline = {"name": "drpo", "variant": "offline", "features": {"kind": "latents"}}
    data = {"prompts": "blocks", "pairs": "pairs1/pairs.jsonl"}
    path = recipe(name="again", method=offline, rewards={}, data=data, rollout=rollout)
    assert cli("train", path)[0] == 0
    assert len(metrics("runs/again")) == STEPS
    code, _, err = cli("pairs", "runs/mine", "--step", 1, "--output", "pairs1")
    assert (code, "pairs1 holds pairs.jsonl already" in err) == (2, True)
    turned = Path("pairs1/pairs.jsonl").read_text().replace('"chosen"', '"x"').replace('"rejected"', '"chosen"')
    Path("pairs1/pairs.jsonl").write_text(turned.replace('"x"', '"rejected"'))
    code, _, err = cli("train", path, "--resume")
    assert (code, "pairs1/pairs.jsonl no longer holds the pairs of" in err) == (2, True)
    code, _, err = cli("train", path, "name=third", "rollout.group_size=1")
    assert (code, "rollout.group_size is 1; give 2 or more" in err) == (2, True)


def test_pairs_are_ranked_as_the_run_ranks_which_counts_several_rewards_in_units_of_siblings(recipe, cli):
    rewards = {"reward.py:brightness": 1.0, "reward.py:weighted": -1e-3}
    path = recipe(
        **METHODS["drpo"], rewards=rewards, data={"prompts": "prompts.jsonl"}, training={"max_train_steps": 1}
    )
    assert cli("train", path)[0] == 0
    assert cli("pairs", "runs/mine", "--step", 0, "--num-pairs", 2)[0] == 0
    lines = [json.loads(line) for line in Path("runs/mine/pairs/pairs.jsonl").read_text().splitlines()]
    scores = [line["chosen_scores"] + line["rejected_scores"] for line in lines]
    assert all(sum(each) == pytest.approx(0, abs=1e-4) and max(each) > 0.3 for each in scores)


def test_a_run_that_breaks_between_updates_keeps_what_it_has(recipe, cli, monkeypatch):
    draw = Rollouts.draw

    def broken(self, prompts, step, *rest, **how):
        if step == 2:
            raise MemoryError("out of memory")
        return draw(self, prompts, step, *rest, **how)

    path = recipe(training={"checkpointing_steps": 100})
    monkeypatch.setattr(Rollouts, "draw", broken)
    with pytest.raises(MemoryError):
        cli("train", path)
    assert checkpoint.latest(Path("runs/mine")).name == "checkpoint-2"


def test_a_run_from_before_a_setting_is_resumed_with_its_default_and_with_no_other_value(recipe, cli):
    path = recipe(training={"max_train_steps": 1})
    assert cli("train", path)[0] == 0
    file = Path("runs/mine/config.yaml")
    file.write_text("".join(line for line in file.open() if "noise_spread" not in line))
    assert cli("train", path, "--resume")[0] == 0
    code, _, err = cli("train", path, "rollout.noise_spread=0.5", "--resume")
    assert code == 2
    assert "has rollout.noise_spread=1.0 and the resumed run was given 0.5" in err


def test_a_run_is_resumed_with_the_prompts_that_it_began_with(recipe, cli):
    path = recipe(training={"max_train_steps": 1})
    assert cli("train", path)[0] == 0
    before = Path("prompts.txt").read_text()
    Path("prompts.txt").write_text(before + "one more\n")
    code, _, err = cli("train", path, "--resume")
    assert code == 2
    assert "prompts.txt no longer holds the prompts of the run in runs/mine" in err
    Path("prompts.txt").write_text(before)
    assert cli("train", path, "--resume")[0] == 0
    Path("prompts.txt").write_text("\n" + before)  # the same, one line further down
    assert cli("train", path, "--resume")[0] == 0


def test_a_run_whose_folder_was_moved_is_resumed_there(recipe, cli):
    path = recipe(training={"max_train_steps": 1})
    assert cli("train", path)[0] == 0
    Path("moved").mkdir()
    Path("runs/mine").rename("moved/other")
    before = len(metrics("moved/other"))
    assert cli("train", path, "output_dir=moved", "name=other", "--resume")[0] == 0
    assert len(metrics("moved/other")) == before
    assert not Path("runs/mine").exists()


def test_a_generator_of_one_call_is_not_evaluated_with_guidance(recipe, cli):
    suite = {"suite": "prompts.txt", "images_per_prompt": 2, "base_guidance_scale": 2.0}
    assert cli("train", recipe(**METHODS["drpo"], training={"max_train_steps": 1}, evaluation=suite))[0] == 0
    assert {folder.name for folder in Path("runs/mine/evaluation").iterdir()} == {"base", "trained"}


def test_whoever_may_read_the_folder_may_read_the_weights(recipe, cli):
    assert cli("train", recipe(training={"max_train_steps": 1}))[0] == 0
    files = [*Path("runs/mine/export").iterdir(), *Path("runs/mine/checkpoint-1").iterdir()]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o666 & ~_umask()}


def _umask():
    now = os.umask(0)
    os.umask(now)
    return now


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("pairs", "nowhere"), "nowhere has no config.yaml"),
        (("pairs", "runs/mine", "--num-pairs", 3), "3 best and 3 worst of 4 candidates overlap"),
        (("pairs", "runs/mine", "--step", 77), "keeps no checkpoint-77"),
        (("pairs", "runs/tokens"), "is a run of agsm without candidates"),
    ],
)
def test_what_cannot_give_pairs_is_one_sentence(recipe, cli, words, sentence):
    for name, changes in (("mine", METHODS["crd"]), ("tokens", CAPTIONED)):
        config = run.load_config(recipe(**changes, name=name))
        Path(f"runs/{name}").mkdir(parents=True)
        Path(f"runs/{name}/config.yaml").write_text(run.dump(config))
    code, _, error = cli(*words)
    assert code == 2
    assert sentence in error


@pytest.mark.parametrize("name", ["drpo", "dpo-one-step", "draft"])
def test_what_is_trained_in_one_call_is_a_model_of_few_calls_or_is_told(recipe, tiny_sd_folder, caplog, name):
    path = recipe(**METHODS[name])
    inputs.check(run.load_config(path))
    assert sum("draws well in few calls" in line for line in caplog.messages) == 1
    with pytest.raises(UserError, match="save the model with an LCMScheduler"):
        inputs.check(run.load_config(path, [f"model.pretrained_model_name_or_path={tiny_sd_folder}"]))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rollout": {"num_inference_steps": 2}}, "trains a generator of one call"),
        (
            {"rollout": {"num_inference_steps": 1, "merge_lora": True}},
            "leave guidance_scale, solver_order and merge_lora",
        ),
        ({"rollout": {"num_inference_steps": 1, "group_size": 1}}, "rollout.group_size is 1"),
        ({"method": {"name": "drpo"}}, "num_negative are 16 together and a prompt has 4 candidates"),
        ({"method": {"name": "drpo", "variant": "binary", "num_rounds": 3}}, "a prompt has 12 candidates in 3 rounds"),
        ({"method": OFFLINE, "data": {"prompts": "blocks"}}, "learns from pairs; give data.pairs"),
        ({"method": OFFLINE, "data": {"prompts": "blocks", "pairs": "prompts.txt"}}, "no .jsonl or .parquet"),
        ({"data": {"pairs": "pairs.jsonl"}}, "data.pairs is given, and only method.name=drpo"),
        ({"method": {"name": "draft"}}, "has no gradient; give it weight 0"),
        ({"rewards": {}}, "names no reward"),
        ({"evaluation": {"num_inference_steps": 4}}, "a generator of one call is sampled so"),
    ],
)
def test_a_recipe_for_a_generator_of_one_call_is_checked_before_weights_load(
    recipe, cli, changes, sentence, monkeypatch
):
    monkeypatch.setattr("trimtab.pipelines.loading.load", None)
    changes = {"method": METHODS["drpo"]["method"], "rollout": {"num_inference_steps": 1}} | changes
    code, _, error = cli("train", recipe(**changes))
    assert code == 2
    assert sentence in error


def test_a_run_is_resumed_with_the_suite_that_its_base_was_evaluated_on(recipe, cli):
    Path("suite.txt").write_text("a photo of a ring\n")
    suite = {"suite": "suite.txt", "images_per_prompt": 1, "num_inference_steps": 1, "base_guidance_scale": None}
    path = recipe(evaluation=suite, training={"max_train_steps": 1})
    assert cli("train", path)[0] == 0
    Path("suite.txt").write_text("a photo of a star\n")
    code, _, err = cli("train", path, "--resume")
    assert code == 2
    assert "suite.txt no longer holds the suite of the run in runs/mine" in err


def test_candidates_are_ranked_again_of_the_prompts_that_the_run_had(recipe, cli):
    path = recipe(training={"max_train_steps": 1})
    assert cli("train", path)[0] == 0
    Path("prompts.txt").write_text("a zebra\na lion\n")
    code, _, err = cli("pairs", "runs/mine", "--step", "0")
    assert code == 2
    assert "prompts.txt no longer holds the prompts of the run in runs/mine" in err


def test_without_a_suite_pictures_may_be_mended_before_a_run_goes_on(recipe, cli):
    path = recipe(**CAPTIONED | {"training": {"train_batch_size": 4, "max_train_steps": 1}})
    assert cli("train", path)[0] == 0
    Path("pictures/0.txt").write_text("mended")
    assert cli("train", path, "--resume")[0] == 0
