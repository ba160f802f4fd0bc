import copy
import importlib
import signal
import weakref
import zipfile
from collections import UserList
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.distributions import Independent, Normal, kl_divergence
from torch.utils.checkpoint import checkpoint

from lightning_vae.callbacks import CollapseDetector, FreeBits
from lightning_vae.callbacks.reading.distribution_reader import DistributionReader
from lightning_vae.callbacks.reading.distributions import as_distribution
from tests.doubles import loader, quiet_trainer

MEAN, SECOND = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.25, 4.0]])
FORMS: dict[str, Any] = {
    "pair": (MEAN, SECOND),
    "list": ["reconstruction", "input", MEAN, SECOND],
    "dict": {"embedding": MEAN, "log_covariance": SECOND},
    "fields": SimpleNamespace(mu=MEAN, logvar=SECOND),
    "others": SimpleNamespace(centre=MEAN, spread=SECOND),
    "tuple": (Normal(MEAN, SECOND), torch.zeros(1, 2)),
    "dists": [Normal(MEAN, SECOND), Normal(0.0, 1.0)],
    "nested": {
        "latent": SimpleNamespace(dist=SimpleNamespace(mean=MEAN), logvar=(None, SECOND)),
        "a.b": MEAN,
        3: SECOND,
    },
}


