import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset

from lightning_vae.evaluation import evaluate
from lightning_vae.evaluation.report import EvaluationReport, draw
from tests.doubles import ForeignModule, digits, optimal_linear_vae, quiet_trainer, small_vae


@pytest.mark.parametrize("option", ["importance_samples", "observations", "samples"])
def test_sizes_are_checked_before_anything_is_loaded(option):
    with pytest.raises(ValueError, match=f"`{option}` must be at least"):
        EvaluationReport(**{option: 0})


def test_pictures_show_images_above_their_reconstructions():
    (batch,) = digits(batch_size=297)
    vae = small_vae()
    pictures = draw(vae, batch)
    assert {name: tuple(picture.shape) for name, picture in pictures.items()} == {
        "reconstructions": (3, 8 * 66, 8 * 66),
        "samples": (3, 8 * 66, 8 * 66),
    }
    first = pictures["reconstructions"][0, 1:65:8, 1:65:8]
    assert torch.equal(first, (batch["x"][0, 0] / 16 * 255).round().to(torch.uint8))
    below = pictures["reconstructions"][0, 67:131:8, 1:65:8]
    with torch.no_grad():
        assert torch.equal(below, (vae.reconstruct(batch["x"][:1])[0, 0] / 16 * 255).round().to(torch.uint8))
    assert draw(optimal_linear_vae(torch.randn(10, 3), 2, 0.1), [torch.randn(4, 3)]) == {}


def run_test(tmp_path, vae, loaders, **options):
    trainer = quiet_trainer(tmp_path, callbacks=[EvaluationReport(importance_samples=2)], **options)
    trainer.test(vae, loaders, verbose=False)
    return trainer


def test_a_loader_without_a_length_is_evaluated(tmp_path, capsys):
    """Case `test_needs_a_length`."""
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    vae = optimal_linear_vae(x, 2, 0.1)
    with pytest.warns(UserWarning, match="Without a logger"):
        run_test(tmp_path, vae, DataLoader(Endless(x), 10))
    assert "40 observations" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="Without a logger"):
        run_test(tmp_path, vae, DataLoader(Endless(x), 10), limit_test_batches=2)
    assert "20 observations" in capsys.readouterr().out


class Endless(IterableDataset):
    """Rows of a tensor, without a length."""

    def __init__(self, x):
        self.x = x

    def __iter__(self):
        return iter(self.x)


@pytest.mark.filterwarnings("ignore:Without a logger")
def test_of_several_loaders_the_first_is_evaluated(tmp_path, capsys):
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    vae, loaders = optimal_linear_vae(x, 2, 0.1), {"one": DataLoader(x, 10), "two": DataLoader(x[:20], 10)}
    with pytest.warns(UserWarning, match="Only the first of 2 test loaders"):
        run_test(tmp_path, vae, loaders)
    assert "40 observations" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:Without a logger")
def test_what_can_not_be_evaluated_is_refused_before_a_step(tmp_path):
    x = torch.randn(40, 2)
    module = ForeignModule()
    with pytest.raises(TypeError, match="got ForeignModule"):
        quiet_trainer(tmp_path, callbacks=[EvaluationReport()], max_epochs=1).fit(module, DataLoader(x, 10))
    module = small_vae()
    with pytest.raises(ValueError, match="`limit_test_batches` is 0, so nothing would be evaluated"):
        quiet_trainer(tmp_path, callbacks=[EvaluationReport()], max_epochs=1, limit_test_batches=0).fit(
            module, digits()
        )
    vae, steps = optimal_linear_vae(x, 1, 0.1), []
    vae.test_step = lambda *_: steps.append(1)
    with pytest.raises(ValueError, match="`loader` is read twice"):
        run_test(tmp_path, vae, iter([x]))
    assert steps == []
    with pytest.raises(ValueError, match=r"already taken, got \['nll'\]"):
        EvaluationReport(metrics={"nll": len})


class Rescaled(LightningDataModule):
    """Vectors that a hook brings to their scale on the way to the device."""

    def __init__(self, x):
        super().__init__()
        self.x = x

    def test_dataloader(self):
        return DataLoader(255 * self.x, 10)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch / 255


@pytest.mark.filterwarnings("ignore:Without a logger")
def test_batches_are_evaluated_as_a_test_step_sees_them(tmp_path, capsys):
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    vae = optimal_linear_vae(x, 2, 0.1)
    trainer = quiet_trainer(tmp_path, callbacks=[EvaluationReport(importance_samples=2)])
    trainer.test(vae, datamodule=Rescaled(x), verbose=False)
    expected = evaluate(vae, DataLoader(x, 10), importance_samples=2)
    assert f"NLL                       {expected.nll:.4g} " in capsys.readouterr().out
