import pickle
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.distributions import Beta, Categorical, Independent, MixtureSameFamily, Normal
from torch.utils.data import DataLoader

from lightning_vae import VAE, Condition
from lightning_vae.callbacks import Dashboard, LatentSpace, Pictures
from lightning_vae.callbacks.drawing.media_logger import MediaLogger
from lightning_vae.callbacks.metrics.observation_subset import evenly_spaced_rows
from tests.doubles import quiet_trainer
from tests.processes import in_two_processes

TAGS = {"images/reconstructions", "images/samples", "images/interpolations", "images/traversals"}
# What a project may do all the same.
SHUFFLED = pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling enabled")
ALL = TAGS | {"latent/against_prior", "latent/by_label"}


class Record(Logger):
    """A logger that keeps the pictures it gets, as Weights & Biases' takes them."""

    name, version = "record", 0

    def __init__(self):
        super().__init__()
        self.images = {}

    def log_hyperparams(self, *_, **__):
        pass

    def log_metrics(self, *_, **__):
        pass

    def log_image(self, key, images, step=None):
        [image] = images
        self.images.setdefault(key, []).append((step, torch.from_numpy(image)))

    def last(self, key):
        return self.images[key][-1][1]

    def steps(self, key):
        return [step for step, _ in self.images[key]]


def images(shape, rows=24, levels=256):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, levels, (rows, *shape), generator=generator)
    return [{"x": each.to(torch.uint8), "label": torch.tensor(n % 3), "index": n} for n, each in enumerate(x)]


def run(tmp_path, callbacks, model, data, *, epochs=2, ckpt_path=None, val=None, **options):
    logger = Record()
    options = {"logger": logger, "num_sanity_val_steps": 0, "log_every_n_steps": 1, **options}
    trainer = quiet_trainer(tmp_path, callbacks=callbacks, max_epochs=epochs, **options)
    batches = DataLoader(data, 8, generator=torch.Generator())
    trainer.fit(model, batches, val or DataLoader(data, 8, generator=torch.Generator()), ckpt_path=ckpt_path)
    return trainer, logger


def small_vae(shape=(1, 8, 8), levels=256, latent_dim=3):
    torch.manual_seed(0)
    return VAE(shape, levels, latent_dim)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 13), (1, 5, 40), (6,), (300,), (1,), (2, 8, 8), (1, 100, 104)])
def test_any_shape_is_drawn(tmp_path, shape):
    levels = 256 if len(shape) == 3 else None
    data = images(shape) if levels else [torch.randn(shape) for _ in range(24)]
    _, logger = run(tmp_path, [Pictures(), LatentSpace()], small_vae(shape, levels), data)
    assert set(logger.images) == ALL
    for key in ALL:
        image = logger.last(key)
        assert image.dtype == torch.uint8
        assert image.shape[2] == 3
        assert max(image.shape) <= 1300
        assert image.float().std() > 1, key


