import json

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_vae import VAE, Bernoulli, CategoricalGroups, evaluate
from lightning_vae.datamodules import Digits
from lightning_vae.estimators import ExPostDensity
from lightning_vae.evaluation.ex_post_fit import fit_density
from lightning_vae.evaluation.report import EvaluationReport
from tests.doubles import optimal_linear_vae, quiet_trainer


def test_the_aggregate_of_the_linear_vae_at_its_optimum_is_the_prior():
    x = torch.randn(4000, 5, generator=torch.Generator().manual_seed(0)).double() * torch.tensor([3, 2, 1.5, 1, 1])
    vae = optimal_linear_vae(x - x.mean(0), 3, 0.4)
    density = fit_density(vae, [{"x": x - x.mean(0), "index": torch.arange(4000)}], components=1)
    torch.testing.assert_close(density.means[0], torch.zeros(3).double(), rtol=0, atol=0.06)
    torch.testing.assert_close(density.covariances[0], torch.eye(3).double(), rtol=0, atol=0.08)


def test_samples_of_the_density_are_nearer_to_the_data_at_a_small_beta(tmp_path):
    torch.manual_seed(0)
    vae, data = VAE((1, 8, 8), 17, 8, likelihood=Bernoulli, beta=0.05), Digits(batch_size=100)
    quiet_trainer(tmp_path, max_epochs=12).fit(vae, data)
    density = fit_density(vae, data.train_dataloader(), 10)
    data.setup("test")
    result = evaluate(vae, data.test_dataloader(), importance_samples=2, density=density)
    assert 0.9 < result.ex_post_distance < result.sample_distance - 0.15
    assert "ex-post samples" in result.table()
    samples = vae.sample(50, density=density.distribution())
    assert samples.shape == (50, 1, 8, 8)


def test_the_report_of_a_test_fits_it_to_the_training_data_and_saves_it(tmp_path, capsys):
    torch.manual_seed(0)
    vae, data = VAE((1, 8, 8), 17, 3, likelihood=Bernoulli), Digits(batch_size=100)
    report = EvaluationReport(importance_samples=2, ex_post=2)
    trainer = quiet_trainer(tmp_path, callbacks=[report], logger=True)
    trainer.test(vae, data, verbose=False)
    [path] = tmp_path.rglob("ex_post.pt")
    written = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Written:"))
    assert {*written.split(", ")[1:]} == {"reconstructions.png", "samples.png", "ex_post.pt"}
    density = ExPostDensity(**torch.load(path, weights_only=True))
    found = fit_density(vae, data.train_dataloader(), 2)
    torch.testing.assert_close(density.means, found.means)
    [numbers] = tmp_path.rglob("evaluation.json")
    assert json.loads(numbers.read_text())["ex_post_distance"] > 0


@pytest.mark.filterwarnings("ignore:Without a logger")
def test_what_makes_no_sense(tmp_path):
    with pytest.raises(ValueError, match="`ex_post` must be an integer of at least 1"):
        EvaluationReport(ex_post=0)
    vae = VAE((1, 8, 8), 17, 8, likelihood=Bernoulli, posterior=lambda k: CategoricalGroups(k, 4))
    with pytest.raises(ValueError, match="categories"):
        fit_density(vae, [])
    with pytest.raises(ValueError, match=r"got 3 for the 3 latents of the training data. Set at most 2, or leave"):
        fit_density(VAE((2,), latent_dim=1), [torch.randn(3, 2)], components=3)
    with pytest.raises(ValueError, match=r"dimensions, 4; got 1 for the 3 latents .* Give more training data, or"):
        fit_density(VAE((2,), latent_dim=4), [torch.randn(3, 2)], components=1)
    vae, steps = VAE((1, 8, 8), 17, 3, likelihood=Bernoulli), []
    vae.test_step = lambda *_: steps.append(1)
    with pytest.raises(ValueError, match=r"`--evaluation.ex_post`.* got 5000 for the 1350 latents"):
        quiet_trainer(tmp_path, callbacks=[EvaluationReport(ex_post=5000)]).test(vae, Digits())
    assert steps == []
    with pytest.raises(ValueError, match="needs the training data: test with a data module"):
        quiet_trainer(tmp_path, callbacks=[EvaluationReport(ex_post=2)]).test(
            VAE((2,), latent_dim=1), DataLoader(torch.randn(20, 2), 10)
        )
