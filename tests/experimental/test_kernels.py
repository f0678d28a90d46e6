"""Triton kernels against the plain functions that they replace: on a GPU if there is one, else interpreted.

A separate test compiles them for GPUs.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_prune.experimental import engine
from llava_prune.methods.views import Spans, View
from llava_prune.ops.attention import mean_weights, text_attention
from llava_prune.ops.clustering import cluster_means
from llava_prune.ops.selection import take
from llava_prune.runtime.attention import _rotate, decoder_attention

pytest.importorskip("triton")
CPU = torch.device("cpu")
HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def kernels() -> Any:
    return engine.load_kernels(HERE)


def view_of(hidden: torch.Tensor, visual: torch.Tensor, counts: int) -> View:
    valid = torch.ones_like(visual)
    text = torch.ones(visual.shape[0], 1, dtype=torch.bool, device=HERE)
    spans = Spans(visual.shape[1], 1, text, tuple(visual.sum(1).tolist()), 4)
    return View(hidden, visual, valid, visual.long(), None, spans, {}, (counts,) * visual.shape[0])


@given(
    before=st.integers(0, 5), patches=st.integers(1, 150), after=st.integers(0, 5), batch=st.integers(1, 2),
    parts=st.tuples(st.floats(0, 1), st.floats(0, 1)), clusters=st.integers(1, 3), split=st.booleans(),
    seed=st.integers(0, 9),
)  # fmt: skip
@settings(max_examples=25)
def test_cuts_are_the_same(
    before: int, patches: int, after: int, batch: int, parts: Any, clusters: int, split: bool, seed: int
) -> None:
    """Covers ties, NaN and infinite scores, one or two images, no text on either side, and all or no tokens kept."""
    draw = torch.Generator().manual_seed(seed)
    length = before + patches + after
    visual = torch.zeros(batch, length, dtype=torch.bool, device=HERE)
    visual[:, before : before + patches] = True
    if split and patches > 2:
        visual[:, before + patches // 2] = False
    n = int(visual[0].sum())
    keep = int(parts[0] * n)
    pool = int(parts[1] * (n - keep))
    score = torch.randint(0, max(2, n // 3), (batch, length), generator=draw).float().to(HERE)
    score[:, seed % length] = [torch.nan, torch.inf, -torch.inf][seed % 3]
    hidden = torch.randn(batch, length, 7, generator=draw).to(HERE)
    view = view_of(hidden, visual, length - n)
    groups = min(clusters, pool)
    given = ([keep] * batch, [pool] * batch, [groups] * batch)
    plain = view.keep_top(score, *given)
    cut = dataclasses.replace(view, kernels=engine.load_kernels(HERE)).keep_top(score, *given)
    assert torch.equal(cut.index, plain.index) and cut.valid is None and plain.valid is None
    assert (cut.merged is None) == (plain.merged is None)
    if cut.merged is not None and plain.merged is not None:
        torch.testing.assert_close(cut.merged, plain.merged)


def test_samples_of_different_counts_are_left_to_torch() -> None:
    visual = torch.tensor([[False, True, True, True, False]] * 2, device=HERE)
    view = view_of(torch.randn(2, 5, 4, device=HERE), visual, 2)
    score = torch.rand(2, 5, device=HERE)
    cut = dataclasses.replace(view, kernels=engine.load_kernels(HERE)).keep_top(score, [1, 2])
    plain = view.keep_top(score, [1, 2])
    assert torch.equal(cut.index, plain.index)
    assert cut.valid is not None and plain.valid is not None and torch.equal(cut.valid, plain.valid)


@pytest.mark.parametrize(("heads", "rows", "length"), [(1, 1, 5), (4, 9, 70), (5, 3, 130)])
def test_text_attention(heads: int, rows: int, length: int) -> None:
    attention = torch.rand(2, heads, rows, length, device=HERE)
    attention[0, 0, 0, 1], attention[1, -1, -1, 2] = torch.nan, torch.inf
    text = torch.rand(2, rows, device=HERE) > 0.3
    plain = text_attention(attention, text)
    got = text_attention(attention, mean_weights(text), engine.load_kernels(HERE))
    torch.testing.assert_close(got, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_means(dtype: torch.dtype) -> None:
    hidden, picked = (
        torch.randn(2, 20, 300, dtype=dtype, device=HERE),
        torch.tensor([[3, 1, 7, 9], [0, 19, 4, 9]], device=HERE)[:, :3],
    )
    plain, _ = cluster_means(hidden, picked, [3, 3], [1, 1])
    got, _ = cluster_means(hidden, picked, [3, 3], [1, 1], engine.load_kernels(HERE))
    torch.testing.assert_close(got, plain)
    assert torch.allclose(plain[:, 0].float(), take(hidden, picked).float().mean(1), atol=1e-3)


@pytest.mark.parametrize("shared", [True, False])
def test_rotary_positions(shared: bool, kernels: Any) -> None:
    """The head size, 12, is not a power of two."""
    queries = torch.randn(2, 5, 3 * 12, device=HERE)
    cos, sin = torch.randn(2, 1 if shared else 2, 5, 12, device=HERE)
    plain = _rotate(queries.view(2, 5, 3, 12).transpose(1, 2), cos, sin)
    torch.testing.assert_close(kernels.turned(queries, cos, sin, 3), plain)


@pytest.mark.parametrize("masked", [False, True])
def test_rows_of_a_layer(masked: bool) -> None:
    """Covers grouped keys, rows in the middle and at the end, and padding columns."""
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, intermediate_size=8, num_attention_heads=4, num_key_value_heads=2)
    layer = LlamaDecoderLayer(config, 0).to(HERE)
    hidden, (cos, sin) = torch.randn(2, 11, 32, device=HERE), torch.randn(2, 1, 11, 8, device=HERE)
    valid = torch.arange(11, device=HERE)[None] >= torch.tensor([[0], [3]], device=HERE) if masked else None
    for rows in (slice(7, 11), slice(4, 6), slice(10, 11)):
        with torch.no_grad():
            plain = decoder_attention(layer, hidden, (cos, sin), rows, valid)
            got = decoder_attention(layer, hidden, (cos, sin), rows, valid, kernels=engine.load_kernels(HERE))
        torch.testing.assert_close(got, plain, rtol=1e-5, atol=1e-6)
        assert got.dtype == torch.float32


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "OLDEST", "99")
    with pytest.raises(ValueError, match="fused=True needs triton >= 99 .this is 3"):
        engine.load_kernels(HERE)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ValueError, match="fused=True needs triton"):
        engine.load_kernels(HERE)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs a CUDA device, and the model is on cpu"):
        engine.load_kernels(CPU)


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from llava_prune.experimental import kernels as k

cases = []
for block in (128, 1024, 4096):
    cases.append((k._place, {"rank": "*i32", "visual": "*i1", "valid": "*i1", "index": "*i64", "picked": "*i64"},
                  {"BLOCK": block}))
cases.append((k._rank, {"score": "*fp32", "among": "*i1", "rank": "*i32"}, {"BLOCK": 64, "TILE": 128}))
for dtype in ("*bf16", "*fp16", "*fp32"):
    cases.append((k._mean_of, {"rows": dtype, "index": "*i64", "out": dtype, "divisor": "fp32"}, {"BLOCK": 128}))
    tables = {"queries": dtype, "cos": dtype, "sin": dtype, "out": dtype}
    cases.append((k._turned, tables, {"SIZE": 128, "BLOCK": 128}))
    for masked in (True, False):
        given = {"score": dtype, "live": "*i1" if masked else dtype, "out": "*fp32", "scale": "fp32"}
        cases.append((k._attention, given, {"MASKED": masked, "BLOCK": 1024}))
for heads in (32, 64):
    given = {"attention": "*fp32", "weight": "*fp32", "out": "*fp32"}
    cases.append((k._looked_at, given, {"ROWS": 4, "HEADS": heads, "BLOCK": 64}))
for number in (80, 90):
    for function, types, constants in cases:
        names = function.arg_names
        signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
        values = {(names.index(n),): v for n, v in constants.items()}
        made = compile(ASTSource(function, signature, values), target=GPUTarget("cuda", number, 32))
        assert made.asm["cubin"], function
print(2 * len(cases))
"""


def test_they_compile_for_a_gpu(tmp_path: Any) -> None:
    """The kernels compile to machine code of two GPU generations, which needs no GPU."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILE], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "36"
