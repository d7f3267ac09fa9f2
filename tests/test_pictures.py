"""Captioned pictures: the layouts of a folder, what is refused or left out, and how a picture becomes a square."""

import io
import json
import logging
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from trimtab.errors import UserError
from trimtab.rewards.detectors import read_blocks
from trimtab.worlds import blocks
from trimtab.worlds.pictures import Unusable, load_pictures, square

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def encoded(image, kind="PNG", **how):
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def plain(color=RED, size=(8, 8)):
    return encoded(Image.new("RGB", size, color))


@pytest.fixture
def folder(tmp_path):
    """Writes files, given as {name: bytes, text or list of JSON lines}, and returns their folder."""

    def write(files):
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            content = "\n".join(map(json.dumps, content)) if isinstance(content, list) else content
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path

    return write


def line(name, text="a cat", column="text"):
    return {"file_name": name, column: text}


# Layouts


def test_metadata_names_pictures_from_where_it_lies_and_says_their_captions(folder):
    metadata = [line("a.png", " a cat "), line("deep/b.png", ["a dog", "two dogs"])]
    where = folder({"metadata.jsonl": metadata, "a.png": plain(RED), "deep/b.png": plain(GREEN), "c.png": plain(BLUE)})
    pictures = load_pictures(str(where), "stop")
    assert pictures.captions == (("a cat",), ("a dog", "two dogs"))
    assert [tuple(pictures.read(i, 4)[:, 0, 0].tolist()) for i in range(len(pictures))] == [RED, GREEN]
    assert pictures.skipped == ()


def test_each_sub_folder_may_have_its_own_metadata(folder):
    files = {f"{side}/metadata.jsonl": [line("a.png", side)] for side in ("left", "right")}
    where = folder(files | {"left/a.png": plain(RED), "right/a.png": plain(BLUE)})
    pictures = load_pictures(str(where), "stop")
    assert pictures.captions == (("left",), ("right",))
    assert pictures.read(1, 4)[:, 0, 0].tolist() == list(BLUE)


def test_captions_are_under_text_or_else_caption_or_else_prompt(folder):
    metadata = [line("a.png", "one", "caption"), line("b.png", "two", "prompt")]
    metadata += [line("c.png", "three") | {"caption": "no", "prompt": "no"}, line("d.png", None) | {"caption": "four"}]
    where = folder({"metadata.jsonl": metadata} | {f"{name}.png": plain() for name in "abcd"})
    assert load_pictures(str(where), "stop").captions == (("one",), ("two",), ("three",), ("four",))


def test_a_line_of_metadata_ends_at_a_newline_only(folder):
    text = "a cat\u2028on a mat"  # JSON has such signs as they are; str.splitlines splits there
    where = folder({"metadata.jsonl": json.dumps(line("a.png", text), ensure_ascii=False) + "\n\n", "a.png": plain()})
    assert load_pictures(str(where), "stop").captions == ((text,),)


def test_a_text_file_beside_a_picture_holds_a_caption_a_line(folder):
    files = {"a.PNG": plain(RED), "a.txt": "\ufeffa cat\n\n two cats \n", "sub/b.webp": plain(BLUE), "sub/b.txt": "b"}
    where = folder(files | {"notes.txt": "no picture", ".thumbs/a.png": plain(), "._b.webp": b""})
    pictures = load_pictures(str(where), "stop")
    assert pictures.captions == (("a cat", "two cats"), ("b",))
    assert pictures.read(1, 4)[:, 0, 0].tolist() == list(BLUE)


# Refusals


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"readme.md": "x"}, r"has no pictures; add metadata.jsonl, or a \.txt beside each picture\.$"),
        ({"a.png": plain(), "b.png": plain()}, r"has 2 pictures, but no captions; add metadata.jsonl"),
        ({"metadata.jsonl": "\n", "a.png": plain()}, r"metadata.jsonl is empty; write a line"),
        (
            {"metadata.jsonl": b"\xff\xfe", "a.png": plain()},
            "cannot be read as text .*; save it as UTF-8",
        ),
    ],
)
@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_folder_without_captioned_pictures_is_refused(folder, files, message, on_error):
    with pytest.raises(UserError, match=message):
        load_pictures(str(folder(files)), on_error)


