import math
import pickle
import re
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.distributions import Independent, OneHotCategorical, kl_divergence

from lightning_vae import free_bits, kl_balance, world_model_kl
from lightning_vae.callbacks import (
    ClassUsage,
    categorical_mutual_information,
    class_usage,
    dead_classes,
    perplexity,
    unimix,
)
from lightning_vae.callbacks.metrics import categorical
from lightning_vae.callbacks.reading.kl_rates import kl_per_dimension
from tests.processes import in_two_processes

GUIDE = Path(__file__).parents[3] / "docs" / "guides" / "collapse.md"
# Three observations, two groups, three classes: a rate of 0.54496 nats, of which 0.46164 are information.
LOGITS = torch.tensor(
    [[[1, 0, -1], [0.5, 0.5, 0]], [[-2, 1, 0], [0, 0, 0]], [[0, 0, 3], [1, -1, 0]]], dtype=torch.float64
)
PROBS = unimix(LOGITS.softmax(-1))
UNIFORM = OneHotCategorical(probs=torch.full((3,), 1 / 3).double())


def posteriors(observations, groups, classes, seed=0, sharpness=1.5):
    noise = torch.randn(
        observations, groups, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return (sharpness * noise).softmax(-1)


def enumerated(probs):
    """The mutual information by its definition, in plain Python: the sum over each joint class and observation."""
    total, rows = 0.0, probs.tolist()
    for classes in product(range(probs.shape[2]), repeat=probs.shape[1]):
        own = [math.prod(group[each] for group, each in zip(row, classes, strict=True)) for row in rows]
        mean = sum(own) / len(own)
        total += sum(each * math.log(each / mean) for each in own if each > 0) / len(own)
    return total


def test_rate_and_mutual_information_by_enumeration():
    rates = kl_per_dimension(OneHotCategorical(probs=PROBS), UNIFORM)
    by_hand = [[sum(p * math.log(3 * p) for p in group) for group in row] for row in PROBS.tolist()]
    torch.testing.assert_close(rates, torch.tensor(by_hand).double(), rtol=0, atol=1e-7)
    known = torch.tensor([[0.26051, 0.02374], [0.37520, 0.0], [0.71493, 0.26051]]).double()
    torch.testing.assert_close(rates, known, rtol=0, atol=1e-5)
    assert rates.sum(1).mean().item() == pytest.approx(0.54496, abs=1e-5)

    information, exact = categorical_mutual_information(PROBS)
    assert exact
    assert information.item() == pytest.approx(enumerated(PROBS), abs=1e-12)
    assert information.item() == pytest.approx(0.46164, abs=1e-5)
    # With one group the rate is the information and the KL of the usage.
    first = categorical_mutual_information(PROBS[:, :1]).mutual_information
    marginal = kl_per_dimension(OneHotCategorical(probs=class_usage(PROBS)), UNIFORM)
    assert (first + marginal[0]).item() == pytest.approx(rates[:, 0].mean().item(), abs=1e-12)


def test_free_nats_of_categorical_latents():
    posterior = OneHotCategorical(probs=PROBS)
    kl = kl_balance(posterior, UNIFORM)
    assert torch.equal(kl, kl_divergence(posterior, UNIFORM))
    assert free_bits(kl, 0.5, per="whole", average="sample").item() == pytest.approx(0.65848, abs=1e-5)
    assert free_bits(kl, 0.5, per="whole", average="batch").item() == pytest.approx(0.54496, abs=1e-5)
    assert free_bits(kl, 0.5, average="sample").item() == pytest.approx(1.07164, abs=1e-5)
    wrapped = Independent(posterior, 1), Independent(UNIFORM.expand((3, 2)), 1)
    assert world_model_kl(*wrapped, 1.0, 0.0, free_nats=0.5).mean().item() == pytest.approx(0.65848, abs=1e-5)


@pytest.mark.parametrize(("classes", "most"), [(3, 1.05394), (32, 3.37791)])
def test_unimix_bounds_the_rate_of_a_group(classes, most):
    certain = torch.eye(classes, dtype=torch.float64)[:1]
    mixed = unimix(certain)
    torch.testing.assert_close(mixed, 0.99 * certain + 0.01 / classes)
    uniform = OneHotCategorical(probs=torch.ones(classes).double())
    assert kl_divergence(OneHotCategorical(probs=mixed), uniform).item() == pytest.approx(most, abs=1e-5)
    assert unimix(torch.ones(2, 4)).dtype == torch.float32


@pytest.mark.parametrize(("groups", "classes"), [(1, 4096), (2, 5), (3, 4), (5, 2)])
def test_mutual_information_of_any_number_of_groups_by_enumeration(groups, classes):
    probs = posteriors(7, groups, classes)
    information, exact = categorical_mutual_information(probs)
    assert exact
    assert information.item() == pytest.approx(enumerated(probs), abs=1e-12)


def direct(probs, seed):
    """The estimate by its definition: each density by torch.distributions, and the control variate by hand."""
    noise = torch.empty(probs.shape, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(seed))
    posterior = Independent(OneHotCategorical(probs=probs), 1)
    sample = torch.nn.functional.one_hot((probs / noise).argmax(-1), probs.shape[-1]).double()
    own = posterior.log_prob(sample)
    terms = own - posterior.log_prob(sample[:, None]).logsumexp(1) + math.log(len(probs))
    control = own + posterior.entropy()
    slope = ((terms - terms.mean()) * control).mean() / control.square().mean()
    return terms.mean() - slope * control.mean()


def test_with_too_many_joint_classes_it_is_the_estimate():
    probs = posteriors(150, 5, 6)
    information, exact = categorical_mutual_information(probs, seed=3)
    assert not exact
    torch.testing.assert_close(information, direct(probs, 3), rtol=1e-9, atol=1e-9)


def test_the_estimate_is_unbiased_and_of_little_noise():
    probs = posteriors(500, 3, 6)
    estimates = torch.stack([categorical._sampled_information(probs, seed) for seed in range(30)])
    exact = categorical_mutual_information(probs).mutual_information
    assert estimates.std() < 0.015  # 0.007 measured
    assert estimates.mean().item() == pytest.approx(exact.item(), abs=0.005)


@pytest.mark.parametrize(("groups", "classes", "exact"), [(2, 8, True), (8, 8, False)])
def test_mutual_information_is_zero_at_collapse_and_log_m_where_nothing_overlaps(groups, classes, exact):
    collapsed = posteriors(1, groups, classes).expand(70, -1, -1)
    information = categorical_mutual_information(collapsed)
    assert information.exact is exact
    assert abs(information.mutual_information.item()) < 1e-12
    codes = torch.arange(64)[:, None] // classes ** torch.arange(groups).clamp(max=1)[None] % classes
    apart = torch.nn.functional.one_hot(codes, classes)  # 64 different codes
    assert categorical_mutual_information(apart).mutual_information.item() == pytest.approx(math.log(64), abs=1e-12)


def test_the_estimate_repeats_itself_and_leaves_the_global_seed_alone():
    before, probs = torch.get_rng_state(), posteriors(20, 8, 8)
    assert torch.equal(*[categorical_mutual_information(probs).mutual_information for _ in range(2)])
    assert torch.equal(torch.get_rng_state(), before)


def test_logits_are_as_good_as_probabilities():
    usage = class_usage(logits=LOGITS)
    torch.testing.assert_close(usage, LOGITS.softmax(-1).mean(0), rtol=1e-12, atol=0)
    both = categorical_mutual_information(LOGITS.softmax(-1)), categorical_mutual_information(logits=LOGITS + 5)
    torch.testing.assert_close(both[0].mutual_information, both[1].mutual_information, rtol=1e-12, atol=0)


def test_half_precision_is_normalised():
    probs = posteriors(50, 2, 32).bfloat16()
    torch.testing.assert_close(class_usage(probs).sum(-1), torch.ones(2).double(), rtol=1e-14, atol=0)
    collapsed = probs[:1].expand(20, -1, -1)
    assert abs(categorical_mutual_information(collapsed).mutual_information.item()) < 1e-12


def test_mutual_information_of_nothing_is_unknown():
    assert categorical_mutual_information(torch.empty(0, 2, 3)).mutual_information.isnan()
    assert categorical_mutual_information(torch.empty(0, 8, 8)).mutual_information.isnan()


def test_perplexity_counts_the_classes_in_use():
    usage = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.5, 0.0, 0.5, 0.0], [0.0, 0.0, 0.0, 1.0], [0.7, 0.1, 0.1, 0.1]])
    expected = torch.tensor([4.0, 2.0, 1.0, math.exp(-0.7 * math.log(0.7) - 0.3 * math.log(0.1))])
    torch.testing.assert_close(perplexity(usage), expected)


