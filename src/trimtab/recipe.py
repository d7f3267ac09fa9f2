"""What a recipe may say: the sections of a run's configuration, all but `method`, which each paper's file defines."""

import re
from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator

from trimtab.captioned import CaptionedConfig
from trimtab.config import Strict
from trimtab.methods.agsm import AGSMConfig
from trimtab.methods.crd import CRDConfig
from trimtab.methods.diffusion_nft import DiffusionNFTConfig
from trimtab.methods.dmd2 import DMD2Config
from trimtab.methods.dmdr import DMDRConfig
from trimtab.methods.dpo_one_step import DPOOneStepConfig
from trimtab.methods.draft import DRaFTConfig
from trimtab.methods.drpo import DrPOConfig
from trimtab.methods.gndm import GNDMConfig
from trimtab.methods.pretrain import PretrainMicroConfig, PretrainRecognizerConfig, PretrainVAEConfig
from trimtab.methods.softrepa import SoftREPAConfig
from trimtab.optimizer import OptimizerConfig
from trimtab.roles import LoraSettings
from trimtab.rollout import RolloutConfig

MethodConfig = Annotated[
    CRDConfig
    | DiffusionNFTConfig
    | AGSMConfig
    | SoftREPAConfig
    | DMD2Config
    | DMDRConfig
    | GNDMConfig
    | DrPOConfig
    | DPOOneStepConfig
    | DRaFTConfig
    | PretrainVAEConfig
    | PretrainMicroConfig
    | PretrainRecognizerConfig,
    Field(discriminator="name"),
]


class ModelConfig(Strict):
    """Which model, and which of its weights learn."""

    pretrained_model_name_or_path: str = "micro"
    adapters: tuple[str, ...] = ()  # on which it is trained: `export` folders of runs; LoRAs are merged
    finetune_type: Literal["lora", "full"] = "lora"
    rank: int = Field(32, gt=0)
    lora_alpha: int = Field(64, gt=0)
    target_modules: tuple[str, ...] | None = Field(None, min_length=1)  # None: what suits the model
    resolution: int | None = Field(None, gt=0)  # pixels a side; None: what the model was made for
    mixed_precision: Literal["no", "bf16"] = "bf16"
    gradient_checkpointing: bool = False
    offload_text_encoders: bool = False  # to main memory, whence they come whenever prompts are new

    @property
    def lora(self) -> LoraSettings | None:
        if self.finetune_type == "full":
            return None
        return LoraSettings(rank=self.rank, lora_alpha=self.lora_alpha, target_modules=self.target_modules)

    @property
    def precision(self) -> torch.dtype:
        return torch.bfloat16 if self.mixed_precision == "bf16" else torch.float32


class DataConfig(Strict):
    """Prompts for methods that sample, pictures with captions for those that learn from pictures."""

    prompts: str = "blocks"  # or a .txt or .jsonl file, or a folder with `train` and `test` files
    # Or a folder with metadata.jsonl (file_name, text), or with a .txt beside each picture.
    pictures: str = Field("blocks", min_length=1)
    pairs: str | None = None  # a .jsonl (prompt, chosen, rejected) or .parquet file, for those that learn offline
    on_error: Literal["stop", "skip"] = "stop"  # for a picture or caption that can't be used
    num_workers: int = Field(2, ge=0)  # processes that decode pictures
    cache: bool = True  # latents and text embeddings on disk, by content

    def captioned(self, batch_size: int) -> CaptionedConfig:
        return CaptionedConfig(batch_size=batch_size, num_workers=self.num_workers, cache=self.cache)


class TrainingConfig(Strict):
    """How long, and what is kept on the way. A step is one rollout (or one batch of pre-training)."""

    max_train_steps: int = Field(gt=0)
    train_batch_size: int = Field(8, gt=0)  # samples in one forward and backward; whole groups where they fit
    checkpointing_steps: int = Field(50, gt=0)
    checkpoints_total_limit: int | None = Field(2, gt=0)  # None: keep all
    validation_steps: int = Field(50, gt=0)  # between grids of pictures, of fixed prompts and seeds
    num_validation_prompts: int = Field(16, ge=0)


class EvaluationConfig(Strict):
    """Before and after training, on prompts of the test split. `suite` None: no evaluation."""

    suite: str | None = None
    images_per_prompt: int = Field(4, gt=0)
    num_inference_steps: int | None = Field(None, gt=0)  # None: 40, or as many calls as a student has
    guidance_scale: float = Field(1.0, ge=0)  # of the trained model and of the base beside it
    # The base also at its best, if it has many calls: with this guidance (None: it is not shown so), and in so many
    # calls (None: as many as the trained model; a teacher of students 40).
    base_guidance_scale: float | None = Field(4.5, ge=0)
    base_num_inference_steps: int | None = Field(None, gt=0)


class RunConfig(Strict):
    """A whole recipe."""

    name: str
    seed: int = Field(42, ge=0, le=2**62)
    output_dir: str = "runs"
    method: MethodConfig
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    rewards: dict[str, float] = Field(default_factory=dict)  # name -> weight; 0: measured, never trained on
    rollout: RolloutConfig = RolloutConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig
    evaluation: EvaluationConfig = EvaluationConfig()

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError("a folder is called so; give letters, digits, _, - and dots, and begin with no - or dot")
        return name