class Doubles(LightningModule):
    """Codes an image by its mean and its first pixel, and decodes to constant images: every pixel can be foretold."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def encode(self, x):
        flat = x.flatten(1)
        mean = torch.stack([flat.mean(1), flat[:, 0]], dim=1)
        return Normal(mean * torch.tensor([1.0, 0.0]), torch.tensor([0.5, 1.0]))

    def decode(self, z):
        return z[:, :1, None, None].expand(-1, 1, 16, 16) * self.weight.detach()

    def training_step(self, batch, batch_idx):
        return self.weight * 0

    def validation_step(self, batch, batch_idx):
        self.posterior = self.encode(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def constants(rows=20):
    """Images that are constant, from black to white."""
    return [torch.full((1, 16, 16), number / (rows - 1)) for number in range(rows)]


def cells(picture, rows, columns, size=34):
    """The middle pixel of each cell of a grid, labels left out."""
    grid = picture[:, picture.shape[1] - columns * size :, 0].float() / 255
    return grid.reshape(rows, size, columns, size)[:, size // 2, :, size // 2]


def test_the_pixels_are_the_models(tmp_path):
    _, logger = run(tmp_path, Pictures(), Doubles(), constants())
    chosen = torch.tensor([0, 2, 4, 7, 9, 12, 14, 16, 17, 18]) / 19  # of batches of 8, 8 and 4: evenly spread
    inputs, outputs = cells(logger.last("images/reconstructions"), 2, 10)
    assert torch.allclose(inputs, chosen, atol=0.003)
    assert torch.allclose(outputs, chosen, atol=0.003)
    between = cells(logger.last("images/interpolations"), 5, 10)
    for row, (first, last) in enumerate(zip(chosen[:5], chosen[5:], strict=True)):
        assert torch.allclose(between[row, 1:-1], torch.linspace(first, last, 8), atol=0.003)
        assert torch.allclose(between[row, [0, -1]], torch.stack([first, last]), atol=0.003)
    traversal = logger.last("images/traversals")
    assert traversal.shape[0] == 34  # the second dimension has rate, but its mean never varies: it is not active
    assert torch.allclose(cells(traversal, 1, 10)[0], torch.linspace(-2.5, 2.5, 10).clamp(0, 1), atol=0.003)
    samples = cells(logger.last("images/samples"), 5, 10)
    assert (samples == 0).float().mean() == pytest.approx(0.5, abs=0.2)


@SHUFFLED
def test_fixed_inputs_and_noise(tmp_path):
    _, logger = run(
        tmp_path, Pictures(), Doubles(), constants(), epochs=3, val=DataLoader(constants(), 8, shuffle=True)
    )
    assert logger.steps("images/samples") == [2, 5, 8]
    for key in TAGS - {"images/traversals"}:
        pictures = [picture for _, picture in logger.images[key]]
        assert all(picture.equal(pictures[0]) for picture in pictures), key


@SHUFFLED
def test_a_resumed_run_shows_the_same_inputs(tmp_path):
    shuffled = DataLoader(constants(), 8, shuffle=True)
    torch.manual_seed(1)
    trainer, logger = run(tmp_path, [Pictures(), LatentSpace()], Doubles(), constants(), epochs=2, val=shuffled)
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)["callbacks"]
    assert [saved[key]["passes"] for key in saved] == [2, 2]
    _, again = run(
        tmp_path, [Pictures(), LatentSpace()], Doubles(), constants(), epochs=4, val=shuffled, ckpt_path=path
    )
    assert again.steps("images/samples") == [8, 11]
    for key in ("images/reconstructions", "images/interpolations", "images/samples"):
        assert again.last(key).equal(logger.last(key)), key


class Noisy(VAE):
    """Draws random numbers wherever it can, and keeps a submodule in training mode on purpose."""

    def encode(self, x):
        torch.rand(1)
        return super().encode(x)

    def decode(self, z):
        assert not torch.is_grad_enabled()
        assert not self.training
        torch.rand(1)
        return super().decode(z)

    def on_validation_model_eval(self):
        self.eval()
        self.encoder.train()

    def on_validation_epoch_end(self):
        super().on_validation_epoch_end()
        self.modes = [module.training for module in self.modules()]

    def on_validation_end(self):
        assert [module.training for module in self.modules()] == self.modes


def test_training_is_not_disturbed(tmp_path):
    def weights(callbacks):
        torch.manual_seed(0)
        model = Noisy((1, 8, 8), 256, 3)
        run(tmp_path, callbacks, model, images((1, 8, 8)), epochs=3, val_check_interval=2)
        return [*model.parameters()], torch.random.get_rng_state()

    (plain, before), (drawn, after) = weights([]), weights([Pictures(), LatentSpace(), Dashboard()])
    assert before.equal(after)
    assert all(one.equal(other) for one, other in zip(plain, drawn, strict=True))
    assert all(weight.grad is None or not weight.grad.is_inference() for weight in drawn)


def test_the_sanity_check_draws_nothing_and_fast_dev_run_passes(tmp_path):
    class Stop(Callback):
        def on_train_start(self, trainer, pl_module):
            assert trainer.logger.images == {}
            trainer.logger.checked = True

    pictures = [Pictures(), LatentSpace(), Dashboard()]
    _, logger = run(tmp_path, [*pictures, Stop()], small_vae(), images((1, 8, 8)), num_sanity_val_steps=2)
    assert logger.checked
    assert len(logger.images["images/samples"]) == 2
    assert pictures[0].state_dict()["passes"] == 2
    run(tmp_path, [Pictures(), LatentSpace(), Dashboard()], small_vae(), images((1, 8, 8)), fast_dev_run=True)


def test_loggers_take_what_they_can(tmp_path):
    def callbacks():
        return [Pictures(), LatentSpace(), Dashboard()]

    data = images((1, 8, 8))
    run(tmp_path, callbacks(), small_vae(), data, logger=False)
    run(tmp_path, callbacks(), small_vae(), data, logger=CSVLogger(tmp_path))
    tensorboard, record = TensorBoardLogger(tmp_path, "board"), Record()
    run(tmp_path, callbacks(), small_vae(), data, logger=[CSVLogger(tmp_path), tensorboard, record])
    events = EventAccumulator(tensorboard.log_dir, size_guidance={"images": 0}).Reload()
    assert set(record.images) == set(events.Tags()["images"]) == ALL
    assert [image.step for image in events.Images("images/samples")] == record.steps("images/samples") == [2, 5]


def test_a_second_fit_starts_afresh(tmp_path):
    callbacks = [Pictures(times=2), LatentSpace(times=2)]
    run(tmp_path, callbacks, small_vae(), images((1, 8, 8)), epochs=3)
    _, logger = run(tmp_path, callbacks, Doubles(), constants(), epochs=3)
    assert logger.steps("images/samples") == logger.steps("latent/by_label") == [2, 8]
    assert logger.last("images/reconstructions").shape[1] == 10 * 34 + 46


@pytest.mark.parametrize("times", [1, 3, 10])
def test_times_in_a_run(tmp_path, times):
    _, logger = run(tmp_path, [Pictures(times=times), LatentSpace(times=times)], Doubles(), constants(), epochs=6)
    expected = {1: [17], 3: [2, 8, 17], 10: [2, 5, 8, 11, 14, 17]}[times]
    assert logger.steps("images/samples") == logger.steps("latent/by_label") == expected


class Foreign(LightningModule):
    """Somebody's VAE: nothing has the names that ours have."""

    def __init__(self):
        super().__init__()
        self.net = nn.ModuleDict({"enc": nn.Linear(64, 6), "dec": nn.Linear(3, 64)})

    def embed(self, x):
        return {"stats": self.net["enc"](x.flatten(1)).chunk(2, 1), "features": x}

    def forward(self, x):
        return self.net["dec"](self.embed(x)["stats"][0]), "something else"

    def training_step(self, batch, batch_idx):
        return self.net["dec"](self.embed(batch[0])["stats"][0]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_foreign_module_by_paths(tmp_path):
    data = [(torch.rand(1, 8, 8), number % 3) for number in range(20)]
    callbacks = [
        Pictures(encode="embed:stats", decode="net.dec", reconstruct="forward"),
        LatentSpace(posterior="net.enc", chunk=1),
    ]
    _, logger = run(tmp_path, callbacks, Foreign(), data)
    assert set(logger.images) == ALL
    callable_ = Pictures(
        encode=lambda module, x: module.embed(x)["stats"][0],  # the mean alone
        decode=lambda module, z: module.net["dec"](z),
        x=lambda batch: batch[0],
    )
    _, logger = run(tmp_path, callable_, Foreign(), data)
    assert set(logger.images) == TAGS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "`encode`: Foreign has nothing callable at 'encode'. It has"),
        ({"encode": "encoder:0", "decode": "net.dec"}, "nothing callable at 'encoder'"),
        ({"encode": "embed", "decode": "dec"}, "Did you mean 'net.dec'"),
    ],
)
def test_a_wrong_path_is_an_error_before_the_first_step(tmp_path, options, message):
    class Never(Foreign):
        def training_step(self, batch, batch_idx):
            raise AssertionError

    Never.__name__ = "Foreign"
    with pytest.raises(ValueError, match=message):
        run(tmp_path, Pictures(**options), Never(), [(torch.rand(1, 8, 8), 0)] * 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encode": "embed", "decode": "net.dec"}, "the output of `encode`.*encode='path:part'"),
        ({"encode": "embed:stats", "decode": "net.enc"}, "mat1 and mat2|shape"),
        ({"encode": "embed:stats", "decode": lambda module, z: z}, r"`decode` gave shape \(3,\) for each"),
        ({"encode": "embed:stats", "decode": lambda module, z: {"x": z}}, "`decode` gave a dict for each"),
        (
            {"encode": "embed:stats", "decode": "net.dec", "reconstruct": "embed:stats"},
            r"`reconstruct` gave shape \(3,\) for each.*reconstruct='path:part'",
        ),
        ({"encode": "embed:stats", "decode": "net.dec", "x": "image"}, "A batch has no 'image'"),
        ({"encode": "embed:stats", "decode": "net.dec", "x": lambda batch: 1}, "no observations were found"),
    ],
)
def test_what_does_not_fit_is_said_once_and_training_goes_on(tmp_path, options, message):
    callback = Pictures(**options)
    what = "the (model's output|observations)"
    for _ in range(2):  # in each run
        with pytest.warns(UserWarning, match=f"Pictures: {what} can't be shown.*({message})") as said:
            trainer, logger = run(tmp_path, callback, Foreign(), [(torch.rand(1, 8, 8), 0)] * 8, epochs=3)
        assert len([each for each in said if str(each.message).startswith("Pictures:")]) == 1
        assert trainer.global_step == 3
        assert logger.images == {}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Pictures(times=0), "`times` must be at least 1, got 0"),
        (lambda: Pictures(value_range=(1, 0)), "`value_range` must be a smaller and a larger number"),
        (lambda: Pictures(encode=3), "`encode` must be the path"),
    ],
)
def test_options_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_few_observations(tmp_path):
    _, logger = run(tmp_path, [Pictures(), LatentSpace()], small_vae(), images((1, 8, 8), rows=1))
    assert set(logger.images) == {"images/reconstructions", "images/samples", "images/traversals"}


