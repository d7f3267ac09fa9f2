"""A user's own reward: both signatures, sync and async, and errors that are found before anything is loaded."""

import math
import sys
from textwrap import dedent

import numpy as np
import pytest
import torch

from trimtab.batch import Prompts
from trimtab.errors import UserError
from trimtab.rewards.custom import load, to_pil

IMAGES = torch.stack([torch.full((3, 4, 5), value) for value in (0.0, 0.5, 1.0)])  # (3, 3, 4, 5)
PROMPTS = ["a", "b", "c"]
METADATA = [{"target": "x"}, {"target": "y", "tag": "t"}, {}]


@pytest.fixture
def reward(tmp_path, monkeypatch):
    """Loads `f` from a file with the given source."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def loaded(source, name="f"):
        (tmp_path / "mine.py").write_text(dedent(source))
        return load(f"mine.py:{name}")

    return loaded


@pytest.mark.parametrize("result", ["s", "(s, {'n': 1})", "s.tolist()", "s.numpy()", "s.double()", "tuple(s.tolist())"])
def test_the_batch_signature_gives_the_tensor_and_takes_any_kind_of_scores(reward, result):
    f = reward(f"""
        def f(images, prompts, metadata):
            assert images.shape == (3, 3, 4, 5) and prompts == ["a", "b", "c"] and metadata[0] == {{"target": "x"}}
            s = images.mean((1, 2, 3))
            return {result}
    """)
    scores = f(IMAGES, PROMPTS, METADATA)
    assert scores.dtype == torch.float32
    assert scores.tolist() == [0.0, 0.5, 1.0]


def test_a_pair_of_scores_is_not_taken_for_scores_and_info(reward):
    f = reward("def f(images, prompts, metadata): return (0.25, None)")
    scores = f(IMAGES[:2], PROMPTS[:2], METADATA[:2])
    assert scores[0] == 0.25
    assert math.isnan(scores[1])


def test_none_is_nan(reward):
    f = reward("def f(images, prompts, metadata): return [1, None, float('nan')]")
    assert f(IMAGES, PROMPTS, METADATA).isnan().tolist() == [False, True, True]


def test_the_columns_signature_gives_pil_images_and_metadata_by_name(reward):
    f = reward("""
        def f(prompts, images, **columns):
            assert columns == {"target": ["x", "y", None], "tag": [None, "t", None]}
            assert prompts == ["a", "b", "c"] and images[0].size == (5, 4) and images[0].mode == "RGB"
            return [image.getpixel((0, 0))[0] for image in images]
    """)
    assert f(IMAGES, PROMPTS, METADATA).tolist() == [0.0, 128.0, 255.0]


def test_what_a_function_changes_in_place_stays_its_own(reward):
    images = IMAGES.clone()
    f = reward("def f(images, prompts, metadata): return images.mul_(255).mean((1, 2, 3))")
    assert f(images, PROMPTS, METADATA).tolist() == f(images, PROMPTS, METADATA).tolist()
    assert torch.equal(images, IMAGES)


def test_a_function_with_named_columns_gets_just_those(reward):
    f = reward("def f(images, *, target, weight=2.0): return [weight * (t == 'y') for t in target]")
    assert f(IMAGES, PROMPTS, METADATA).tolist() == [0.0, 2.0, 0.0]


def test_a_needed_column_that_no_prompt_has_is_named(reward):
    f = reward("def f(images, word): return [0.0 for _ in images]")
    message = (
        r"'mine.py:f' needs word, which no prompt has; 'a' \(p.jsonl, line 1\) has target: give JSONL with that key"
    )
    with pytest.raises(UserError, match=message):
        f.check(Prompts(("a", "b"), ({"target": "x"}, {}), (0, 1), ("p.jsonl, line 1", "p.jsonl, line 2")))


def test_a_needed_column_that_some_prompts_lack_is_none_for_them_and_the_first_is_told(reward, caplog):
    f = reward("def f(images, prompts, target, weight=2.0): return [t and weight * (t == 'y') for t in target]")
    f.check(Prompts(tuple(PROMPTS), tuple(METADATA), (0, 1, 2)))
    assert caplog.messages == [
        "reward 'mine.py:f' needs target, which 1 of 3 prompts lack; the first is 'c' (a prompt)"
    ]
    assert f(IMAGES[2:], PROMPTS[2:], METADATA[2:]).isnan().all()  # even where none of a batch has it
    caplog.clear()
    f.check(Prompts(("a", "b"), tuple(METADATA[:2]), (0, 1)))
    assert not caplog.messages


@pytest.mark.parametrize("parameters", ["images, prompts, metadata", "images, **columns"])
def test_both_signatures_may_be_async(reward, parameters):
    f = reward(f"""
        import asyncio

        async def f({parameters}):
            return await asyncio.gather(*(asyncio.sleep(0, result=i) for i, _ in enumerate(images)))
    """)
    assert f(IMAGES, PROMPTS, METADATA).tolist() == [0.0, 1.0, 2.0]


def test_an_object_with_call_works_sync_and_async(reward):
    source = """
        class Brightness:
            scale = 2
            {} __call__(self, images, prompts, metadata):
                return self.scale * images.mean((1, 2, 3))

        f = Brightness()
    """
    for definition in ("def", "async def"):
        assert reward(source.format(definition))(IMAGES, PROMPTS, METADATA).tolist() == [0.0, 1.0, 2.0]


def test_a_function_of_an_installed_module_is_found_by_its_dotted_name(tmp_path, monkeypatch):
    (tmp_path / "company").mkdir()
    (tmp_path / "company" / "scores.py").write_text("def f(images, **columns): return [1.0] * len(images)")
    monkeypatch.syspath_prepend(tmp_path)
    assert load("company.scores:f")(IMAGES, PROMPTS, METADATA).tolist() == [1.0] * 3


def test_a_file_that_fails_while_it_is_imported_is_named_with_the_cause(reward):
    with pytest.raises(UserError, match=r"importing .*failed \(ZeroDivisionError"):
        reward("1 / 0")


def test_a_file_may_import_its_neighbours_and_define_dataclasses(reward, tmp_path):
    (tmp_path / "neighbour_of_mine.py").write_text("VALUE = 3.0")
    f = reward("""
        from __future__ import annotations
        from dataclasses import dataclass
        import neighbour_of_mine

        @dataclass
        class Score:
            value: float

        def f(images, **columns):
            return [Score(neighbour_of_mine.VALUE).value] * len(images)
    """)
    assert f(IMAGES, PROMPTS, METADATA).tolist() == [3.0] * 3


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("[1.0, 2.0]", "'mine.py:f' returned 2 scores for 3 images"),
        ("None", "returned a NoneType for 3 images"),
        ("0.5", "returned a float for 3 images"),
        ("{'a': [1, 2, 3]}", "returned a dict for 3 images"),
        ("images.mean()", "returned a float for 3 images"),
        ("images.mean((2, 3))", "scores that are no numbers"),
        ("['good', 'bad', 'ugly']", "scores that are no numbers"),
    ],
)
def test_scores_that_are_not_one_number_per_image_are_refused_by_name(reward, returned, message):
    f = reward(f"def f(images, prompts, metadata): return {returned}")
    with pytest.raises(UserError, match=message):
        f(IMAGES, PROMPTS, METADATA)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def f(pictures, texts, extra): ...", r"has the signature \(pictures, texts, extra\); expected"),
        ("def f(images, prompts, metadata, judge): ...", r"metadata, judge\); expected"),
        ("def f(images, metadata): ...", r"\(images, metadata\); expected"),
        ("def f(images, prompts, metadata, /): ...", "expected fn"),
        ("def f(prompts): ...", r"\(prompts\); expected"),
        ("def f(prompts, completions, /, **columns): ...", "expected fn"),
        ("class f: ...", "'f' is <class"),
        ("f = 3", "'f' is 3 in mine.py"),
        ("g = 3", "'f' is missing in mine.py"),
        ("import no_such_module_at_all", "ModuleNotFoundError: No module named 'no_such_module_at_all'"),
        ("def f(:", "importing mine.py failed .SyntaxError"),
    ],
)
def test_what_cannot_work_is_refused_on_loading(reward, source, message):
    with pytest.raises(UserError, match=message) as caught:
        reward(source)
    assert "'mine.py:f'" in str(caught.value)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("math", "expected 'package.module:function' or 'path/to/file.py:function'"),
        ("math:", "expected 'package.module:function'"),
        (":f", "expected 'package.module:function'"),
        (".math:f", "expected 'package.module:function'"),
        ("no/such/file.py:f", "there is no file /.*no/such/file.py; give a path relative to"),
        ("no_such_package.module:f", "ModuleNotFoundError"),
        ("math:no_such_function", "'no_such_function' is missing in math"),
    ],
)
def test_references_that_lead_nowhere_are_refused(reference, message):
    with pytest.raises(UserError, match=message):
        load(reference)


def test_an_error_inside_the_users_function_comes_through_unchanged(reward):
    f = reward("def f(images, prompts, metadata): raise KeyError('theirs')")
    with pytest.raises(KeyError, match="theirs"):
        f(IMAGES, PROMPTS, METADATA)


def test_pil_images_have_the_nearest_of_256_levels():
    # 0.5 is 127.5, to the even 128; values outside [0, 1] are cut off; channels stay in order.
    image = torch.tensor([-0.1, 0.5, 1.2]).view(1, 3, 1, 1)
    (picture,) = to_pil(image)
    assert np.array(picture).tolist() == [[[0, 128, 255]]]
    levels = torch.arange(256).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert (np.array(to_pil(levels / 255)[0])[..., 0] == levels[0, 0].numpy()).all()


SMOOTH = """
class Light:
    def __call__(self, images, prompts, metadata):
        return images.mean((1, 2, 3)).tolist()

    def with_gradient(self, images, prompts, metadata):
        return images.mean((1, 2, 3))

