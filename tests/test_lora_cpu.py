"""The CPU LoRA path on vLLM's real layers: grouped rows, real ranks, untouched base rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.lora import LoRAConfig
from vllm.distributed import (
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper import get_punica_wrapper
from vllm.lora.utils import from_layer
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.platforms import current_platform

from serve import lora_cpu, lora_delta

pytestmark = pytest.mark.arithmetic

INPUTS = 48
MAX_RANK = 16
TOKENS = 64
VOCAB = 96
BASE = 0  # vLLM's adapter id of base-model rows
IDS = (7, 8, 9)  # adapter ids in slots 0, 1 and 2
RANKS = {7: 2, 8: 16, 9: 5}

# kind -> (names of the packed modules, outputs per slice); q is wider than k and v
SHAPES: dict[str, tuple[list[str], tuple[int, ...]]] = {
    "qkv": (["q_proj", "k_proj", "v_proj"], (64, 16, 16)),
    "gate_up": (["gate_proj", "up_proj"], (40, 40)),
    "o": ([], (INPUTS,)),
    "replicated": ([], (24,)),
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}

Adapter = list[tuple[Tensor, Tensor] | None]  # per slice A [rank, inputs] and B [outputs, rank]


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tensor parallelism over one process, which vLLM's layers insist on, and our registration."""
    lora_cpu.register()
    store: Path = tmp_path_factory.mktemp("store") / "group"
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        initialize_model_parallel(1, 1)
        yield
        destroy_model_parallel()
        destroy_distributed_environment()


def base_layer(kind: str, dtype: torch.dtype) -> Any:
    shared: dict[str, Any] = {"bias": False, "params_dtype": dtype}
    _, widths = SHAPES[kind]
    layer: Any
    if kind == "qkv":
        layer = QKVParallelLinear(INPUTS, 16, 4, 1, **shared)
    elif kind == "gate_up":
        layer = MergedColumnParallelLinear(INPUTS, list(widths), **shared)
    elif kind == "o":
        layer = RowParallelLinear(INPUTS, widths[0], **shared)
    else:
        layer = ReplicatedLinear(INPUTS, widths[0], **shared)
    torch.manual_seed(len(kind))
    layer.weight.data.normal_(std=INPUTS**-0.5)
    return layer


def random_adapter(kind: str, rank: int, seed: int) -> Adapter:
    draw = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(rank, INPUTS, generator=draw) * INPUTS**-0.5,
            torch.randn(width, rank, generator=draw),
        )
        for width in SHAPES[kind][1]
    ]


@dataclass
class Bench:
    """One wrapped layer, its wrapper, and what it should compute."""

    kind: str
    layer: Any
    punica: Any
    weight: Tensor
    adapters: dict[int, Adapter]

    def load(self, adapter_id: int, adapter: Adapter) -> None:
        self.adapters[adapter_id] = adapter
        lora_a = [None if pair is None else pair[0] for pair in adapter]
        lora_b = [None if pair is None else pair[1] for pair in adapter]
        packed = len(adapter) > 1
        self.layer.set_lora(
            IDS.index(adapter_id), lora_a if packed else lora_a[0], lora_b if packed else lora_b[0]
        )

    def run(self, inputs: Tensor, ids: Sequence[int]) -> Tensor:
        mapping = LoRAMapping(tuple(ids), tuple(ids), is_prefill=True)
        self.punica.update_metadata(mapping, list(IDS), len(IDS) + 1, VOCAB)
        output: Tensor = self.layer(inputs)[0]
        return output

    def expected(self, inputs: Tensor, ids: Sequence[int]) -> Tensor:
        """Row by row in float32."""
        rows = [linear(row, self.weight) for row in inputs.float()]
        for row, inputs_row, adapter_id in zip(rows, inputs.float(), ids, strict=True):
            slices = row.split_with_sizes(SHAPES[self.kind][1])
            for part, pair in zip(slices, self.adapters.get(adapter_id, []), strict=False):
                if pair is not None:
                    part += pair[1] @ (pair[0] @ inputs_row)
        return torch.stack(rows)


