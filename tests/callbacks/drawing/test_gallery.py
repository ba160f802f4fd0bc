import torch

from lightning_vae.callbacks.drawing.gallery import _curves


def test_a_sequence_of_vectors_is_drawn_entry_by_entry():
    courses = torch.stack([torch.zeros(100), torch.ones(100)], dim=1)[None, None]  # (1, 1, 100, 2)
    assert _curves(courses)[0, 0].tolist() == [0.0] * 100 + [1.0] * 100
    assert _curves(courses.mT).equal(_curves(courses))
    assert _curves(torch.arange(3.0)[None, None]).tolist() == [[[0, 1, 2]]]
