"""From noise to data along a falling list of times: deterministic, with noise and likelihood, or in a few steps.

Every solver asks `predict(x_t, t) -> Prediction`, x_t (B, ...) and t a scalar tensor, keeps its state in at least
float32 whatever the network computes in, and ends at times[-1]. One formula makes every deterministic step,
alpha' x0 + sigma' eps: it is DDIM for a variance-preserving process and Euler for rectified flow.

Gradients flow through everything; callers who want none say so. Noise is given, never drawn.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from trimtab.prediction import Prediction
from trimtab.process import NUM_TIMESTEPS, Process, RectifiedFlow, over, shifted, widened

Predict = Callable[[Tensor, Tensor], Prediction]
Dynamics = Literal["flow", "dance", "cps"]
ADAMS_BASHFORTH = {  # number of outputs -> weight of each, the latest first
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def time_grid(num_steps: int, shift: float = 1.0) -> Tensor:
    """Times (T + 1,) of rectified flow from 1 to 0, bit for bit the sigmas of FlowMatchEulerDiscreteScheduler.

    Its lowest training time, 1/1000, is shifted when the scheduler is built, and the even grid that ends there is
    shifted again. So the last time before 0 is not that of `shifted(linspace)`.
    """
    lowest = shifted(torch.tensor(1 / NUM_TIMESTEPS, dtype=torch.float32), shift).item()
    even = np.linspace(NUM_TIMESTEPS, lowest * NUM_TIMESTEPS, num_steps) / NUM_TIMESTEPS  # rounded as diffusers does
    return torch.cat([torch.from_numpy(shifted(even, shift)).float(), torch.zeros(1)])


def vp_time_grid(
    num_steps: int,
    num_train_timesteps: int = NUM_TIMESTEPS,
    timestep_spacing: Literal["leading", "trailing"] = "leading",
    steps_offset: int = 0,
    set_alpha_to_one: bool = True,
) -> Tensor:
    """Times (T + 1,) of a `VariancePreserving` table as diffusers' DDIMScheduler visits it; options keep its names.

    The grid ends in clean data, t = 0, or with set_alpha_to_one=False in the table's first row (Stable Diffusion 1.5).
    Where that row is the last call's own, the grid is one shorter: such a call changes nothing.
    With "trailing", DDIMScheduler steps by N // T rows whatever its next timestep is, so we agree where T divides N.
    """
    _check_fits(num_steps, num_train_timesteps)
    if timestep_spacing == "leading":
        rows = np.arange(num_steps)[::-1] * (num_train_timesteps // num_steps) + steps_offset
    elif timestep_spacing == "trailing":  # the step is not exact, and may leave room for a row below the table
        rows = np.round(np.arange(num_train_timesteps, 0, -num_train_timesteps / num_steps)[:num_steps]) - 1
    else:
        raise ValueError(f"timestep_spacing {timestep_spacing!r} is neither 'leading' nor 'trailing'")
    if rows[0] >= num_train_timesteps:
        raise ValueError(f"{num_steps} steps from row {rows[0]} do not fit a table of {num_train_timesteps} rows")
    end = -1 if set_alpha_to_one else 0
    if rows[-1] != end:
        rows = np.append(rows, end)
    return torch.from_numpy((rows + 1) / num_train_timesteps).float()


def guided(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """uncond + w (cond - uncond) in at least float32; w = 1 is off and gives cond itself.

    Takes network outputs of any one kind at the same x_t, since every kind is affine in every other.
    """
    if scale == 1:
        return widened(cond)
    return widened(uncond) + scale * (widened(cond) - widened(uncond))


def ode(predict: Predict, x: Tensor, times: Tensor, order: int = 1) -> Tensor:
    """Follow the probability-flow ODE from x (B, ...) at times[0] to times[-1], one network call a step.

    order 1 is DDIM or Euler; order 2 is DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2), its last step first order.
    Between the very ends of rectified flow, where log-SNR is infinite, an even grid has error h^2 log(1/h), not h^2.
    """
    if order not in (1, 2):
        raise ValueError(f"ode of order {order} was asked for; there are orders 1 and 2")
    x, times = _start(x, times)
    previous = None
    for i, (t, t_next) in enumerate(pairwise(times)):
        now = predict(x, t)
        last = i == len(times) - 2  # sigma' may be 0 there, an infinite step in log-SNR
        extrapolates = order == 2 and previous is not None and not last
        ahead = _extrapolated(now, previous, t_next) if extrapolates else now
        x = _stepped(ahead, t_next)  # (B, ...)
        previous = now
    return x


def plms(predict: Predict, x: Tensor, times: Tensor) -> Tensor:
    """Follow the ODE by PNDM's linear multistep (arXiv 2202.09778, without its Runge-Kutta start), as Stable Diffusion
    1.5 is sampled by its own scheduler: diffusers' PNDMScheduler with skip_prk_steps. Networks say much the same from
    one step to the next, so a step takes the Adams-Bashforth mean of up to four outputs; the first is made twice, the
    second time with the mean of what is said at its two ends. One network call more than there are steps.
    """
    x, times = _start(x, times)
    said: list[Tensor] = []
    for i, (t, t_next) in enumerate(pairwise(times)):
        now = predict(x, t)
        said = [*said[-3:], widened(now.value)]
        mean = sum(weight * value for weight, value in zip(ADAMS_BASHFORTH[len(said)], reversed(said), strict=True))
        if i == 0 and len(times) > 2:
            mean = (mean + widened(predict(_stepped(now, t_next), t_next).value)) / 2
        x = _stepped(replace(now, value=mean), t_next)  # (B, ...)
    return x


def ancestral(predict: Predict, x: Tensor, times: Tensor, noise: Tensor) -> Tensor:
    """Sample as a DDPM does, eq. 12 of arXiv 2010.02502 at eta = 1, with noise (T, B, ...): diffusers'
    EulerAncestralDiscreteScheduler. Of the predicted noise a share stays that falls as the noise-to-signal ratio does,
    x' = alpha' x0 + sigma' (k eps + sqrt(1 - k^2) z),  k = (sigma' / alpha') / (sigma / alpha); the rest is fresh.
    """
    x, times = _start(x, times)
    for t, t_next, z in zip(times[:-1], times[1:], noise, strict=True):
        now = predict(x, t)
        ratio, before = (now.process.sigma(time) / now.process.alpha(time) for time in (t_next, t))
        kept = ratio / before
        x = now.process.noised(now.x0, kept * now.eps + (1 - kept**2).sqrt() * z, t_next)  # (B, ...)
    return x


def sde_step(
    prediction: Prediction, t_next: Tensor, noise_level: float, dynamics: Dynamics = "flow"
) -> tuple[Tensor, Tensor]:
    """Mean (B, ...) and standard deviation, of a shape that broadcasts, of x at t_next; the noise level is a > 0.

    flow (arXiv 2505.05470): rate g = a sqrt(t / (1 - t)).  dance (arXiv 2505.07818): g = a.  Both for rectified flow,
        mean = x + (flow + g^2 eps / (2 t)) dt,  std = g sqrt(-dt),  dt = t' - t < 0
    cps (arXiv 2509.05952): mean = alpha' x0 + cos(a pi/2) sigma' eps,  std = sin(a pi/2) sigma'; a = 1 noises afresh.
    """
    if noise_level <= 0:
        raise ValueError(f"sde_step needs a noise level above 0, got {noise_level}; use ode for none")
    if dynamics == "cps":
        angle = noise_level * math.pi / 2
        mean = prediction.process.noised(prediction.x0, math.cos(angle) * prediction.eps, t_next)  # (B, ...)
        return mean, math.sin(angle) * over(prediction.process.sigma(t_next), mean)
    if not isinstance(prediction.process, RectifiedFlow):
        raise ValueError(f"dynamics {dynamics!r} is defined for RectifiedFlow; use 'cps' for {prediction.process!r}")
    x = widened(prediction.x_t)
    t, t_next = over(prediction.t, x), over(t_next, x)
    # At t = 1 the flow rate is infinite; Flow-GRPO takes the next time inside the root's denominator.
    rate = {"flow": noise_level * (t / (1 - torch.where(t == 1, t_next, t))).sqrt(), "dance": noise_level}[dynamics]
    mean = x + (prediction.flow + rate**2 / (2 * t) * prediction.eps) * (t_next - t)  # (B, ...)
    return mean, rate * (t - t_next).sqrt()


def log_prob(x: Tensor, mean: Tensor, std: Tensor | None) -> Tensor:
    """Log-density (B,) of a given sample x under N(mean, std^2), its mean over dimensions, in at least float32.

    std=None leaves the variance out, -(x - mean)^2, as Flow-CPS does, whose last step has std 0. x counts as data and
    gets no gradient: a policy gradient differentiates the probability of what was drawn.
    """
    squares = (widened(x.detach()) - widened(mean)).square()  # (B, ...)
    if std is None:
        return -squares.flatten(1).mean(1)
    density = -squares / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)  # (B, ...)
    return density.flatten(1).mean(1)


def sde(
    predict: Predict, x: Tensor, times: Tensor, noise: Tensor, noise_level: float = 0.7, dynamics: Dynamics = "flow"
) -> tuple[Tensor, Tensor]:
    """Sample with noise (T, B, ...): the path (T + 1, B, ...), x first, and the log-probability of each step (T, B)."""
    x, times = _start(x, times)
    path, log_probs = [x], []
    for t, t_next, z in zip(times[:-1], times[1:], noise, strict=True):
        mean, std = sde_step(predict(x, t), t_next, noise_level, dynamics)
        x = mean + std * z  # (B, ...)
        path.append(x)
        log_probs.append(log_prob(x, mean, None if dynamics == "cps" else std))
    return torch.stack(path), torch.stack(log_probs)


def few_step(predict: Predict, x: Tensor, times: Tensor, noise: Tensor) -> Tensor:
    """Predict x0 and noise it afresh to the next time, T times over; noise is (T, B, ...): the whole path (T + 1, ...).

    path[k] is the network's input at times[k]: backward simulation (DMD2, arXiv 2405.14867). With times[-1] = 0 the
    path ends in the last x0, and noise[-1] has no effect.
    """
    x, times = _start(x, times)
    path = [x]
    for t, t_next, z in zip(times[:-1], times[1:], noise, strict=True):
        now = predict(path[-1], t)
        path.append(now.process.noised(now.x0, z, t_next))  # (B, ...)
    return torch.stack(path)


def few_step_grid(num_steps: int, shift: float = 1.0) -> Tensor:
    """Times (T + 1,) at which a student of rectified flow is called, and 0: an even grid from 1, shifted.

    {1, 3/4, 1/2, 1/4} for four calls, {1, .9, .75, .5} at SD3's shift of 3. Unlike `time_grid` it leaves no call to
    the very end, where a prediction of x0 says nothing new.
    """
    return shifted(torch.arange(num_steps, -1, -1) / num_steps, shift)


def vp_few_step_grid(num_steps: int, num_train_timesteps: int = NUM_TIMESTEPS) -> Tensor:
    """The same for a table: rows 999, 749, 499, 249 for four calls, as DMD2 has them and diffusers' LCMScheduler."""
    _check_fits(num_steps, num_train_timesteps)
    rows = num_train_timesteps - 1 - np.arange(num_steps) * num_train_timesteps // num_steps
    return torch.from_numpy((np.append(rows, -1) + 1) / num_train_timesteps).float()


