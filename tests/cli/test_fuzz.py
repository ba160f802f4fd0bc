"""Wrong configs by the hundred: each must end in one readable message and exit code 2, or in a run.

The default run tries a few drawn configs and one wrong value of some options, the exhaustive tests 30 configs and one
value of each option; with `--hypothesis-profile=thorough` they try 1,300 configs and all values.
"""

import contextlib
import copy
import io
import json
import logging
import sys
import warnings

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_vae.cli.vae_cli import VAECLI

THOROUGH = settings.default.max_examples >= 1300

LINEAR = {"class_path": "Linear", "init_args": {"steps": 2}}
BASE = {
    "seed_everything": 0,
    "data": {"class_path": "Gaussian", "init_args": {"eigenvalues": [2.0, 1.0], "size": 16, "batch_size": 8}},
    "model": {
        "class_path": "VAE",
        "init_args": {
            "latent_dim": 2,
            "beta": 1.0,
            "free_bits": 0.1,
            "encoder": {"class_path": "MLPEncoder", "init_args": {"hidden": [3]}},
            "decoder": {"class_path": "MLPDecoder", "init_args": {"hidden": [3]}},
            "likelihood": {"class_path": "Gaussian", "init_args": {"variance": 0.5}},
        },
    },
    "optimizer": {"class_path": "Adam", "init_args": {"lr": 0.001}},
    "trainer": {
        "max_steps": 1, "limit_val_batches": 1, "num_sanity_val_steps": 1, "accelerator": "cpu", "logger": False,
        "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
        "log_every_n_steps": 1,
        "callbacks": [
            {"class_path": "KLAnnealing", "init_args": {"schedule": LINEAR}},
            {"class_path": "CollapseDetector", "init_args": {"warmup": 1, "patience": 1}},
        ],
    },
}  # fmt: skip


class FitAlone(VAECLI):
    """The command line with the parser of `fit` alone, made once: most of a case's time would be the parsers'."""

    made = None

    @staticmethod
    def subcommands():
        return {"fit": VAECLI.subcommands()["fit"]}

    def setup_parser(self, *arguments):
        if not FitAlone.made:
            super().setup_parser(*arguments)
            FitAlone.made = dict(vars(self))
        vars(self).update(FitAlone.made)


def outcome(*arguments: str) -> tuple[int, str]:
    """The exit code of `fit` and what it says; whatever else is raised is the test's failure."""
    said = io.StringIO()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            FitAlone(["fit", *arguments])
        except SystemExit as exit_:
            return int(exit_.code), said.getvalue()
    return 0, said.getvalue()


def refused(code: int, said: str, *names: str) -> None:
    assert code == 2, said
    one_message(said, *names)


def refused_or_diverged(code: int, said: str) -> None:
    """A number within its range may still be too large for the model, which only the loss can tell: exit code 1."""
    assert code == 2 or (code == 1 and "is not a finite number" in said), said
    one_message(said)


def one_message(said: str, *names: str) -> None:
    assert said.strip().startswith("error: ")
    assert "Traceback" not in said
    assert len(said) < 1000
    assert not names or any(name in said for name in names), said


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))


def test_the_base_is_right():
    assert outcome("--config=base.yaml")[0] == 0


# ---- every numeric option, with values that are wrong

# What an option goes by in the message of another's code.
SAID_OTHERWISE = ("target", "A length", "Trainer", "memory", "`per`", "learning rate", "beta parameter", "torch_xla")
NOT_FINITE = (".nan", ".inf", "-.inf", "1e400")
NO_COUNT = ("0", "-1", "1.5", "null", "x", "[]", "true", str(10**30), *NOT_FINITE)
NOT_POSITIVE = ("0", "-1", "x", "[]", "1e39", *NOT_FINITE)
NEGATIVE = ("-1", "x", "[]", "1e39", *NOT_FINITE)
NO_FRACTION = ("0", "1", "-0.5", "1.5", "null", "x", *NOT_FINITE)

