"""The benchmarks: dry runs on the CPU, what is counted, and the report."""

from __future__ import annotations

import csv
import json
import xml.etree.ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import (
    __main__,
    check,
    context_parallel,
    data,
    few,
    gpt,
    kvcache,
    matrix,
    providers,
    report,
    results,
    runner,
    suites,
    tune,
)
from benchmarks.results import COLUMNS, RATIO_COLUMNS, Table
from torch_flash2.cli import demo

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors are slower on several threads, the more so where others share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def run(out: Path, *arguments: str) -> None:
    quick = ["--device", "cpu", "--rounds", "3", "--window-ms", "0.1", "--out", str(out)]
    assert __main__.main([*arguments, *quick]) == 0


def shape(name: str, suite: str = "features", direction: str = "backward") -> suites.Shape:
    groups = suites.suite(suite, tiny=True)
    found = [s for g in groups for s in g.shapes if (s.name, s.direction) == (name, direction)]
    return found[0]


@pytest.mark.parametrize("direction", suites.DIRECTIONS)
def test_grid_dry_run(
    direction: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BENCH_COMMIT", "abc1234")
    run(
        tmp_path,
        "--suite",
        direction,
        "--filter",
        "d64-causal-s(512|8192)",
        "--against",
        "math,sdpa",
    )
    with (tmp_path / f"{direction}.csv").open() as file:
        assert file.readline().strip() == (
            "date,commit,device,driver,torch,triton,suite,case,direction,dtype,"
            "head_dim,causal,seqlen,provider,ms,tflops,gbps,peak_mib"
        )
    rows = read(tmp_path / f"{direction}.csv")
    assert [(row["case"], row["provider"]) for row in rows] == [
        (f"d64-causal-s{seqlen}", provider) for seqlen in (512, 8192) for provider in ("torch_flash2", "math", "sdpa")
    ]
    assert all(float(row["ms"]) > 0 and float(row["tflops"]) > 0 for row in rows)
    assert {row["commit"] for row in rows} != {""}
    ratios = read(tmp_path / f"{direction}_ratios.csv")
    speeds = [row for row in ratios if row["kind"] == "speed"]
    assert {(row["provider"], row["versus"]) for row in speeds} == {
        ("torch_flash2", "math"),
        ("torch_flash2", "sdpa"),
    }
    assert all(float(r["low"]) <= float(r["value"]) <= float(r["high"]) for r in speeds)
    assert "geometric means" in capsys.readouterr().out


def test_features_dry_run(tmp_path: Path) -> None:
    run(tmp_path, "--suite", "features", "--filter", "16k|t5|bert", "--without", "fa3")
    rows = read(tmp_path / "features.csv")
    assert {"window4096-16k", "documents8-16k", "bias-t5", "padding-bert"} <= {row["case"] for row in rows}
    assert {row["direction"] for row in rows} == {"forward", "backward"}
    ratios = read(tmp_path / "features_ratios.csv")
    costs = {(r["case"], r["versus"]) for r in ratios if r["kind"] == "cost"}
    assert ("documents8-16k", "causal-16k") in costs
    refused = {(r["provider"], r["note"]) for r in ratios if r["kind"] == "refused"}
    assert ("flex", "measured on CUDA only") in refused
    assert "fa3" not in {provider for provider, _ in refused}


def test_memory_dry_run(tmp_path: Path) -> None:
    run(tmp_path, "--suite", "memory", "--quick")
    rows = read(tmp_path / "memory.csv")
    assert {(row["provider"], row["direction"]) for row in rows} == {
        ("torch_flash2", "both"),
        ("math", "both"),
    }


def test_wrong_results_are_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = providers._ours
    monkeypatch.setattr(providers, "_ours", lambda inputs: right(inputs) * 1.05)
    run(tmp_path, "--suite", "forward", "--filter", "d64-full-s512", "--against", "math")
    assert [row["provider"] for row in read(tmp_path / "forward.csv")] == ["math"]
    ratios = read(tmp_path / "forward_ratios.csv")
    (refused,) = [row for row in ratios if row["kind"] == "refused"]
    assert refused["provider"] == "torch_flash2"
    assert refused["note"].startswith("wrong: out is off by 5.0e-02 > ")


@pytest.mark.parametrize(
    "name",
    ["causal-16k", "documents8-16k", "sinks-8k-d128", "bias-t5", "padding-bert", "alibi-8k-d128"],
)
def test_reference_agrees_and_notices(name: str) -> None:
    case = shape(name)
    sample = data.make(case, CPU, 0, True)
    provider = providers.make("torch_flash2:reference", case, sample.inputs)
    reference = check.Reference(case, sample)
    found = check.results(provider, case, sample)
    assert set(found) == {"out", *sample.inputs.leaves}
    assert reference.complaints(reference.errors(found)) == []
    rounded = {name: 2 * bound for name, bound in reference.bounds.items()}
    assert len(reference.complaints(rounded)) == len(rounded) and not reference.complaints(rounded, check.PEER_SLACK)
    found["key"] = found["key"] * 1.1
    (complaint,) = reference.complaints(reference.errors(found))
    assert complaint.startswith("key is off by ")
    found["key"][:] = torch.nan
    assert reference.complaints(reference.errors(found))[0].startswith("key is off by nan")


def test_each_run_over_several_gpus_stands_beside_its_own_one() -> None:
    rows = [
        {"case": case, "provider": f"torch_flash2 {how}", "ms": ms, "tflops": "1"}
        for case, how, ms in (
            ("x2", "x1", "200"),
            ("x2", "x2 ring", "100"),
            ("x4", "x1", "240"),
            ("x4", "x4 ring", "60"),
        )
    ]
    lines = report.context_parallel_table(rows).splitlines()[2:]
    assert [line.split("|")[-2].strip() for line in lines] == ["1.00", "2.00", "1.00", "4.00"]


def test_dense_mask_of_peers_agrees() -> None:
    for name in ("window4096-16k", "documents8-16k", "padding-bert", "alibi-8k-d128"):
        case = shape(name)
        sample = data.make(case, CPU, 0, True)
        provider = providers.make("math", case, sample.inputs)
        reference = check.Reference(case, sample)
        assert not reference.complaints(reference.errors(check.results(provider, case, sample)))


def test_spans() -> None:
    assert suites.span("full") == (None, None)
    assert suites.span("causal") == (None, 0)
    assert suites.span("causal & window(4, 0) & window(-, 7)") == (4, 0)
    with pytest.raises(ValueError, match=r"not 'chunk\(4\)'"):
        suites.span("causal & chunk(4)")


def test_counts() -> None:
    """Pairs and bytes of small shapes, by hand: 64 rows, head dim 16, fp16."""
    case = shape("d128-causal-s512", "forward", "forward")
    sample = data.make(case, CPU, 0, False)
    per_pair = 2 * case.case.batch * case.case.heads * (16 + 16)
    assert sample.flops("forward") == per_pair * 64 * 65 / 2
    assert sample.flops("backward") == 2.5 * sample.flops("forward")
    tensor = case.case.batch * case.case.heads * 64 * 16 * 2
    assert sample.bytes("forward") == 4 * tensor + tensor // 8
    packed = shape("documents8-16k")
    sample = data.make(packed, CPU, 0, False)
    rows = packed.case.seqlen_q // 8
    assert sample.flops("forward") == 2 * packed.case.heads * 32 * 2 * rows * (rows + 1) / 2


def test_provider_names(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"kv": {"BLOCK_M": 64, "tma": True}, "path": "tiled", "mode": None}
    assert providers.parse_config(providers.config_text(config)) == config
    assert __main__.words("fa2,torch_flash2:triton@a=1,b.c=2,sdpa") == (
        "fa2",
        "torch_flash2:triton@a=1,b.c=2",
        "sdpa",
    )
    monkeypatch.setenv("TRITON_OVERRIDE_ARCH", "sm80")
    assert providers.label("torch_flash2:triton") == "torch_flash2:triton@sm80"
    assert providers.label("fa2") == "fa2"
    with pytest.raises(ValueError, match="no provider is called 'fa9'; known are torch_flash2, "):
        runner.run(["forward"], runner.Options(device="cpu", against=("fa9",)))
    with pytest.raises(ValueError, match="the suites are forward, .* got 'encode'"):
        suites.suite("encode")


def test_tune(tmp_path: Path) -> None:
    found = tmp_path / "tune.json"
    arguments = "tune --kernel cpu --filter d64-causal-s512 --processes 1".split()
    run(found, *arguments)
    (case,) = json.loads(found.read_text())
    assert case["case"]["name"] == "d64-causal-s512" and case["kernel"] == "cpu"
    assert case["default"] in [place["config"] for place in case["ranking"]]
    assert sorted(case["ranking"], key=lambda place: place["ms"]) == case["ranking"]
    with pytest.raises(ValueError, match="kernel 'reference' has no configs to tune"):
        run(found, "tune", "--kernel", "reference", "--filter", "d64-causal-s512")


def test_tune_joins_parts() -> None:
    default = {"kv": {"M": 1}, "q": {"M": 1}}
    ranking = [
        {"kv": {"M": 2}, "q": {"M": 1}},
        {"kv": {"M": 3}, "q": {"M": 1}},
        {"kv": {"M": 1}, "q": {"M": 4}},
        default,
        {"kv": {"M": 1}, "q": {"M": 5}},
    ]
    assert tune.joined(default, ranking) == {"kv": {"M": 2}, "q": {"M": 4}}
    assert tune.joined({"M": 1}, [{"M": 2}, {"M": 1}]) == {"M": 1}


def synthetic(folder: Path) -> None:
    """A forward grid of two lengths, and a feature with its base."""
    same = {
        "date": "2026-11-21", "commit": "abc1234", "device": "NVIDIA H200", "driver": "580",
        "torch": "2.11.0", "triton": "3.6.0", "dtype": "bf16", "head_dim": "128", "causal": "1",
    }  # fmt: skip
    grid = Table(folder / "forward.csv", COLUMNS)
    grid_ratios = Table(folder / "forward_ratios.csv", RATIO_COLUMNS)
    for seqlen, ours, fa2 in ((1024, 330.0, 250.0), (4096, 400.0, 300.0)):
        case = f"d128-causal-s{seqlen}"
        place = {"suite": "forward", "case": case, "direction": "forward", "seqlen": str(seqlen)}
        for provider, tflops in (("torch_flash2", ours), ("fa2", fa2)):
            measured = {"provider": provider, "ms": "1.0", "tflops": str(tflops)}
            grid.append({**same, **place, **measured})
        row = {k: v for k, v in (same | place).items() if k in RATIO_COLUMNS}
        speed = {"provider": "torch_flash2", "kind": "speed", "versus": "fa2"}
        grid_ratios.append({**row, **speed, "value": f"{ours / fa2:.3f}"})
        refused = {"provider": "fa3", "kind": "refused", "note": "PEERS_HOME is not set"}
        grid_ratios.append({**row, **refused})
    features = Table(folder / "features.csv", COLUMNS)
    feature_ratios = Table(folder / "features_ratios.csv", RATIO_COLUMNS)
    for case, ms in (("causal-16k", "4.0"), ("window4096-16k", "1.8")):
        place = {"suite": "features", "case": case, "direction": "forward", "seqlen": "16384"}
        features.append({**same, **place, "provider": "torch_flash2", "ms": ms})
        features.append({**same, **place, "provider": "flex", "ms": "3.6"})
        row = {k: v for k, v in (same | place).items() if k in RATIO_COLUMNS}
        row["provider"] = "torch_flash2"
        speed = {"kind": "speed", "versus": "flex", "value": f"{3.6 / float(ms):.3f}"}
        feature_ratios.append({**row, **speed})
        if case != "causal-16k":
            cost = {"kind": "cost", "versus": "causal-16k", "value": "0.450"}
            feature_ratios.append({**row, **cost})


def test_report(tmp_path: Path) -> None:
    expecttest = pytest.importorskip("expecttest")
    synthetic(tmp_path)
    texts, drawings = report.sections(tmp_path)
    found = "\n\n".join(f"{name}:\n{text}" for name, text in texts.items())
    expecttest.assert_expected_inline(
        found,
        """\
features:
| case | provider | forward ms | x base | speed | backward ms | x base | speed |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |
| causal-16k | torch_flash2 | 4.000 | - | - | - | - | - |
| causal-16k | flex | 3.600 | - | 0.90 | - | - | - |
| window4096-16k | torch_flash2 | 1.800 | 0.45 | - | - | - | - |
| window4096-16k | flex | 3.600 | - | 2.00 | - | - | - |

x base: time over that without the feature; speed: how many times as fast ours is.

Measured on NVIDIA H200, driver 580, torch 2.11.0, Triton 3.6.0, commit abc1234, 2026-11-21.

forward:
| TFLOP/s | provider | 1024 | 4096 |
| --- | --- | ---: | ---: |
| bf16, D 128, causal | torch_flash2 | 330 | 400 |
| bf16, D 128, causal | fa2 | 250 | 300 |

Measured on NVIDIA H200, driver 580, torch 2.11.0, Triton 3.6.0, commit abc1234, 2026-11-21.

forward-ratios:
| speed | over | 64 full | 64 causal | 128 full | 128 causal | 256 full | 256 causal | all | cases |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| torch_flash2 (bf16) | fa2 | - | - | - | 1.33 | - | - | 1.326 | 2 |

Measured on NVIDIA H200, driver 580, torch 2.11.0, Triton 3.6.0, commit abc1234, 2026-11-21.

forward-refused:
- fa3 on d128-causal-s1024 forward, d128-causal-s4096 forward: PEERS_HOME is not set""",
    )
    assert list(drawings) == ["forward_bf16_d128.svg"]


def test_report_fills_the_readme(tmp_path: Path) -> None:
    synthetic(tmp_path)
    readme = tmp_path / "README.md"
    start, end = "<!-- benchmarks:forward-ratios -->", "<!-- /benchmarks:forward-ratios -->"
    readme.write_text(f"a\n{start}\nold\n{end}\nb")
    for _ in range(2):
        assert __main__.main(["report", str(tmp_path), "--readme", str(readme)]) == 0
        lines = readme.read_text().splitlines()
        assert lines[:2] == ["a", start]
        assert lines[2].startswith("| speed | over |") and "old" not in lines
        assert lines[-2:] == [end, "b"]
    assert "| bf16, D 128, causal | fa2 | 250 | 300 |" in (tmp_path / "report.md").read_text()
    drawing = (tmp_path / "forward_bf16_d128.svg").read_text()
    assert len(list(xml.etree.ElementTree.fromstring(drawing).findall("{*}polyline"))) == 2
    with pytest.raises(ValueError, match="names no table; there are features, forward"):
        report.fill("<!-- benchmarks:nothing -->", report.sections(tmp_path)[0])
    with pytest.raises(ValueError, match="has no <!-- /benchmarks:forward -->"):
        report.fill("<!-- benchmarks:forward -->", report.sections(tmp_path)[0])
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="has no results"):
        report.sections(empty)