@pytest.mark.parametrize("name", ["", "a.png"])
def test_what_is_no_folder_is_refused(folder, name):
    source = str(folder({"a.png": plain()}) / (name or "missing"))
    with pytest.raises(UserError, match="are no folder; give 'blocks', or a folder of pictures with captions"):
        load_pictures(source, "stop")


GOOD = {"metadata.jsonl": [line("good.png")], "good.png": plain()}
BAD_LINES = {
    "{": "line 2 is not JSON",
    "[" * 100_000: "line 2 is not JSON",
    '"a.png"': "line 2 has no text under 'file_name'",
    '{"text": "a cat"}': "line 2 has no text under 'file_name'",
    '{"file_name": "a.png"}': "line 2 has an empty caption or none",
    '{"file_name": "a.png", "text": " "}': "line 2 has an empty caption or none",
    '{"file_name": "a.png", "text": ["a cat", ""]}': "line 2 has an empty caption or none",
    '{"file_name": "a.png", "text": []}': "line 2 has an empty caption or none",
    '{"file_name": "a.png", "text": 3}': "line 2 has an empty caption or none",
    '{"file_name": "none.png", "text": "a"}': "line 2 names .*none.png, which does not exist",
    '{"file_name": "./good.png", "text": "a"}': "line 2 names .*good.png for the second time",
    '{"file_name": "text.png", "text": "a"}': r"text.png is no picture that can be read \(no format that",
    '{"file_name": "empty.png", "text": "a"}': r"empty.png is no picture that can be read \(no format",
    '{"file_name": ".", "text": "a"}': r"is no picture that can be read \(Is a directory\)",
    '{"file_name": "deep.png", "text": "a"}': r"deep.png is no picture .*mode I;16 is not 8 bits",
}


@pytest.mark.parametrize(("bad", "message"), [pytest.param(*each, id=each[0][:50]) for each in BAD_LINES.items()])
def test_a_bad_line_is_refused_by_its_number_or_left_out(folder, caplog, bad, message):
    deep = encoded(Image.fromarray(np.zeros((4, 4), np.uint16)))
    files = {"a.png": plain(), "good.png": plain(), "text.png": "text", "empty.png": "", "deep.png": deep}
    where = folder(files | {"metadata.jsonl": json.dumps(line("good.png")) + "\n" + bad})
    with pytest.raises(UserError, match=f"{message}.*; mend it, or leave such pictures out with data.on_error=skip"):
        load_pictures(str(where), "stop")
    pictures = load_pictures(str(where), "skip")
    assert pictures.captions == (("a cat",),)
    assert len(pictures.skipped) == 1
    assert f"1 of 2 pictures in {where} are left out: {pictures.skipped[0]}" in caplog.text


@pytest.mark.parametrize("text", [None, b"", b" \n", b"\xff\xff"])
def test_a_picture_without_text_beside_it_is_refused_or_left_out(folder, text):
    files = {"a.png": plain(), "a.txt": "a", "b.png": plain()} | ({} if text is None else {"b.txt": text})
    where = folder(files)
    with pytest.raises(UserError, match=r"b.png has an empty caption or none|b.txt cannot be read as text"):
        load_pictures(str(where), "stop")
    assert load_pictures(str(where), "skip").captions == (("a",),)


def test_of_many_that_are_left_out_a_few_are_named_once(folder, caplog):
    metadata = [line("good.png")] + [line(f"{i}.png") for i in range(9)]
    with caplog.at_level(logging.WARNING):
        pictures = load_pictures(str(folder({"good.png": plain(), "metadata.jsonl": metadata})), "skip")
    assert len(pictures.skipped) == 9
    assert [record.message.count("does not exist") for record in caplog.records] == [3]
    assert "; and 6 more" in caplog.text


def test_nothing_usable_is_refused_with_the_first_reason(folder):
    with pytest.raises(UserError, match=r"none of the 2 pictures in .* \(.*line 1 names .*0.png, which does not"):
        load_pictures(str(folder({"metadata.jsonl": [line("0.png"), line("1.png")]})), "skip")