def bench(kind: str, dtype: torch.dtype = torch.float32, *, native: bool = True) -> Bench:
    base = base_layer(kind, dtype)
    weight = base.weight.detach().float().clone()
    base.quant_method.process_weights_after_loading(base)
    config = LoRAConfig(max_lora_rank=MAX_RANK, max_loras=len(IDS), lora_dtype=dtype)
    layer: Any = from_layer(base, len(IDS), config, SHAPES[kind][0], None)
    punica: Any = get_punica_wrapper(TOKENS, max_batches=TOKENS, device="cpu", lora_config=config)
    layer.set_mapping(punica)
    if not native:
        punica.native_add = None  # as on a machine without a compiler
    made = Bench(kind, layer, punica, weight, {})
    for adapter_id, rank in RANKS.items():
        rounded = [
            (pair[0].to(dtype).float(), pair[1].to(dtype).float())
            for pair in random_adapter(kind, rank, adapter_id)
            if pair is not None
        ]
        made.load(adapter_id, list(rounded))
    return made


def tokens(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, INPUTS, generator=torch.Generator().manual_seed(count)).to(dtype)


MIXED = [BASE, 7, 7, 8, BASE, 9, 7, BASE, 8, 9]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("native", [True, False], ids=["c++", "torch"])
def test_mixed_batch_is_plain_float32_maths(kind: str, dtype: torch.dtype, *, native: bool) -> None:
    made, inputs = bench(kind, dtype, native=native), tokens(len(MIXED), dtype)
    output = made.run(inputs, MIXED)
    assert output.dtype is dtype
    error = (output.float() - made.expected(inputs, MIXED)).abs().max()
    assert error <= TOLERANCE[dtype] * output.abs().max()


