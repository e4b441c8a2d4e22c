"""diffusers and transformers modules on our weights, and how they are prepared for speed."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers.models.upsampling import Upsample2D

PREPARATIONS = ("plain", "channels-last", "compiled")
"""As loaded; weights and activations NHWC in memory; that, through `torch.compile`."""


@dataclasses.dataclass(frozen=True)
class Models:
    """The networks of one latent diffusion model, all in evaluation mode."""

    unet: torch.nn.Module
    vae: torch.nn.Module
    text: torch.nn.Module
    alpha_bar: torch.Tensor
    prediction_type: str

    @property
    def scale(self) -> float:
        """Of latents."""
        return self.vae.config.scaling_factor


def use_threads(count: int) -> None:
    """Threads of one operation; operations do not run side by side."""
    torch.set_num_threads(count)


def load(folder: str | Path) -> Models:
    """The models of a diffusers folder, float32."""
    read = lambda kind, part: kind.from_pretrained(str(folder), subfolder=part, torch_dtype=torch.float32).eval()
    noise = diffusers.DDPMScheduler.from_pretrained(str(folder), subfolder="scheduler")
    return Models(
        compilable(read(diffusers.UNet2DConditionModel, "unet")),
        compilable(read(diffusers.AutoencoderKL, "vae")),
        read(transformers.CLIPTextModel, "text_encoder"),
        noise.alphas_cumprod,
        noise.config.prediction_type,
    )


def described(class_name: str, values: Mapping[str, Any], seed: int = 0) -> torch.nn.Module:
    """A diffusers module with the weights that its own initialisation draws."""
    torch.manual_seed(seed)
    plain = {key: value for key, value in values.items() if not key.startswith("_")}
    return compilable(getattr(diffusers, class_name)(**plain).eval())


def compilable(module: torch.nn.Module) -> torch.nn.Module:
    """The module with nearest-neighbour doubling that `torch.compile` can differentiate, in place.

    Inductor 2.13 fuses the gradient of `interpolate` into that of a residual block before it, for some numbers of channels, such that what flows
    back is zero. Outside of compiled programs everything stays as it is.
    """
    for part in module.modules():
        if isinstance(part, Upsample2D):
            part.interpolate = False
            part.register_forward_pre_hook(_doubled)
    return module


def _doubled(module: torch.nn.Module, args: tuple) -> tuple:
    x, *others = args
    if not torch.compiler.is_compiling():
        return torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"), *others
    b, c, h, w = x.shape
    return x[:, :, :, None, :, None].expand(b, c, h, 2, w, 2).reshape(b, c, 2 * h, 2 * w), *others


def state(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """The state dict as arrays."""
    return {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}


def gradients(module: torch.nn.Module, found: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Gradients by parameter name as arrays, zero where there is none."""
    return {name: np.asarray(found.get(name, torch.zeros_like(p))) for name, p in module.named_parameters()}


def prepared(module: torch.nn.Module, how: str, *, frozen: bool = True) -> Callable:
    """The module ready to be called.

    Args:
        how: of `PREPARATIONS`.
        frozen: no gradients of weights are asked for.
    """
    module.requires_grad_(not frozen)
    if how == "plain":
        return module
    module.to(memory_format=torch.channels_last)
    return torch.compile(module, dynamic=False) if how == "compiled" else module


def nchw(array: Any, how: str = "plain") -> torch.Tensor:
    """NHWC array -> tensor [B, C, H, W] that owns its memory, laid out as the preparation wants it."""
    tensor = torch.from_numpy(np.array(np.moveaxis(np.asarray(array), -1, 1)))
    return tensor if how == "plain" else tensor.contiguous(memory_format=torch.channels_last)


def nhwc(tensor: torch.Tensor) -> np.ndarray:
    """The way back."""
    return np.moveaxis(tensor.detach().numpy(), 1, -1)


def whole(array: Any) -> torch.Tensor:
    """An array of any other kind as a tensor that owns its memory."""
    return torch.from_numpy(np.array(array))


def noise_of(models: Models, prediction: torch.Tensor, z_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The noise that a prediction stands for."""
    if models.prediction_type == "epsilon":
        return prediction
    a = models.alpha_bar[t].view(-1, 1, 1, 1)
    return a.sqrt() * prediction + (1 - a).sqrt() * z_t


def noisy(models: Models, z0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """z_t."""
    a = models.alpha_bar[t].view(-1, 1, 1, 1)
    return a.sqrt() * z0 + (1 - a).sqrt() * noise


def target_of(models: Models, z0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """What a perfect network predicts."""
    if models.prediction_type == "epsilon":
        return noise
    a = models.alpha_bar[t].view(-1, 1, 1, 1)
    return a.sqrt() * noise - (1 - a).sqrt() * z0


no_grad: Callable[[], contextlib.AbstractContextManager] = torch.inference_mode