class Says(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return self.value


class Model(LightningModule):
    posterior: Any
    prior: Any

    def __init__(self):
        super().__init__()
        self.net = nn.ModuleDict({name: Says(value) for name, value in FORMS.items()})
        self.fc_mu, self.fc_var = Says(MEAN), Says(SECOND)

    def step(self):
        for module in (*self.net.values(), self.fc_mu, self.fc_var):
            module(None)


def read(posterior, second="log_variance", model=None, chunk=None):
    model = model or Model()
    reader = DistributionReader(posterior, second, chunk)
    reader.listen(model)
    model.step()
    return reader.read(model, batch=None)


@pytest.mark.parametrize(
    "posterior",
    [
        "net.pair",
        ("net.list:2", "net.list:3"),
        ["net.list:-2", "net.list:-1"],
        ("net.dict:embedding", "net.dict:log_covariance"),
        ("net.fields:mu", "net.fields:logvar"),
        ("net.nested:latent.dist.mean", "net.nested:latent.logvar.-1"),
        ("net.nested:latent.dist.mean", "net.nested:3"),
        ("net.tuple:0.loc", "fc_var"),
        ("fc_mu", "fc_var"),
        lambda pl_module, batch: (pl_module.fc_mu.value, pl_module.fc_var.value),
    ],
)
def test_every_form_of_a_mean_and_a_second_parameter(posterior):
    [distribution] = read(posterior)
    assert isinstance(distribution, Normal)
    assert torch.equal(distribution.mean, MEAN)
    torch.testing.assert_close(distribution.variance, SECOND.exp())


@pytest.mark.parametrize(
    "posterior", ["net.tuple:0", "net.tuple", lambda *_: FORMS["tuple"], lambda *_: [FORMS["tuple"]]]
)
def test_a_distribution_in_a_tuple(posterior):
    assert read(posterior) == [FORMS["tuple"][0]]


def test_of_two_distributions_in_an_output_one_must_be_named():
    with pytest.raises(
        ValueError, match=r"a list of 2 \(a Normal, a Normal\)\. Specify which one .* `posterior='path:index'`"
    ):
        read("net.dists")
    assert read("net.dists:0") == FORMS["dists"][:1]


@pytest.mark.parametrize(
    ("second", "scale"),
    [
        ("log_variance", (SECOND / 2).exp()),
        ("variance", SECOND.sqrt()),
        ("scale", SECOND),
        ("log_scale", SECOND.exp()),
    ],
)
def test_second(second, scale):
    torch.testing.assert_close(read("net.pair", second)[0].stddev, scale)


def test_the_modules_own_posterior():
    model = Model()
    model.posterior = Independent(Normal(MEAN, SECOND), 1)
    [distribution] = read(None, model=model)
    assert isinstance(distribution, Normal)
    assert distribution.batch_shape == (1, 2)


def test_what_is_read_is_forgotten_and_hooks_are_removed():
    model = Model()
    reader = DistributionReader("net.pair")
    reader.listen(model)
    reader.listen(model)
    assert len(model.net["pair"]._forward_hooks) == 1
    model.step()
    reader.read(model, None)
    with pytest.raises(ValueError, match=r"'net\.pair' was not called in this step"):
        reader.read(model, None)
    reader.detach()
    assert not model.net["pair"]._forward_hooks


# ---- one tensor


@pytest.mark.parametrize(
    ("shape", "chunk", "latents"),
    [
        ((3, 4), 1, (3, 2)),
        ((3, 4), -1, (3, 2)),
        ((3, 2), 1, (3, 1)),
        ((3, 4, 5, 6), 1, (3, 2, 5, 6)),
        ((3, 5, 4), -1, (3, 5, 2)),
        ((3, 5, 2), -1, (3, 5)),
        ((3, 5, 2), 2, (3, 5)),
    ],
)
@pytest.mark.parametrize("way", ["path", "part", "callable", "own"])
def test_chunk(shape, chunk, latents, way):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    model = Model()
    model.posterior = tensor
    model.net["chunked"], model.net["beside"] = Says(tensor), Says({"moments": tensor})
    places = {"path": "net.chunked", "part": "net.beside:moments", "callable": lambda *_: tensor, "own": None}
    [distribution] = read(places[way], "log_scale", model, chunk)
    mean, log_scale = (half.reshape(latents) for half in tensor.chunk(2, chunk))
    assert isinstance(distribution, Normal)
    assert torch.equal(distribution.mean, mean)
    torch.testing.assert_close(distribution.stddev, log_scale.exp())


@pytest.mark.parametrize("chunk", [0, 1.0, "1"])
def test_invalid_chunk(chunk):
    with pytest.raises(ValueError, match=r"`chunk` must be the axis .* got "):
        DistributionReader("encoder", chunk=chunk)
    with pytest.raises(ValueError, match=r"`chunk` splits one tensor; with the pair .* leave it out"):
        DistributionReader(("a", "b"), chunk=1)


# ---- several posteriors


class Views(LightningModule):
    """A module that looks at each half of a batch by itself."""

    def __init__(self):
        super().__init__()
        self.mean, self.second = nn.Linear(2, 3), nn.Linear(2, 3)
        self.views, self.seconds = 2, 2

    def step(self, batch, again=lambda module, x: module(x)):
        means = [again(self.mean, part) for part in batch[: self.views]]
        seconds = [again(self.second, part) for part in batch[: self.seconds]]
        return sum(means).sum() + sum(seconds).sum()


def test_each_call_of_a_submodule_gives_a_posterior():
    model, batch = Views(), torch.randn(2, 5, 2)
    nn.init.constant_(model.second.bias, 9.0)  # a scale is positive
    reader = DistributionReader(("mean", "second"), "scale")
    reader.listen(model)
    model.step(batch)
    posteriors: Any = reader.read(model, batch)
    assert [torch.equal(each.loc, model.mean(part)) for each, part in zip(posteriors, batch, strict=True)] == [True] * 2
    assert [torch.equal(each.scale, model.second(part)) for each, part in zip(posteriors, batch, strict=True)] == [
        True
    ] * 2


def test_a_pair_whose_parts_are_called_unequally_often():
    model = Views()
    model.seconds = 1
    reader = DistributionReader(("mean", "second"))
    reader.listen(model)
    model.step(torch.randn(2, 5, 2))
    with pytest.raises(ValueError, match="'mean' was called 2 times in this step and 'second' 1 times"):
        reader.read(model, None)


@pytest.mark.parametrize(
    ("value", "number"),
    [
        ((MEAN, SECOND), 1),
        ([(MEAN, SECOND)], 1),
        ([(MEAN, SECOND), (SECOND, MEAN), (MEAN, SECOND)], 3),
        (FORMS["dists"], 2),
        (tuple(FORMS["dists"]), 2),
        ([Normal(0.0, 1.0), (MEAN, SECOND)], 2),
        ((Normal(0.0, 1.0), MEAN), 1),
    ],
)
@pytest.mark.parametrize("way", ["callable", "own"])
def test_a_list_of_posteriors_is_several(value, number, way):
    model = Model()
    model.posterior = value
    assert len(read(None if way == "own" else lambda *_: value, model=model)) == number


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_what_the_backward_pass_computes_again_does_not_count(use_reentrant):
    model, batch, calls = Views(), torch.randn(2, 5, 2, requires_grad=True), []
    model.mean.register_forward_hook(lambda *_: calls.append(1))
    reader = DistributionReader(("mean", "second"))
    reader.listen(model)
    model.step(
        batch, again=lambda module, x: checkpoint(lambda x: module(x).sin(), x, use_reentrant=use_reentrant)
    ).backward()
    assert len(calls) == 4
    assert len(reader.read(model, batch)) == 2


def test_no_output_of_another_step_is_kept():
    model = Views()
    outputs: list[Any] = []
    model.mean.register_forward_hook(lambda *args: outputs.append(weakref.ref(args[-1])))
    reader = DistributionReader(("mean", "second"))
    alive = []
    for listens in (True, True, False, False, True):
        reader.listen(model) if listens else reader.forget()
        model.step(torch.randn(2, 5, 2))
        alive.append(sum(output() is not None for output in outputs))
    assert alive == [2, 2, 0, 0, 2]
    reader.detach()
    assert not any(output() is not None for output in outputs)


def test_a_copy_of_a_watched_module_is_not_watched():
    model, batch = Views(), torch.randn(2, 5, 2)
    reader = DistributionReader(("mean", "second"))
    reader.listen(model)
    twin = copy.deepcopy(model)
    twin.step(batch)
    model.step(batch)
    assert len(reader.read(model, batch)) == 2


# ---- what can't be read


@pytest.mark.parametrize(
    ("posterior", "message"),
    [
        ("net.pairs", "Model has no submodule 'net.pairs'. Did you mean 'net.pair'"),
        ("xyzzy", "It has 'net', 'fc_mu', 'fc_var', 'net.pair'"),
        (("fc_mu", "fc_vr"), "Did you mean 'fc_var'"),
    ],
)
def test_a_path_that_leads_nowhere(posterior, message):
    model = Model()
    with pytest.raises(ValueError, match=message):
        DistributionReader(posterior).listen(model)
    assert not model.fc_mu._forward_hooks


@pytest.mark.parametrize(
    ("posterior", "message"),
    [
        ("fc_mu", r"got a tensor of shape \(1, 2\).*`chunk=1`"),
        ("net.list", "a list of 4"),
        ("net.dict:mean", "a dict with the keys 'embedding', 'log_covariance' has no 'mean'"),
        ("net.list:7", "a list of 4 .* has no '7'"),
        ("net.fields:mean", "a SimpleNamespace with the fields 'mu', 'logvar' has no 'mean'"),
        ("net.others", "got a SimpleNamespace with the fields 'centre', 'spread'. Pick a part of it"),
        ("net.nested:latent.logvar.2", r"a tuple of 2 .* has no '2'"),
        (
            "net.nested:latent.dist.mean.0",
            r"a tensor of shape \(1, 2\) has no '0'. To split a tensor into halves, use `chunk=`",
        ),
        (None, "`Model.posterior`, which does not exist"),
    ],
)
def test_an_output_that_is_no_posterior(posterior, message):
    with pytest.raises(ValueError, match=message):
        read(posterior)


class Silent(LightningModule):
    def __init__(self):
        super().__init__()
        self.encoder, self.latent_mu, self.inner = nn.Linear(2, 2), nn.Linear(2, 2), Model()

    def step(self):
        self.latent_mu(self.encoder.forward(torch.zeros(1, 2)))


def test_a_submodule_that_is_not_called():
    with pytest.raises(
        ValueError, match=r"'encoder' was not called .* not at `encoder\.forward\(x\)`.*'latent_mu'"
    ) as error:
        read("encoder", model=Silent())
    assert "compile" not in str(error.value)


def test_what_is_called_posterior_and_is_none():
    model = Model()
    model.posterior = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"reads `Model\.posterior`, which is a Linear\. Name the .*'posterior'"):
        read(None, model=model)


