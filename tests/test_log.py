"""What a run writes down."""

import json

from trimtab.log import MetricsLog, append


def test_a_resume_drops_what_comes_after_its_step_and_what_is_no_line(tmp_path):
    file = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        append(file, step, {"reward": 0.5 * step, "elapsed_seconds": 2.0 * step, "images": 8.0 * step})
    whole = file.read_text().splitlines()
    file.write_text("\n".join([whole[0], "garbage}", "[1]", whole[1], whole[2], '{"step": 2, "rew']))
    log = MetricsLog(tmp_path, 2)
    log.close()
    assert file.read_text().splitlines() == whole[:2]
    assert (log.elapsed, log.images) == (4.0, 16.0)


def test_what_is_not_finite_is_null(tmp_path):
    append(tmp_path / "metrics.jsonl", 1, {"loss": float("nan"), "kl": 0.5})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": None, "kl": 0.5}
