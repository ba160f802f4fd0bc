from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
from torch.utils.data import DataLoader

from lightning_vae.callbacks import LatentSpace, latent_space
from lightning_vae.callbacks.drawing.media_logger import MediaLogger
from lightning_vae.callbacks.latent_space import _names, _planes
from tests.doubles import quiet_trainer


class Foreign(LightningModule):
    """Somebody's VAE, whose encoder gives both parameters in one tensor."""

    def __init__(self):
        super().__init__()
        self.enc = nn.Linear(4, 6)
        self.steps = 0

    def training_step(self, batch, batch_idx):
        self.steps += 1
        return self.enc(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.enc(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(root, callback, model):
    data = [(torch.randn(4, generator=torch.Generator().manual_seed(n)), n % 3) for n in range(16)]
    logger = TensorBoardLogger(root, "runs")
    options = {"max_epochs": 3, "num_sanity_val_steps": 0, "log_every_n_steps": 1}
    batches = DataLoader(data, 8, generator=torch.Generator())
    quiet_trainer(root, logger=logger, callbacks=callback, **options).fit(model, batches, batches)
    return EventAccumulator(logger.log_dir, size_guidance={"images": 0}).Reload().Tags()["images"]


def test_it_draws_a_foreign_posterior(tmp_path):
    assert set(run(tmp_path, LatentSpace("enc", chunk=1), Foreign())) == {"latent/against_prior", "latent/by_label"}


class WithMixture(Foreign):
    """One whose prior has two far components, both narrow."""

    def __init__(self):
        super().__init__()
        parts = Independent(Normal(torch.tensor([[-8.0] * 3, [8.0] * 3]), torch.full((2, 3), 0.8)), 1)
        self.prior = MixtureSameFamily(Categorical(torch.ones(2)), parts)


def test_posteriors_are_drawn_against_the_density_of_a_mixture_in_its_units(tmp_path, monkeypatch):
    drawn = []
    draw = latent_space.density_panels
    monkeypatch.setattr(latent_space, "density_panels", lambda *args: drawn.append((args[0], args[3])) or draw(*args))
    model = WithMixture()
    run(tmp_path, LatentSpace("enc", chunk=1, times=1), model)
    mean, prior = drawn[-1]
    assert mean.abs().max() < 1  # of the prior's standard deviation, 8.04
    assert 20 * prior[40].max() < prior[30].min()  # nothing at 0, and a component at -1
    model.prior = Normal(0.0, 1.0)
    drawn.clear()
    run(tmp_path / "standard", LatentSpace("enc", chunk=1, times=1), model)
    torch.testing.assert_close(drawn[-1][1][40], torch.full_like(drawn[-1][1][40], 0.39894))


def test_a_wrong_path_is_an_error_before_the_first_step(tmp_path):
    model = Foreign()
    with pytest.raises(ValueError, match="encoder"):
        run(tmp_path, LatentSpace("encoder"), model)
    assert model.steps == 0
    assert not model.enc._forward_hooks


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (LatentSpace("enc"), "the posterior can't be shown"),  # one tensor, and no `chunk`
        (LatentSpace("enc", chunk=1, label="class"), "A batch has no 'class'"),
        (LatentSpace(lambda module, batch: Normal(torch.zeros(8), 1.0)), "the latent space can't be shown|posterior"),
    ],
)
def test_what_cant_be_read_is_said_once_and_training_goes_on(tmp_path, callback, message):
    model = Foreign()
    for steps in (6, 12):
        with pytest.warns(UserWarning, match=f"LatentSpace: .*({message})") as said:
            assert run(tmp_path, callback, model) == []
        assert len([each for each in said if str(each.message).startswith("LatentSpace:")]) == 1
        assert model.steps == steps
        assert not model.enc._forward_hooks


def test_after_the_pass_of_the_first_error_nothing_more_is_tried(tmp_path):
    tried = []

    def posterior(module, batch):
        tried.append(module.steps)
        raise ValueError("no posterior")

    with pytest.warns(UserWarning, match="LatentSpace: the posterior can't be shown .*no posterior"):
        run(tmp_path, LatentSpace(posterior), Foreign())
    assert set(tried) == {2}, "the first of three epochs"


def test_a_full_disk_does_not_end_the_run(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(MediaLogger, "embedding", fail)
    model = Foreign()
    with pytest.warns(UserWarning, match="LatentSpace: the projector can't be shown .*No space left"):
        assert len(run(tmp_path, LatentSpace("enc", chunk=1), model)) == 2
    assert model.steps == 6


def test_every_dimension_is_in_a_plane():
    assert _planes([4, 2, 7], 9) == [[4, 2], [7, 0]]
    assert _planes([0], 1) == [[0, 0]]
    assert _planes([3, 1], 9) == [[3, 1]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LatentSpace(observations=1), "`observations` must be at least 2"),
        (lambda: LatentSpace(times=0), "`times`"),
    ],
)
def test_options_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (torch.tensor([1, 2]), ["1", "2"]),
        (torch.tensor([[True], [False]]), ["True", "False"]),
        (torch.tensor([0.5, 2.0]), ["0.5", "2"]),
        (["cat", "dog"], ["cat", "dog"]),
        (torch.zeros(2, 3), None),
        (torch.zeros(3), None),
        (None, None),
    ],
)
def test_labels_of_any_kind(labels, expected):
    assert _names(labels, 2) == expected


def test_data_sorted_by_class_show_all_classes():
    class Keep(LatentSpace):
        def _show(self, logger, pictures, codes, step):
            self.shown = self._latest

    callback = Keep("enc", chunk=1, observations=10)
    data = DataLoader([(torch.randn(4), n // 10) for n in range(50)], 8)
    quiet_trainer(".", callbacks=callback, max_epochs=1, logger=Draws(), num_sanity_val_steps=0).fit(
        Foreign(), data, data
    )
    assert sorted(callback.shown.labels) == sorted("0011223344")
    assert len(callback.shown.codes.mean) == 10


class Draws(TensorBoardLogger):
    """A logger that takes pictures, and writes nothing."""

    def __init__(self):
        super().__init__(".")

    @property
    def experiment(self):
        return SimpleNamespace(add_image=lambda *_: None)

    def log_metrics(self, *_, **__):
        pass

    log_hyperparams = log_graph = finalize = save = log_metrics