def test_matrix_rate_is_a_dashed_line(tmp_path: Path) -> None:
    """It is drawn at its height, also above all else, and only for its own dtype and device."""
    synthetic(tmp_path)
    table = Table(tmp_path / "matrix.csv", COLUMNS)
    same = {"suite": "matrix", "case": "gemm-8192", "provider": "matmul", "ms": "1.4"}
    table.append(same | {"device": "NVIDIA H200", "dtype": "fp16", "tflops": "700.0"})
    assert "dasharray" not in report.sections(tmp_path)[1]["forward_bf16_d128.svg"]
    table.append(same | {"device": "NVIDIA H200", "dtype": "bf16", "tflops": "790.0"})
    texts, drawings = report.sections(tmp_path)
    assert "matrix" not in texts and "matrix product: 790" in drawings["forward_bf16_d128.svg"]
    root = xml.etree.ElementTree.fromstring(drawings["forward_bf16_d128.svg"])
    dashed = [line for line in root.findall("{*}line") if line.get("stroke-dasharray")]
    heights = [
        float(point.split(",")[1]) for line in root.findall("{*}polyline") for point in line.get("points", "").split()
    ]
    assert len(dashed) == 1 and 40 < float(dashed[0].get("y1", "nan")) < min(heights)
    row = matrix.measure(CPU, "fp32", 64, 2)
    assert float(row["tflops"]) == pytest.approx(2 * 64**3 / float(row["ms"]) / 1e9, abs=0.06)


