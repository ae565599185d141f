"""transformers' models with attn_implementation="torch_flash2": tiny, with random weights, against eager."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch._dynamo.utils

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

import torch_flash2  # noqa: E402
from torch_flash2.frontends import transformers as frontend  # noqa: E402
from torch_flash2.masks import Mask  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
NAME = torch_flash2.transformers.register()
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
B, S, WINDOW = 3, 17, 5

_DECODER = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
_HYBRID = dict(sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"])
_BERT = {key: _DECODER[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
# Classes and configurations; decoders first. All experts are asked: a choice would turn rounding into another result.
DECODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _DECODER),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _DECODER),
    "mistral": ("MistralForCausalLM", "MistralConfig", dict(_DECODER, sliding_window=WINDOW)),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", dict(_DECODER, **_HYBRID, attn_logit_softcapping=2.0)),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", dict(_DECODER, **_HYBRID)),
    "gpt-oss": (
        "GptOssForCausalLM", "GptOssConfig", dict(_DECODER, **_HYBRID, num_local_experts=2, num_experts_per_tok=2)
    ),
    "llama4": (
        "Llama4ForCausalLM", "Llama4TextConfig",
        dict(_DECODER, intermediate_size_mlp=48, num_local_experts=2, num_experts_per_tok=2,
             attention_chunk_size=WINDOW,
             layer_types=["chunked_attention", "full_attention"]),
    ),
    "deepseek-v3": (
        "DeepseekV3ForCausalLM", "DeepseekV3Config",
        dict({key: value for key, value in _DECODER.items() if key != "head_dim"}, num_key_value_heads=4,
             q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16,
             first_k_dense_replace=2),
    ),
    "gpt2": (
        "GPT2LMHeadModel", "GPT2Config",
        dict(vocab_size=64, n_positions=128, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=None,
             pad_token_id=0),
    ),
}  # fmt: skip
ENCODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", "BertConfig", dict(_BERT, num_attention_heads=4)),
    "modernbert": (
        "ModernBertForMaskedLM", "ModernBertConfig",
        dict(_BERT, num_attention_heads=4, local_attention=8, global_attn_every_n_layers=2, pad_token_id=0,
             bos_token_id=1, eos_token_id=1, cls_token_id=1, sep_token_id=1),
    ),
    "vit": (
        "ViTForImageClassification", "ViTConfig",
        dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=32,
             patch_size=8),
    ),
    "t5": (
        "T5ForConditionalGeneration", "T5Config",
        dict(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
             eos_token_id=None),
    ),
    "whisper": (
        "WhisperForConditionalGeneration", "WhisperConfig",
        dict(vocab_size=64, num_mel_bins=8, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
             decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=20, pad_token_id=0,
             bos_token_id=1, eos_token_id=1, decoder_start_token_id=1),
    ),
}  # fmt: skip
PADDINGS = ("none", "right", "left", "holes")


def make(name: str, device: str = "cpu") -> Any:
    """The model with random weights, without dropout."""
    model_class, config_class, options = {**DECODERS, **ENCODERS}[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**options, attn_implementation="eager")
    model = getattr(transformers, model_class)(config).eval().to(device)
    if name in ("gpt-oss", "llama4"):
        model.set_experts_implementation("eager")
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def padding_of(kind: str) -> torch.Tensor:
    keep = torch.ones(B, S, dtype=torch.long)
    if kind == "right":
        keep[1, 12:], keep[2, 5:] = 0, 0
    elif kind == "left":
        keep[1, :5], keep[2, :12] = 0, 0
    elif kind == "holes":
        keep[1, 3:6], keep[2, 9], keep[2, 15:] = 0, 0, 0
    return keep


def inputs_of(name: str, padding: str) -> tuple[dict[str, Any], torch.Tensor]:
    """The model's keywords, and the logits that count, bool [B, rows]."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 64, (B, S), generator=generator)
    keep = padding_of(padding)
    if name == "vit":
        return dict(pixel_values=torch.randn(B, 3, 32, 32, generator=generator)), torch.ones(B, dtype=torch.bool)
    if name == "whisper":
        features = torch.randn(B, 8, 40, generator=generator)
        return dict(input_features=features, decoder_input_ids=ids), torch.ones(B, S, dtype=torch.bool)
    if name == "t5":
        decoder = torch.randint(2, 64, (B, 9), generator=generator)
        found = dict(input_ids=ids, attention_mask=keep, decoder_input_ids=decoder)
        return found, torch.ones(B, 9, dtype=torch.bool)
    caches = dict(use_cache=False) if name in DECODERS else {}
    return dict(input_ids=ids, attention_mask=keep, **caches), keep.bool()