def test_a_posterior_that_is_no_gaussian(tmp_path):
    class Other(Doubles):
        def encode(self, x):
            return Beta(x.flatten(1)[:, :2] + 1, torch.ones(2))

    _, logger = run(tmp_path, [Pictures(), LatentSpace()], Other(), constants())
    assert set(logger.images) == ALL


def test_a_mixture_for_a_prior(tmp_path):
    class Mixed(Doubles):
        def __init__(self):
            super().__init__()
            parts = Independent(Normal(torch.tensor([[-9.0, 0.0], [9.0, 0.0]]), 0.1), 1)
            self.prior = MixtureSameFamily(Categorical(torch.ones(2)), parts)

    _, logger = run(tmp_path, [Pictures(), LatentSpace()], Mixed(), constants())
    samples = cells(logger.last("images/samples"), 5, 10)
    assert set(samples.flatten().tolist()) == {0.0, 1.0}  # of each part some, nothing between


def test_batches_of_other_sizes_are_left_out(tmp_path):
    class Several(Doubles):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            super().validation_step(batch, batch_idx)

    sizes = [constants(), [torch.full((1, 20, 20), 0.5)] * 20]
    _, logger = run(
        tmp_path, [Pictures(), LatentSpace()], Several(), constants(), val=[DataLoader(data, 10) for data in sizes]
    )
    assert set(logger.images) == ALL
    mixed = [torch.stack(data[:10]) for data in sizes for _ in range(2)]
    _, logger = run(tmp_path, [Pictures(), LatentSpace()], Doubles(), constants(), val=DataLoader(mixed, None))
    assert logger.last("images/reconstructions").shape[1] < 10 * 34


