"""The losses beside their formulae, and laws over the table."""

import math

import pytest
import torch
import torch.nn.functional as F

from augment import UserError
from augment.core.registry import make
from augment.training.models.losses import LDAM, LOSSES, class_weights, cost, log_others, smooth

COUNTS = [500, 60, 7, 1]


def softmax(z):
    top = max(z)
    powers = [math.exp(x - top) for x in z]
    return [power / sum(powers) for power in powers]


def cross_entropy(z, y):
    return -math.log(softmax(z)[y])


def slow_cross_entropy(z, n, y):
    return cross_entropy(z, y)


def slow_balanced_softmax(z, n, y):
    weighed = [count * math.exp(x) for x, count in zip(z, n, strict=True)]
    return -math.log(weighed[y] / sum(weighed))


def slow_logit_adjustment(z, n, y, tau=1.0):
    return cross_entropy(
        [x + tau * math.log(count / sum(n)) for x, count in zip(z, n, strict=True)], y
    )


def slow_ldam(z, n, y, max_margin=0.5, scale=30.0):
    margins = [count**-0.25 for count in n]
    margins = [margin * max_margin / max(margins) for margin in margins]
    z = [x - margins[k] if k == y else x for k, x in enumerate(z)]
    return cross_entropy([scale * x for x in z], y)


def slow_class_balanced(z, n, y, beta=0.9999):
    weights = [(1 - beta) / (1 - beta**count) for count in n]
    return weights[y] * len(n) / sum(weights) * cross_entropy(z, y)


def slow_focal(z, n, y, gamma=2.0):
    p = softmax(z)[y]
    return -((1 - p) ** gamma) * math.log(p)


CASES = [
    ("cross_entropy", {}, slow_cross_entropy),
    ("balanced_softmax", {}, slow_balanced_softmax),
    ("logit_adjustment", {}, slow_logit_adjustment),
    ("logit_adjustment", {"tau": 1.7}, slow_logit_adjustment),
    ("ldam", {}, slow_ldam),
    ("ldam", {"max_margin": 0.2, "scale": 5.0}, slow_ldam),
    ("class_balanced", {}, slow_class_balanced),
    ("class_balanced", {"beta": 0.9}, slow_class_balanced),
    ("class_balanced", {"beta": 0.0}, slow_class_balanced),
    ("focal", {}, slow_focal),
    ("focal", {"gamma": 0.5}, slow_focal),
    ("focal", {"gamma": 0.0}, slow_focal),
]
every_loss = pytest.mark.parametrize("name", LOSSES)


def draw(n=16, k=4, dtype=torch.float64, spread=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, k, generator=generator, dtype=dtype) * spread
    return logits, torch.randint(k, (n,), generator=generator)


@pytest.mark.parametrize(("name", "options", "slow"), CASES)
def test_a_loss_is_its_formula(name, options, slow):
    logits, _ = draw()
    table = LOSSES[name](**options)(logits, torch.tensor(COUNTS))
    expected = [[slow(z, COUNTS, y, **options) for y in range(4)] for z in logits.tolist()]
    torch.testing.assert_close(
        table, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-12
    )


def test_every_loss_has_a_formula():
    assert {name for name, _, _ in CASES} == LOSSES.keys()


@pytest.mark.parametrize("amount", [0.0, 0.1, 1.0])
def test_cross_entropy_is_that_of_torch(amount):
    logits, labels = draw()
    ours = cost(LOSSES["cross_entropy"]()(logits, torch.ones(4)), smooth(labels, 4, amount))
    expected = F.cross_entropy(logits, labels, reduction="none", label_smoothing=amount)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    shares = logits.softmax(-1)
    ours = cost(LOSSES["cross_entropy"]()(logits, torch.ones(4)), smooth(shares, 4, amount))
    expected = F.cross_entropy(logits, shares, reduction="none", label_smoothing=amount)
    torch.testing.assert_close(ours, expected)


@every_loss
def test_a_soft_label_costs_the_mixture(name):
    logits, labels = draw()
    table = LOSSES[name]()(logits, torch.tensor(COUNTS))
    other, share = labels.roll(1), 0.3
    mixed = share * F.one_hot(labels, 4).double() + (1 - share) * F.one_hot(other, 4).double()
    parts = share * cost(table, labels) + (1 - share) * cost(table, other)
    torch.testing.assert_close(cost(table, mixed), parts)
    torch.testing.assert_close(cost(table, smooth(labels, 4).double()), cost(table, labels))


