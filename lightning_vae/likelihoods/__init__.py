"""Likelihoods p(x|z): the meaning of the decoder's output.

Each is a module that turns the decoder's output into a normalised ``torch.distributions.Distribution`` over the data in
the networks' scale (images in [0, 1]). Constants are included: ``log_prob`` is in nats and comparable across methods.
"""

from .base import Likelihood as Likelihood
from .bernoulli import Bernoulli as Bernoulli
from .bernoulli import ContinuousBernoulli as ContinuousBernoulli
from .categorical import Categorical as Categorical
from .columns import Columns as Columns
from .counts import NegativeBinomial as NegativeBinomial
from .counts import Poisson as Poisson
from .default import default_likelihood as default_likelihood
from .feedback import warn_of_feedback as warn_of_feedback
from .gaussian import Gaussian as Gaussian
from .heavy_tailed import Laplace as Laplace
from .heavy_tailed import StudentT as StudentT
from .logistic import DiscretisedLogistic as DiscretisedLogistic
from .logistic import DiscretisedLogisticMixture as DiscretisedLogisticMixture
