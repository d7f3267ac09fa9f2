"""Soft tokens on the built-in model: what they change, which settings matter, and what a step costs.

    python benchmarks/agsm.py [--steps 300] [--seeds 0 1 2] [--crd runs/crd-micro/export]
    python benchmarks/agsm.py --study [--steps 300]      # tokens, layers, temperature, gammas: one seed each
    python benchmarks/agsm.py --cost                     # time against plain passes, memory against `rows`
    python benchmarks/agsm.py --attention runs/agsm-micro/export    # the share that pixels give to the tokens

All runs see the same captioned pictures in the same order, with the same noise. Scores are of the test prompts of
blocks, 4 pictures each. Writes benchmarks/results/agsm*.{json,md}. A run that is finished already is not run again.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tables import numbers, table

from trimtab import run
from trimtab.batch import Captions
from trimtab.cli import Terminal
from trimtab.evaluate import Setting, generate
from trimtab.methods import agsm
from trimtab.pipelines import loading
from trimtab.pipelines.soft_tokens import TokenSettings
from trimtab.pipelines.token_files import load_soft_tokens
from trimtab.worlds.files import load_prompts

RESULTS = Path(__file__).parent / "results"
VARIANTS = {  # name -> recipe and changes
    "SoftREPA": ("softrepa-micro", []),
    "AGSM": ("agsm-micro", []),
    "AGSM, matched pairs only": ("agsm-micro", ["method.gamma_neg=0"]),
    "AGSM, one bank": ("agsm-micro", ["method.shared_bank=true"]),
    "score matching only": ("agsm-micro", ["method.gamma_pos=0", "method.gamma_neg=0"]),
}
ON_CRD = "AGSM on CRD"
STUDY = {
    "1 token": ["method.tokens.num_tokens=1"],
    "16 tokens": ["method.tokens.num_tokens=16"],
    "first layer only": ["method.tokens.num_layers=1"],
    "all 6 layers": ["method.tokens.num_layers=6"],
    "tau 0.01": ["method.temperature=0.01"],
    "tau 1": ["method.temperature=1.0"],
    "gamma+ 0.5": ["method.gamma_pos=0.5"],
    "gamma- 1": ["method.gamma_neg=1.0"],
    "average 0.99": ["method.ema_decay=0.99"],
}


def trained(name: str, recipe: str, changes: list[str], seed: int, given: argparse.Namespace) -> Path:
    """The run folder of one variant, trained to its end and evaluated."""
    slug = "".join(c if c.isalnum() else "-" for c in name.lower())
    overrides = [
        *changes,
        f"name=tokens-{slug}-seed{seed}",
        f"seed={seed}",
        f"output_dir={given.output}",
        f"optimizer.learning_rate={given.learning_rate}",
        f"training.max_train_steps={given.steps}",
        f"training.checkpointing_steps={given.steps}",
        f"evaluation.guidance_scale={given.guidance_scale}",
        "training.num_validation_prompts=0",
    ]
    with Terminal() as display:
        return run.train(run.load_config(recipe, overrides), display, resume=True, command="agsm.py")


def compare(given: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    folders = {
        name: [trained(name, recipe, changes, seed, given) for seed in given.seeds]
        for name, (recipe, changes) in VARIANTS.items()
    }
    rows = {"base": [numbers(folders["AGSM"][0], "base")]}
    rows |= {name: [numbers(folder) for folder in runs] for name, runs in folders.items()}
    if given.crd is not None:
        adapters = [f"model.adapters=[{given.crd}]"]
        runs = [trained(ON_CRD, "agsm-micro", adapters, seed, given) for seed in given.seeds]
        rows["CRD"] = [numbers(runs[0], "base")]
        rows[ON_CRD] = [numbers(folder) for folder in runs]
    return rows


def study(given: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    folders = {name: trained(name, "agsm-micro", changes, 0, given) for name, changes in STUDY.items()}
    default = trained("AGSM", "agsm-micro", [], 0, given)
    rows = {"base": [numbers(default, "base")], "AGSM": [numbers(default)]}
    return rows | {name: [numbers(folder)] for name, folder in folders.items()}


# ---- what a step costs


def batch_of(pipeline, size: int) -> Captions:
    texts = tuple(f"a photo of {n} red circles" for n in range(size))
    x0 = torch.randn(size, *pipeline.latent_shape(pipeline.resolution))
    return Captions(x0, pipeline.encode(texts), texts, tuple(range(size)), seed=0, step=0)


def ready(size: int, rows: int):
    """A method, its batch, and its parameters."""
    config = agsm.AGSMConfig(rows=rows)
    pipeline = loading.load_with_tokens(
        "micro", TokenSettings(), num_signs=2, roles=config.roles, precision=torch.bfloat16
    )
    return agsm.AGSM(config, pipeline, None), batch_of(pipeline, size)


def seconds_of(call, repeats: int = 12) -> float:
    call()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def one_step(method, batch) -> None:
    for loss in method.losses(batch):
        loss.value.backward()


def plain_passes(method, batch) -> None:
    """As many passes through the same network as a step has, and nothing else."""
    pipeline, pairs, rows = method.pipeline, len(batch) ** 2, method.config.rows * len(batch)
    picture = torch.arange(len(batch)).repeat_interleave(len(batch))
    x_t, condition, t = batch.x0[picture], batch.condition[torch.arange(pairs) % len(batch)], torch.tensor(0.5)
    for part in torch.arange(pairs).split(rows):
        with torch.no_grad():
            pipeline.predict(x_t[part], t, condition[part], agsm.AVERAGE)
        pipeline.predict(x_t[part], t, condition[part], agsm.TRAINED).value.square().mean().backward()


def peak_bytes(size: int, rows: int) -> int:
    """Of a process of its own that takes two steps."""
    words = [sys.executable, __file__, "--peak", str(size), str(rows)]
    return int(subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()[-1])


def cost() -> str:
    lines = ["| pictures | rows | step, s | plain passes, s | ratio | peak, MiB |", "| --- |" + " --- |" * 5]
    for size, rows in ((4, 4), (8, 8), (8, 2), (16, 16), (16, 2)):
        method, batch = ready(size, rows)
        step, plain = seconds_of(lambda: one_step(method, batch)), seconds_of(lambda: plain_passes(method, batch))  # noqa: B023
        peak = peak_bytes(size, rows) / 2**20
        lines.append(f"| {size} | {rows} | {step:.3f} | {plain:.3f} | {step / plain:.3f} | {peak:.0f} |")
    return "\n".join(lines) + "\n"


def attention(folder: Path) -> str:
    """What pixels of micro attend to in each block: a mean over heads, four times and eight test prompts."""
    pipeline, shares = loading.load_for_sampling("micro"), []
    load_soft_tokens(pipeline.pipe, folder)
    product = F.scaled_dot_product_attention

    def counted(query, key, value, attn_mask=None, **other):
        if other:  # a text encoder's
            return product(query, key, value, attn_mask=attn_mask, **other)
        weights = (query @ key.mT / query.shape[-1] ** 0.5 + attn_mask).softmax(-1)
        num_pixels, folded = 16, int(attn_mask[0, 0, 0].argmax())  # the token that stands for T5's 256 equal ones
        of_pixels = weights[:, :, :num_pixels].mean((0, 1, 2))
        shares.append([of_pixels[:num_pixels].sum(), of_pixels[folded], of_pixels[folded + 1 :].sum()])
        return product(query, key, value, attn_mask=attn_mask)

    F.scaled_dot_product_attention = counted
    prompts = load_prompts("blocks", "test")[list(range(0, 136, 17))]
    setting = Setting(suite="", num_inference_steps=4)
    generate(pipeline, "default", prompts, torch.arange(8), list(range(8)), setting)
    F.scaled_dot_product_attention = product
    means = torch.tensor(shares).unflatten(0, (4, -1)).mean(0)
    lines = ["| block | pixels | T5's 256 | soft tokens |", "| --- | --- | --- | --- |"]
    lines += [f"| {i} | {p:.3f} | {t:.3f} | {s:.3f} |" for i, (p, t, s) in enumerate(means.tolist())]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--learning-rate", type=float, default=1e-2, help="ten times the published one, for few steps")
    parser.add_argument("--crd", type=Path, help="the `export` folder of a CRD run, to train tokens on top of")
    parser.add_argument("--output", type=Path, default=Path("runs"))
    parser.add_argument("--study", action="store_true")
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--attention", type=Path, metavar="EXPORT")
    parser.add_argument("--peak", type=int, nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    if given.attention:
        print(attention(given.attention))
        return
    if given.peak:
        method, batch = ready(*given.peak)
        for _ in range(2):
            one_step(method, batch)
        # Not getrusage: a child starts with its parent's peak there.
        status = Path("/proc/self/status").read_text()
        print(1024 * int(status.split("VmHWM:")[1].split()[0]))
        return
    name = "agsm_cost" if given.cost else "agsm_study" if given.study else "agsm"
    rows = {} if given.cost else study(given) if given.study else compare(given)
    text = cost() if given.cost else table(rows)
    (RESULTS / f"{name}.md").write_text(text)
    if rows:
        about = {"steps": given.steps, "seeds": given.seeds, "guidance_scale": given.guidance_scale}
        (RESULTS / f"{name}.json").write_text(json.dumps(about | {"rows": rows}, indent=1))
    print(text)


if __name__ == "__main__":
    main()
