"""What an encoder may return, and what the heads make of it."""

import copy
import functools
import itertools
import math
import pickle
from collections import UserList

import numpy as np
import pytest
import torch
from torch import distributions as td
from torch import nn

from lightning_vae import (
    BatchNormMeans,
    CategoricalGroups,
    DiagonalGaussian,
    FullCovariance,
    PosteriorHead,
    StandardNormal,
    UniformCategorical,
    free_bits,
    rate_parts,
)
from lightning_vae.posteriors import posterior_of
from tests.image_vae import LaplaceEncoder, OwnEncoder, images, small


@pytest.mark.parametrize("encoder", [None, OwnEncoder, LaplaceEncoder, functools.partial(OwnEncoder, width=4)])
def test_an_encoder_may_return_a_pair_a_tensor_or_a_distribution(encoder):
    vae = small(encoder=encoder)
    posterior = vae.encode(images(5))
    assert posterior.batch_shape == (5, 3)
    assert vae.elbo_terms(images(5)).rate_per_dimension.shape == (5, 3)
    if isinstance(posterior, td.Laplace):  # no closed form: the same sample's estimate
        terms = vae.elbo_terms(images(5), torch.arange(5))
        assert terms.rate_per_dimension.isfinite().all()


class IndependentEncoder(LaplaceEncoder):
    def forward(self, x):
        return td.Independent(super().forward(x), 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": lambda shape, k: OwnEncoder(shape, 1)}, r"`encoder` must give .* \(5, 3\) each.*got \(5, 1\)"),
        ({"encoder": lambda shape, k: IndependentEncoder(shape, k)}, r"`encoder` must give .* no event shape.*\(3,\)"),
    ],
)
def test_posteriors_of_another_shape_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options).elbo_terms(images(5))


@pytest.mark.parametrize(
    ("output", "got"),
    [
        ((torch.zeros(5, 3), torch.zeros(3)), r"\(5, 3\) and \(3,\)"),
        ((torch.zeros(5, 3), torch.zeros(1, 3)), r"\(5, 3\) and \(1, 3\)"),
        ((torch.zeros(5, 3), torch.zeros(5, 1)), r"\(5, 3\) and \(5, 1\)"),
        ((torch.zeros(1, 3), torch.zeros(5, 3)), r"\(1, 3\) and \(5, 3\)"),
        ((torch.zeros(5, 3),) * 3, r"\(5, 3\) and \(5, 3\) and \(5, 3\)"),
        (torch.zeros(5, 1), r"\(5, 1\)"),
        (torch.zeros(5, 5), r"\(5, 3\) and \(5, 2\)"),
        (torch.tensor(1.0), "Tensor"),
        ({"mean": 1}, "dict"),
        (None, "NoneType"),
    ],
)
def test_parameters_that_would_be_shared_are_refused(output, got):
    with pytest.raises(ValueError, match=rf"`encoder` must give .* \(5, 3\) each.*got {got}\."):
        posterior_of(output, 5, 3)


def test_any_sequence_is_a_pair():
    posterior = posterior_of(UserList([torch.ones(5, 3), torch.zeros(5, 3)]), 5, 3)
    assert torch.equal(posterior.mean, torch.ones(5, 3))


# ---- heads

HEADS = {
    "diagonal": DiagonalGaussian,
    "bounded": functools.partial(DiagonalGaussian, bound=2.0),
    "batch_norm": BatchNormMeans,
    "full": FullCovariance,
    "categories": functools.partial(CategoricalGroups, classes=3),
}