def results(
    model: Any, implementation: str, inputs: dict[str, Any], counts: torch.Tensor, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Logits that count and the gradient of every parameter."""
    model.set_attn_implementation(implementation)
    model = model.to(dtype)
    device = next(model.parameters()).device
    given = {k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in inputs.items()}
    given = {k: x.to(dtype) if k in ("pixel_values", "input_features") else x for k, x in given.items()}
    logits = model(**given).logits[counts.to(device)]
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).to(logits)
    model.zero_grad()
    logits.backward(upstream)
    found = {name: p.grad.cpu().double() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach().cpu().double(), **found}


def compare(model: Any, inputs: dict[str, Any], counts: torch.Tensor, dtype: torch.dtype) -> None:
    """Every error against fp64 at most twice that of eager in the same dtype, plus that of rounding the result."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def run(implementation: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        model.to(torch.float32).load_state_dict(state)
        return results(model, implementation, inputs, counts, dtype)

    # Eager takes every softmax in fp32, where a row of fp64's least numbers is NaN.
    softmax = torch.nn.functional.softmax
    with mock.patch.object(torch.nn.functional, "softmax", lambda x, dim=None, dtype=None: softmax(x, dim)):
        exact = run("eager", torch.float64)
    eager, ours = run("eager", dtype), run(NAME, dtype)
    assert ours.keys() == exact.keys()
    steepest = max(value.norm() for name, value in exact.items() if name != "logits")
    for name, value in exact.items():
        # Over the whole tensor: its worst element is one draw, and may be too good by chance.
        allowed = (eager[name] - value).norm()
        # The gradient of a key's bias is rounding alone.
        scale = max(value.norm(), steepest) if name.endswith("bias") else value.norm()
        error = (ours[name] - value).norm()
        rounding = torch.finfo(dtype).eps / 2 * scale
        assert error <= 2 * allowed + rounding, f"{name}: {error:.2e}, eager has {allowed:.2e}"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any, Any]]:
    """Mask, lengths and bias of every call of attention."""
    found: list[tuple[Any, Any, Any]] = []

    def spy(query: Any, key: Any, value: Any, mask: Any, *, lengths: Any, bias: Any, **others: Any) -> Any:
        # Heads are never repeated.
        found.append((mask, lengths, bias))
        return torch_flash2.attention(query, key, value, mask, lengths=lengths, bias=bias, **others)

    monkeypatch.setattr(frontend, "attention", spy)
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", [*DECODERS, "bert", "modernbert", "t5"])
def test_padding(name: str, padding: str, device: str, calls: list[Any]) -> None:
    compare(make(name, device), *inputs_of(name, padding), torch.float32)
    if padding != "holes" and name not in ("llama4", "t5"):
        # Bands and lengths, no dense masks; these do not lay their keys out row by row, so that padding on the left is
        # a mask of columns.
        columns = name in ("gpt-oss", "deepseek-v3") and padding == "left"
        assert calls and all(isinstance(mask, Mask) != columns for mask, _, _ in calls)
        assert all((lengths.used_k is None) == (padding == "none" or columns) for _, lengths, _ in calls)
        assert all((lengths.cu_k is None) == (padding != "left" or columns) for _, lengths, _ in calls)
    assert all(isinstance(mask, Mask) or mask.dense.shape[2] == 1 for mask, _, _ in calls) or name == "llama4"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["vit", "whisper"])
