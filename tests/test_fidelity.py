"""`proof.fidelity`: every figure against a slow reference, on models that differ by known noise."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from quant.errors import CompareError
from quant.proof import fidelity
from quant.proof.evidence import TextFidelity
from quant.proof.fidelity import Pair, Picks, Question, Quiz, Sample, Trace
from tests import tiny

pytestmark = pytest.mark.arithmetic

DIGEST = "d" * 64


def silent(_done: int, _total: int) -> None:
    """Tells nobody."""


@pytest.fixture(scope="module")
def parent() -> PreTrainedModel:
    return tiny.model()


def noisy(amount: float) -> PreTrainedModel:
    """The parent with noise of `amount` on every matrix."""
    model = tiny.model()
    torch.manual_seed(7)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.add_(torch.randn_like(weight), alpha=amount)
    return model


@pytest.fixture(scope="module")
def pair(parent: PreTrainedModel) -> Pair:
    return Pair(parent, noisy(0.02))


def windows(count: int = 4, length: int = 90, seed: int = 0) -> tuple[Tensor, ...]:
    """Of unequal lengths, none a multiple of the chunk that is compared at once."""
    draw = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randint(4, tiny.VOCAB, (length - 13 * (place % 3),), generator=draw)
        for place in range(count)
    )


def measured(pair: Pair, texts: tuple[Tensor, ...], seed: int = 0) -> TextFidelity:
    return fidelity.of_text(
        fidelity.trace(pair, texts, silent), Sample("noise", DIGEST, texts), seed
    )


def test_a_model_is_at_no_distance_from_itself(parent: PreTrainedModel) -> None:
    found = measured(Pair(parent, tiny.model()), windows())
    assert found.mean_kl.value == found.p99_kl.high == 0
    assert found.top1_agreement.low == found.top1_agreement.value == 1
    assert found.mean_shift.value == found.rms_shift.value == 0
    assert found.perplexity_ratio.low == found.perplexity_ratio.high == 1


@torch.no_grad()
def slow(pair: Pair, texts: tuple[Tensor, ...]) -> dict[str, list[float]]:
    """Token by token, in Python floats."""
    out: dict[str, list[float]] = {"before": [], "after": [], "kl": [], "agrees": []}
    for ids in texts:
        both = [m(input_ids=ids[None]).logits[0].tolist() for m in (pair.parent, pair.quantized)]
        for place, target in enumerate(ids[1:].tolist()):
            p, q = (softmax(rows[place]) for rows in both)
            out["before"].append(-math.log(p[target]))
            out["after"].append(-math.log(q[target]))
            out["kl"].append(sum(x * math.log(x / y) for x, y in zip(p, q, strict=True)))
            out["agrees"].append(float(p.index(max(p)) == q.index(max(q))))
    return out


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(value - max(row)) for value in row]
    return [power / sum(powers) for power in powers]


def test_every_prediction_is_the_slow_references(pair: Pair) -> None:
    texts = windows(count=2, length=70)
    found, expected = fidelity.trace(pair, texts, silent), slow(pair, texts)
    for name in ("before", "after", "kl", "agrees"):
        given = getattr(found, name).double().numpy()
        np.testing.assert_allclose(given, expected[name], rtol=1e-4, atol=1e-6, err_msg=name)
    assert found.window.tolist() == [0] * 69 + [1] * 56


def test_figures_are_what_their_names_say(pair: Pair) -> None:
    texts = windows()
    found, seen = measured(pair, texts), slow(pair, texts)
    before, after, kl, agrees = (np.array(column) for column in seen.values())
    shift = np.exp(-after) - np.exp(-before)
    expected = {
        "parent_perplexity": np.exp(before.mean()),
        "perplexity": np.exp(after.mean()),
        "perplexity_ratio": np.exp(after.mean() - before.mean()),
        "mean_kl": kl.mean(),
        "p99_kl": np.quantile(kl, 0.99, method="inverted_cdf"),
        "top1_agreement": agrees.mean(),
        "mean_shift": shift.mean(),
        "rms_shift": np.sqrt(np.square(shift).mean()),
    }
    for name, value in expected.items():
        estimate = getattr(found, name)
        assert estimate.value == pytest.approx(value, rel=1e-3, abs=1e-6), name
        assert estimate.low <= estimate.value <= estimate.high, name
    assert (found.windows, found.predictions) == (len(texts), len(kl))


def test_perplexity_is_transformers_own_loss(parent: PreTrainedModel) -> None:
    [text] = windows(count=1)
    with torch.no_grad():
        loss = float(parent(input_ids=text[None], labels=text[None]).loss)
    found = measured(Pair(parent, parent), (text,))
    assert found.parent_perplexity.value == pytest.approx(math.exp(loss), rel=1e-5)


def test_more_noise_is_more_distance(parent: PreTrainedModel) -> None:
    found = [measured(Pair(parent, noisy(a)), windows()).mean_kl for a in (1e-3, 1e-2, 0.1)]
    assert found[0].high < found[1].low and found[1].high < found[2].low


def test_intervals_shrink_with_more_windows(pair: Pair) -> None:
    few, many = (measured(pair, windows(count, length=32)).mean_kl for count in (6, 60))
    assert few.low < few.value < few.high
    assert many.high - many.low < 0.5 * (few.high - few.low)


def test_pairing_narrows_the_ratio(pair: Pair) -> None:
    """Windows differ far more from each other than the two models do on one of them."""
    found = measured(pair, windows(16, length=40))
    alone = found.perplexity.high / found.perplexity.low
    assert found.perplexity_ratio.high / found.perplexity_ratio.low < alone


def test_progress_counts_windows(pair: Pair) -> None:
    told: list[tuple[int, int]] = []
    fidelity.trace(pair, windows(count=3), lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("broken", ["parent", "artifact"])
def test_a_model_without_numbers_is_refused(parent: PreTrainedModel, broken: str) -> None:
    wrong = tiny.model()
    with torch.no_grad():
        wrong.lm_head.weight[5, 0] = math.nan
    pair = Pair(wrong, parent) if broken == "parent" else Pair(parent, wrong)
    with pytest.raises(CompareError, match=f"the {broken} computes logits that are not finite"):
        fidelity.trace(pair, windows(count=1), silent)


def test_the_pick_is_the_likeliest_choice_per_token(pair: Pair) -> None:
    draw = random.Random(0)
    questions = [
        Question((5, 6, 7), tuple(tuple(draw.choices(range(4, 300), k=n)) for n in (1, 3, 2)), 0)
        for _ in range(12)
    ]
    found = fidelity.picks(pair, questions, silent)
    for model, picked in ((pair.parent, found.before), (pair.quantized, found.after)):
        assert picked.tolist() == [likeliest(model, question) for question in questions]
    assert len(set(found.before.tolist())) > 1, "one choice always wins: the test shows nothing"


@torch.no_grad()
def likeliest(model: PreTrainedModel, question: Question) -> int:
    """By transformers' own loss, the question's tokens left out of it."""
    losses = []
    for choice in question.choices:
        ids = torch.tensor([[*question.asked, *choice]])
        labels = ids.clone()
        labels[:, : len(question.asked)] = -100
        losses.append(float(model(input_ids=ids, labels=labels).loss))
    return losses.index(min(losses))


def test_flips_are_counted_both_ways() -> None:
    before, after, right = (
        torch.tensor(row) for row in ([0, 0, 1, 2, 1, 0, 3, 1], [0, 1, 1, 1, 0, 0, 0, 2], [0] * 8)
    )
    right[6] = 0
    found = fidelity.of_choices(
        Picks(before, after, right), Quiz("q", DIGEST, (Question((1,), ((2,), (3,)), 0),) * 8), 0
    )
    # Right before: 0, 1 and 5. Right after: 0, 4, 5 and 6. Changed: 1, 3, 4, 6 and 7.
    assert found.parent_accuracy.value == 3 / 8 and found.accuracy.value == 4 / 8
    assert found.right_to_wrong.value == 1 / 8 and found.wrong_to_right.value == 2 / 8
    assert found.flips.value == 5 / 8 and found.flips.low < 5 / 8 < found.flips.high
    assert found.questions == 8


def test_a_trace_of_one_window_has_intervals_without_width() -> None:
    before, after, kl = torch.rand(3, 4, dtype=torch.float64)
    agrees = torch.tensor([True, False, True, True])
    trace = Trace(torch.zeros(4, dtype=torch.int64), before, after, kl, agrees)
    found = fidelity.of_text(trace, Sample("one", DIGEST, (torch.arange(5),)), 0)
    assert found.mean_kl.low == pytest.approx(found.mean_kl.high)
    assert found.top1_agreement.value == 0.75
