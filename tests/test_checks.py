"""Numbers that options are given, of all that is public."""

import inspect
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import lightning_vae
from lightning_vae import callbacks, checks, datamodules, estimators, likelihoods, terms
from lightning_vae.callbacks import schedules
from tests.doubles import small_vae

MEANS, LABELS = torch.zeros(3, 2), torch.tensor([0, 1, 0])
# What is needed besides the option that is tried.
NORMAL = torch.distributions.Normal(MEANS, MEANS + 1)
NETWORKS = ("Linear", "MLP", "Conv")
LIKELIHOODS = [name for name, thing in vars(likelihoods).items() if isinstance(thing, type) and name != "Gaussian"]
GIVEN: dict[str, dict[str, Any]] = {
    "BatchLoader": {"size": 4, "batch_size": 2},
    "StreamLoader": {"dataset": [0, 1], "batch_size": 2},
    "TensorLoader": {"tensors": {"x": MEANS}, "batch_size": 2},
    **{name: {"shape": (2,)} for name in LIKELIHOODS},
    **{f"{kind}{part}": {"shape": (1, 8, 8), "latent_dim": 2} for kind in NETWORKS for part in ("Encoder", "Decoder")},
    "Condition": {"classes": 3},
    "group_rates": {"kl_per_dimension": MEANS},
    "kl_balance": {"posterior": NORMAL, "prior": NORMAL},
    "world_model_kl": {"posterior": NORMAL, "prior": NORMAL},
    "multi_sample_bound": {"posterior": NORMAL, "prior": NORMAL, "log_likelihood": lambda z: z.sum(-1), "samples": 2},
    "BatchNormMeans": {"latent_dim": 2},
    "CategoricalGroups": {"latent_dim": 4, "classes": 2},
    "ConditionalNormal": {"latent_dim": 2, "condition_dim": 3},
    "DiagonalGaussian": {"latent_dim": 2},
    "LearnedNormal": {"latent_dim": 2},
    "MixturePrior": {"latent_dim": 2},
    "Prior": {"latent_dim": 2},
    "StandardNormal": {"latent_dim": 2},
    "UniformCategorical": {"latent_dim": 4},
    "VampPrior": {"latent_dim": 2},
    "Arrays": {"path": "nowhere.npy"},
    "Images": {"root": "nowhere", "size": 8},
    "Table": {"path": "nowhere.csv"},
    "VAE": {"shape": (6,)},
    "Constant": {"value": 1.0},
    "Capacity": {"schedule": 1.0},
    "Staged": {"values": [0.0, 1.0, 2.0]},
    "EnforcedFreeBits": {"threshold": 0.5, "posterior": "encoder", "weight": 1.0},
    "FreeBits": {"threshold": 0.5},
    "ActiveUnits": {"dim": 2},
    "AggregatePosterior": {"dim": 2},
    "ObservationSubset": {"columns": 2, "size": 2},
    "RunningMoments": {"columns": 2},
    "active_units": {"means": MEANS},
    "collapse_state": {
        "rate_per_dimension": None,
        "variance_of_means": MEANS[0],
        "mutual_information": 0.1,
        "observations": 3,
    },
    "dip_penalty": {"covariance": torch.eye(2)},
    "inverse_multiquadric": {"squared_distance": MEANS},
    "minibatch_weights": {"batch_size": 2, "data_size": 4},
    "rbf": {"squared_distance": MEANS},
    "compare_latents": {"models": {"one": small_vae()}, "loader": []},
    "ClassUsage": {"groups": 2, "classes": 2},
    "categorical_estimates": {"probs": torch.ones(2, 1, 2) / 2, "rates": torch.zeros(2)},
    "categorical_mutual_information": {"probs": torch.ones(2, 1, 1)},
    "dead_classes": {"usage": torch.ones(1, 1)},
    "unimix": {"probs": torch.ones(1)},
    "evaluate": {"vae": small_vae(), "loader": []},
    "score": {"vae": small_vae(), "observations": None},
    "free_bits": {"kl_per_dimension": MEANS, "threshold": 0.5},
    "knn_accuracy": {"means": MEANS, "labels": LABELS},
    "linear_probe_accuracy": {"means": MEANS, "labels": LABELS},
    "linear_probe_r2": {"means": MEANS, "targets": MEANS},
    "linear_vae_optimum": {"eigenvalues": [1.0], "latent_dim": 1, "variance": 1.0},
    "mixture_estimates": {"mean": MEANS, "variance": MEANS + 1},
    "mutual_information": {"mean": MEANS, "variance": MEANS + 1},
    "shannon_distortion": {"eigenvalues": [1.0], "variance": 1.0, "rate": 1.0},
    "weighted_loss": {"distortion": torch.zeros(()), "floored_rate": torch.zeros(())},
}
ONE_OF = (
    (("steps", "epochs", "fraction"), 2),
    (("period_steps", "period_epochs", "period_fraction"), 2),
    (("at_steps", "at_epochs", "at_fractions"), [1]),
    (("nats", "bits"), 1.0),
    (("squared_error", "distortion"), 1.0),
)
# Results, measurements and records; where something is, which a number may say; and what the VAE checks and passes on.
RESULTS = {"AggregateMoments", "Averages", "Evaluation", "LatentReport", "LinearVAEOptimum", "MixtureEstimates", "Step"}
NO_OPTIONS = {*RESULTS, "is_saturated"}
NO_NUMBERS = {"label", "x", "mask", "mutual_information", "information_rate", "marginal_kl_per_unit", "own", "schedule"}
OF_THE_VAE = {"latent_dim", "levels", "shape", "condition_dim", "outputs"}
NAMED = ("FreeBitsPer", "Shape")  # types of numbers


