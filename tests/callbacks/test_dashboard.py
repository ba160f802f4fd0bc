import json
import re
import subprocess
import sys
import urllib.request
from functools import partial
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch import nn
from torch.utils.data import DataLoader

from lightning_vae import VAE, Gaussian
from lightning_vae.callbacks import CollapseDetector, Dashboard, FreeBits, KLAnnealing, LatentSpace, Linear, Pictures
from lightning_vae.callbacks.dashboard import hyperparameters_of, options_of
from lightning_vae.callbacks.drawing.media_logger import MediaLogger
from lightning_vae.datamodules import Digits
from tests.doubles import ForeignModule, loader, quiet_trainer

pytestmark = pytest.mark.skipif(not find_spec("sklearn"), reason="the base install has no digits")


def tensorboard(root, **options):
    return TensorBoardLogger(root, "runs", version="one", **{"default_hp_metric": False, **options})


def fit(root, callbacks, logger, model=None, data=None, **options):
    torch.manual_seed(0)
    model = model or VAE((1, 8, 8), 17, 4, beta=2.0)
    trainer = quiet_trainer(
        root, max_epochs=3, logger=logger, callbacks=callbacks, num_sanity_val_steps=1, log_every_n_steps=5, **options
    )
    if data is None:
        trainer.fit(model, datamodule=Digits(batch_size=100))
    else:
        trainer.fit(model, data, data)
    return trainer