DIGITS = ("--data=Digits", "--model.likelihood=Bernoulli")
CONV = (*DIGITS, "--model.encoder=ConvEncoder", "--model.decoder=ConvDecoder")
IMAGES = ("--data=Images", "--data.root=.", "--data.size=8", *DIGITS[1:])


def appended(name: str, *options: str) -> tuple[str, ...]:
    return (f"--trainer.callbacks+={name}", *(f"--trainer.callbacks.{option}" for option in options))


def annealing(schedule: str, *options: str) -> tuple[str, ...]:
    return appended("KLAnnealing", f"schedule={schedule}", *(f"schedule.{option}" for option in options))


TARGET = appended("TargetRate", "nats=1")
_CALLBACK = "trainer.callbacks"
KNOWN_BAD = [
    (("--config=base.yaml",), "seed_everything", ("-1", str(2**32), "1.5", "x", "null", *NOT_FINITE)),
    *(((), f"data.{name}", NO_COUNT) for name in ("batch_size", "size")),
    ((), "data.eigenvalues", ("[]", "[0]", "[-1, 1]", "[.nan]", "[.inf]", "x", "null", "3")),
    (DIGITS, "data.val_fraction", NO_FRACTION),
    (DIGITS, "data.batch_size", NO_COUNT),
    *((IMAGES, f"data.{name}", NO_FRACTION) for name in ("val_fraction", "test_fraction")),
    (IMAGES, "data.size", ("0", "-1", "[1]", "[1, 2, 3]", "[0, 4]", "x", "null", *NOT_FINITE)),
    (IMAGES, "data.channels", ("0", "2", "-1", "x", "null")),
    (IMAGES, "data.memory_budget", NEGATIVE),
    (IMAGES, "data.num_workers", ("-1", "1.5", "x", "null")),
    ((), "model.latent_dim", NO_COUNT),
    *(((), f"model.{name}", NEGATIVE) for name in ("beta", "free_bits")),
    ((), "model.free_bits_per", ("0", "-1", "3", "x", "null", "[]")),
    ((), "model.free_bits_average", ("x", "null", "0")),
    *(((), f"model.{name}", ("[3]", "7", "x")) for name in ("shape", "levels")),
    *(((), f"model.{name}.hidden", ("[0]", "[-1]", "[1.5]", "[.nan]", "x", "null", f"[{10**30}]"))
      for name in ("encoder", "decoder")),
    *((CONV, f"model.{name}.hidden", NO_COUNT) for name in ("encoder", "decoder")),
    *((CONV, f"model.{name}.channels", ("[]", "[0]", "[-1]", "x", "null", "3")) for name in ("encoder", "decoder")),
    ((), "model.likelihood.variance", NOT_POSITIVE),
    *(((), f"optimizer.{name}", ("-1", "x", "null", *NOT_FINITE)) for name in ("lr", "eps", "weight_decay")),
    (("--lr_scheduler=StepLR",), "lr_scheduler.step_size", ("0", "1.5", "x", "null")),
    (("--lr_scheduler=CosineAnnealingLR",), "lr_scheduler.T_max", ("0", "1.5", "x", "null")),
    ((), "optimizer.betas", ("[2, 2]", "[-1, 0.9]", "x", "null", "3")),
    *(((), f"trainer.{name}", ("-7", "1.5", "x", "[]", str(10**30), *NOT_FINITE))
      for name in ("max_epochs", "max_steps", "min_epochs", "min_steps", "log_every_n_steps", "num_sanity_val_steps",
                   "reload_dataloaders_every_n_epochs")),
    *(((), f"trainer.{name}", NO_COUNT)
      for name in ("accumulate_grad_batches", "num_nodes") ),
    ((), "trainer.check_val_every_n_epoch", ("0", "-1", "1.5", "x", *NOT_FINITE)),
    ((), "trainer.val_check_interval", ("0", "-1", "x", *NOT_FINITE)),
    ((), "trainer.gradient_clip_val", NEGATIVE),
    *(((), f"trainer.{name}", ("-1", "1.5", "x", *NOT_FINITE))
      for name in ("limit_train_batches", "limit_val_batches", "overfit_batches")),
    ((), "trainer.devices", ("0", "-5", "x", "[]")),
    ((), "trainer.precision", ("3", "x", "[]")),
    ((), "trainer.accelerator", ("x", "3", "tpu")),
    ((), "trainer.strategy", ("x", "3")),
    *((annealing(name, "steps=2"), f"{_CALLBACK}.schedule.{option}", ("x", "1e39", *NOT_FINITE))
      for name in ("Linear", "Cosine", "Sigmoid") for option in ("start", "stop")),
    (annealing("Sigmoid", "steps=2"), f"{_CALLBACK}.schedule.steepness", NOT_POSITIVE),
    (annealing("Linear"), f"{_CALLBACK}.schedule.steps", NO_COUNT),
    (annealing("Linear"), f"{_CALLBACK}.schedule.epochs", NOT_POSITIVE),
    (annealing("Linear"), f"{_CALLBACK}.schedule.fraction", ("0", "-1", "1.5", "x", *NOT_FINITE)),
    (annealing("Cyclical"), f"{_CALLBACK}.schedule.period_steps", NO_COUNT),
    (annealing("Cyclical", "period_steps=2"), f"{_CALLBACK}.schedule.ratio", ("0", "-1", "1.5", "null", *NOT_FINITE)),
    (annealing("Cyclical", "period_steps=2"), f"{_CALLBACK}.schedule.cycles", ("0", "-1", "1.5", "x")),
    (annealing("Constant"), f"{_CALLBACK}.schedule.value", ("x", "null", "1e39", *NOT_FINITE)),
    (annealing("Staged", "values=[0, 1]"), f"{_CALLBACK}.schedule.at_steps", ("[]", "[0]", "[-1]", "[1, 2]", "[1.5]")),
    (annealing("Join"), f"{_CALLBACK}.schedule.schedules", ("[]", "null", "x", "[1]")),
    (appended("FreeBits"), f"{_CALLBACK}.threshold", ("null", *NEGATIVE)),
    (TARGET, f"{_CALLBACK}.nats", ("null", *NEGATIVE)),
    (appended("TargetRate"), f"{_CALLBACK}.bits", ("null", *NEGATIVE)),
    *((TARGET, f"{_CALLBACK}.{name}", NOT_POSITIVE) for name in ("start", "min_beta", "max_beta", "price")),
    *((TARGET, f"{_CALLBACK}.{name}", ("null", *NOT_POSITIVE)) for name in ("integral", "patience")),
    *((TARGET, f"{_CALLBACK}.{name}", ("null", *NEGATIVE)) for name in ("proportional", "tolerance")),
    (TARGET, f"{_CALLBACK}.smoothing", ("-1", "1", "2", "null", *NOT_FINITE)),
    *((appended("CollapseDetector"), f"{_CALLBACK}.{name}", ("null", *NEGATIVE)) for name in ("min_rate", "threshold")),
    *((appended("CollapseDetector"), f"{_CALLBACK}.{name}", NO_COUNT) for name in ("observations", "patience")),
    (appended("CollapseDetector"), f"{_CALLBACK}.warmup", ("-1", "1.5", "x", "null", *NOT_FINITE)),
    (appended("LatentSpace"), f"{_CALLBACK}.observations", NO_COUNT),
    *((appended(name), f"{_CALLBACK}.times", NO_COUNT) for name in ("LatentSpace", "Pictures")),
]  # fmt: skip