def test_dead_classes_are_used_less_than_a_hundredth_of_uniform():
    usage = torch.tensor([[0.9976, 0.0024, 0.0, 0.0], [0.9974, 0.0026, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]]).double()
    assert dead_classes(usage).tolist() == [3, 2, 0]
    assert dead_classes(usage, threshold=0.02).tolist() == [3, 3, 0]
    assert dead_classes(usage, threshold=1.0).tolist() == [3, 3, 0]


def test_the_uniform_share_hides_no_dead_class():
    certain = torch.eye(4)[[0, 1, 1]][:, None]  # two of four classes are never used
    usage = class_usage(unimix(certain, share=0.02))
    assert dead_classes(usage).tolist() == [0]
    assert dead_classes(usage, share=0.02).tolist() == [2]
    assert dead_classes(class_usage(unimix(certain)), share=0.01).tolist() == [2]


@pytest.mark.parametrize("sizes", [(100,), (30, 70), (1,) * 100, (0, 17, 0, 83)])
def test_a_stream_has_the_same_usage_for_any_batches(sizes):
    probs = posteriors(100, 3, 4)
    metric = ClassUsage(groups=3, classes=4)
    for batch in probs.split(sizes):
        metric.update(batch)
    assert metric.count == 100
    torch.testing.assert_close(metric.compute(), class_usage(probs), rtol=1e-13, atol=0)
    torch.testing.assert_close(perplexity(metric.compute()), perplexity(class_usage(probs)))


