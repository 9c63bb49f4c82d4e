"""What LoRA costs on the CPU, per layer, against vLLM's own code.

One fused q,k,v projection; every figure is a ratio to the same layer without LoRA, measured
alternately in one process.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.lora import LoRAConfig
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.lora.layers import LoRAMapping, MergedQKVParallelLinearWithLoRA
from vllm.lora.punica_wrapper import get_punica_wrapper
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.lora.utils import from_layer
from vllm.model_executor.layers.linear import QKVParallelLinear

from serve import lora_cpu

HIDDEN, HEAD, HEADS, KV_HEADS = 2048, 64, 32, 8
MAX_RANK = 64
BATCHES = (1, 8, 64, 512)
RANKS = (8, 16, 64)
BASE, ADAPTER = 0, 1
REPEATS, SECONDS = 7, 0.02


@dataclass(frozen=True, slots=True)
class Wrapped:
    layer: Any
    punica: Any

    def load(self, rank: int) -> None:
        widths = (HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD)
        self.layer.set_lora(
            0,
            [torch.randn(rank, HIDDEN) for _ in widths],
            [torch.randn(width, rank) for width in widths],
        )

    def announce(self, ids: list[int]) -> None:
        mapping = LoRAMapping(tuple(ids), tuple(ids), is_prefill=True)
        self.punica.update_metadata(mapping, [ADAPTER], 2, 1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    with one_process(), torch.inference_mode():
        layers(getattr(torch, asked.dtype))


def layers(dtype: torch.dtype) -> None:
    base, ours, stock = build(dtype)
    print(f"{dtype}, {HIDDEN} -> q,k,v; times relative to the layer without LoRA")
    print("rows rank | no LoRA us | base rows: ours stock | adapter: ours stock | half: ours stock")
    for rows in BATCHES:
        inputs = torch.randn(rows, HIDDEN).to(dtype)
        for rank in RANKS:
            ours.load(rank)
            stock.load(rank)
            plain, ratios = measure(base, (ours, stock), inputs)
            shown = " | ".join(f"{a:6.2f} {b:7.2f}" for a, b in ratios)
            print(f"{rows:4} {rank:4} | {plain * 1e6:10.1f} | {shown}")


def measure(
    base: Any, wrapped: tuple[Wrapped, Wrapped], inputs: Tensor
) -> tuple[float, list[tuple[float, ...]]]:
    """Seconds of the plain layer; ratios (ours, stock) for base, adapter and mixed rows."""
    plain, ratios = [], []
    rows = len(inputs)
    for ids in ([BASE] * rows, [ADAPTER] * rows, [BASE, ADAPTER] * (rows // 2) or [ADAPTER]):
        for each in wrapped:
            each.announce(ids)
        calls = [lambda: base(inputs), *(lambda w=each: w.layer(inputs) for each in wrapped)]
        seconds = alternate(calls)
        plain.append(seconds[0])
        ratios.append(tuple(second / seconds[0] for second in seconds[1:]))
    return statistics.median(plain), ratios


def alternate(calls: list[Callable[[], object]]) -> list[float]:
    """Median seconds per call, the calls taking turns so that drift hits all alike."""
    counts = []
    for call in calls:
        call()
        began = time.perf_counter()
        call()
        counts.append(max(1, int(SECONDS / (time.perf_counter() - began))))
    samples: list[list[float]] = [[] for _ in calls]
    for _ in range(REPEATS):
        for call, count, into in zip(calls, counts, samples, strict=True):
            began = time.perf_counter()
            for _ in range(count):
                call()
            into.append((time.perf_counter() - began) / count)
    return [statistics.median(each) for each in samples]


def build(dtype: torch.dtype) -> tuple[Any, Wrapped, Wrapped]:
    base = QKVParallelLinear(HIDDEN, HEAD, HEADS, KV_HEADS, bias=False, params_dtype=dtype)
    base.weight.data.normal_(std=HIDDEN**-0.5)
    base.quant_method.process_weights_after_loading(base)
    config = LoRAConfig(max_lora_rank=MAX_RANK, max_loras=1, lora_dtype=dtype)
    stock = MergedQKVParallelLinearWithLoRA(base)
    stock.create_lora_weights(1, config)
    wide = max(BATCHES)
    stock_punica = PunicaWrapperCPU(wide, wide, "cpu")
    stock.set_mapping(stock_punica)
    lora_cpu.register()
    ours = from_layer(base, 1, config, ["q_proj", "k_proj", "v_proj"], None)
    punica = get_punica_wrapper(wide, max_batches=wide, device="cpu", lora_config=config)
    ours.set_mapping(punica)
    return base, Wrapped(ours, punica), Wrapped(stock, stock_punica)


@contextmanager
def one_process() -> Iterator[None]:
    """vLLM's layers insist on a tensor-parallel group, of one here."""
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{Path(folder) / 'store'}", 0, "gloo")
        initialize_model_parallel(1, 1)
        yield


if __name__ == "__main__":
    main()