def test_levels_of_a_foreign_module_are_its_own_affair(tmp_path):
    model = Doubles()
    model.levels = 3
    _, logger = run(tmp_path, Pictures(), model, constants())
    inputs, outputs = cells(logger.last("images/reconstructions"), 2, 10)
    assert torch.allclose(inputs, outputs, atol=0.01)
    assert inputs.max() > 0.9


def test_outputs_may_lie_in_memory_as_they_like(tmp_path):
    def turned(module, x):
        return module.decode(module.encode(x).mean).transpose(2, 3).expand(-1, 1, 16, 16)

    callback = Pictures(reconstruct=lambda module, x: turned(module, x)[:, 0], x=lambda batch: batch.flatten(1))
    _, logger = run(tmp_path, callback, Doubles(), constants())
    assert set(logger.images) == TAGS


def test_curves_of_small_numbers_fill_their_panels(tmp_path):
    data = [torch.randn(6, generator=torch.Generator().manual_seed(number)) / 100 for number in range(20)]
    _, logger = run(tmp_path, Pictures(), small_vae((6,), None), data)
    picture = logger.last("images/reconstructions").float()
    grey = ((picture - 150).abs().amax(2) < 8).nonzero()[:, 0] % 98
    assert grey.max() - grey.min() > 35


def test_half_precision(tmp_path):
    _, logger = run(tmp_path, [Pictures(), LatentSpace()], small_vae(), images((1, 8, 8)), precision="bf16-true")
    assert set(logger.images) == ALL


