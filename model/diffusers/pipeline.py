"""The pipeline of an exported folder: images as they were searched for, with diffusers alone.

A copy of this file lies in every exported folder, so it imports only torch and diffusers. How the
chain runs (scheduler, steps, width of each call, classes, latents) is in the folder's configs.
"""

from __future__ import annotations

import inspect

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


class StepAwarePipeline(DiffusionPipeline):
    """unet: a StepAwareUNet whose config says how to sample. vae: where it works in latents.

    current_timestep: of the network pass that is made, for the caches that diffusers offers.
    """

    _optional_components = ["vae"]  # noqa: RUF012 - diffusers adds to it
    model_cpu_offload_seq = "unet->vae"

    def __init__(self, unet, scheduler, vae=None) -> None:  # types as text break 0.34
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        class_labels: int | list[int] | Tensor | None = None,
        guidance_scale: float | None = None,
        encoder_hidden_states: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Images, as PIL's, or with output_type="np" as float (B, H, W, C) in [0, 1].

        latents: the initial noise (B, C, H, W), unit Gaussian, instead of the generator's.
        class_labels: of a class-conditional model, one or one for each image; without, those that
        were exported in turn. guidance_scale: by default as exported. encoder_hidden_states: (1, L,
        D) or one for each image, instead of the exported embeddings and without guidance.
        """
        unet, scheduler, device = self.unet, self.scheduler, self._execution_device
        config = unet.config
        how, classes = config.sampling, config.sampling.get("classes")
        side = config.sample_size
        sides = side if isinstance(side, (list, tuple)) else (side, side)
        shape = (batch_size, config.in_channels, *sides)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=unet.dtype)
        given, labels = {}, None
        if encoder_hidden_states is not None:
            states = encoder_hidden_states.to(device, unet.dtype)
            given, classes = {"encoder_hidden_states": states.expand(batch_size, -1, -1)}, None
        if not classes and (class_labels is not None or guidance_scale not in (None, 1)):
            raise ValueError(
                "class_labels, guidance_scale: this model was exported without classes"
            )
        if classes:
            if class_labels is None:
                class_labels = [
                    classes["shown"][i % len(classes["shown"])] for i in range(batch_size)
                ]
            labels = torch.as_tensor(class_labels, device=device).expand(batch_size)
            guidance_scale = classes["guidance"] if guidance_scale is None else guidance_scale
            if classes["null"] is None and guidance_scale != 1:
                raise ValueError("guidance_scale: the model was not trained without classes")
        scheduler.set_timesteps(device=device, **how["set_timesteps"])
        options = dict(how["step"])
        if "generator" in inspect.signature(scheduler.step).parameters:
            options["generator"] = generator
        x = latents.to(device, unet.dtype) * scheduler.init_noise_sigma
        steps = zip(self.progress_bar(scheduler.timesteps), how["calls"], strict=True)
        for time, (t, width) in steps:
            self.current_timestep = t
            seen = scheduler.scale_model_input(x, time)
            if classes:
                output = self._guided(seen, t, width, labels, classes["null"], guidance_scale)
            else:
                output = unet(seen, t, width=width, **given).sample
            x = scheduler.step(output, time, x, **options).prev_sample
        if self.vae is not None:
            scale, shift = (
                x.new_tensor(how["latents"][name]).reshape(-1, 1, 1) for name in ("scale", "shift")
            )
            x = self.vae.decode(x / scale + shift).sample
        images = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()  # what a cache holds is of these images
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _guided(
        self, x: Tensor, t: int, width: float, labels: Tensor, null: int, guidance: float
    ) -> Tensor:
        """without + guidance·(with − without the class), in one batch where both are needed."""
        if guidance == 1:
            return self.unet(x, t, width=width, class_labels=labels).sample
        nothing = torch.full_like(labels, null)
        if guidance == 0:
            return self.unet(x, t, width=width, class_labels=nothing).sample
        both = torch.cat([labels, nothing])
        output = self.unet(torch.cat([x, x]), t, width=width, class_labels=both).sample
        with_class, without = output.chunk(2)
        return without + guidance * (with_class - without)