@pytest.mark.parametrize("kind", SHAPES)
def test_mixed_batch_equals_separate_runs(kind: str) -> None:
    made, inputs = bench(kind), tokens(len(MIXED))
    together = made.run(inputs, MIXED)
    for adapter_id in (BASE, *IDS):
        rows = [row for row, used in enumerate(MIXED) if used == adapter_id]
        alone = made.run(inputs[rows], [adapter_id] * len(rows))
        torch.testing.assert_close(together[rows], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("native", [True, False], ids=["c++", "torch"])
def test_base_rows_are_untouched_to_the_bit(dtype: torch.dtype, *, native: bool) -> None:
    made, inputs = bench("qkv", dtype, native=native), tokens(len(MIXED), dtype)
    plain = made.layer.base_layer(inputs)[0]
    base_rows = [row for row, used in enumerate(MIXED) if used == BASE]
    assert torch.equal(made.run(inputs, MIXED)[base_rows], plain[base_rows])


def test_base_batch_after_an_adapter_batch_is_the_base_layer() -> None:
    made, inputs = bench("qkv"), tokens(4)
    plain = made.layer.base_layer(inputs)[0]
    assert not torch.equal(made.run(inputs, [7] * 4), plain)
    assert torch.equal(made.run(inputs, [BASE] * 4), plain)
    assert made.punica.idle


@cache
def shared_qkv(*, native: bool) -> Bench:
    return bench("qkv", native=native)


@settings(max_examples=60, deadline=None)
@given(
    ids=st.lists(st.sampled_from((BASE, *IDS)), min_size=1, max_size=TOKENS), native=st.booleans()
)
def test_any_mapping_is_plain_maths(ids: list[int], *, native: bool) -> None:
    made, inputs = shared_qkv(native=native), tokens(len(ids))
    torch.testing.assert_close(
        made.run(inputs, ids), made.expected(inputs, ids), atol=1e-5, rtol=1e-4
    )


NATIVE = pytest.mark.skipif(lora_delta.native() is None, reason="native kernels do not build")


@NATIVE
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@settings(max_examples=40, deadline=None)
@given(
    ids=st.lists(st.integers(0, 79), min_size=1, max_size=80, unique=True),
    ranks=st.lists(st.integers(0, 13), min_size=1, max_size=3).filter(any),
    inputs=st.integers(1, 40), threads=st.integers(1, 2),
)  # fmt: skip
def test_a_rows_delta_is_the_same_to_the_bit_whatever_shares_its_batch(
    dtype: torch.dtype, ids: list[int], ranks: list[int], inputs: int, threads: int
) -> None:
    add = lora_delta.native()
    assert add is not None
    draw = torch.Generator().manual_seed(len(ids))
    x = torch.randn(80, inputs, generator=draw).to(dtype)
    down = torch.randn(sum(ranks), inputs, generator=draw)
    ups = tuple(torch.randn(rank, 37, generator=draw) for rank in ranks)
    start = torch.randn(80, 37 * len(ranks), generator=draw).to(dtype)
    alone = start.clone()
    for row in range(80):
        add(alone, x, down, ups, torch.tensor([row]))
    together = start.clone()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    add(together, x, down, ups, torch.tensor(ids))
    torch.set_num_threads(before)
    assert torch.equal(together[ids], alone[ids])
    others = sorted(set(range(80)) - set(ids))
    assert torch.equal(together[others], start[others])


@given(slots=st.lists(st.integers(-1, 3), min_size=1, max_size=40), slices=st.booleans())
def test_groups_partition_the_rows_that_use_an_adapter(slots: list[int], *, slices: bool) -> None:
    seen = torch.full((len(slots),), -1)
    for each in lora_delta.group(torch.tensor(slots), slices=slices):
        assert slices or not isinstance(each.rows, slice)
        seen[slice(None) if each.rows is None else each.rows] = each.slot
    assert seen.tolist() == slots


def test_an_adapter_may_leave_slices_alone() -> None:
    made, inputs = bench("qkv"), tokens(6)
    q, _, v = random_adapter("qkv", 4, seed=1)
    made.load(8, [q, None, v])
    output = made.run(inputs, [8] * 6)
    torch.testing.assert_close(output, made.expected(inputs, [8] * 6), atol=1e-5, rtol=1e-4)
    assert torch.equal(output[:, 64:80], made.layer.base_layer(inputs)[0][:, 64:80])


def test_a_slot_costs_its_real_rank_not_the_padded_one() -> None:
    made = bench("qkv")
    kept = {slot: delta.ranks for slot, delta in made.layer._deltas.items()}
    assert kept == {0: (2, 2, 2), 1: (16, 16, 16), 2: (5, 5, 5)}


def test_a_replaced_slot_forgets_the_adapter_before() -> None:
    made, inputs = bench("qkv"), tokens(5)
    made.run(inputs, [7] * 5)
    made.load(7, random_adapter("qkv", 3, seed=99))
    expected = made.expected(inputs, [7] * 5)
    # The mapping has not changed, so vLLM does not announce it again.
    torch.testing.assert_close(made.layer(inputs)[0], expected, atol=1e-5, rtol=1e-4)
    made.layer.reset_lora(IDS.index(7))
    assert torch.equal(made.layer(inputs)[0], made.layer.base_layer(inputs)[0])


def test_a_batch_dimension_is_accepted() -> None:
    made, inputs = bench("gate_up"), tokens(6)
    ids = [7, BASE, 8, 8, 9, BASE]
    flat = made.run(inputs, ids)
    assert torch.equal(made.layer(inputs[None])[0][0], flat)


def test_a_layer_without_weight_still_takes_lora() -> None:
    base = base_layer("qkv", torch.float32)
    base.weight = None  # what vLLM leaves behind after packing int8 weights for oneDNN
    config = LoRAConfig(max_lora_rank=MAX_RANK, max_loras=1, lora_dtype=torch.float32)
    layer: Any = from_layer(base, 1, config, SHAPES["qkv"][0], None)
    assert layer.device == torch.device("cpu")


def test_unwrapped_punica_operation_agrees_with_the_layer() -> None:
    made, inputs = bench("qkv"), tokens(len(MIXED))
    expected = made.run(inputs, MIXED)
    output = made.layer.base_layer(inputs)[0]
    made.punica.add_lora_linear(
        output, inputs, made.layer.lora_a_stacked, made.layer.lora_b_stacked, 1.0, (64, 16, 16)
    )
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)