def test_latents_with_several_axes(tmp_path):
    class Maps(Doubles):
        def encode(self, x):
            return Normal(x[:, :, ::4, ::4], 0.5)

        def decode(self, z):
            assert z.shape[1:] == (1, 4, 4)
            return z.repeat_interleave(4, 2).repeat_interleave(4, 3)

    _, logger = run(tmp_path, [Pictures(), LatentSpace()], Maps(), constants())
    assert logger.last("images/traversals").shape[0] == 12 * 34


def test_sharded_parameters_are_left_alone(tmp_path, monkeypatch):
    from lightning.pytorch.strategies import SingleDeviceStrategy

    class FSDPStrategy(SingleDeviceStrategy):
        pass

    strategy = FSDPStrategy(device="cpu")
    _, logger = run(
        tmp_path,
        [Pictures(), LatentSpace()],
        small_vae(),
        images((1, 8, 8)),
        strategy=strategy,
        accelerator="auto",
        devices="auto",
    )
    assert set(logger.images) == ALL - TAGS


def test_pickle_and_yaml_defaults():
    for callback in (Pictures(), LatentSpace(), Dashboard()):
        assert type(pickle.loads(pickle.dumps(callback))) is type(callback)


def draw(rank, folder):
    callbacks = [Pictures(), LatentSpace(), Dashboard()]
    logger = TensorBoardLogger(folder, "board", version=0)
    run(folder, callbacks, small_vae(), images((1, 8, 8), rows=32), logger=logger, strategy="ddp", devices=2)