def _check_fits(num_steps: int, num_rows: int) -> None:
    if not 0 < num_steps <= num_rows:
        raise ValueError(f"{num_steps} steps do not fit a table of {num_rows} rows")


def _start(x: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    if times.ndim != 1 or not (times.diff() < 0).all():
        raise ValueError(f"times of shape {tuple(times.shape)} must be (T + 1,) and strictly falling")
    x = widened(x)
    return x, times.to(x)


def _stepped(prediction: Prediction, t_next: Tensor) -> Tensor:
    """x' = alpha' x0 + sigma' eps (DDIM, arXiv 2010.02502, eq. 12 without noise)."""
    return prediction.process.noised(prediction.x0, prediction.eps, t_next)  # (B, ...)


def _extrapolated(now: Prediction, previous: Prediction, t_next: Tensor) -> Prediction:
    """The x0 expected half a step ahead in half log-SNR lambda = log(alpha / sigma), from the line through two calls.

    Putting it into `_stepped` gives exactly the second-order update of DPM-Solver++(2M). Where lambda was infinite
    (rectified flow at t = 1) the slope is 0 and the step is first order.
    """
    before, here, after = (_half_log_snr(now.process, t) for t in (previous.t, now.t, t_next))
    slope = (now.x0 - previous.x0) / (here - before)  # (B, ...)
    return replace(now, value=now.x0 + slope * (after - here) / 2, kind="x0")


def _half_log_snr(process: Process, t: Tensor) -> Tensor:
    return process.alpha(t).log() - process.sigma(t).log()