def test_others(name: str, device: str, calls: list[Any]) -> None:
    compare(make(name, device), *inputs_of(name, "none"), torch.float32)
    assert calls and all(isinstance(mask, Mask) for mask, _, _ in calls)


@pytest.mark.gpu
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-oss", "modernbert", "t5"])
def test_bf16(name: str, padding: str) -> None:
    compare(make(name, "cuda"), *inputs_of(name, padding), torch.bfloat16)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
@pytest.mark.parametrize("batch", [1, B])
def test_packed(name: str, batch: int, device: str, calls: list[Any]) -> None:
    """Sequences that begin anew in a row are packed, and do not see one another."""
    model = make(name, device)
    inputs, _ = inputs_of(name, "none")
    ids = inputs["input_ids"][:batch]
    positions = torch.cat([torch.arange(4), torch.arange(1), torch.arange(12)]).repeat(batch, 1)
    inputs = dict(input_ids=ids, position_ids=positions, use_cache=False)
    compare(model, inputs, torch.ones(batch, S, dtype=torch.bool), torch.float32)
    assert calls and all(isinstance(mask, Mask) and lengths.cu_q is not None for mask, lengths, _ in calls)
    assert all(lengths.cu_q.tolist()[:4] == [0, 4, 5, 17] for _, lengths, _ in calls)
    # What a data collator says of the lengths is the same.
    edges = torch.tensor([0, 4, 5, 17], dtype=torch.int32, device=device)
    inputs = dict(inputs, input_ids=ids.to(device), position_ids=positions.to(device))
    if batch == 1:
        told = model(**inputs, cu_seq_lens_q=edges, cu_seq_lens_k=edges, max_length_q=12, max_length_k=12).logits
        torch.testing.assert_close(told, model(**inputs).logits)


def test_lengths_of_a_collator(calls: list[Any]) -> None:
    """Cumulative lengths alone, without Spans: a module's attributes say the rest."""
    module = torch.nn.Module()
    module.is_causal = True
    edges = torch.tensor([0, 7, 20], dtype=torch.int32)
    q, k, v = (torch.randn(1, heads, 20, 8) for heads in (4, 2, 2))
    dense = torch.zeros(1, 1, 20, 20, dtype=torch.bool)
    found, _ = frontend.attend(module, q, k, v, dense, cu_seq_lens_q=edges, cu_seq_lens_k=edges, sliding_window=4)
    for start, stop in ((0, 7), (7, 20)):
        part = [tensor[:, :, start:stop] for tensor in (q, k, v)]
        wanted = torch_flash2.attention(*part, "window(3, 0)").transpose(1, 2)
        torch.testing.assert_close(found[:, start:stop], wanted)


@pytest.mark.parametrize("device", DEVICES)
def test_unpadded(device: str, calls: list[Any]) -> None:
    """ModernBERT on sequences laid end to end, of which cumulative lengths tell: as padded, one by one."""
    model = make("modernbert", device)
    inputs, counts = inputs_of("modernbert", "right")
    padded = {name: tensor.to(device) for name, tensor in inputs.items()}
    model.set_attn_implementation("eager")
    wanted = model(**padded).logits[counts.to(device)]
    model.set_attn_implementation(NAME)
    lengths = counts.sum(1)
    edges = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    places = torch.cat([torch.arange(int(n)) for n in lengths])[None]
    told = dict(
        cu_seq_lens_q=edges, cu_seq_lens_k=edges, position_ids=places, input_ids=inputs["input_ids"][counts][None]
    )
    found = model(**{name: tensor.to(device) for name, tensor in told.items()}).logits[0]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert {str(mask) for mask, _, _ in calls} == {"full @ bottom-right", "window(4, 4) @ bottom-right"}
    assert all(lengths.cu_q is not None for _, lengths, _ in calls)