def test_forward_merge_pickle_and_reset():
    probs = posteriors(100, 3, 4)
    left, right = ClassUsage(groups=3, classes=4), ClassUsage(groups=3, classes=4)
    torch.testing.assert_close(left(probs[:10]), class_usage(probs[:10]), rtol=1e-13, atol=0)
    torch.testing.assert_close(left(logits=probs[10:30].log()), class_usage(probs[10:30]), rtol=1e-12, atol=0)
    right.update(probs[30:])
    left.merge_state(right)
    torch.testing.assert_close(left.compute(), class_usage(probs), rtol=1e-12, atol=0)
    assert torch.equal(pickle.loads(pickle.dumps(left)).compute(), left.compute())
    left.reset()
    assert left.count == 0


def test_a_stream_of_nothing_has_no_usage():
    metric = ClassUsage(groups=1, classes=2)
    metric.update(torch.empty(0, 1, 2))
    assert metric.compute().isnan().all()


def share(rank: int, folder: Path) -> None:
    probs = posteriors(100, 3, 4)
    uneven, lopsided = ClassUsage(3, 4), ClassUsage(3, 4)
    uneven.update(probs[:30] if rank == 0 else probs[30:])
    lopsided.update(probs if rank == 0 else probs[:0])
    torch.save([uneven.compute(), lopsided.compute()], folder / f"{rank}.pt")