@pytest.mark.parametrize("path", ["", "inner"])
def test_a_lightning_module_that_is_not_called(path):
    message = rf"'{path}' was not called .* Lightning calls its .* not call the module's own `forward`"
    with pytest.raises(ValueError, match=message):
        read(path, model=Silent())


@pytest.mark.parametrize("path", ["", "inner"])
def test_a_lightning_module_that_is_called(path):
    model = Silent()
    model.inner = Views()
    model.inner.forward = lambda _: (MEAN, SECOND)
    model.forward = lambda x: model.inner(x)
    model.step = lambda: model(None)
    assert torch.equal(read(path, model=model)[0].mean, MEAN)


@pytest.mark.parametrize("posterior", [3, ("a", "b", "c"), (1, 2), []])
def test_invalid_posterior(posterior):
    with pytest.raises(ValueError, match="`posterior` must be None, a submodule's path"):
        DistributionReader(posterior)


def test_invalid_second():
    with pytest.raises(ValueError, match=r"`second` must be one of 'log_variance'.* got 'logvar'"):
        DistributionReader("encoder", second="logvar")


# ---- the callbacks that read, in a Trainer


class Steps:
    """A module of somebody else's, whose encoder says (2 + x_0, 0) with variance 1 and learns nothing."""

    def __init__(self, returns="loss", fails=None):
        super().__init__()
        self.encoder = nn.Linear(2, 4)
        with torch.no_grad():
            self.encoder.weight.copy_(torch.eye(4, 2) * torch.tensor([1.0, 0.0]))
            self.encoder.bias.copy_(torch.tensor([2.0, 0.0, 0.0, 0.0]))
        self.free_bits = 0.0
        self.returns, self.fails = returns, fails
        self.automatic_optimization = returns != "manual"
        self.outputs: list[Any] = []
        self.alive: list[int] = []

    def encode(self, batch):
        self.alive.append(sum(output() is not None for output in self.outputs))
        output = self.encoder(batch)
        self.outputs.append(weakref.ref(output))
        return output.square().mean()

    def training_step(self, batch, batch_idx):
        loss = self.encode(batch)
        if self.fails in ("training_step", "clear") and batch_idx == 1:
            if self.fails == "clear":
                self.trainer.callbacks.clear()
            raise RuntimeError("on purpose")
        if self.fails == "interrupt" and batch_idx == 1:
            raise KeyboardInterrupt
        if self.returns == "manual":
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
            return None
        return {"loss": loss, "dict": {"loss": loss, "other": 1}, "none": None}[self.returns]

    def validation_step(self, batch, batch_idx):
        if self.fails == "validation_step" and not self.trainer.sanity_checking:
            raise RuntimeError("on purpose")
        self.encode(batch)

    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), 0.0) for _ in range(1 if self.automatic_optimization else 2)]