def test_packed_with_a_bias() -> None:
    """A bias has rows of its own: packed sequences are then a dense mask."""
    q = torch.randn(2, 4, 9, 8)
    ids = torch.tensor([[0] * 4 + [1] * 5, [0] * 9])
    spans = frontend.Spans(torch_flash2.masks.causal(), documents=frontend.Documents(ids))
    bias = torch.randn(1, 4, 9, 9)
    found, _ = frontend.attend(torch.nn.Module(), q, q, q, spans, position_bias=bias)
    same = (ids[:, :, None] == ids[:, None, :])[:, None] & torch.ones(9, 9, dtype=torch.bool).tril()
    torch.testing.assert_close(found, torch_flash2.attention(q, q, q, same, bias=bias).transpose(1, 2))
    edges = torch.tensor([0, 4, 9, 18], dtype=torch.int32)
    with pytest.raises(ValueError, match="a position bias needs sequences that are padded"):
        frontend.attend(torch.nn.Module(), q, q, q, spans, position_bias=bias, cu_seq_lens_q=edges)


# Continuous batching.


needs_batching = pytest.mark.skipif(
    not frontend._batching(), reason="continuous batching of this transformers is closed"
)


@needs_batching
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt-oss"])
def test_continuous_batching(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of many lengths, prompts cut into pieces: tokens and log-probabilities are eager's of each alone."""
    seen: list[Any] = []
    attend_pages = frontend._attend_pages
    monkeypatch.setattr(frontend, "_attend_pages", lambda *a: seen.append(a[5].get("block_table")) or attend_pages(*a))
    model = make(name, device)
    prompts = [list(range(5, 12)), [3, 4], [2 + 7 * i % 60 for i in range(23)]]
    options: dict[str, Any] = dict(max_new_tokens=6, do_sample=False)
    wanted = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=device)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), **options, return_dict_in_generate=True, output_scores=True
        )
        scores = torch.stack(out.scores)[:, 0].log_softmax(-1)
        wanted.append((out.sequences[0, len(prompt) :].tolist(), scores.amax(1).cpu()))
    model.set_attn_implementation(NAME)
    config = transformers.ContinuousBatchingConfig(
        # gpt-oss's eager experts cannot be captured.
        num_blocks=16, max_batch_tokens=16, return_logprobs=True, use_cuda_graph=False if name == "gpt-oss" else None
    )  # fmt: skip
    found = model.generate_batch(
        prompts, generation_config=transformers.GenerationConfig(**options, eos_token_id=None, pad_token_id=0),
        continuous_batching_config=config, progress_bar=False,
    )  # fmt: skip
    assert model.config._attn_implementation == NAME
    for result, (tokens, scores) in zip(found.values(), wanted, strict=True):
        assert result.generated_tokens == tokens
        torch.testing.assert_close(torch.tensor(result.logprobs), scores, atol=1e-3, rtol=1e-3)
    assert seen
    # Steps of one token go by block tables where all layers see all keys, and there is a GPU.
    assert any(table is not None for table in seen) == (name == "llama" and device == "cuda")


@needs_batching
def test_block_tables_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Continuous batching on CUDA finds a function for paged caches."""
    from transformers.generation.continuous_batching import initialization

    config = make("llama").config
    config._attn_implementation = NAME
    wanted = transformers.ContinuousBatchingConfig(max_blocks_per_request=4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    initialization.ensure_decode_fast_path_is_available(config, wanted, True)
    assert wanted.max_blocks_per_request == 4


class Paged:
    """A cache that leaves the writing to the function, as transformers' does with a block table."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.caches = dict(k_cache=keys, v_cache=values)

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, told: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        told.update(self.caches)
        return key, value


