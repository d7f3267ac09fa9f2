"""Evaluation: equal calls write equal bytes, means by hand, and any picture can be made again."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from trimtab import evaluate, inference
from trimtab.batch import Prompts
from trimtab.distributed import Processes
from trimtab.errors import UserError
from trimtab.evaluate import Setting
from trimtab.worlds import blocks

QUIET = SimpleNamespace(note=lambda text: None, progress=lambda *args: None)
NAN = float("nan")
LINES = [
    content | {"prompt": f"a photo of {blocks.phrase(content)}"}
    for content in (
        blocks.contents("single_object")[0],
        blocks.contents("single_object")[4],
        blocks.contents("colors")[9],
    )
]
PROMPTS = Prompts(tuple(line["prompt"] for line in LINES), tuple(LINES), (0, 1, 2))
SETTING = Setting(suite="blocks", images_per_prompt=2, num_inference_steps=2, guidance_scale=2.0, seed=30)


@pytest.fixture(scope="module")
def face(tiny):
    return tiny()


def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3))


def test_the_same_call_twice_writes_the_same_bytes(face, tmp_path):
    setting, how = replace(SETTING, images_per_prompt=6), {"rewards": {"mine": brightness}, "reference": "ref"}
    for name in ("one", "two"):
        evaluate._real_features.cache_clear()  # as in another process
        evaluate.evaluate(face, "default", PROMPTS, setting, tmp_path / name, **how)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) == 18 + 3 + 2  # pictures, facts, rows and results
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_a_picture_can_be_made_again_from_its_row(face, tiny_folder, tmp_path):
    evaluate.evaluate(face, "default", PROMPTS, SETTING, tmp_path)
    rows = [json.loads(text) for text in (tmp_path / "images.jsonl").read_text().splitlines()]
    assert [row["seed"] for row in rows] == [30, 31, 32, 33, 34, 35]
    row = rows[3]
    how = {"num_inference_steps": 2, "guidance_scale": 2.0, "images_per_prompt": 1, "seed": row["seed"]}
    (file,) = inference.sample(str(tiny_folder), [], [row["prompt"]], tmp_path / "again", QUIET, **how)
    again, first = (np.asarray(Image.open(path), dtype=int) for path in (file, tmp_path / row["file"]))
    assert np.abs(again - first).max() <= 1
    assert np.abs(first - np.asarray(Image.open(tmp_path / rows[2]["file"]), dtype=int)).max() > 8


def test_pictures_do_not_depend_on_the_batch_size(face):
    group, seeds = torch.tensor([0, 0, 1, 1, 2, 2]), list(range(6))
    pictures = [
        evaluate.generate(face, "default", PROMPTS, group, seeds, Setting("", 2, 2, batch_size=size))[0]
        for size in (4, None)
    ]
    assert (pictures[0] - pictures[1]).abs().max() < 1e-3


@pytest.mark.parametrize("size", [1, 4, None])  # 6 parts, 2 of which the last is smaller, and 1, which both draw
def test_two_processes_draw_the_pictures_of_one_and_the_first_writes_them(tiny, tmp_path, gathers, size):
    setting, faces = replace(SETTING, batch_size=size), {name: shaken(tiny()) for name in ("alone", "first", "other")}

    def evaluated(rank, name):
        processes = Processes() if rank is None else Processes(rank, 2, gathers[rank])
        how = {"reference": "ref", "rewards": {"mine": brightness}, "processes": processes}
        return evaluate.evaluate(faces[name], "default", PROMPTS, setting, tmp_path / name, **how)

    alone = evaluated(None, "alone")
    with ThreadPoolExecutor(2) as pool:
        first, other = pool.map(evaluated, range(2), ("first", "other"))
    assert other == {}
    assert not (tmp_path / "other").exists()
    assert alone["drift"] > 0
    found, expected = dict(numbers(first)), dict(numbers(alone))
    assert found == pytest.approx(expected, rel=1e-5, nan_ok=True)  # threads may round otherwise than the main one
    files = sorted((tmp_path / "alone").rglob("*.png"))
    assert len(files) == 6
    for file in files:
        own, other = (
            np.asarray(Image.open(each)).astype(int)
            for each in (file, tmp_path / "first" / file.relative_to(tmp_path / "alone"))
        )
        assert abs(own - other).max() <= 1


def numbers(results, place=""):
    """What results say, one leaf each; what is no number is part of its place."""
    if isinstance(results, dict):
        for key, value in results.items():
            yield from numbers(value, f"{place}/{key}")
    elif isinstance(results, int | float):
        yield place, results
    else:
        yield f"{place}={results}", 0


def shaken(face):
    generator = torch.Generator().manual_seed(0)
    for parameter in face.roles.parameters("default").values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return face


@pytest.mark.parametrize(("side", "sizes"), [(64, [64, 6]), (512, [16, 16, 16, 16, 6]), (1024, [4] * 17 + [2])])
def test_large_pictures_are_drawn_a_few_at_a_time(side, sizes):
    assert [len(part) for part in Setting("").parts(70, side)] == sizes
    assert [len(part) for part in Setting("", batch_size=35).parts(70, side)] == [35, 35]
    assert [len(part) for part in Setting("").parts(2, 4096)] == [1, 1]


@pytest.fixture
def drawn(monkeypatch):
    """The pictures to judge: scenes of the three prompts, true, true / true, blank / blank, false."""
    rng = np.random.default_rng(0)
    of = [blocks.scene(line, rng) for line in (LINES[0], LINES[0], LINES[1], LINES[1], LINES[2], LINES[1])]
    pictures = blocks.draw(of)
    pictures[[3, 4]] = 1.0
    monkeypatch.setattr(evaluate, "generate", lambda *args: (pictures, torch.zeros(6, 8, 8, 8)))
    return pictures


def results(tmp_path, **kwargs):
    written = evaluate.evaluate(None, "default", PROMPTS, SETTING, tmp_path, **kwargs)
    assert written == json.loads((tmp_path / "results.json").read_text())
    rows = [json.loads(text) for text in (tmp_path / "images.jsonl").read_text().splitlines()]
    return written, rows


@pytest.mark.usefixtures("drawn")
def test_means_of_tags_by_hand_and_overall_is_their_mean(tmp_path):
    written, rows = results(tmp_path)
    # single_object: 3 of 4; colors: 0 of 2; overall (3/4 + 0) / 2
    strict = written["scores"]["strict"]
    assert {tag: score["mean"] for tag, score in strict["tags"].items()} == {"single_object": 0.75, "colors": 0.0}
    assert strict["overall"]["mean"] == 0.375
    assert [score["num_images"] for score in strict["tags"].values()] == [4, 2]
    assert [row["strict"] for row in rows] == [1, 1, 1, 0, 0, 0]
    assert [bool(row["reason"]) for row in rows] == [False, False, False, True, True, True]
    assert strict["tags"]["colors"]["low"] is None  # one prompt says nothing about others


@pytest.mark.usefixtures("drawn")
def test_rows_tell_prompt_sibling_seed_and_file(tmp_path):
    _, rows = results(tmp_path)
    assert [(row["prompt_index"], row["sibling"]) for row in rows] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert rows[3]["prompt"] == PROMPTS.text[1]
    assert rows[3]["file"] == "images/00001/samples/0001.png"
    assert json.loads((tmp_path / "images/00001/metadata.jsonl").read_text()) == LINES[1]


def test_a_picture_file_holds_the_picture(drawn, tmp_path):
    _, rows = results(tmp_path)
    for row, picture in zip(rows, drawn, strict=True):
        saved = np.asarray(Image.open(tmp_path / row["file"]), dtype=float) / 255
        assert np.abs(saved - picture.permute(1, 2, 0).numpy()).max() <= 0.5 / 255 + 1e-6


@pytest.mark.usefixtures("drawn")
def test_missing_scores_are_left_out_of_the_means_and_counted(tmp_path):
    rewards = {
        "some": lambda *args: torch.tensor([1.0, NAN, 4.0, 4.0, 2.0, NAN]),
        "none": lambda *args: torch.full((6,), NAN),
    }
    written, rows = results(tmp_path, rewards=rewards)
    some, none = written["scores"]["some"], written["scores"]["none"]
    assert (some["tags"]["single_object"]["mean"], some["tags"]["colors"]["mean"]) == (3.0, 2.0)
    assert (some["overall"]["mean"], some["num_missing"]) == (2.5, 2)
    assert (none["overall"]["mean"], none["num_missing"], none["tags"]) == (None, 6, {})
    assert [row["some"] for row in rows] == [1, None, 4, 4, 2, None]


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize("kept", [(), ("include",)], ids=["nothing", "no tag"])
def test_a_suite_without_facts_is_scored_by_what_it_is_given(kept, tmp_path):
    plain = Prompts(PROMPTS.text, tuple({key: line[key] for key in kept} for line in LINES), (0, 1, 2))
    written = evaluate.evaluate(None, "default", plain, SETTING, tmp_path, rewards={"mine": brightness})
    assert set(written["scores"]) == {"mine"}
    assert set(written["scores"]["mine"]["tags"]) == {"all"}
    assert "frechet_distance" not in written
    assert set(written["image_statistics"]) >= {"brightness", "saturation"}


def found_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.usefixtures("drawn")
def test_pictures_of_another_evaluation_never_stay(tmp_path, monkeypatch):
    _, rows = results(tmp_path)
    kept = tmp_path / "images/00001/notes.txt"
    kept.write_text("not ours")
    monkeypatch.setattr(evaluate, "generate", lambda *args: (torch.rand(1, 3, 64, 64), torch.zeros(1, 8, 8, 8)))
    one = Prompts(PROMPTS.text[:1], PROMPTS.metadata[:1], (0,))
    evaluate.evaluate(None, "default", one, replace(SETTING, images_per_prompt=1), tmp_path)
    files = [name for name in found_in(tmp_path) if (tmp_path / name).is_file()]
    ours = ["images.jsonl", "images/00000/metadata.jsonl", "images/00000/samples/0000.png", "results.json"]
    assert files == sorted([*ours, "images/00001/notes.txt"])
    assert not (tmp_path / "images/00002").exists()  # GenEval's own scripts would look into it
    assert rows[5]["file"] == "images/00002/samples/0001.png"


def test_a_reward_that_raises_costs_the_scores_and_no_picture(drawn, tmp_path, monkeypatch):
    def raises(images, prompts, metadata):
        raise UserError("no")

    with pytest.raises(UserError):
        evaluate.evaluate(None, "default", PROMPTS, SETTING, tmp_path / "new", rewards={"mine": raises})
    assert len(list(tmp_path.glob("new/images/*/samples/*.png"))) == 6
    assert not (tmp_path / "new" / "results.json").exists()
    results(tmp_path)
    before = (tmp_path / "results.json").read_bytes()
    for changed in (False, True):
        pictures = 1 - drawn if changed else drawn
        monkeypatch.setattr(evaluate, "generate", lambda *args, found=pictures: (found, torch.zeros(6, 8, 8, 8)))
        with pytest.raises(UserError):
            evaluate.evaluate(None, "default", PROMPTS, SETTING, tmp_path, rewards={"mine": raises})
        if changed:  # what stood there was said of other pictures
            assert not (tmp_path / "results.json").exists()
            assert not (tmp_path / "images.jsonl").exists()
        else:
            assert (tmp_path / "results.json").read_bytes() == before


def test_a_folder_is_written_again_by_the_same_call_only(tiny_folder, tmp_path):
    (tmp_path / "one.txt").write_text("a red circle\n")
    folder, calls = tmp_path / "out", []

    def evaluated(**how):
        asked = {"num_inference_steps": 1, "images_per_prompt": 1, "guidance_scale": 1.0, "seed": 0} | how
        calls.append(inference.evaluate_model(str(tiny_folder), [], str(tmp_path / "one.txt"), folder, QUIET, **asked))

    evaluated()
    evaluated()
    assert calls[0] == calls[1]
    before = (folder / "results.json").read_bytes()
    with pytest.raises(
        UserError, match="with num_inference_steps=1, and this one has 40; ask for the same, or give --output"
    ):
        evaluated(num_inference_steps=None)  # 40 are taken, as only the model knows
    assert (folder / "results.json").read_bytes() == before


def test_a_suite_or_a_reward_that_has_changed_is_another_evaluation(tiny_folder, tmp_path):
    suite, reward, folder = tmp_path / "edit.txt", tmp_path / "mine.py", tmp_path / "out"
    suite.write_text("a red circle\n")
    reward.write_text("def score(images, prompts, metadata): return [1.0] * len(images)\n")

    def evaluated(**how):
        asked = {"num_inference_steps": 1, "images_per_prompt": 1, "guidance_scale": 1.0, "seed": 0} | how
        return inference.evaluate_model(str(tiny_folder), [], str(suite), folder, QUIET, **asked)

    evaluated()
    with_reward = {"rewards": [f"{reward}:score"]}
    evaluated(**with_reward)  # scores may be added
    before = (folder / "results.json").read_bytes()
    suite.write_text("\na red circle\n\n")  # says the same
    evaluated(**with_reward)
    for file, text in ((suite, "a blue circle\n"), (reward, reward.read_text().replace("1.0", "2.0"))):
        kept = file.read_text()
        file.write_text(text)
        with pytest.raises(UserError, match=rf"from before .*{file.name}.* changed; give --output another folder"):
            evaluated(**with_reward)
        file.write_text(kept)
    assert (folder / "results.json").read_bytes() == before
    older = json.loads(before)
    del older["sha256"]
    (folder / "results.json").write_text(json.dumps(older))
    evaluated(**with_reward)  # from before there were hashes
    assert (folder / "results.json").read_bytes() == before


def test_no_picture_replaces_another(tiny_folder, tmp_path):
    def sampled(steps, text="a red circle"):
        how = {"num_inference_steps": steps, "images_per_prompt": 2, "seed": 0, "guidance_scale": 1.0}
        return inference.sample(str(tiny_folder), [], [text], tmp_path, QUIET, **how)

    first = sampled(1)
    before = [file.read_bytes() for file in first]
    assert [file.name for file in first] == [f"000-a-red-circle-seed{s}.png" for s in (0, 1)]
    assert [file.name for file in sampled(2)] == [f"001-a-red-circle-seed{s}.png" for s in (0, 1)]
    assert [file.name for file in sampled(1, "two stars")] == [f"000-two-stars-seed{s}.png" for s in (0, 1)]
    assert sampled(1) == first  # the same pictures once more
    assert [file.read_bytes() for file in first] == before
    assert len(list(tmp_path.iterdir())) == 6


def test_a_long_prompt_in_any_script_makes_a_file_s_name(tiny_folder, tmp_path):
    (file,) = inference.sample(
        str(tiny_folder), [], ["\u72ac" * 200], tmp_path, QUIET, num_inference_steps=1, images_per_prompt=1, seed=2**62
    )
    assert file.is_file()


def test_true_scenes_lie_nearer_to_real_ones_than_blank_pictures(tmp_path, monkeypatch):
    rng, setting = np.random.default_rng(3), replace(SETTING, images_per_prompt=6)
    true = blocks.draw([blocks.scene(LINES[i // 6], rng) for i in range(18)])
    distances = []
    for pictures in (true, torch.ones_like(true)):
        monkeypatch.setattr(evaluate, "generate", lambda *args, pictures=pictures: (pictures, None))
        distances.append(evaluate.evaluate(None, "default", PROMPTS, setting, tmp_path)["frechet_distance"])
    assert 5 * distances[0] < distances[1]


def test_prompts_of_which_no_scene_can_be_drawn_have_no_distance_to_real_ones(tmp_path, monkeypatch):
    crowd = {"tag": "counting", "include": [{"class": "circle", "count": 5, "color": None, "position": None}]}
    prompts = Prompts(("five circles",), (crowd,), (0,))
    monkeypatch.setattr(evaluate, "generate", lambda *args: (torch.ones(12, 3, 64, 64), None))
    found = evaluate.evaluate(None, "default", prompts, replace(SETTING, images_per_prompt=12), tmp_path)
    assert found["scores"]["strict"]["overall"]["mean"] == 0
    assert "frechet_distance" not in found


def test_a_role_does_not_drift_from_itself_and_its_drift_is_that_of_its_field(tiny):
    # Fields that differ by c everywhere are c^2 apart, whatever the samples and times.
    face, group, latents = tiny(), torch.tensor([0, 0, 1]), torch.randn(3, 8, 8, 8)
    assert evaluate.drift(face, "default", "ref", latents, PROMPTS, group, SETTING) == 0
    predict = face.predict

    def moved(x_t, t, condition, role, scale):
        prediction = predict(x_t, t, condition, role, scale)
        return prediction if role == "ref" else SimpleNamespace(flow=prediction.flow + 0.3)

    face.predict = moved
    drift = evaluate.drift(face, "default", "ref", latents, PROMPTS, group, SETTING)
    assert drift == pytest.approx(0.09, rel=1e-4)


def test_drift_is_measured_at_four_even_times_each_with_noise_of_its_own(tiny):
    face, group, noises = tiny(), torch.tensor([0, 1]), {}
    predict = face.predict

    def watched(x_t, t, condition, role, scale):
        noises[t.item()] = x_t / t  # for samples that are 0
        return predict(x_t, t, condition, role, scale)

    face.predict = watched
    evaluate.drift(face, "default", "ref", torch.zeros(2, 8, 8, 8), PROMPTS, group, SETTING)
    assert list(noises) == [1 / 8, 3 / 8, 5 / 8, 7 / 8]
    assert torch.pdist(torch.cat(list(noises.values())).flatten(1)).min() > 1


def test_the_table_keeps_a_users_names_and_has_no_row_without_a_number():
    score = {"overall": {"mean": 0.5, "low": None}, "tags": {}}
    bare = {"scores": {"my_reward.py:score": score}, "diversity": None, "frechet_distance": 2.0}
    assert evaluate.table({"my_model": bare}) == [
        ["", "my_model"],
        ["my_reward.py:score, overall", "0.500"],
        ["frechet distance", "2.000"],
    ]


@pytest.mark.usefixtures("drawn")
def test_the_table_has_a_column_for_each_evaluation_and_blanks_where_one_has_no_number(tmp_path):
    full, _ = results(tmp_path)
    bare = {"scores": {}}
    header, *rows = evaluate.table({"base": full, "other": bare})
    assert header == ["", "base", "other"]
    assert [row[0] for row in rows][:3] == ["strict, single object", "strict, colors", "strict, overall"]
    assert rows[0][1].startswith("0.750 [")
    assert all(row[2] == "" for row in rows)


def test_the_look_is_that_of_all_pictures_however_many():
    images = torch.zeros(70, 3, 16, 16)
    images[64:] = 1.0
    found = evaluate._look(images, torch.zeros(70).long(), Prompts(("a cat",), ({},), (0,)))
    assert found["image_statistics"]["brightness"] == pytest.approx(6 / 70)


@pytest.mark.parametrize(
    ("cuda", "bf16", "precision"), [(True, True, "bf16"), (True, False, "no"), (False, True, "no")]
)
def test_a_gpu_draws_in_the_precision_of_training(monkeypatch, cuda, bf16, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bf16)
    assert inference._usual_precision() == precision