def test_modules_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The suites that are modules, on the CPU: each writes its table, which the report draws."""
    run(tmp_path, "--suite", "matrix,kvcache,few", "--dtype", "fp32")
    assert [row["provider"] for row in read(tmp_path / "matrix.csv")] == ["matmul"]
    rows = read(tmp_path / "kvcache.csv")
    assert [row["case"] for row in rows] == ["copy", "llama-b3-rows", "llama-b3-page64", "llama-b3-page256"]
    assert {row["case"] for row in read(tmp_path / "few.csv")} == {case.name for case in few.CASES}
    run(tmp_path, "--suite", "context_parallel")
    ways = ["torch_flash2 x1", "sdpa x1", "torch_flash2 x2 alltoall", "torch_flash2 x2 allgather"]
    assert [row["provider"] for row in read(tmp_path / "context_parallel.csv")] == ways
    texts, _ = report.sections(tmp_path)
    assert "| 32-of-16k-h32 | torch_flash2 |" in texts["few"]
    assert "| torch_flash2 x2 allgather |" in texts["context_parallel"] and "| llama-b3-page64 |" in texts["kvcache"]
    assert "[#############.......] 3/3 llama-b3-page256" in capsys.readouterr().err


def test_models_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table of every provider's time, and our speed over the fastest peer that ran."""
    run(tmp_path, "--suite", "models", "--filter", "8b-8k|gemma2-8k", "--against", "math,efficient")
    texts, _ = report.sections(tmp_path)
    lines = [line.split(" | ") for line in texts["models"].splitlines() if line.startswith("| ")]
    assert lines[0] == ["| case", "ms", "torch_flash2", "math", "fastest peer", "speed over it |"]
    cases = [(line[0], line[1], line[4]) for line in lines[2:]]
    dtypes = ("bf16", "fp16")
    assert cases == [
        (f"| {case}", f"{direction}, {dtype}", peer)
        for direction in suites.DIRECTIONS
        for case, peer, kinds in (("llama3.1-8b-8k", "math", dtypes), ("gemma2-8k", "-", dtypes[:1]))
        for dtype in kinds
    ]
    assert texts["models"].split("\n\n")[0] in capsys.readouterr().out
    rows = [{"case": "x", "dtype": "bf16", "direction": "forward", "suite": "models"} for _ in range(3)]
    for row, (name, ms) in zip(rows, (("torch_flash2", "2.0"), ("fa3", "1.0"), ("flex", "3.0")), strict=True):
        row |= {"provider": name, "ms": ms}
    ratios = [
        rows[0] | {"kind": "speed", "versus": name, "value": name, "low": "1", "high": "2"} for name in ("flex", "fa3")
    ]
    assert report.model_table(rows, ratios).endswith("| 2.000 | 1.000 | 3.000 | fa3 | fa3 (1..2) |")