@every_loss
@pytest.mark.parametrize("spread", [1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_costs_and_gradients_are_finite_and_no_cost_is_negative(name, spread, dtype):
    logits = torch.eye(4, dtype=dtype) * spread * 2 - spread
    logits = torch.cat([logits, -logits, torch.zeros(1, 4, dtype=dtype)]).requires_grad_()
    counts = torch.tensor([10_000_000, 60, 1, 0])
    table = LOSSES[name]()(logits, counts)
    assert table.dtype == torch.promote_types(dtype, torch.float32)
    assert table.isfinite().all() and (table >= 0).all()
    table.sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


@every_loss
def test_the_gradient_is_that_of_differences(name):
    logits = draw(3)[0].requires_grad_()
    counts = torch.tensor(COUNTS)
    assert torch.autograd.gradcheck(lambda z: LOSSES[name]()(z, counts), logits)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_the_focal_gradient_is_finite_where_the_truth_is_certain(gamma):
    logits = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    LOSSES["focal"](gamma=gamma)(logits, torch.ones(3)).sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


def test_ldam_is_exact_in_single_precision_where_the_truth_is_certain():
    logits = torch.tensor([[1.0, -1.0, -1.0, -1.0], [1.0, 0.5, 0.9, -1.0]])
    counts, ldam = torch.tensor([1, 60, 7, 500]), LDAM(scale=64.0)
    exact = ldam(logits.double(), counts)
    torch.testing.assert_close(ldam(logits, counts).double(), exact, rtol=1e-4, atol=1e-12)


def test_the_sum_over_the_others_is_that_of_a_loop():
    logits, _ = draw(spread=10.0)
    logits[0] = 1.0  # a tie
    rows = logits.tolist()
    expected = [
        [math.log(sum(math.exp(x) for j, x in enumerate(z) if j != k)) for k in range(4)]
        for z in rows
    ]
    torch.testing.assert_close(log_others(logits), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("name", ["balanced_softmax", "logit_adjustment", "class_balanced"])
def test_equal_counts_leave_cross_entropy(name):
    logits, _ = draw()
    plain = LOSSES["cross_entropy"]()(logits, torch.ones(4))
    equal = LOSSES[name]()(logits, torch.full((4,), 37))
    torch.testing.assert_close(equal, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("logit_adjustment", {"tau": 0.0}),
        ("focal", {"gamma": 0.0}),
        ("class_balanced", {"beta": 0.0}),
        ("ldam", {"max_margin": 0.0, "scale": 1.0}),
    ],
)
def test_an_option_of_none_leaves_cross_entropy(name, options):
    logits, _ = draw()
    plain = LOSSES["cross_entropy"]()(logits, torch.ones(4))
    torch.testing.assert_close(LOSSES[name](**options)(logits, torch.tensor(COUNTS)), plain)


def test_balanced_softmax_is_logit_adjustment():
    logits, _ = draw()
    pair = [
        LOSSES[n]()(logits, torch.tensor(COUNTS)) for n in LOSSES if "_softmax" in n or "_adj" in n
    ]
    torch.testing.assert_close(*pair)


@every_loss
def test_a_class_without_images_counts_as_one_of_one(name):
    logits, _ = draw()
    none, one = (LOSSES[name]()(logits, torch.tensor([500, 60, 7, n])) for n in (0, 1))
    torch.testing.assert_close(none, one)


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.9999, 1 - 1e-12])
def test_weights_sum_to_the_classes_and_fall_with_the_count(beta):
    weights = class_weights(torch.tensor(COUNTS), beta)
    assert weights.sum().item() == pytest.approx(4)
    assert (weights.diff() >= 0).all()
    if beta > 0.99999:
        inverse = 1 / torch.tensor(COUNTS).float()
        torch.testing.assert_close(weights, inverse * 4 / inverse.sum())


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("hinge", {}, "loss out of cross_entropy"),
        ("focal", {"tau": 1.0}, "settings of focal out of gamma"),
        ("cross_entropy", {"tau": 1.0}, "no settings, got 'tau'; cross_entropy"),
        ("focal", {"gamma": -1.0}, "gamma ≥ 0"),
        ("ldam", {"scale": 0.0}, "scale > 0"),
        ("ldam", {"max_margin": -0.1}, "max_margin ≥ 0"),
        ("class_balanced", {"beta": 1.0}, "beta < 1"),
        ("logit_adjustment", {"tau": math.nan}, "tau of logit_adjustment as float, got nan"),
    ],
)
def test_a_wrong_loss_is_one_sentence(name, options, words):
    with pytest.raises(UserError, match=rf"^expected .*{words}"):
        make(LOSSES, name, options, "loss")


def test_too_much_smoothing_is_refused():
    with pytest.raises(UserError, match="label smoothing"):
        smooth(torch.tensor([0]), 2, 1.1)
