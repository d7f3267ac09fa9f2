"""The whole path on the built-in model: soft tokens, rewards, one call, ranking; and the same prompts after each stage.

    python benchmarks/path.py [--output runs] [--picture docs/images/path.png]

Runs the four commands that docs/drpo.md shows, each from what the one before has left, and writes a picture of eight
prompts after every stage, and benchmarks/results/path.md. A stage that is finished is not run again.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image
from tables import table

from trimtab import inference, run
from trimtab.cli import Terminal
from trimtab.worlds.files import load_prompts

RESULTS = Path(__file__).parent / "results"
STAGES = {  # name -> recipe and changes; the last is the model of one call that the path is for
    "path-1-agsm": ("agsm-micro", ["evaluation.guidance_scale=1"]),
    "path-2-crd": ("crd-micro", ["training.max_train_steps=40"]),
    "path-3-gndm": ("gndm-micro-1step-lora", ["training.max_train_steps=150", "method.real_guidance_scale=1"]),
    "path-4-drpo": ("drpo-micro-turbo", ["model.pretrained_model_name_or_path=micro", "training.max_train_steps=40"]),
}
NUM_PROMPTS, SCALE = 8, 2


def trained(output: Path, display: Terminal) -> dict[str, list[str]]:
    """Every stage's adapters, from the first to its own, trained where they are not."""
    before: list[str] = []
    found = {"micro": []}
    for name, (recipe, changes) in STAGES.items():
        adapters = json.dumps(before)
        overrides = [*changes, f"name={name}", f"output_dir={output}", f"model.adapters={adapters}"]
        folder = run.train(run.load_config(recipe, overrides), display, resume=True, command="path.py")
        before = [*before, str(folder / "export")]
        found[name] = before
    return found


def pictures(adapters: list[str], folder: Path, display: Terminal) -> np.ndarray:
    """One picture of each of the chosen test prompts side by side, from the same seed at every stage."""
    prompts = load_prompts("blocks", "test")
    chosen = [prompts.text[i * len(prompts) // NUM_PROMPTS] for i in range(NUM_PROMPTS)]
    files = inference.sample("micro", adapters, chosen, folder, display, images_per_prompt=1)
    return np.concatenate([np.array(Image.open(file)) for file in files], axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs"))
    parser.add_argument("--picture", type=Path, default=Path("docs/images/path.png"))
    given = parser.parse_args()
    rows, shown = {}, []
    with Terminal() as display:
        for name, adapters in trained(given.output, display).items():
            folder = given.output / "path" / name
            file = folder / "results.json"
            done = file.is_file() and json.loads(file.read_text())
            results = done or inference.evaluate_model("micro", adapters, "blocks", folder, display, precision="bf16")
            strict = results["scores"]["strict"]
            rows[name] = [
                {"calls": results["num_inference_steps"], "strict": strict["overall"]["mean"]}
                | {tag: value["mean"] for tag, value in strict["tags"].items()}
                | {"frechet": results["frechet_distance"], "diversity": results["diversity"]}
            ]
            shown.append(pictures(adapters, folder / "shown", display))
    image = Image.fromarray(np.concatenate(shown))
    given.picture.parent.mkdir(parents=True, exist_ok=True)
    image.resize((image.width * SCALE, image.height * SCALE), Image.Resampling.NEAREST).save(given.picture)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "path.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