def test_block_tables() -> None:
    """One new row of each of two requests, and a third place that is empty."""
    keys, values = torch.randn(2, 6, 4, 2, 8)
    table = torch.tensor([[2, 5, -1], [0, 3, 1], [-1, -1, -1]], dtype=torch.int32)
    held = [5, 9]
    query, key, value = (torch.randn(1, heads, 3, 8) for heads in (4, 2, 2))
    module: Any = torch.nn.Module()
    module.layer_idx = 0
    edges_k = torch.tensor([0, 6, 16, 16], dtype=torch.int32)
    rows = [[cache[table[b].clamp(0).long()].flatten(0, 1)[:n] for cache in (keys, values)] for b, n in enumerate(held)]
    untouched = keys[4].clone()
    told = dict(cu_seq_lens_q=torch.arange(4, dtype=torch.int32), cu_seq_lens_k=edges_k, block_table=table)
    for window in (None, 4):
        found, _ = frontend.attend(
            module, query, key, value, None, cache=Paged(keys, values), sliding_window=window, **told
        )
        for b, (k, v) in enumerate(rows):
            k, v = (torch.cat([old, new[0, :, b][None]]).transpose(0, 1)[None] for old, new in ((k, key), (v, value)))
            mask = "full" if window is None else f"window({window - 1}, 0) @ bottom-right"
            wanted = torch_flash2.attention(query[:, :, b : b + 1], k, v, mask)
            torch.testing.assert_close(found[:, b], wanted[:, :, 0])
        assert (found[:, 2] == 0).all() and torch.equal(keys[4], untouched)


# Generation.


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", list(DECODERS))
def test_generate(name: str, cache: str, device: str, calls: list[Any]) -> None:
    """Token by token what eager generates, from a batch padded on the left."""
    model = make(name, device)
    generated, scores = {}, {}
    ids, keep = inputs_of(name, "none")[0]["input_ids"].to(device), padding_of("left").to(device)
    for implementation in ("eager", NAME):
        model.set_attn_implementation(implementation)
        options: dict[str, Any] = dict(max_new_tokens=12, do_sample=False, disable_compile=True)
        if cache == "static":
            options["cache_implementation"] = "static"
        try:
            out = model.generate(ids, attention_mask=keep, **options, return_dict_in_generate=True, output_scores=True)
        except TypeError as error:
            # transformers 5.17 calls its own mask functions of llama4's static cache with arguments they lack.
            if implementation == "eager":
                pytest.skip(f"this release of transformers cannot, with eager attention: {error}")
            raise
        generated[implementation], scores[implementation] = out.sequences, torch.stack(out.scores)
    assert torch.equal(generated[NAME], generated["eager"])
    torch.testing.assert_close(scores[NAME], scores["eager"], atol=2e-4, rtol=2e-4)
    assert calls


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_static_cache_has_lengths(name: str, calls: list[Any]) -> None:
    """Without padding a static cache is read up to what is in it."""
    model = make(name)
    model.set_attn_implementation(NAME)
    ids = inputs_of(name, "none")[0]["input_ids"]
    keep = padding_of("none")
    options = dict(max_new_tokens=4, do_sample=False, cache_implementation="static", disable_compile=True)
    model.generate(ids, attention_mask=keep, **options)
    used = [lengths.used_k.tolist() for _, lengths, _ in calls if lengths.used_k is not None]
    assert [S + 2] * B in used
    assert all(isinstance(mask, Mask) for mask, _, _ in calls)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_generate_compiled(name: str) -> None:
    """generate() compiles the decoding step of a static cache, as often as with eager."""
    model = make(name)
    ids, keep = inputs_of(name, "none")[0]["input_ids"], padding_of("left")
    generated, graphs = {}, []
    for implementation in ("eager", NAME):
        model.set_attn_implementation(implementation)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        options = transformers.CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
        options._compile_all_devices = True
        generated[implementation] = model.generate(
            ids, attention_mask=keep, max_new_tokens=8, do_sample=False, cache_implementation="static",
            compile_config=options,
        )  # fmt: skip
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1]
    assert torch.equal(generated[NAME], generated["eager"])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama"])
def test_generate_compiled_on_a_gpu(name: str, calls: list[Any]) -> None:
    """As generate() compiles by itself where there is a GPU: Inductor, with CUDA graphs."""
    model = make(name, "cuda")
    ids, keep = inputs_of(name, "none")[0]["input_ids"].cuda(), padding_of("none").cuda()
    generated = {}
    for implementation in ("eager", NAME):
        model.set_attn_implementation(implementation)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        generated[implementation] = model.generate(
            ids, attention_mask=keep, max_new_tokens=8, do_sample=False, cache_implementation="static"
        )
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert calls and torch.equal(generated[NAME], generated["eager"])


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_compiled(name: str, padding: str) -> None:
    """A forward is one graph."""
    model = make(name)
    inputs, counts = inputs_of(name, padding)
    model.set_attn_implementation(NAME)
    wanted = model(**inputs).logits[counts]
    torch._dynamo.reset()
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs).logits[counts]
    torch.testing.assert_close(found, wanted)