light = Light()
dark = Light()
dark.with_gradient = lambda images, prompts, metadata: images.detach().mean((1, 2, 3))
"""


def test_an_object_with_a_gradient_keeps_it(tmp_path):
    (tmp_path / "smooth.py").write_text(SMOOTH)
    reward = load(f"{tmp_path}/smooth.py:light")
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    scores = reward.with_gradient(images, ["a", "b"], [{}, {}])
    scores.sum().backward()
    assert torch.equal(images.grad, torch.full_like(images, 1 / 48))
    assert reward(images.detach(), ["a", "b"], [{}, {}]).tolist() == pytest.approx(scores.tolist())
    with pytest.raises(UserError, match="depends on the pictures"):
        load(f"{tmp_path}/smooth.py:dark").with_gradient(images, ["a", "b"], [{}, {}])


def test_what_an_object_changes_in_place_on_its_way_to_a_gradient_stays_its_own(tmp_path):
    (tmp_path / "smooth.py").write_text(
        SMOOTH + "light.with_gradient = lambda images, **_: images.mul_(2).mean((1, 2, 3))\n"
    )
    leaf = torch.rand(2, 3, 4, 4, requires_grad=True)
    images = leaf * 1
    load(f"{tmp_path}/smooth.py:light").with_gradient(images, ["a", "b"], [{}, {}]).sum().backward()
    assert torch.equal(images, leaf)
    assert torch.equal(leaf.grad, torch.full_like(leaf, 2 / 48))


@pytest.mark.parametrize("value", ["images.double().mean((1, 2, 3))", "images[:, 0, 0, 0].double() * float('nan')"])
def test_scores_with_a_gradient_are_of_one_type_whatever_the_users_model_has(tmp_path, value):
    (tmp_path / "smooth.py").write_text(SMOOTH + f"light.with_gradient = lambda images, **_: {value}\n")
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    scores = load(f"{tmp_path}/smooth.py:light").with_gradient(images, ["a", "b"], [{}, {}])
    assert scores.dtype == torch.float32
    assert torch.autograd.grad(scores.nansum(), images)[0].isfinite().all()


def test_an_object_with_a_gradient_that_applies_to_none_of_the_prompts_may_say_so_without(tmp_path):
    (tmp_path / "smooth.py").write_text(
        SMOOTH + "light.with_gradient = lambda images, **_: images.detach()[:, 0, 0, 0] * 0 + float('nan')\n"
    )
    reward = load(f"{tmp_path}/smooth.py:light")
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    scores = reward.with_gradient(images.detach(), ["a", "b"], [{}, {}])
    assert scores.isnan().all()
    scores = reward.with_gradient(images, ["a", "b"], [{}, {}])
    assert torch.autograd.grad(scores.nansum(), images)[0].abs().max() == 0


def test_functions_of_one_file_share_what_it_loads_until_it_is_written_anew(reward):
    source = """
        LOADED = []
        def one(images, prompts, metadata):
            LOADED.append(1)
            return [float(len(LOADED))] * 3
        two = one
    """
    one = reward(source, "one")
    assert one(IMAGES, PROMPTS, METADATA)[0] == 1
    assert load("mine.py:two")(IMAGES, PROMPTS, METADATA)[0] == 2
    assert reward(source, "two")(IMAGES, PROMPTS, METADATA)[0] == 1


def test_a_file_that_exits_while_it_is_imported_is_named(reward):
    with pytest.raises(UserError, match=r"importing .* failed \(SystemExit: 7\)"):
        reward("import sys\nsys.exit(7)\n")
