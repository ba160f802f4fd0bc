import pytest
import torch

from lightning_vae.evaluation.report import EvaluationReport, draw
from tests.doubles import digits, optimal_linear_vae, small_vae


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