@pytest.mark.sampled(12)
@pytest.mark.parametrize("row", range(len(KNOWN_BAD)), ids=[f"{row[1]}-{i}" for i, row in enumerate(KNOWN_BAD)])
def test_a_value_out_of_range_is_never_taken(row):
    before, option, values = KNOWN_BAD[row]
    taken = []
    for value in values if THOROUGH else [values[row % len(values)]]:
        code, said = outcome("--config=base.yaml", *before, f"--{option}={value}")
        if code == 0:
            taken.append(value)
        else:
            refused(code, said, *option.split("."), *SAID_OTHERWISE)
    assert not taken


# ---- configs with something wrong anywhere

GARBAGE = st.one_of(
    st.none(), st.booleans(), st.builds(dict), st.integers(), st.floats(), st.text(max_size=20),
    st.sampled_from(["", "null", "1e400", "é\u202e", "a" * 5000, "os.system", "..", "!!python/x", "${HOME}", 10**30]),
    st.lists(st.integers(), max_size=3), st.dictionaries(st.text(min_size=1, max_size=5), st.integers(), max_size=2),
    st.recursive(st.integers(), lambda inner: st.lists(inner, max_size=2), max_leaves=9),
)  # fmt: skip


def places(value, path=()):
    """Every place in a nested config."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


# Not these: any name of a device or a plugin would start processes, and so many steps would take their time.
PLACES = [path for path in places(BASE) if path[-1] not in ("trainer", "max_steps", "enable_checkpointing", "logger")]


@st.composite
def broken(draw):
    """The base with one or two places replaced, removed or added to."""
    config = yaml.safe_load(yaml.safe_dump(BASE))
    touched = []
    for path in draw(st.lists(st.sampled_from(PLACES), min_size=1, max_size=2, unique=True)):
        holder = config
        try:
            for key in path[:-1]:
                holder = holder[key]
            action = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
            if action == "remove":
                del holder[path[-1]]
            elif action == "add" and isinstance(holder, dict):
                holder[draw(st.text(st.characters(categories=["L"]), min_size=1, max_size=8))] = draw(GARBAGE)
            else:
                holder[path[-1]] = draw(GARBAGE)
        except (TypeError, KeyError, IndexError):  # the first change has taken the place of the second away
            continue
        touched += path
    return config


TRIED = {"refused": 0, "ran": 0}


def ends_in_one_message_or_runs(config):
    with open("broken.yaml", "w") as file:
        yaml.safe_dump(config, file, allow_unicode=True)
    code, said = outcome("--config=broken.yaml")
    if code:
        refused_or_diverged(code, said)
    TRIED["refused" if code else "ran"] += 1


@given(broken())
@settings(max_examples=6)
def test_a_broken_config_ends_in_one_message_or_runs(config):
    ends_in_one_message_or_runs(config)


@pytest.mark.exhaustive
@given(broken())
def test_many_broken_configs_end_in_one_message_or_run(config):
    ends_in_one_message_or_runs(config)


def test_most_of_them_were_wrong():
    assert TRIED["refused"] > TRIED["ran"]
    print(TRIED)


# ---- texts and options that are no config

TEXTS = {
    "a key twice": "model: {class_path: VAE}\nmodel: {class_path: VAE}",
    "a tag of Python": "model: !!python/object/apply:os.system ['touch touched']",
    "no text": b"\xff\xfe\x80",
    "another file": "root:x:0:0:secret:/root:/bin/bash\ndaemon:x:1:1",
    "nothing": "",
    "a list": "[1, 2]",
    "two documents": "a: 1\n---\nb: 2",
    "a number as key": "3: 4",
    "a list of options": "trainer: [1]",
    "no trainer": "trainer: null",
    "callbacks that are none": "trainer: {callbacks: [null]}",
    "a trainer that is a number": "trainer: 3",
    "a class that has no name": "model: {class_path: [VAE]}",
    "options that are none": "model: {class_path: VAE, init_args: 3}",
    "an option with nothing in it": "betta: {}",
    "an option of the trainer with nothing in it": "trainer: {betta: {}}",
    "an option of the data with nothing in it": "data: {class_path: Gaussian, init_args: {betta: {}}}",
    "an option of a callback with nothing in it":
        "trainer: {callbacks: [{class_path: CollapseDetector, init_args: {betta: {}}}]}",
    "a callback with nothing in it": "trainer: {callbacks: [{}]}",
    "callbacks with nothing in them": "trainer: {callbacks: {}}",
    "a likelihood with nothing in it": "model: {class_path: VAE, init_args: {likelihood: {}}}",
}  # fmt: skip


@pytest.mark.sampled(6)
@pytest.mark.parametrize("case", TEXTS)
def test_a_text_that_is_no_config(case, tmp_path):
    text = TEXTS[case]
    (tmp_path / "t.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    code, said = outcome("--config=base.yaml", "--config=t.yaml")
    refused(code, said)
    assert "secret" not in said
    assert "object has no attribute" not in said
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    "option", ["--model.bet=4", "--trainer.max_epoch=3", "--seed_every=3", "--trainer.foo=1", "--foo", "--model",
               "--model.encoder=os.system", "--model.likelihood=Likelihood", "--model.decoder=LinearEncoder"]
)  # fmt: skip
def test_nothing_is_taken_for_something_else(option):
    refused(*outcome("--config=base.yaml", option))


# ---- checkpoints with something wrong anywhere


@st.composite
def damage(draw):
    """Which place of a checkpoint, as a fraction of all of them, and what becomes of it."""
    return (
        draw(st.floats(0, 1, exclude_max=True)),
        draw(st.sampled_from(["remove", "replace", "tensor"])),
        draw(GARBAGE),
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE))
    where = {"class_path": "ModelCheckpoint", "init_args": {"dirpath": str(folder), "filename": "whole"}}
    saves = ("--trainer.enable_checkpointing=true", f"--trainer.callbacks+={json.dumps(where)}")
    assert outcome(f"--config={folder / 'base.yaml'}", *saves, f"--trainer.default_root_dir={folder}")[0] == 0
    return torch.load(folder / "whole.ckpt", weights_only=True)


@pytest.mark.parametrize(
    ("emptied", "says"),
    [("hyper_parameters", "`hyper_parameters`"), ("loops", "only weights"), ("state_dict", "The first mismatch")],
)
def test_an_emptied_part_of_a_checkpoint_is_named(checkpoint, emptied, says):
    torch.save({**checkpoint, emptied: {}}, "broken.ckpt")
    refused(*outcome("--config=base.yaml", "--ckpt_path=broken.ckpt"), says)


def test_a_checkpoint_that_holds_itself_is_refused(checkpoint):
    checkpoint = copy.deepcopy(checkpoint)
    checkpoint["loops"]["fit_loop"] = checkpoint["loops"]
    torch.save(checkpoint, "broken.ckpt")
    refused(*outcome("--config=base.yaml", "--ckpt_path=broken.ckpt"), "does not fit: RecursionError")


@pytest.mark.exhaustive  # the samples are the emptied parts above
@given(damage())
@settings(max_examples=settings.default.max_examples // 3)
def test_a_broken_checkpoint_ends_in_one_message_or_a_run(checkpoint, broken):
    where, action, garbage = broken
    checkpoint = copy.deepcopy(checkpoint)
    everywhere = [path for path in places(checkpoint) if path[0] != "pytorch-lightning_version"]
    path = everywhere[int(where * len(everywhere))]
    holder = checkpoint
    for key in path[:-1]:
        holder = holder[key]
    if action == "remove":
        del holder[path[-1]]
    elif action == "tensor" and isinstance(holder[path[-1]], torch.Tensor):
        holder[path[-1]] = torch.zeros(3, 1, 2, dtype=torch.int32)
    else:
        holder[path[-1]] = garbage
    torch.save(checkpoint, "broken.ckpt")
    code, said = outcome("--config=base.yaml", "--ckpt_path=broken.ckpt", "--trainer.max_steps=3")
    if code:
        refused_or_diverged(code, said)
