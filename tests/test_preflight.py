"""`solver.preflight`: what a run will take, counted from shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quant.solver import preflight
from quant.solver.preflight import ON_CPU, Allowed, Calibration, Operations, Places, Unit

GIVEN = Calibration(samples=32, length=512, width=2048)


def llama(hidden: int, inner: int, blocks: int = 2) -> dict[str, tuple[int, int]]:
    """Shapes of a model with a quarter as many heads for keys and values."""
    layers = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden // 4, hidden),
        "self_attn.v_proj": (hidden // 4, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    return {
        f"model.layers.{place}.{name}": shape
        for place in range(blocks)
        for name, shape in layers.items()
    }


def units(hidden: int = 2048, inner: int = 8192, blocks: int = 2) -> list[list[Unit]]:
    return preflight.units(llama(hidden, inner, blocks))


def test_layers_that_read_one_input_are_one_unit() -> None:
    assert units(64, 128) == [[Unit(96, 64), Unit(64, 64), Unit(256, 64), Unit(64, 128)]] * 2


def test_a_token_reaches_the_experts_that_are_chosen_for_it() -> None:
    shapes = {
        f"model.layers.0.mlp.experts.{place}.{leaf}": shape
        for place in range(8)
        for leaf, shape in (("gate_proj", (96, 64)), ("up_proj", (96, 64)), ("down_proj", (64, 96)))
    }
    (block,) = preflight.units(shapes, experts_per_token=2)
    assert block == [Unit(192, 64, 0.25), Unit(64, 96, 0.25)] * 8
    (everywhere,) = preflight.units(shapes, experts_per_token=8)
    some, all_of_them = (preflight.operations([units], GIVEN) for units in (block, everywhere))
    assert some.moments == all_of_them.moments / 4


def test_every_weight_meets_every_token_in_both_streams() -> None:
    short = replace(GIVEN, length=1)
    counted = preflight.operations(units(), short).forwards
    weights = sum(rows * columns for rows, columns in llama(2048, 8192).values())
    attention = 2 * 2 * short.tokens * short.width
    assert counted == 2 * short.tokens * weights + attention


def test_work_grows_with_blocks_tokens_and_length() -> None:
    once = preflight.operations(units(), GIVEN)
    assert preflight.operations(units(blocks=4), GIVEN).total == pytest.approx(2 * once.total)
    twice = preflight.operations(units(), replace(GIVEN, samples=64))
    assert twice.forwards == 2 * once.forwards and twice.moments == 2 * once.moments
    assert once.solving < twice.solving < 1.5 * once.solving  # hardly of tokens
    longer = preflight.operations(units(), replace(GIVEN, samples=16, length=1024))
    assert longer.forwards > once.forwards and longer.moments == once.moments


def test_memory_is_the_largest_blocks() -> None:
    small, large = units(1024, 4096, 1), units(2048, 8192, 1)
    assert preflight.memory([*small, *large, *small], GIVEN) == preflight.memory(large, GIVEN)
    assert preflight.memory(small, GIVEN) < preflight.memory(large, GIVEN)


def test_memory_does_not_depend_on_depth() -> None:
    assert preflight.memory(units(blocks=9), GIVEN) == preflight.memory(units(blocks=1), GIVEN)


def test_memory_grows_with_the_calibration_until_the_rest_waits_on_disk() -> None:
    small, given = units(576, 1536), replace(GIVEN, width=576)
    few, more, many, most = (replace(given, samples=count) for count in (4, 16, 256, 1024))
    assert preflight.memory(small, few) < preflight.memory(small, more)
    assert preflight.on_disk(small, more) == 0 < preflight.on_disk(small, many)
    a_stream = 2 * preflight.waiting(small, many) // many.streams  # with holes
    held = preflight.memory(small, many)
    assert ON_CPU.device - a_stream <= held <= ON_CPU.device
    assert held == preflight.memory(small, most)


def test_streams_wait_in_memory_while_there_is_room_then_on_the_host_then_on_disk() -> None:
    small, given = units(576, 1536), replace(GIVEN, samples=256, width=576)

    def places(device: int, host: int) -> Places:
        return preflight.places(small, replace(given, allowed=Allowed(device, host)))

    some = places(ON_CPU.device, 0)
    assert 0 < some.device < given.streams and sum(some) == given.streams
    assert places(10**12, 10**12) == (given.streams, 0, 0)
    assert places(0, 10**12) == (0, given.streams, 0)
    assert places(0, 0) == (0, 0, given.streams)
    apart = places(ON_CPU.device, preflight.waiting(small, given) // 4)
    assert apart == (some.device, given.streams // 4, some.disk - given.streams // 4)


def test_every_device_has_room_for_streams_of_its_own() -> None:
    given = replace(GIVEN, kind="cuda", samples=4096, allowed=Allowed(12 << 30))
    two = replace(given, devices=2)
    once, twice = (preflight.places(units(), each) for each in (given, two))
    assert 0 < 2 * once.device == twice.device < given.streams
    assert preflight.memory(units(), two) == preflight.memory(units(), given)
    few = replace(two, samples=64)
    assert preflight.places(units(), few).device == few.streams
    assert preflight.memory(units(), few) < preflight.memory(units(), replace(few, devices=1))


def test_a_large_block_leaves_no_room_for_what_waits() -> None:
    assert preflight.places(units(4096, 11_008), GIVEN) == (0, 0, GIVEN.streams)


def test_a_mixtures_memory_is_bounded_and_its_experts_outputs_lie_on_disk_too() -> None:
    many, most = (replace(GIVEN, samples=count) for count in (256, 1024))
    (dense,) = units(blocks=1)
    mixture = [*dense[:2], *(replace(unit, share=0.25) for unit in dense[2:] * 8)]  # two a token
    assert preflight.memory([mixture], many) == preflight.memory([mixture], most)
    more = preflight.on_disk([mixture], many) - preflight.on_disk([dense], many)
    assert more == 2 * 2 * many.states  # of two streams, two experts a token


def test_every_further_order_costs_the_same_solving_and_nothing_else() -> None:
    none, two, four = (preflight.operations(units(), GIVEN, refine) for refine in (0, 2, 4))
    assert (two.forwards, two.moments) == (none.forwards, none.moments)
    assert none.solving < two.solving and four.solving - two.solving == two.solving - none.solving


def test_speed_is_that_of_products_done() -> None:
    found = preflight.speed(torch.device("cpu"))
    assert 1e6 < found < 1e16  # a broken count of operations or of seconds is further off
    work = Operations(10**9, 10**9, 10**9)
    coarse = replace(GIVEN, dtype=torch.bfloat16)
    for given in (GIVEN, coarse, replace(coarse, kind="cuda")):
        once = preflight.seconds(work, found, given, found)
        assert once == pytest.approx(preflight.seconds(work, 2 * found, given, 2 * found) * 2)
    cheap, dear = (preflight.seconds(work, found, given, found) for given in (coarse, GIVEN))
    assert cheap < dear


def test_a_gpus_forwards_have_a_speed_of_their_own() -> None:
    work, given = Operations(3 * 10**9, 10**9, 10**9), replace(GIVEN, kind="cuda")
    slow, fast = (preflight.seconds(work, 1e9, given, speed) for speed in (1e9, 4e9))
    assert slow / fast == pytest.approx(5 / 2)


def test_states_of_sixteen_bits_take_half() -> None:
    coarse = replace(GIVEN, samples=1, dtype=torch.bfloat16)
    exact = replace(coarse, dtype=torch.float32)
    assert 2 * coarse.states == exact.states
    assert preflight.waiting(units(), exact) < 2 * preflight.waiting(units(), coarse)
    assert preflight.memory(units(), coarse) < preflight.memory(units(), exact)
