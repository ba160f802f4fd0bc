"""Mistakes in a config that its parser would accept in silence."""

import pytest
import yaml

from lightning_vae.cli.yaml_checks import check_empty, check_schedule, check_text, check_values

VALUES = {"trainer": {"max_epochs": 3, "gradient_clip_val": None}, "seed_everything": 0, "model": {"beta": 1.0}}


@pytest.mark.parametrize(
    "text", ["", "3", "a: 1", "a: {class_path: B, init_args: {c: [1, {d: 2}]}}", "a: &x [1]\nb: *x"]
)
def test_a_text_without_mistakes_passes(text):
    check_text(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\na: 2", "`a` is given 2 times"),
        ("x: [{b: 1, b: 2}]", "`b` is given 2 times"),
        ("x: {class_path: [VAE]}", "`class_path` must be the name of a class"),
        ("x: {class_path: VAE, init_args: 3}", "`init_args` must be a mapping"),
        ("x: [", "expected"),
    ],
)
def test_mistakes_in_a_text_are_named(text, says):
    with pytest.raises(yaml.YAMLError, match=says):
        check_text(text)


@pytest.mark.parametrize(
    ("text", "made", "says"),
    [
        ("betta: {}", {}, "`betta` is not an option"),
        ("data: {class_path: Table, init_args: {betta: {}}}", {"data": {"class_path": "a.Table", "init_args": {}}},
         "`data.init_args.betta` is not an option"),
        ("model: {init_args: {betta: {}}}", {"model": {"class_path": "a.VAE", "init_args": {}}},
         "`model.init_args.betta` is not an option"),
        ("model: {init_args: {likelihood: {}}}", {"model": {"init_args": {"likelihood": {"class_path": "Gaussian"}}}},
         "`model.init_args.likelihood` must name a class"),
        ("callbacks: [{}]", {"callbacks": [{"class_path": "A"}]}, "`callbacks.0` must name a class"),
    ],
)  # fmt: skip
def test_empty_mappings_are_named(text, made, says):
    with pytest.raises(ValueError, match=says):
        check_empty(text, made)
    check_empty("model: {class_path: VAE, init_args: {}}", {"model": {"class_path": "VAE", "init_args": None}})


@pytest.mark.parametrize(
    "made",
    [
        {"class_path": "lightning_vae.datamodules.Table", "init_args": {"columns": None}},
        {"class_path": "lightning_vae.datamodules.Table", "init_args": {"columns": {"visits": "count"}}},
        {"class_path": "lightning_vae.datamodules.Digits", "init_args": {"seed": 0}},
        None,
    ],
)
def test_what_a_later_input_has_replaced_is_no_mistake(made):
    check_empty("data: {class_path: Table, init_args: {columns: {}}}", {"data": made})


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"model": {"beta": float("nan")}}, "`model.beta` must be a finite number"),
        ({"model": {"init_args": {"widths": [1, 10**30]}}}, "`model.widths.1` must be a finite number"),
        ({"trainer": {"min_steps": -1}}, "`trainer.min_steps` must be at least 0, got -1"),
        ({"trainer": {"val_check_interval": 0}}, "`trainer.val_check_interval` must be above 0, got 0"),
        ({"trainer": 3}, "`trainer` must be a mapping of options, got 3"),
        ({"seed_everything": 2**32}, "`seed_everything` must be from 0 to 4294967295"),
    ],
)
def test_values_out_of_range_are_named(changed, says):
    check_values(VALUES, "fit")
    with pytest.raises(ValueError, match=says):
        check_values({**VALUES, **changed}, "fit")


@pytest.mark.parametrize(
    ("subcommand", "limit"),
    [("validate", "limit_val_batches"), ("test", "limit_test_batches"), ("predict", "limit_predict_batches")],
)
def test_a_limit_that_leaves_nothing_to_do_is_named(subcommand, limit):
    values = {**VALUES, "trainer": {limit: 0}}
    with pytest.raises(ValueError, match=f"`trainer.{limit}` is 0, so `{subcommand}` would do nothing"):
        check_values(values, subcommand)
    check_values(values, "fit")


def test_a_schedule_of_length_0_is_named():
    step = {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 0}}
    with pytest.raises(ValueError, match="`lr_scheduler` StepLR: its first step fails"):
        check_schedule(step)
    check_schedule({**step, "init_args": {"step_size": 1}})
    check_schedule(None)