def test_two_processes_draw_once_and_wait_for_nobody(tmp_path):
    in_two_processes(draw, tmp_path)
    events = EventAccumulator(str(tmp_path / "board" / "version_0"), size_guidance={"images": 0}).Reload()
    assert set(events.Tags()["images"]) == ALL
    assert len(events.Images("images/samples")) == 2


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_either_lightning(tmp_path, package):
    lightning = import_module(package)
    methods = {name: value for name, value in vars(Doubles).items() if callable(value) and not name.startswith("__")}

    class Theirs(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

    for name, method in methods.items():
        setattr(Theirs, name, method)
    logger = import_module(f"{package}.loggers").TensorBoardLogger(tmp_path, "board", version=0)
    off = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = lightning.Trainer(
        max_epochs=1,
        logger=logger,
        callbacks=[Pictures(), LatentSpace(), Dashboard()],
        accelerator="cpu",
        log_every_n_steps=1,
        **off,
    )
    batches = DataLoader(constants(), 10)
    trainer.fit(Theirs(), batches, batches)
    assert set(EventAccumulator(logger.log_dir).Reload().Tags()["images"]) == ALL


def test_flags_of_the_command_line(capsys, monkeypatch):
    pytest.importorskip("jsonargparse", reason="the base install has no command line")
    from lightning_vae.main import main

    monkeypatch.setattr("sys.argv", ["train.py"])
    config = Path(__file__).parents[2] / "configs" / "digits.yaml"
    flags = [
        "--trainer.callbacks=Pictures",
        "--trainer.callbacks.encode=model.encode:0",
        "--trainer.callbacks.x=image",
        "--trainer.callbacks.value_range=[-1, 1]",
        "--trainer.callbacks+=LatentSpace",
        "--trainer.callbacks.label=2",
        "--trainer.callbacks+=Dashboard",
        '--trainer.callbacks.charts={"rate": ["kl", "val_kl"]}',
    ]
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", str(config), *flags, "--print_config"])
    assert end.value.code == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    for words in ("encode: model.encode:0", "x: image", "label: 2", "- val_kl"):
        assert words in printed


@pytest.mark.parametrize(("rows", "batches"), [([8, 8, 4], 3), ([100], 1), ([2] * 50, 50), ([10], float("inf"))])
def test_observations_come_from_everywhere(rows, batches):
    chosen = [
        (number, row) for number, count in enumerate(rows) for row in evenly_spaced_rows(10, count, number, batches)
    ]
    assert len(set(chosen)) == len(chosen) == 10
    places = [sum(rows[:number]) + row for number, row in chosen]
    assert places == sorted(places)
    assert places[-1] >= 0.85 * sum(rows)
    assert all(row < rows[number] for number, row in chosen)


def test_few_observations_are_taken_once():
    assert evenly_spaced_rows(10, 3, 0, 1) == [0, 1, 2]
    assert evenly_spaced_rows(10, 0, 0, 1) == []


class Conditional(LightningModule):
    """A VAE of another project, whose decoder needs the class too."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(64, 8), nn.Linear(4 + 3, 64)
        self.decodings = 0

    def encode(self, x):
        return self.encoder(x.flatten(1)).chunk(2, 1)

    def decode(self, z, y):
        return self.decoder(torch.cat([z, y], 1)).view(-1, 1, 8, 8)

    def training_step(self, batch, _):
        return self.decode(self.encode(batch[0])[0], batch[1]).square().mean()

    def validation_step(self, batch, _):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


@pytest.mark.parametrize("sanity", [0, 2])
def test_a_decoder_that_wants_a_class_is_named_once_and_drawing_stops(tmp_path, sanity):
    """Case `picture_that_fails_loses_an_epoch`."""

    class First(Callback):
        def on_train_start(self, *_):
            warned.extend(str(each.message) for each in said)

    warned, tried = [], []

    def decode(module, z):
        tried.append(1)
        return module.decode(z)

    data = [(torch.rand(1, 8, 8), torch.eye(3)[n % 3]) for n in range(16)]
    with pytest.warns(UserWarning, match=r"Pictures: .* can't be shown \(TypeError: .*decode\(\)") as said:
        trainer, logger = run(
            tmp_path, [Pictures(decode=decode), First()], Conditional(), data, epochs=3, num_sanity_val_steps=sanity
        )
    assert trainer.current_epoch == 3
    assert logger.images == {}
    assert len(tried) == 1
    assert any(each.startswith("Pictures:") for each in warned) == (sanity > 0)


@pytest.mark.parametrize("sanity", [0, 2])
def test_a_logger_that_fails_does_not_end_the_run(tmp_path, monkeypatch, sanity):
    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(MediaLogger, "__init__", fail)
    callbacks = [Pictures(), LatentSpace(), Dashboard()]
    with pytest.warns(UserWarning, match="can't be shown") as said:
        trainer, _ = run(tmp_path, callbacks, small_vae(), images((1, 8, 8)), num_sanity_val_steps=sanity)
    assert trainer.current_epoch == 2
    texts = [str(each.message) for each in said]
    assert {name for name in ("Pictures", "LatentSpace", "Dashboard") if any(f"{name}: the" in t for t in texts)} == {
        "Pictures",
        "LatentSpace",
        "Dashboard",
    }


def test_a_run_without_validation_is_told_that_nothing_is_drawn(tmp_path, caplog):
    callbacks = [Pictures(), LatentSpace(), Dashboard()]
    with caplog.at_level("INFO"):
        run(tmp_path, callbacks, small_vae(), images((1, 8, 8)), epochs=1, limit_val_batches=0)
    for name in ("Pictures", "LatentSpace", "Dashboard"):
        assert f"{name}: this run has no validation" in caplog.text


def test_a_run_without_a_logger_for_pictures_is_told_that_nothing_is_drawn(tmp_path, caplog):
    callbacks = [Pictures(), LatentSpace(), Dashboard()]
    with caplog.at_level("INFO"):
        run(tmp_path, callbacks, small_vae(), images((1, 8, 8)), epochs=1, logger=CSVLogger(tmp_path))
    for name in ("Pictures", "LatentSpace", "Dashboard"):
        assert f"{name}: no logger of this run takes pictures" in caplog.text


class OwnPriors(Doubles):
    """Its prior has each observation's own mean, far from the others', and hardly a width."""

    def __init__(self, joint=False):
        super().__init__()
        self.prior_net, self.joint = PriorNet(), joint

    def encode(self, x):
        flat = x.flatten(1)
        return Normal(torch.stack([flat.mean(1), -flat[:, 0]], dim=1), torch.tensor([0.5, 1.0]))

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.p = Normal(*self.prior_net(batch))
        if self.joint:
            self.p = Independent(self.p, 1)


class PriorNet(nn.Module):
    def forward(self, x):
        mean = x.flatten(1)[:, :2] / 2 + 0.25
        return mean, torch.full_like(mean, 1e-4)


PRIORS = {
    "a path": ({"prior": "prior_net", "second": "scale"}, False),
    "a callable": ({"prior": lambda module, batch: module.p}, False),
    "a joint one": ({"prior": lambda module, batch: module.p}, True),
}


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("loader", [{}, {"shuffle": True}], ids=["in order", "shuffled"])
@SHUFFLED
def test_a_conditional_prior_is_that_of_the_observations_shown(tmp_path, name, loader):
    places, joint = PRIORS[name]
    torch.manual_seed(0)
    val = DataLoader(constants(), 8, **loader)
    _, logger = run(tmp_path, Pictures(**places), OwnPriors(joint), constants(), val=val)
    for step in range(len(logger.steps("images/samples"))):
        chosen = cells(logger.images["images/reconstructions"][step][1], 2, 10)[0]
        samples = cells(logger.images["images/samples"][step][1], 5, 10)
        assert torch.allclose(samples, (chosen / 2 + 0.25).expand(5, 10), atol=0.005)
        traversal = logger.images["images/traversals"][step][1]
        expected = (chosen[:1] / 2 + 0.25).expand(10)
        assert any(torch.allclose(row, expected, atol=0.005) for row in cells(traversal, 2, 10)), "only one is visible"


def test_a_shared_prior_as_wide_as_the_batch_is_not_taken_for_one_of_each_row(tmp_path):
    prior = Normal(torch.tensor([0.5, 0.0]), torch.tensor([1e-4, 1.0]))
    data = constants()
    _, logger = run(tmp_path, Pictures(prior=prior), Doubles(), data, val=DataLoader(data, 2))
    assert torch.allclose(cells(logger.last("images/samples"), 5, 10), torch.tensor(0.5), atol=0.005)


def test_a_prior_with_only_a_density_has_no_samples_and_says_so_once(tmp_path, caplog):
    class Density:
        def log_prob(self, z):
            return Normal(0.0, 1.0).log_prob(z).sum(1)

    model = Doubles()
    model.density = Density()
    with caplog.at_level("INFO"):
        _, logger = run(tmp_path, Pictures(prior="density"), model, constants(), epochs=3)
    assert set(logger.images) == TAGS - {"images/samples"}
    said = [record.message for record in caplog.records if record.message.startswith("Pictures:")]
    assert said == [
        "Pictures: the prior, a Density, can't be sampled, so there are no `images/samples`. If it is a "
        "torch.distributions.Distribution elsewhere, say where with `prior=`."
    ]


def test_the_own_prior_of_each_batch(tmp_path):
    class Own(OwnPriors):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.prior = self.p

    _, logger = run(tmp_path, Pictures(), Own(), constants())
    chosen = cells(logger.last("images/reconstructions"), 2, 10)[0]
    assert torch.allclose(cells(logger.last("images/samples"), 5, 10)[0], chosen / 2 + 0.25, atol=0.005)


def test_the_prior_leaves_no_hook_and_no_trace(tmp_path):
    class Saves(Callback):
        def on_validation_batch_end(self, trainer, pl_module, *_):
            trainer.save_checkpoint(tmp_path / "amid.ckpt")
            hooks.append(len(pl_module.prior_net._forward_hooks))

    hooks, model, pictures = [], OwnPriors(), Pictures(prior="prior_net", second="scale")
    run(tmp_path, [pictures, Saves()], model, constants())
    assert not any(hooks)
    assert not model.prior_net._forward_hooks
    assert pickle.loads(pickle.dumps(pictures)).state_key == pictures.state_key
    with pytest.raises(ValueError, match=r"`prior`: OwnPriors has no submodule 'prior_nte'. Did you mean 'prior_net'"):
        run(tmp_path, Pictures(prior="prior_nte"), OwnPriors(), constants())


@pytest.mark.parametrize("rows", [3, 24])
def test_a_conditional_model_of_few_observations_is_drawn(tmp_path, rows):
    torch.manual_seed(0)
    model = VAE((1, 8, 8), 256, 3, condition=partial(Condition, classes=3))
    _, logger = run(tmp_path, Pictures(), model, images((1, 8, 8), rows=rows))
    assert set(logger.images) == TAGS | {"images/counterfactuals"}