class Foreign(Steps, LightningModule):
    pass


class Fails(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if pl_module.fails == "callback":
            raise RuntimeError("on purpose")


def fit(root, model, *callbacks, package="lightning.pytorch", validates=True, **options):
    trainer = importlib.import_module(package).Trainer(
        **{
            "default_root_dir": root,
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "callbacks": list(callbacks),
            "logger": False,
            "log_every_n_steps": 1,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **options,
        }
    )
    trainer.fit(model, loader(), loader() if validates else None)
    return trainer


def readers():
    return [
        CollapseDetector("encoder", chunk=1, name="view"),
        FreeBits(0.5, posterior="encoder", chunk=1),
    ]


def check(trainer):
    metrics = trainer.callback_metrics
    assert (metrics["latent_view/active_units"], metrics["latent/at_floor"]) == (1, 1)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("returns", ["loss", "dict", "none", "manual"])
@pytest.mark.parametrize("validates", [True, False])
def test_nothing_is_taken_for_granted_of_a_step(tmp_path, returns, validates):
    check(fit(tmp_path, Foreign(returns), *readers(), validates=validates))


@pytest.mark.parametrize("number", [1, 2])
def test_any_logger(tmp_path, number):
    loggers = [CSVLogger(tmp_path, name=str(index)) for index in range(number)]
    check(fit(tmp_path, Foreign(), *readers(), logger=loggers))
    for logger in loggers:
        assert {"latent_view/active_units", "latent/at_floor"} <= set(logger.experiment.metrics_keys)


def test_the_other_lightning(tmp_path):
    package = importlib.import_module("pytorch_lightning")
    model = type("Foreign", (Steps, package.LightningModule), {})()
    check(fit(tmp_path, model, *readers(), package="pytorch_lightning"))


ENDS: list[tuple[str, type[BaseException]]] = [
    ("training_step", RuntimeError),
    ("validation_step", RuntimeError),
    ("clear", RuntimeError),
    ("callback", RuntimeError),
    ("interrupt", SystemExit),
]


@pytest.mark.parametrize(
    ("fails", "error", "validates"),
    [(*end, validates) for end in ENDS for validates in (True, False) if validates or end[0] != "validation_step"],
)
def test_nothing_is_left_however_a_run_ends(tmp_path, fails, error, validates):
    model, callbacks = Foreign(fails=fails), readers()
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(error):
            fit(tmp_path, model, *callbacks, Fails(), validates=validates)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(output() is not None for output in model.outputs)
    model.fails = None
    model.train()  # Lightning leaves it as it was when validation failed
    check(fit(tmp_path, model, *callbacks, validates=validates))
    check(fit(tmp_path, Foreign(), *callbacks, validates=validates))


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"log_every_n_steps": 50}])
def test_no_step_lives_on(tmp_path, options):
    alive = []
    for callbacks in ([], readers()):
        model = Foreign()
        fit(tmp_path, model, *callbacks, max_epochs=2, val_check_interval=2, **options)
        alive.append(model.alive)
    assert alive[0] == alive[1]
    assert len(alive[0]) == 2 * (6 + 3 * 6) + 2


