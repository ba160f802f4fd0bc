import torch

from lightning_vae.callbacks.drawing.canvas import Canvas


def test_dots_outside_are_left_out():
    canvas = Canvas(10, 10)
    canvas.dots(torch.tensor([[-50.0, 5.0], [5.0, 90.0], [float("nan"), 5.0]]), torch.zeros(3, 3))
    assert (canvas.image() == 255).all()


def test_the_later_dot_covers_the_earlier_one():
    colours = torch.arange(4000)[:, None].expand(-1, 3) % 251
    canvas = Canvas(10, 10)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        canvas.dots(torch.full((4000, 2), 5.0), colours, radius=3)
    finally:
        torch.set_num_threads(threads)
    assert canvas.image()[:, 5, 5].tolist() == [3999 % 251] * 3