# Dynamo looks at the gradient of every input.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_gpt_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """All attentions learn alike, FlashAttention-3 by a stand-in; one that is wrong is not timed."""
    peer = torch.library.Library("flash_attn_3", "DEF")
    peer.define("fwd(Tensor q, Tensor k, Tensor v, *, bool is_causal, int num_splits) -> Tensor[]")
    peer.define(
        "bwd(Tensor g, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, *, bool is_causal, float softmax_scale)"
        " -> Tensor[]"
    )

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> list[torch.Tensor]:
        assert options == dict(is_causal=True, num_splits=1)
        out = gpt.stock(*(tensor.transpose(1, 2) for tensor in (q, k, v))).transpose(1, 2)
        return [out, q.new_zeros(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)]

    def backward(*tensors: torch.Tensor, is_causal: bool, softmax_scale: float) -> list[torch.Tensor]:
        g, q, k, v, out = (tensor.transpose(1, 2) for tensor in tensors[:5])
        scores = (q @ k.mT * softmax_scale).masked_fill(torch.ones(q.shape[2], q.shape[2]).triu(1) > 0, -torch.inf)
        p = scores.float().softmax(-1).to(q.dtype)
        ds = p * (g @ v.mT - (g * out).sum(-1, keepdim=True)) * softmax_scale
        return [tensor.transpose(1, 2).contiguous() for tensor in (ds @ k, ds.mT @ q, p.mT @ g)]

    peer.impl("fwd", forward, "CPU")
    peer.impl("bwd", backward, "CPU")
    monkeypatch.setattr(providers, "load_peer", lambda name: None)
    wrong = dict(gpt.ATTENTIONS, wrong=lambda: lambda q, k, v: gpt.stock(q, k, v) * 1.05)
    monkeypatch.setattr(gpt, "ATTENTIONS", wrong)
    run(tmp_path, "--suite", "train", "--filter", "gpt", "--against", "sdpa,fa3,wrong,fa9")
    said = capsys.readouterr().err
    assert "wrong: errors of loss" in said and "fa9 is not measured" in said
    assert [row["provider"] for row in read(tmp_path / "train.csv")] == ["matmul", "torch_flash2", "sdpa", "fa3"]
    assert [row["versus"] for row in read(tmp_path / "train_ratios.csv")] == ["sdpa", "fa3"]
    losses = report.loss_lines(read(tmp_path / "loss.csv"))
    assert list(losses) == ["torch_flash2", "sdpa", "fa3", "sdpa, nudged"]
    for line in losses.values():
        assert len(line) == 6 and line == pytest.approx(losses["sdpa"], abs=2e-3) and line[-1] < line[0] - 0.1
    texts, drawings = report.sections(tmp_path)
    assert "| gpt-49m-b2-s32 | fa3 | 6 |" in texts["loss"] and "tokens/s | MFU" in texts["train"]
    assert "polyline" in drawings["loss.svg"]