def test_logits_take_the_adapter_of_their_request() -> None:
    made, hidden = bench("o"), tokens(3)
    lora_a = torch.randn(len(IDS), 1, MAX_RANK, INPUTS)
    lora_b = torch.randn(len(IDS), 1, VOCAB, MAX_RANK)
    mapping = LoRAMapping((7,) * 5 + (BASE,) * 4 + (9,), (7, BASE, 9), is_prefill=True)
    made.punica.update_metadata(mapping, list(IDS), len(IDS) + 1, VOCAB)
    logits = torch.zeros(3, VOCAB + 32)  # vLLM pads the vocabulary
    made.punica.add_lora_logits(logits, hidden, lora_a, lora_b, 1.0)
    for row, slot in ((0, 0), (2, 2)):
        expected = lora_b[slot, 0] @ (lora_a[slot, 0] @ hidden[row])
        torch.testing.assert_close(logits[row, :VOCAB], expected, atol=1e-4, rtol=1e-4)
    assert not logits[1].any() and not logits[:, VOCAB:].any()


def test_embedding_adapters_change_only_their_rows() -> None:
    base = VocabParallelEmbedding(VOCAB, INPUTS, params_dtype=torch.float32)
    base.weight.data.normal_()
    config = LoRAConfig(max_lora_rank=MAX_RANK, max_loras=len(IDS), lora_dtype=torch.float32)
    layer: Any = from_layer(base, len(IDS), config, [], None)
    made = bench("o")
    layer.set_mapping(made.punica)
    lora_a, lora_b = torch.randn(4, VOCAB), torch.randn(INPUTS, 4)
    layer.set_lora(1, lora_a, lora_b)
    ids = torch.tensor([3, 90, 3, 90])
    mapping = LoRAMapping((BASE, 8, 8, BASE), (BASE,), is_prefill=True)
    made.punica.update_metadata(mapping, list(IDS), len(IDS) + 1, VOCAB)
    expected = base.weight[ids].clone()
    expected[1:3] += (lora_b @ lora_a[:, [90, 3]]).t()
    torch.testing.assert_close(layer(ids), expected, atol=1e-5, rtol=1e-5)
    made.run(tokens(1), [BASE])
    assert torch.equal(layer(ids), base.weight[ids])


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_what_is_not_finite_reaches_its_own_row_alone(dtype: torch.dtype, *, native: bool) -> None:
    made = bench("qkv", dtype, native=native)
    made.load(8, random_adapter("qkv", RANKS[8], seed=8))
    inputs = tokens(6).to(dtype)
    plain = made.run(inputs, [8] * 6)
    for stranger in (torch.nan, torch.inf):
        inputs[4, 47] = stranger
        got = made.run(inputs, [8] * 6)
        assert not got[4].isfinite().any()
        assert torch.equal(got.isnan(), made.expected(inputs, [8] * 6).isnan())
        assert torch.equal(got[:4], plain[:4]) and torch.equal(got[5], plain[5])


def test_registering_twice_changes_nothing() -> None:
    from vllm.lora import utils

    before = utils._all_lora_classes
    lora_cpu.register()
    assert utils._all_lora_classes is before
    assert current_platform.get_punica_wrapper() == lora_cpu.WRAPPER