def options() -> Iterator[Any]:
    """Every public option that takes a number, with what is needed to try it."""
    for module in (lightning_vae, callbacks, datamodules, estimators, terms):
        for name in sorted(dir(module)):  # some are imported at their first use
            thing = getattr(module, name)
            if name.startswith("_") or not callable(thing) or inspect.isabstract(thing) or name in NO_OPTIONS:
                continue
            try:
                parameters = inspect.signature(thing).parameters
            except ValueError:  # an exception
                continue
            for option, parameter in parameters.items():
                kind = re.sub(r"Callable\[\[.*?\]", "", str(parameter.annotation))
                part = name not in ("VAE", "linear_vae_optimum") and option in OF_THE_VAE
                if re.search(rf"\b(int|float|{'|'.join(NAMED)})\b", kind) and not part and option not in NO_NUMBERS:
                    several = bool(re.search(r"Sequence|tuple\[float|Shape", kind))
                    yield pytest.param(thing, option, several, id=f"{name}-{option}")


@pytest.mark.parametrize(("thing", "option", "several"), list(options()))
def test_a_boolean_is_no_number(thing: Any, option: str, several: bool) -> None:
    of_a_likelihood = {"shape": (2,)} if thing is lightning_vae.Gaussian else {}  # a data module has the same name
    given = {**GIVEN.get(thing.__name__, {}), **of_a_likelihood, option: (True, True) if several else True}
    for alternatives, value in ONE_OF:
        if alternatives[0] in inspect.signature(thing).parameters and option not in alternatives:
            given[alternatives[0]] = value
    with pytest.raises(ValueError, match=rf"(?s)`{option}` must be .*got .*True"):
        thing(**given)


def test_both_sides_of_the_seam_check_alike() -> None:
    """The callbacks' folder can be copied alone, so it has the checks itself."""
    for name in ("check_number", "at_least", "is_positive", "integer_from", "_is_boolean"):
        assert inspect.getsource(getattr(checks, name)) == inspect.getsource(getattr(schedules, name))


@pytest.mark.parametrize(
    "value", ["1", None, [1.0], (1, True), float("nan"), -1, 1.5, True, np.True_, torch.tensor(True), torch.ones(2)]
)
def test_what_is_no_count_is_refused_by_name(value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^`n` must be a count, got {re.escape(repr(value))}. Count again.$"):
        checks.check_number("n", value, "a count", checks.integer_from(0), "Count again.")


@pytest.mark.parametrize("value", [0, np.int64(3), torch.tensor(2)])
def test_any_integer_is_a_count(value: Any) -> None:
    checks.check_number("n", value, "a count", checks.integer_from(0))
