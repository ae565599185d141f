"""Unmodified models of transformers with random weights, run by a script that knows nothing of this library:

    python test/sdpa_models.py FOLDER           # one file for each family: logits, gradients, what was counted

B batch, S sequence length.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

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


def build(name: str) -> Any:
    """The model in fp32, in training mode.

    Raises:
        ValueError: this release of transformers has no sdpa for it.
    """
    torch.manual_seed(0)
    family = FAMILIES[name]
    config = getattr(transformers, family.config)(**family.options)
    made = getattr(transformers, family.model)._from_config(config, attn_implementation="sdpa")
    return made.to(DEVICE).train()


def inputs(name: str) -> dict[str, torch.Tensor]:
    """The same ones each time."""
    torch.manual_seed(1)
    return {name: tensor.to(DEVICE) for name, tensor in FAMILIES[name].inputs().items()}


def run(name: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Logits and the gradients of all parameters."""
    model = build(name).to(dtype)
    given = {n: t.to(dtype) if t.is_floating_point() else t for n, t in inputs(name).items()}
    logits = model(**given).logits
    if name == "llama-padded":
        # Rows of padding see what padding they like.
        logits = logits * given["attention_mask"][..., None]
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    (logits * weight).sum().backward()
    found = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach().float(), **found}


def main(folder: Path) -> None:
    for name in FAMILIES:
        try:
            found = run(name, torch.bfloat16)
        except ValueError as error:
            found = {"skipped": str(error)}
        # What the variable alone has brought in.
        package = sys.modules.get("torch_flash2")
        torch.save((found, package and package.stats(reset=True)), folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
