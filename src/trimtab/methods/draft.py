"""DRaFT: Directly Fine-Tuning Diffusion Models on Differentiable Rewards, arXiv 2309.17400. A baseline for DrPO.

The reward is differentiated through the auto-encoder and the one call of the generator:

    (1)  L = - mean_i sum_m w_m R_m(decode(G(eps_i, c_i)))  +  latent_weight mean_i mean_j (G_ij - G_ref,ij)^2

    symbol   name                 symbol   name
    w_m      rewards              G        the trained generator, G_ref before training

Departures from the paper:

1. The paper differentiates through the last steps of a sampler of many; here is one, and it is all of it.
2. Equation 1's second term is not the paper's, whose regularisation is a smaller LoRA scale; DrPO's authors use it so.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from trimtab.batch import Rollout
from trimtab.errors import UserError
from trimtab.matching import denoising_error
from trimtab.method import Loss, MethodSettings, Stateful
from trimtab.pipelines import Pipeline
from trimtab.rewards.composite import Composite, with_gradient
from trimtab.roles import REFERENCE, TRAINED
from trimtab.rollout import Rollouts, diversity


class DRaFTConfig(MethodSettings):
    """Defaults: those of DrPO's authors for SD-Turbo."""

    name: Literal["draft"] = "draft"
    latent_weight: float = Field(0.0, ge=0)


@dataclass
class DRaFT:
    """The glue: the samples of a step, a part at a time."""

    config: DRaFTConfig
    pipeline: Pipeline
    rollouts: Rollouts
    batch_size: int
    log: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def check_rewards(rewards: Composite) -> None:
        """UserError unless all that is trained on has a gradient."""
        black = next(iter(rewards.black_box), None)
        if black is not None:
            raise UserError(
                f"draft differentiates its reward and {black!r} has no gradient; give it weight 0, or train on one "
                "that has, such as recognizer."
            )

    def trained(self) -> dict[str, dict[str, nn.Parameter]]:
        return {TRAINED: self.pipeline.roles.parameters(TRAINED)}

    def state(self) -> dict[str, Stateful]:
        return {"roles": self.pipeline.roles}

    def collect(self, step: int) -> list[Rollout]:
        """Noise alone; samples are drawn with gradient."""
        rollout = self.rollouts.blank(self.rollouts.prompts_of(step), step)
        self.log = {"images": float(len(rollout))}
        return [rollout]

    def losses(self, rollout: Rollout) -> Iterator[Loss]:
        num_terms, rewards, latents, seen = self.rollouts.mean_length(rollout), self.rollouts.rewards, [], []
        for part in torch.arange(len(rollout)).split(self.batch_size):
            x = self.rollouts.again(rollout[part], TRAINED)
            images = self.pipeline.decode(x)
            latents.append(x.detach())
            seen.append(images.detach().cpu() if rewards.watched else None)
            yield self._loss(rollout[part], x, images, num_terms)
        if self.rollouts.config.group_size > 1:
            self.log["diversity"] = diversity(torch.cat(latents), rollout.group)
        if rewards.watched:
            self.log |= rewards.watch(torch.cat(seen), *rollout.prompts.of(rollout.group), rollout.group)

    def after_step(self, step: int) -> dict[str, float]:
        return self.log

    def export(self, folder: Path) -> None:
        self.pipeline.export(folder, TRAINED)

    def _loss(self, rollout: Rollout, x: Tensor, images: Tensor, num_terms: float) -> Loss:
        reward, metrics = self._reward(rollout, images)
        value = -reward.nansum() / num_terms
        if self.config.latent_weight:
            with torch.no_grad():
                origin = self.rollouts.again(rollout, REFERENCE)
            distance = denoising_error(x, origin)  # (B,)
            value = value + self.config.latent_weight * distance.sum() / num_terms
            metrics["latent_distance"] = distance.mean().detach()
        metrics["reward"] = reward.nanmean().detach()
        return Loss(TRAINED, value, metrics, len(rollout))

    def _reward(self, rollout: Rollout, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum (B,) of what applies, NaN where nothing does, and to log: means of rewards, and failures."""
        rewards, about = self.rollouts.rewards, rollout.prompts.of(rollout.group)
        total, metrics = torch.full((len(images),), torch.nan, device=images.device), {}
        for name, reward in rewards.smooth.items():
            scores, failed = with_gradient(name, reward, images, *about, rollout.group)
            metrics[f"rewards/{name}/mean"] = scores.detach().nanmean()
            metrics[f"failed/{name}"] = torch.tensor(float(failed))
            total = torch.where(scores.isnan(), total, total.nan_to_num(0.0) + rewards.weights[name] * scores)
        return total, metrics