def outputs(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_diagonal_gaussian_is_what_an_encoders_output_means_without_a_head():
    output, head = outputs(5, 6), DiagonalGaussian(3)
    expected = posterior_of(output, 5, 3)
    for given in (output, (output[:, :3], output[:, 3:]), UserList(output.split([1, 5], dim=1))):
        posterior = head(given)
        assert torch.equal(posterior.loc, expected.loc)
        assert torch.equal(posterior.scale, expected.scale)


def test_a_bound_holds_the_log_variance_and_leaves_a_gradient():
    output = torch.tensor([[0, -100], [0, -2], [0, 0.01], [0, 3]], dtype=torch.float64, requires_grad=True)
    log_variance = 2 * DiagonalGaussian(1, bound=2.0)(output).scale.log()
    expected = [-2.0, -2 * math.tanh(1), 2 * math.tanh(0.005), 2 * math.tanh(1.5)]
    assert log_variance[:, 0].tolist() == pytest.approx(expected, abs=1e-12)
    log_variance.sum().backward()
    assert (output.grad[1:, 1] > 0).all()
    assert output.grad[2, 1] == pytest.approx(1, abs=1e-4)


def test_batch_normalised_means_have_the_rate_and_the_bound_in_closed_form():
    h = np.random.default_rng(1).standard_normal((6, 3)) * [1, 0.01, 2]
    log_variance = np.random.default_rng(2).standard_normal((6, 3)) * 0.3 - 1
    gamma, shift = 0.5, np.array([0.1, -0.2, 0.3])
    head = BatchNormMeans(3, gamma).double()
    assert [name for name, _ in head.named_parameters()] == ["shift"]  # gamma is fixed
    with torch.no_grad():
        head.shift.copy_(torch.from_numpy(shift))
    output = torch.from_numpy(np.hstack([h, log_variance]))
    rates = rate_parts(head(output), StandardNormal(3).double()()).mean(0).detach()
    assert rates.tolist() == pytest.approx([0.37748, 0.24873, 0.34853], abs=5e-6)

    squares = gamma**2 * h.var(0) / (h.var(0) + 1e-5) + shift**2
    assert squares / 2 == pytest.approx([0.13, 0.0994, 0.17], abs=5e-6)
    others = (np.exp(log_variance) - log_variance - 1).mean(0)
    np.testing.assert_allclose(rates, 0.5 * (squares + others), rtol=1e-12)

    head.normalise.momentum = 1.0
    head(output)
    mean = head.eval()(output).loc.detach().numpy()  # the running variance is the unbiased one
    expected = gamma * (h - h.mean(0)) / np.sqrt(h.var(0, ddof=1) + 1e-5) + shift
    np.testing.assert_allclose(mean, expected, rtol=1e-10)


def test_a_batch_of_one_has_no_statistics():
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        BatchNormMeans(3)(torch.zeros(1, 6))


def test_a_full_covariance_is_that_of_its_cholesky_factor():
    head = FullCovariance(3)
    assert head.outputs == 3 + 3 * 4 // 2
    output = outputs(5, 9)
    posterior = head(output)
    assert (posterior.batch_shape, posterior.event_shape) == ((5,), (3,))
    mean, log_variance, below = output.split([3, 3, 3], dim=1)
    assert torch.equal(posterior.mean, mean)
    for row in range(5):
        factor = np.diag(np.exp(0.5 * log_variance[row].numpy()))
        factor[1, 0], factor[2, 0], factor[2, 1] = below[row].tolist()
        np.testing.assert_allclose(posterior.covariance_matrix[row], factor @ factor.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k", [1, 4])
def test_a_full_covariance_without_correlations_is_a_diagonal_gaussian(k):
    output, head, prior = outputs(5, 2 * k), FullCovariance(k), StandardNormal(k).double()()
    zeros = torch.zeros(5, head.outputs - 2 * k).double()
    whole = rate_parts(head((output, zeros)), prior)
    each = rate_parts(DiagonalGaussian(k)(output), prior)
    torch.testing.assert_close(whole, each.sum(1, keepdim=True), rtol=1e-12, atol=1e-12)


# ---- categories

LOGITS = torch.tensor(
    [[[1.0, 0, -1], [0.5, 0.5, 0]], [[-2.0, 1, 0], [0, 0, 0]], [[0.0, 0, 3], [1, -1, 0]]], dtype=torch.float64
)


def categories():
    return CategoricalGroups(6, 3)(LOGITS.flatten(1))


def test_the_rate_of_categories_in_closed_form():
    posterior = categories()
    assert (posterior.batch_shape, posterior.event_shape) == ((3, 2), (3,))
    rates = rate_parts(posterior, UniformCategorical(6, classes=3).double()())
    expected = [0.26051, 0.02374, 0.37520, 0, 0.71493, 0.26051]
    assert rates.flatten().tolist() == pytest.approx(expected, abs=5e-6)
    np.testing.assert_allclose(rates, math.log(3) - posterior.entropy(), rtol=0, atol=1e-12)
    assert rates.sum(1).mean().item() == pytest.approx(0.54496, abs=5e-6)
    for per, average, floored in (("whole", "sample", 0.65848), ("whole", "batch", 0.54496), (1, "sample", 1.07164)):
        assert free_bits(rates, 0.5, per, average).item() == pytest.approx(floored, abs=5e-6)


def test_the_decomposition_of_the_rate_of_categories_by_enumeration():
    probs = categories().probs.numpy()
    joint = np.einsum("na,nb->ab", probs[:, 0], probs[:, 1]) / 3
    marginals = probs.mean(0)

    def entropy(p):
        return -(p * np.log(p)).sum()

    information = entropy(joint) - np.mean([entropy(group) for group in probs.reshape(-1, 3)]) * 2
    correlation = entropy(marginals[0]) + entropy(marginals[1]) - entropy(joint)
    each = 2 * math.log(3) - entropy(marginals[0]) - entropy(marginals[1])
    assert (information, correlation, each) == (
        pytest.approx(0.46164, abs=5e-6),
        pytest.approx(0.02752, abs=5e-6),
        pytest.approx(0.05580, abs=5e-6),
    )


@pytest.mark.parametrize(("classes", "most"), [(3, 1.05394), (32, 3.37791)])
def test_the_uniform_share_bounds_the_rate_of_a_group(classes, most):
    certain = 1e3 * torch.eye(classes).double()[:1]
    rate = rate_parts(CategoricalGroups(classes, classes)(certain), UniformCategorical(classes, 0, classes).double()())
    assert rate.item() == pytest.approx(most, abs=5e-6)
    without = rate_parts(CategoricalGroups(classes, classes, 0)(certain), UniformCategorical(classes, 0, classes)())
    assert without.item() == pytest.approx(math.log(classes), abs=1e-6)


@pytest.mark.parametrize("unimix", [0.01, 0.0, 0.3])
def test_the_straight_through_gradient_does_not_depend_on_the_sample(unimix):
    logits, a = torch.tensor([[1.0, 0.0, -1.0]]).double().requires_grad_(), torch.tensor([1.0, -2.0, 0.5]).double()
    head, drawn = CategoricalGroups(3, 3, unimix), set()
    softmax = logits.detach().softmax(-1)[0]
    for seed in range(20):
        torch.manual_seed(seed)
        logits.grad = None
        z = head(logits).rsample()
        assert sorted(z[0, 0].tolist()) == [0, 0, 1]
        drawn.add(int(z.argmax()))
        (z @ a).sum().backward()
        torch.testing.assert_close(logits.grad[0], (1 - unimix) * softmax * (a - softmax @ a), rtol=1e-12, atol=1e-12)
    assert drawn == {0, 1, 2}
    if unimix == 0.01:
        assert logits.grad[0].tolist() == pytest.approx([0.51317, -0.53806, 0.02489], abs=5e-6)


def test_the_straight_through_gradient_is_unbiased_for_what_is_linear_in_each_group(monkeypatch):
    logits = LOGITS[:1].flatten(1).clone().requires_grad_()
    weight = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 3)))
    head = CategoricalGroups(6, 3)

    def gradient(z):
        value = z[0, 0] @ weight @ z[0, 1]
        return torch.autograd.grad(value, logits)[0]

    exact, expected = gradient(head(logits).probs), torch.zeros_like(logits)
    for state in itertools.product(range(3), range(3)):
        posterior, drawn = head(logits), torch.eye(3).double()[list(state)][None]
        monkeypatch.setattr(posterior, "sample", lambda shape, drawn=drawn: drawn)
        expected += posterior.log_prob(drawn).sum().exp().item() * gradient(posterior.rsample())
    torch.testing.assert_close(expected, exact, rtol=1e-12, atol=1e-14)


