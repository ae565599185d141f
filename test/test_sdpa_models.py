"""Unmodified models of transformers, with random weights, taken over: logits and gradients, and which calls were taken.

They run in bf16, by PyTorch's attention and by this library's; both are held to the same model in fp32.
B batch, S sequence length.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

import torch_flash2

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.filterwarnings("default")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, S = 2, 24
SMALL = dict(
    vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=128, attention_dropout=0.0,
)  # fmt: skip
SHARED = {**SMALL, "num_key_value_heads": 2}


@dataclasses.dataclass(frozen=True)
class Family:
    """A model: its class, its configuration, its inputs, and the least number of calls of attention."""

    model: str
    config: str
    options: dict[str, Any]
    inputs: Callable[[], dict[str, torch.Tensor]]
    calls: int = 2


def tokens(**more: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(1, 97, (B, S)), **more}


def padding() -> torch.Tensor:
    mask = torch.ones(B, S, dtype=torch.long)
    mask[1, S // 2 :] = 0
    return mask


FAMILIES = {
    "llama": Family("LlamaForCausalLM", "LlamaConfig", SHARED, tokens),
    "llama-padded": Family("LlamaForCausalLM", "LlamaConfig", SHARED, lambda: tokens(attention_mask=padding())),
    "qwen3": Family("Qwen3ForCausalLM", "Qwen3Config", {**SHARED, "head_dim": 16}, tokens),
    "gemma2": Family("Gemma2ForCausalLM", "Gemma2Config", {**SHARED, "head_dim": 16, "sliding_window": 8}, tokens),
    "mistral": Family("MistralForCausalLM", "MistralConfig", {**SHARED, "sliding_window": 8}, tokens),
    "bert": Family(
        "BertForMaskedLM",
        "BertConfig",
        {**SMALL, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0},
        lambda: tokens(attention_mask=padding()),
    ),
    "vit": Family(
        "ViTForImageClassification",
        "ViTConfig",
        {**SMALL, "image_size": 32, "patch_size": 8, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        lambda: {"pixel_values": torch.randn(B, 3, 32, 32)},
    ),
    "whisper": Family(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        dict(
            vocab_size=97, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, num_mel_bins=20,
            max_source_positions=32, max_target_positions=64, dropout=0.0, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, decoder_start_token_id=1,
        ),
        lambda: {"input_features": torch.randn(B, 20, 64), "decoder_input_ids": torch.randint(1, 97, (B, S))},
        calls=6,
    ),
    "t5": Family(
        "T5ForConditionalGeneration",
        "T5Config",
        dict(vocab_size=97, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, dropout_rate=0.0),
        lambda: tokens(decoder_input_ids=torch.randint(1, 97, (B, S))),
        calls=0,
    ),
    "deepseek-v3": Family(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **SMALL, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 8, "n_group": 2, "topk_group": 1,
            "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 2,
        },
        tokens,
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        "GPT2Config",
        dict(
            vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_positions=64,
            attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
        ),
        tokens,
    ),
}  # fmt: skip


def build(family: Family) -> Any:
    """The model in fp32, in training mode."""
    torch.manual_seed(0)
    config = getattr(transformers, family.config)(**family.options)
    model = getattr(transformers, family.model)
    try:
        made = model._from_config(config, attn_implementation="sdpa")
    except ValueError as error:
        pytest.skip(f"this release of transformers has no sdpa for it: {error}")
    return made.to(DEVICE).train()


def run(model: Any, inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Logits and the gradients of all parameters."""
    model = copy.deepcopy(model).to(dtype)
    given = {n: t.to(DEVICE, dtype if t.is_floating_point() else None) for n, t in inputs.items()}
    logits = model(**given).logits
    if model.config.model_type == "llama" and "attention_mask" in given:
        # Rows of padding see what padding they like.
        logits = logits * given["attention_mask"][..., None]
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    (logits * weight).sum().backward()
    found = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach().float(), **found}


@pytest.mark.parametrize("name", FAMILIES)
def test_models(name: str) -> None:
    family = FAMILIES[name]
    model = build(family)
    inputs = family.inputs()
    exact = run(model, inputs, torch.float32)
    stock = run(model, inputs, torch.bfloat16)
    torch_flash2.stats(reset=True)
    with torch_flash2.enabled("always", device_type=DEVICE):
        ours = run(model, inputs, torch.bfloat16)
    counted = torch_flash2.stats(reset=True)
    print(name, counted)
    kernel = "triton" if DEVICE == "cuda" else "cpu"
    assert counted.get(kernel, 0) >= family.calls, counted
    assert set(counted) <= {kernel}, counted
    assert set(ours) == set(stock) == set(exact)
    for tensor, want in exact.items():
        error, other = ((found[tensor] - want).norm().item() for found in (ours, stock))
        scale = want.norm().item()
        assert error <= 2 * other + 1e-3 * scale, f"{tensor}: {error:.3e}, PyTorch's {other:.3e}, of {scale:.3e}"


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_generation_and_compiled_models(name: str) -> None:
    model = build(FAMILIES[name]).eval()
    inputs = {n: t.to(DEVICE) for n, t in FAMILIES[name].inputs().items()}
    with torch.no_grad():
        wanted = model(**inputs).logits
        with torch_flash2.enabled("always", device_type=DEVICE):
            found = torch.compile(model, backend="aot_eager")(**inputs).logits
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
            if name == "llama":
                made = model.generate(inputs["input_ids"], max_new_tokens=5, do_sample=False)
    if name == "llama":
        assert torch.equal(made, model.generate(inputs["input_ids"], max_new_tokens=5, do_sample=False))