def test_gpt_counts() -> None:
    """Parameters by hand, and operations as the FLOP counter sees them."""
    size = gpt.SIZES["gpt-1.3b"]
    with torch.device("meta"):
        model = demo.GPT(size, gpt.stock)
    assert 1.3e9 < sum(parameter.numel() for parameter in model.parameters()) < 1.35e9
    small = demo.Size(2, 32, 2, 32, 2, 6, 1e-3)
    model, text = demo.GPT(small, demo.math_attention), torch.zeros(2, 32, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(text).sum().backward()
    # Math attention multiplies masked pairs too: of 32 x 32, 33 x 16 are visible.
    hidden = 3 * 4 * 2 * 32 * (32 - 16.5) * 32 * 2
    assert gpt.operations(small) == pytest.approx(counter.get_total_flops() - hidden)


def test_train_dry_run(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    run(tmp_path, "--suite", "train", "--filter", "gemma2", "--against", "eager,sdpa")
    # "sdpa" has no softcap: its gradients are others.
    assert [row["provider"] for row in read(tmp_path / "train.csv")] == ["torch_flash2", "eager"]


def test_kvcache_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step attends to what was there and the new token; its bytes are those of keys and values."""
    for page in (None, 64):
        step = kvcache.Step(kvcache.caches_of(2, 128, page, CPU), 128)
        assert step().shape == (2, 1, kvcache.H, kvcache.D)
        taken = torch.randint(8, 127, (2,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
        assert step.caches.bytes == int((taken + 1).sum()) * 2 * 8 * 128 * 2
        step.check(range(2))
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="sequence 0 is wrong"):
            patch.setattr(kvcache, "flash_attn_with_kvcache", lambda q, *a, **k: q)
            step.check(range(2))


def test_context_parallel_notices() -> None:
    """The fp32 standard, computed in pieces, is math's; an error beyond the bound raises."""
    tensors = [torch.randn(1, heads, 100, 16) for heads in (4, 2, 2, 4)]
    wanted = context_parallel.exact(tensors, 32)
    found = context_parallel.step(tensors, context_parallel.stock)
    assert max(context_parallel.errors(found, wanted)) < 1e-5
    context_parallel.check("right", found, wanted, [1e-5] * 4, 0)
    found[2] = found[2] * 1.01
    with pytest.raises(RuntimeError, match="late is wrong: errors of out, dQ, dK, dV"):
        context_parallel.check("late", found, wanted, [1e-5] * 4, 0)


def test_train_table(tmp_path: Path) -> None:
    table = Table(tmp_path / "train.csv", COLUMNS)
    same = {"suite": "train", "case": "gemma2-l4-s8192", "device": "NVIDIA H200", "driver": "580", "torch": "2.11.0"}
    same["seqlen"] = "8192"
    for name, ms in (("torch_flash2", "50.0"), ("eager", "120.0")):
        table.append(same | {"provider": name, "ms": ms, "peak_mib": "2048.0"})
    lines = report.sections(tmp_path)[0]["train"].splitlines()
    assert lines[2:4] == [
        "| gemma2-l4-s8192 | torch_flash2 | 50.0 | 1.00 | 163,840 | - | 2,048 |",
        "| gemma2-l4-s8192 | eager | 120.0 | 2.40 | 68,267 | - | 2,048 |",
    ]
    for name, ms, rate in (("matmul", "", "800.0"), ("torch_flash2", "500.0", "400.0")):
        row = {"case": "gpt-1.3b-b2-s8192", "provider": name, "ms": ms, "tflops": rate, "peak_mib": "1.0"}
        table.append(same | row)
    (line,) = [line for line in report.sections(tmp_path)[0]["train"].splitlines() if "gpt" in line]
    assert line == "| gpt-1.3b-b2-s8192 | torch_flash2 | 500.0 | 1.00 | 32,768 | 0.500 | 1 |"
    assert not list(tmp_path.glob("*_ratios.csv"))


def test_table_keeps_the_newest(tmp_path: Path) -> None:
    table = Table(tmp_path / "x.csv", COLUMNS)
    for case, ms in (("a", "1"), ("b", "2"), ("a", "3")):
        table.append({"case": case, "provider": "fa2", "ms": ms})
    again = Table(tmp_path / "x.csv", COLUMNS)
    again.compact()
    assert [(row["case"], row["ms"]) for row in again.rows()] == [("a", "3"), ("b", "2")]
    ratios = Table(tmp_path / "x_ratios.csv", RATIO_COLUMNS)
    for case, kind in (("a", "refused"), ("a", "error"), ("b", "error"), ("b", "refused")):
        ratios.append({"case": case, "provider": "fa3", "kind": kind})
    ratios.compact()
    kept = [(row["case"], row["kind"]) for row in ratios.rows()]
    assert kept == [("a", "error"), ("b", "error"), ("b", "refused")]


def test_commit_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "_output", lambda *command: "")
    monkeypatch.setenv("BENCH_COMMIT", "abc1234")
    assert results.environment(CPU)["commit"] == "abc1234"


def test_decode_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "--suite", "decode", "--filter", "mixed|mla|stack-b1", "--against", "sdpa,fa3,efficient")
    rows = read(tmp_path / "decode.csv")
    found = {(row["case"], row["provider"]) for row in rows}
    for case in ("b64-16k-d128", "mixed", "mixed-page16", "window1024-page64", "mla-page64", "llama-stack-b1"):
        assert {(case, name) for name in ("torch_flash2", "copy", "gemm")} <= found
    assert ("mixed", "sdpa") in found and all(float(row["gbps"]) > 0 for row in rows)
    ratios = read(tmp_path / "decode_ratios.csv")
    assert {row["versus"] for row in ratios if row["kind"] == "speed"} == {"sdpa"}
    refused = {(row["case"], row["provider"]) for row in ratios if row["kind"] == "refused"}
    assert ("mla-page64", "sdpa") in refused and ("mixed", "fa3") in refused
    report.write(tmp_path, None)
    assert "| mixed | torch_flash2 |" in (tmp_path / "report.md").read_text()