def test_categories_are_made_without_waiting_for_the_device(monkeypatch):
    """torch checks the parameters of a distribution, which reads them."""
    monkeypatch.setattr(torch.Tensor, "__bool__", None)
    posterior = categories()
    assert posterior.expand((4, 3, 2)).batch_shape == (4, 3, 2)


# ---- all heads


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_every_column_of_the_output_has_a_gradient(head):
    head = head(6).double()
    output = outputs(5, head.outputs).requires_grad_()
    posterior = head(output)
    assert posterior.mean.shape == ((5, 2, 3) if head.classes else (5, 6))
    weight = outputs(5, posterior.mean[0].numel(), seed=1)
    ((posterior.rsample().flatten(1) * weight).sum() + posterior.entropy().sum()).backward()
    assert output.grad.abs().amin() > 0


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_distributions_are_in_at_least_float32(head):
    made = head(6).to(torch.bfloat16)
    output = outputs(5, made.outputs).bfloat16()
    assert made(output).mean.dtype == torch.float32
    assert made(output).rsample().dtype == torch.float32
    made = head(6).double()
    assert made(output.double()).rsample().dtype == torch.float64


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_a_copied_head_makes_the_same_distribution(head, copied):
    head = head(6).double()
    output = outputs(5, head.outputs)
    head(3 * output)  # moves the running statistics
    twin, loaded = copied(head), type(head)(6, *([3] if head.classes else [])).double()
    for other in (twin, loaded):
        other.load_state_dict(head.state_dict())
    if not isinstance(head, DiagonalGaussian) or not head.bound:  # an option, which is not in the state
        assert torch.equal(loaded.eval()(output).mean, head.eval()(output).mean)
    assert torch.equal(twin.eval()(output).variance, head.eval()(output).variance)


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_an_output_of_another_width_is_refused(head):
    head = head(6)
    width = head.outputs
    for output, got in (
        (torch.zeros(5, width + 1), rf"\(5, {width + 1}\)"),
        (torch.zeros(5, width, 1), rf"\(5, {width}, 1\)"),
        ((torch.zeros(5, width - 1), torch.zeros(4, 1)), rf"\(5, {width - 1}\) and \(4, 1\)"),
        (td.Normal(torch.zeros(5, 6), 1.0), "Normal"),
        ([], "list"),
        (None, "NoneType"),
    ):
        with pytest.raises(ValueError, match=rf"`encoder` must give {width} columns .* {type(head).__name__} .*{got}"):
            head(output)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DiagonalGaussian(3, bound=0), "`bound` must be a positive number, or None for no bound, got 0"),
        (lambda: BatchNormMeans(3, gamma=-1.0), "`gamma` must be a positive number, got -1.0"),
        (lambda: FullCovariance(0), "`latent_dim` must be an integer of at least 1, got 0"),
        (lambda: CategoricalGroups(7, 3), "`classes` must divide `latent_dim`, .* got 3 for 7"),
        (lambda: CategoricalGroups(6, 1), "`classes` must be an integer of at least 2, got 1"),
        (lambda: CategoricalGroups(6, 3, 1.0), "`unimix` must be at least 0 and below 1, got 1.0"),
    ],
)
def test_options_of_heads_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_head_without_a_distribution_is_an_error():
    with pytest.raises(NotImplementedError, match="`posterior`: PosteriorHead has no `forward`"):
        PosteriorHead(2)(torch.zeros(1, 4))


def test_a_head_is_a_module():
    assert all(isinstance(head(6), nn.Module) for head in HEADS.values())
