"""diffusers' models, unchanged, under enable(): tiny, with random weights, against PyTorch's own attention.

H heads, S tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

import torch_flash2  # noqa: E402
from torch_flash2.dispatch import KERNELS  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def dit() -> tuple[Any, Callable[..., torch.Tensor], int]:
    """A diffusion transformer: self-attention, H 2, S 16, D 8."""
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8, norm_num_groups=4,
        num_embeds_ada_norm=10,
    )  # fmt: skip

    def run(model: Any, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        steps, labels = torch.tensor([3, 5], device=image.device), torch.tensor([1, 2], device=image.device)
        out: torch.Tensor = model(image, timestep=steps, class_labels=labels).sample
        return out

    return model, run, 2


def unet() -> tuple[Any, Callable[..., torch.Tensor], int]:
    """A U-Net with text: self-attention and attention to 5 tokens, H 4, S 16, D 4."""
    model = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip

    def run(model: Any, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = model(image, timestep=3, encoder_hidden_states=text).sample
        return out

    return model, run, 8


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make", [dit, unet])
def test_models(make: Callable[[], tuple[Any, Any, int]], device: str) -> None:
    """Every attention is taken; output and gradients are within twice the error of PyTorch's own, plus rounding."""
    torch.manual_seed(0)
    model, run, attentions = make()
    image, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def results(dtype: torch.dtype) -> list[torch.Tensor]:
        model.to(device, torch.float32).load_state_dict(state)
        model.to(dtype).zero_grad()
        out = run(model, image.to(device, dtype), text.to(device, dtype))
        out.square().sum().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        return [tensor.detach().cpu().double() for tensor in (out, *grads)]

    exact, plain = results(torch.float64), results(torch.float32)
    torch_flash2.stats(reset=True)
    with torch_flash2.enabled("always"):
        ours = results(torch.float32)
    counted = torch_flash2.stats()
    assert set(counted) <= set(KERNELS) and sum(counted.values()) == attentions
    for found, stock, wanted in zip(ours, plain, exact, strict=True):
        steepest = max(float(tensor.abs().max()) for tensor in exact[1:])
        allowed = 2 * (stock - wanted).abs().max() + 16 * torch.finfo(torch.float32).eps * steepest
        assert (found - wanted).abs().max() <= allowed