class Late(Foreign):
    def on_train_start(self):
        self.encoder = copy.deepcopy(self.encoder)


def test_a_module_that_builds_itself_when_training_starts(tmp_path):
    check(fit(tmp_path, Late(), *readers(), validates=False))


def whole(model):
    return torch.compile(model, backend="eager")


def encoder(model):
    model.encoder.compile(backend="eager")
    return model


@pytest.mark.parametrize("compiled", [whole, encoder])
def test_compiled(tmp_path, compiled):
    model = compiled(Quiet())
    check(fit(tmp_path, model, *readers()))
    check(fit(tmp_path, model, *readers()))


class Quiet(Foreign):
    def encode(self, batch):
        return self.encoder(batch).square().mean()


def test_compiled_before_anybody_watched(tmp_path):
    torch.compiler.reset()
    model = whole(Quiet())
    fit(tmp_path, model)
    with pytest.raises(ValueError, match=r"'encoder' was not called .* call `torch\.compiler\.reset\(\)` before you"):
        fit(tmp_path, model, FreeBits(0.5, posterior="encoder", chunk=1))
    torch.compiler.reset()
    check(fit(tmp_path, model, *readers()))


@pytest.mark.filterwarnings("ignore:FreeBits", "ignore:.*is an instance of `nn.Module`")
def test_a_module_that_is_saved_as_an_object_takes_no_hook_along(tmp_path):
    class Saves(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    class Theirs(LightningModule):
        def __init__(self, encoder):
            super().__init__()
            self.save_hyperparameters()
            self.encoder, self.free_bits = encoder, 0.0

        def training_step(self, batch, batch_idx):
            return self.encoder(batch).square().sum() * (1 + self.free_bits)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    watching = {"posterior": "encoder", "chunk": 1}
    for callbacks in ([Saves(), FreeBits(0.5, **watching), CollapseDetector(**watching)],
                      [CollapseDetector(**watching), FreeBits(0.5, **watching), Saves()]):  # fmt: skip
        trainer = quiet_trainer(tmp_path, callbacks=callbacks, max_epochs=2, log_every_n_steps=1)
        trainer.fit(Theirs(nn.Linear(2, 4)), loader())
        assert "latent/at_floor" in trainer.callback_metrics
        for path in tmp_path.glob("*.ckpt"):
            with zipfile.ZipFile(path) as archive:
                (pickled,) = [archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")]
            assert b"encoder" in pickled
            assert b"DistributionReader" not in pickled


@pytest.mark.parametrize(
    "output",
    [
        (torch.randn(4, 2), torch.rand(())),
        (torch.randn(4, 2), torch.rand(4, 1)),
        (torch.randn(4, 3, 2), torch.randn(1, 4, 2)),
        (torch.randn(4, 2), torch.rand(4)),
    ],
    ids=["z and kl", "z and kl of each", "recurrent", "z and a vector"],
)
def test_two_tensors_that_are_no_pair_are_refused(output):
    if output[1].ndim:
        with pytest.raises(ValueError, match="must have the same shape, got a tuple of 2"):
            as_distribution(output)
    reader = DistributionReader("encoder")
    model = LightningModule()
    model.encoder = Says(output)
    reader.listen(model)
    model.encoder(None)
    with pytest.raises(ValueError, match="must have the same shape, got a tuple of 2"):
        reader.read(model, None)


def test_a_step_that_skips_its_batch_has_none():
    reader, model = DistributionReader("fc_mu", chunk=1), Model()
    reader.listen(model)
    with pytest.raises(ValueError, match="was not called in this step"):
        reader.read(model, None)
    for calls in (1, 0, 1):
        reader.listen(model)
        for _ in range(calls):
            model.fc_mu(None)
        assert len(reader.read(model, None)) == calls


def test_a_callable_takes_no_random_numbers_from_training():
    reader, model = DistributionReader(lambda module, batch: (torch.randn(2, 2), torch.zeros(2, 2))), Model()
    state = torch.random.get_rng_state()
    reader.read(model, None)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_small_rate_of_half_precision_is_not_rounded_again(dtype: torch.dtype) -> None:
    mean, log_variance = (0.05 * torch.randn(100, 2)).to(dtype).split(1, dim=1)
    exact = 0.5 * (mean.double() ** 2 + log_variance.double().exp() - 1 - log_variance.double())
    [posterior] = DistributionReader().read(SimpleNamespace(posterior=(mean, log_variance)), None)
    rate = kl_divergence(posterior, Normal(0.0, 1.0))
    torch.testing.assert_close(rate.double(), exact, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("paths", [UserList(["mean", "second"]), ["mean", "second"]])
def test_any_sequence_of_paths(paths):
    """Case `sequences_of_hydra`."""
    model, batch = Views(), torch.randn(2, 5, 2)
    reader = DistributionReader(paths)
    assert type(reader.key) is list
    assert reader.key == ["mean", "second"]
    reader.listen(model)
    model.step(batch)
    assert [each.mean.shape for each in reader.read(model, batch)] == [(5, 3)] * 2


@pytest.mark.parametrize("wrap", [UserList, tuple])
def test_any_sequence_of_parameters(wrap):
    pair = wrap([torch.zeros(5, 3), torch.zeros(5, 3)])
    assert read(lambda *_: pair)[0].stddev.equal(torch.ones(5, 3))
    assert len(read(lambda *_: wrap([pair, pair]))) == 2


def test_of_several_captures_in_a_step_the_first_counts():
    """Some optimizers compute the loss several times in a step, with other weights each time."""
    scales = iter([1.0, 2.0, 3.0])
    reader = DistributionReader(lambda module, batch: Normal(batch, next(scales)))
    model, batch = Views(), torch.zeros(5, 3)
    for expected in (1.0, 2.0):
        reader.listen(model, batch)
        reader.capture(model)
        reader.capture(model)
        assert [float(each.scale.unique()) for each in reader.read(model, batch)] == [expected]


def test_a_text_is_no_pair_of_paths():
    with pytest.raises(ValueError, match="`posterior` must be"):
        DistributionReader(["mean", "second", "third"])


@pytest.mark.parametrize(("second", "value"), [("scale", -1.3), ("scale", 0.0), ("variance", -1.3)])
def test_a_second_parameter_that_is_not_positive(second, value):
    pair = torch.zeros(5, 3), torch.full((5, 3), value)
    with pytest.raises(ValueError, match=rf"{second} must be positive, got values down to {value:.4g}.*log_variance"):
        read(lambda *_: pair, second)
    assert as_distribution(pair, second).scale.isnan().all()  # unchecked it gives no rate, not a wrong one


def test_a_distribution_with_a_negative_scale():
    with pytest.raises(ValueError, match="scale must be positive, got values down to -2"):
        read(lambda *_: Normal(torch.zeros(5, 3), -2 * torch.ones(5, 3), validate_args=False))


@pytest.mark.parametrize(
    ("function", "key"), [(max, "max"), (partial(max, 1), "max"), (type("Read", (), {"__call__": None})(), "Read")]
)
def test_a_key_is_a_name_and_no_address(function, key):
    assert DistributionReader(function).key == key