def events(logger):
    return EventAccumulator(logger.log_dir, size_guidance={"images": 0, "tensors": 0}).Reload()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """One run with everything that there is, and its TensorBoard, which listens on a loopback port of its own."""
    root = tmp_path_factory.mktemp("run")
    callbacks = [KLAnnealing(Linear(fraction=0.5)), CollapseDetector(), Dashboard(), Pictures(), LatentSpace()]
    fit(root, callbacks, tensorboard(root))
    command = ["tensorboard.main", "--logdir", str(root), "--host", "127.0.0.1", "--port", "0", "--load_fast=false"]
    process = subprocess.Popen([sys.executable, "-m", *command], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        yield next(found[0] for line in process.stderr if (found := re.search(r"http://127.0.0.1:\d+/", line)))
    finally:
        process.terminate()
        process.communicate()


def fetch(address, path, body=None):
    request = urllib.request.Request(
        f"{address}data/{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read()


def test_tensorboard_serves_what_was_logged(address):
    assert json.loads(fetch(address, "runs")) == ["runs/one"]

    tags = json.loads(fetch(address, "plugin/scalars/tags"))["runs/one"]
    titles = ["beta", "rate", "distortion", "ELBO", "active_units", "mutual_information"]
    overview = {f"Overview/{title}" for title in titles}
    assert {tag for tag in tags if tag.startswith("Overview/")} == overview
    assert min(tags) in overview  # so that they are on the first screen

    def curve(tag):
        points = json.loads(fetch(address, f"plugin/scalars/scalars?run=runs%2Fone&tag={tag.replace('/', '%2F')}"))
        return [point[1:] for point in points]

    assert curve("Overview/ELBO") == curve("val/elbo")
    assert curve("Overview/rate") == curve("val/rate")
    assert [value for _, value in curve("Overview/beta")] == pytest.approx([18 / 21, 2.0, 2.0])
    assert len(curve("Overview/active_units")) == 3

    pictures = json.loads(fetch(address, "plugin/images/tags"))["runs/one"]
    assert set(pictures) == {
        *(f"images/{name}" for name in ("reconstructions", "samples", "interpolations", "traversals")),
        *(f"latent/{name}" for name in ("against_prior", "by_label", "rate_per_dimension", "variance_per_dimension")),
    }
    for tag in pictures:
        frames = json.loads(fetch(address, f"plugin/images/images?run=runs%2Fone&tag={tag}&sample=0"))
        assert [frame["step"] for frame in frames] == [13, 27, 41]
        image = Image.open(BytesIO(fetch(address, f"plugin/images/individualImage?{frames[-1]['query']}")))
        assert min(image.size) >= 16
        assert image.convert("L").getextrema()[1] > 60, tag

    layout = json.loads(fetch(address, "plugin/custom_scalars/layout"))
    [category] = layout["category"]
    charts = {chart["title"]: chart["multiline"]["tag"] for chart in category["chart"]}
    assert list(charts) == titles
    for patterns in charts.values():
        for pattern in patterns:
            assert [tag for tag in tags if re.match(pattern, tag)] == [pattern.rstrip("$").replace("\\", "")]

    texts = {
        name: json.loads(fetch(address, f"plugin/text/text?run=runs%2Fone&tag={name}%2Ftext_summary"))[0]["text"]
        for name in ("How_to_read", "objective", "data")
    }
    for tag in re.findall(r"<code>(\w+/\w+)</code>", texts["How_to_read"]):
        assert tag in {*tags, *pictures}
    assert texts["How_to_read"].count("<tr>") == 9  # one around it
    for words in ("beta · floored rate", "<code>Bernoulli</code>", "latent dimensions", "Linear(", "<code>Adam</code>"):
        assert words in texts["objective"]
    for words in ("<code>Digits</code>", "(1, 8, 8)", "1,350 observations", "150 observations"):
        assert words in texts["data"]

    histograms = json.loads(fetch(address, "plugin/histograms/tags"))["runs/one"]
    assert set(histograms) == {"latent/posterior_mean", "latent/posterior_scale"}

    experiment = json.loads(fetch(address, "plugin/hparams/experiment", body={"experimentName": ""}))
    # Few, as what was measured stands behind them.
    assert {each["name"] for each in experiment["hparamInfos"]} == {"beta", "latent_dim", "method", "setup"}
    assert {each["name"]["tag"] for each in experiment["metricInfos"]} == overview - {"Overview/beta"}

    assert json.loads(fetch(address, "plugin/projector/runs")) == ["runs/one"]
    [embedding] = json.loads(fetch(address, "plugin/projector/info?run=runs%2Fone"))["embeddings"]
    name = embedding["tensorName"]
    rows = fetch(address, f"plugin/projector/tensor?run=runs%2Fone&name={name}&num_rows=1000")
    assert torch.frombuffer(bytearray(rows), dtype=torch.float32).shape == (150 * 4,)
    labels = fetch(address, f"plugin/projector/metadata?run=runs%2Fone&name={name}&num_rows=1000").decode().split()
    assert len(labels) == 150
    assert set(labels) == set("0123456789")
    sprite = Image.open(BytesIO(fetch(address, f"plugin/projector/sprite_image?run=runs%2Fone&name={name}")))
    assert sprite.size == (13 * 8, 13 * 8)


class Foreign(LightningModule):
    """Somebody's VAE, which logs other names."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.kl_weight = 0.3

    def training_step(self, batch, batch_idx):
        kl = self.layer(batch).square().mean()
        self.log("kl", kl)
        return kl * self.kl_weight

    def validation_step(self, batch, batch_idx):
        self.log("val_kl", self.layer(batch).square().mean(), batch_size=len(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def test_a_foreign_module_says_its_names(tmp_path):
    charts = {"rate": ["kl", "val_kl"], "beta": ["knobs/kl_weight"], "distortion": []}
    callbacks = [Dashboard(charts, objective="**Mine**"), KLAnnealing(Linear(fraction=0.5), attribute="kl_weight")]
    logger = tensorboard(tmp_path)
    trainer = fit(tmp_path, callbacks, logger, Foreign(), loader())
    found = events(logger)
    assert found.Scalars("Overview/rate")[-1].value == pytest.approx(float(trainer.callback_metrics["val_kl"]))
    assert found.Scalars("Overview/beta")[-1].value == pytest.approx(0.3)
    assert {tag for tag in found.Tags()["scalars"] if tag.startswith("Overview")} == {"Overview/rate", "Overview/beta"}
    [objective] = found.Tensors("objective/text_summary")
    assert objective.tensor_proto.string_val[0] == b"**Mine**"
    [data] = found.Tensors("data/text_summary")
    assert b"12 observations" in data.tensor_proto.string_val[0]
    assert callbacks[0].charts["rate"] == ["kl", "val_kl"]
    assert "distortion" not in callbacks[0].charts


def test_nothing_of_the_sanity_check_and_of_other_runs(tmp_path):
    logger = tensorboard(tmp_path)
    trainer = fit(tmp_path, Dashboard(), logger)
    steps = [event.step for event in events(logger).Scalars("Overview/rate")]
    assert len(steps) == 3
    assert min(steps) > 0
    trainer.validate(trainer.lightning_module, datamodule=Digits(batch_size=100), verbose=False)
    assert len(events(logger).Scalars("Overview/rate")) == 3


@pytest.mark.parametrize("default", [True, False])
def test_hyperparameters_are_not_written_twice(tmp_path, default):
    logger = tensorboard(tmp_path, default_hp_metric=default)
    fit(tmp_path, Dashboard(), logger, ForeignModule(), loader())
    plugins = EventAccumulator(logger.log_dir).Reload().summary_metadata
    written = [
        value.tag
        for path in Path(logger.log_dir).glob("events.*")
        for event in EventFileLoader(str(path)).Load()
        for value in event.summary.value
        if value.tag.startswith("_hparams_")
    ]
    assert len(written) == len(set(written)) == 3
    metadata = plugins["_hparams_/experiment"].plugin_data.content
    assert (b"hp_metric" in metadata) == default


@pytest.mark.parametrize("logger", [False, CSVLogger])
def test_loggers_of_numbers_alone_get_nothing_twice(tmp_path, logger):
    trainer = fit(tmp_path, Dashboard(), logger and logger(tmp_path))
    assert not [name for name in trainer.callback_metrics if name.startswith("Overview")]
    if logger:
        [table] = tmp_path.rglob("metrics.csv")
        assert "Overview" not in table.read_text()


def test_runs_are_compared_by_few_columns():
    data = Digits(batch_size=7)
    method = [KLAnnealing(Linear(fraction=0.5)), FreeBits(0.1), Dashboard()]
    model = VAE((1, 8, 8), 17, 4, likelihood=partial(Gaussian, variance=0.3))
    assert hyperparameters_of(SimpleNamespace(datamodule=data, callbacks=method), model) == {
        "beta": 1.0,
        "latent_dim": 4,
        "likelihood/variance": 0.3,
        "method": "KLAnnealing(Linear(start=0.0, fraction=0.5)), FreeBits(Constant(value=0.1))",
        "setup": "VAE(likelihood=Gaussian, free_bits_per=dimension, free_bits_average=batch, compile=False) on "
        "Digits(batch_size=7, val_fraction=0.1, seed=0, held_out=())",
    }
    theirs = hyperparameters_of(SimpleNamespace(callbacks=[]), ForeignModule(beta=0.5))
    assert theirs == {"beta": 0.5, "optimizers": 1, "method": "none", "setup": "ForeignModule()"}


class Untold(ForeignModule):
    """Its optimizer has no learning rate, one of its layers has no size yet, and it was made of parts."""

    def __init__(self, table, part):
        super().__init__()
        self.later = nn.LazyLinear(3)
        self.table, self.part = table, part

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.layer.parameters(), 0.01)
        for group in optimizer.param_groups:
            group["lr"] = None
        optimizer.step = lambda closure: closure()
        return optimizer


@pytest.mark.filterwarnings("ignore:Attribute 'part' is an instance")
def test_what_is_not_known_is_no_error(tmp_path):
    class Sized(DataLoader):
        def size(self):
            return 12

    class Theirs(Callback):
        schedule = "somebody's"

    logger = tensorboard(tmp_path)
    data = Sized(loader().dataset, 4, generator=torch.Generator())
    fit(tmp_path, [Theirs(), Dashboard()], logger, Untold(torch.zeros(90, 90), nn.Linear(2, 2)), data)
    [objective] = events(logger).Tensors("objective/text_summary")
    for words in (b"learning rate none given", b"parameters not yet made"):
        assert words in objective.tensor_proto.string_val[0]
    [described] = events(logger).Tensors("data/text_summary")
    assert b"12 observations" in described.tensor_proto.string_val[0]
    texts = options_of(Untold(torch.zeros(90, 90), nn.Linear(2, 2)))
    assert texts["part"] == "Linear"
    assert len(texts["table"]) < 100


def test_options_are_what_an_object_was_made_with():
    assert options_of(Digits(batch_size=7)) == {"batch_size": 7, "val_fraction": 0.1, "seed": 0, "held_out": "()"}
    assert options_of(None) == {}

    net = {"class_path": "a.b.Net", "init_args": {"hidden": [2, 3]}}
    made = SimpleNamespace(hparams={"net": net, "rate": 0.1, "none": None, "_x": 1})
    assert options_of(made) == {"net": "Net", "net/hidden": "[2, 3]", "rate": 0.1}


def test_what_cant_be_shown_is_said_once_and_training_goes_on(tmp_path):
    class Odd(ForeignModule):
        @property
        def knobs(self):
            raise RuntimeError("not yet")

    logger = tensorboard(tmp_path)
    with pytest.warns(UserWarning, match="Dashboard: (objective|HParams) can't be shown .*not yet") as said:
        trainer = fit(tmp_path, Dashboard(charts={"rate": ["val_loss"]}), logger, Odd(), loader())
    assert len([each for each in said if str(each.message).startswith("Dashboard:")]) == 2
    assert trainer.current_epoch == 3
    found = events(logger)
    assert len(found.Scalars("Overview/rate")) == 3
    assert {"data/text_summary", "How_to_read/text_summary"} <= set(found.Tags()["tensors"])
    assert "objective/text_summary" not in found.Tags()["tensors"]


def test_a_full_disk_does_not_end_the_run(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(MediaLogger, "scalar", fail)
    with pytest.warns(UserWarning, match="Dashboard: Overview can't be shown .*No space left") as said:
        trainer = fit(
            tmp_path, Dashboard(charts={"rate": ["val_loss"]}), tensorboard(tmp_path), ForeignModule(), loader()
        )
    assert len([each for each in said if str(each.message).startswith("Dashboard:")]) == 1
    assert trainer.current_epoch == 3


def test_no_text_holds_an_address():
    class Options:
        def __init__(self, transform):
            self.transform = transform

    for transform in (lambda x: x, partial(len), object()):
        assert "0x" not in str(options_of(Options(transform)))