def test_a_picture_that_breaks_off_passes_by_its_header_and_is_found_when_decoded(folder):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    whole = encoded(Image.fromarray(noise))
    where = folder({"a.png": whole[: len(whole) // 2], "a.txt": "a"})
    pictures = load_pictures(str(where), "stop")
    with pytest.raises(Unusable, match=r"a.png cannot be decoded \(.*truncated.*\)$"):
        pictures.read(0, 8)
    (where / "a.png").unlink()
    with pytest.raises(Unusable, match=r"a.png cannot be read \(No such file or directory\)$"):
        pictures.read(0, 8)


# Squares


def test_the_shorter_side_is_resized_bicubically_and_the_middle_kept():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 60, 3), dtype=np.uint8)
    wide, high = Image.fromarray(pixels), Image.fromarray(pixels.transpose(1, 0, 2))
    for picture, size, box in ((wide, (24, 8), (8, 0, 16, 8)), (high, (8, 24), (0, 8, 8, 16))):
        expected = np.array(picture.resize(size, Image.Resampling.BICUBIC).crop(box)).transpose(2, 0, 1)
        image = square(encoded(picture), 8)
        assert image.dtype == torch.uint8
        assert np.abs(image.numpy().astype(int) - expected).max() <= 1


def test_a_picture_is_turned_as_its_exif_says():
    upright = np.zeros((8, 8, 3), np.uint8)
    upright[:4], upright[4:] = RED, BLUE
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that the file must be turned by 90 degrees clockwise
    lying = Image.fromarray(np.rot90(upright).copy())
    assert (square(encoded(lying, exif=exif), 8).permute(1, 2, 0).numpy() == upright).all()
    assert (square(encoded(lying), 8).permute(1, 2, 0).numpy() != upright).any()


def test_what_is_transparent_is_white_and_grey_is_rgb():
    hidden = Image.new("RGBA", (4, 4), (*RED, 0))
    assert (square(encoded(hidden), 4) == 255).all()
    assert (square(encoded(Image.new("L", (4, 4), 100)), 4) == 100).all()
    assert (square(encoded(Image.new("1", (4, 4), 1)), 4) == 255).all()


# The world blocks


@pytest.fixture(scope="module")
def world():
    return load_pictures("blocks", "stop")


def test_scenes_of_blocks_show_their_captions_and_come_from_the_train_side(world):
    step = len(world) // 24
    picked = range(0, len(world), step)  # a few of each tag
    images = torch.stack([world.read(i, 64) for i in picked]).float() / 255
    test = {item["prompt"] for item in blocks.prompts("test", 10**6)}
    assert not {world.captions[i][0] for i in range(len(world))} & test
    for i, found in zip(picked, read_blocks(images), strict=True):
        include = blocks.facts(world.captions[i][0])["include"]
        wanted = [clause["class"] for clause in include for _ in range(clause["count"])]
        assert sorted(detection.name for detection in found) == sorted(wanted)


def test_a_scene_is_the_same_at_every_call_and_another_at_another_number(world):
    twins = [i for i in range(len(world)) if world.captions[i] == world.captions[0]][:2]
    assert torch.equal(world.read(0, 64), world.read(0, 64))
    assert not torch.equal(*(world.read(i, 64) for i in twins))
    assert world.read(0, 16).shape == (3, 16, 16)


def test_captions_of_blocks_that_differ_in_their_opening_mean_the_same(world):
    meanings = {world.meaning(f"{opening} two stars") for opening in blocks.OPENINGS}
    assert len(meanings) == 1
    assert world.meaning("a photo of three stars") not in meanings


def test_pictures_can_be_sent_to_workers(world, folder):
    own = load_pictures(str(folder({"a.png": plain(), "a.txt": "a"})), "stop")
    for pictures in (own, world):
        assert torch.equal(pickle.loads(pickle.dumps(pictures)).read(0, 8), pictures.read(0, 8))


@pytest.mark.parametrize("text", ["bad \ud800 caption", "9" * 5000])
def test_a_line_that_python_itself_chokes_on_is_named_like_any_other(folder, text):
    value = json.dumps(text) if "bad" in text else text
    where = folder({"a.png": plain(), "b.png": plain(), "metadata.jsonl": ""})
    lines = [json.dumps(line("a.png")), '{"file_name": "b.png", "text": ' + value + "}"]
    (where / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"metadata\.jsonl, line 2 .*data\.on_error=skip"):
        load_pictures(str(where), "stop")
    assert load_pictures(str(where), "skip").captions == (("a cat",),)