# Masks.


def exactly(spans: Any, M: int, N: int) -> torch.Tensor:
    """What spans let rows see, bool [B, M, N]: the attention of a layer on values that are the identity."""
    module = torch.nn.Module()
    module.is_causal = False
    query, key = torch.zeros(B, 2, M, 8), torch.zeros(B, 1, N, 8)
    out, _ = frontend.attend(module, query, key, torch.eye(N).expand(B, 1, N, N), spans)
    return out[:, :, 0] > 0


@pytest.fixture
def made() -> Iterator[Callable[..., tuple[Any, torch.Tensor]]]:
    from transformers import masking_utils

    def both(function: Any, **options: Any) -> tuple[Any, torch.Tensor]:
        options = dict(batch_size=B, mask_function=function, **options)
        dense = masking_utils.sdpa_mask(**options, allow_is_causal_skip=False)
        return frontend.spans_of(**options), dense[:, 0].expand(B, -1, -1)

    yield both


@pytest.mark.parametrize("padding", PADDINGS)
def test_masks(padding: str, made: Callable[..., tuple[Any, torch.Tensor]]) -> None:
    """Spans say what the dense mask says, but that rows of padding see nothing."""
    from transformers import masking_utils as utils

    functions: dict[str, Any] = {
        "causal": utils.causal_mask_function,
        "full": utils.bidirectional_mask_function,
        "window": utils.sliding_window_causal_mask_function(4),
        "both sides": utils.sliding_window_bidirectional_mask_function(3),
    }
    # Rows, keys, positions of the first row and key: whole, a cache that grows, one that slides, static ones.
    shapes = [(9, 9, 0, 0), (3, 9, 6, 0), (1, 9, 8, 0), (3, 6, 7, 4), (3, 12, torch.tensor(4), 0), (1, 12, 6, 0)]
    keep = padding_of(padding)[:, :9].bool()
    for name, function in functions.items():
        for M, N, q_offset, kv_offset in shapes:
            mask = keep if N != 6 else torch.cat([keep, keep[:, :1] | True], 1)
            spans, dense = made(
                function, q_length=M, kv_length=N, q_offset=q_offset, kv_offset=kv_offset, attention_mask=mask
            )
            if name == "both sides" and N == 12:
                # Keys behind the last row, and a mask that looks ahead.
                assert torch.equal(spans[:, 0], dense)
                continue
            assert isinstance(spans, frontend.Spans), (name, M, N)
            at = int(q_offset) + torch.arange(M)
            rows = mask[:, at] if int(at[-1]) < mask.shape[1] else torch.ones(B, M, dtype=torch.bool)
            found = exactly(spans, M, N)
            assert torch.equal(found[rows], dense[rows]), (name, M, N)


def test_custom_masks_stay_dense(made: Callable[..., tuple[Any, torch.Tensor]]) -> None:
    from transformers import masking_utils as utils

    blocks = torch.tensor([[-1, 0, 0, -1, 1, 1, -1, -1, -1]]).expand(B, -1)
    functions = [
        utils.or_masks(utils.causal_mask_function, utils.blockwise_overlay(blocks)),
        utils.chunked_causal_mask_function(4, torch.zeros(B, dtype=torch.long)),
        lambda b, h, q, k: (k <= q) & (k % 2 == 0),
        lambda b, h, q, k: k < q,
    ]
    for function in functions:
        found, dense = made(function, q_length=9, kv_length=9)
        assert torch.equal(found[:, 0].expand(B, -1, -1), dense)


def test_output_attentions() -> None:
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match="output_attentions needs"):
        frontend.attend(torch.nn.Module(), q, q, q, None, output_attentions=True)