def test_two_processes_equal_one(tmp_path):
    in_two_processes(share, tmp_path)
    for rank in range(2):
        for usage in torch.load(tmp_path / f"{rank}.pt"):
            torch.testing.assert_close(usage, class_usage(posteriors(100, 3, 4)), rtol=1e-13, atol=0)


def test_a_stream_of_logits_for_probabilities_is_refused_on_reading():
    metric = ClassUsage(groups=2, classes=3)
    metric.update(LOGITS)
    with pytest.raises(ValueError, match=r"`probs` must give probabilities .* Logits go to `logits=`"):
        metric.compute()


SHAPE = r"must have shape \(M, groups, classes\), with at least two classes, got"
REFUSALS = {
    "two axes": (lambda: class_usage(torch.ones(4, 3) / 3), rf"`probs` {SHAPE} \(4, 3\).*`\[:, None\]`"),
    "four axes": (lambda: class_usage(logits=torch.ones(4, 3, 2, 2)), rf"`logits` {SHAPE} .*`flatten\(0, 1\)`"),
    "one class": (lambda: categorical_mutual_information(torch.ones(4, 3, 1)), SHAPE),
    "no group": (lambda: categorical_mutual_information(torch.ones(4, 0, 3)), SHAPE),
    "no observation": (lambda: class_usage(torch.ones(0, 2, 3)), "needs observations"),
    "both": (lambda: class_usage(PROBS, LOGITS), "not both"),
    "neither": (lambda: categorical_mutual_information(), "got neither"),
    "logits for probabilities": (lambda: class_usage(LOGITS), "`probs` must give .*`logits=`"),
    "counts": (lambda: categorical_mutual_information(torch.ones(4, 2, 3)), "off by 2"),
    "a negative probability": (lambda: class_usage(torch.tensor([[[1.5, -0.5]]])), "values down to -0.5"),
    "NaN": (lambda: class_usage(torch.full((4, 2, 3), torch.nan)), "`probs` must"),
    "NaN logits": (lambda: class_usage(logits=torch.full((4, 2, 3), torch.nan)), "`logits` must"),
    "the perplexity of posteriors": (lambda: perplexity(PROBS), r"`usage` must have shape \(groups, classes\)"),
    "the perplexity of counts": (lambda: perplexity(torch.ones(2, 3)), "`usage` must give"),
    "dead classes of posteriors": (lambda: dead_classes(PROBS), r"`usage` must have shape"),
    "a negative threshold": (lambda: dead_classes(PROBS[0], threshold=-1), "`threshold` must be at least 0, got -1"),
    "nothing but the uniform share": (lambda: dead_classes(PROBS[0], share=1.0), "`share` must be from 0 to below 1"),
    "a share above 1": (lambda: unimix(PROBS, share=1.5), "`share` must be from 0 to 1, got 1.5"),
    "a share below 0": (lambda: unimix(PROBS, share=-0.5), "`share` must be from 0 to 1, got -0.5"),
    "no groups": (lambda: ClassUsage(0, 3), "`groups` must be at least 1, got 0"),
    "one class of a stream": (lambda: ClassUsage(2, 1), "`classes` must be at least 2, got 1"),
    "groups of another number": (lambda: ClassUsage(1, 3).update(PROBS), r"shape \(N, 1, 3\), got \(3, 2, 3\)"),
    "one group for all": (lambda: ClassUsage(2, 3).update(PROBS[:, :1]), r"shape \(N, 2, 3\), got \(3, 1, 3\)"),
}


@pytest.mark.parametrize(("call", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_guides_example_runs():
    section = GUIDE.read_text(encoding="utf-8").partition("## Categorical latents")[2].partition("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    namespace = {}
    exec(block, namespace)
    assert namespace["usage"].shape == (4, 8)
    assert namespace["dead"].tolist() == [2] * 4
    assert namespace["information"].exact
