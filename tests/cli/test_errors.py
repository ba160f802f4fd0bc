"""What the command line says about wrong input."""

from lightning_vae.cli.errors import readable


def test_a_message_of_one_line_stays_as_it_is():
    assert readable("`beta` must be at least 0, got -1.") == "`beta` must be at least 0, got -1."


def test_a_nested_message_becomes_the_option_and_the_fault():
    nested = """Parser key "model.encoder":
  - Does not validate against any of the Union subtypes
  Subtypes: [<class 'A'>, <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'A':
      Parser key "hidden":
        Expected a <class 'list'>
    - Expected a <class 'NoneType'>
  Given value type: <class 'str'>
  Given value: 7up"""
    assert readable(nested) == "model.encoder.hidden: Expected a <class 'list'>, got 7up"


def test_long_values_are_cut():
    assert len(readable("a" * 5000)) < 100
    assert len(readable("word " * 5000)) < 900


def test_a_name_like_a_known_class_is_suggested_and_a_module_is_not():
    said = readable('Parser key "trainer.callbacks": Expected a dot import path string: KLAnealing')
    assert said.endswith(". Did you mean KLAnnealing?")
    assert "schedules" not in readable('Parser key "x": Expected a dot import path string: Schedules')


def test_an_option_that_a_class_does_not_have_is_answered_with_those_that_it_has():
    nested = """Parser key "trainer.callbacks":
  Does not validate against any of the Union subtypes
  Errors:
    - Problem with given class_path 'lightning_vae.callbacks.Staged':
        Option 'steps' is not accepted
    - Problem with given class_path 'lightning.Callback':
        Option 'steps' is not accepted
    - Expected a <class 'NoneType'>
  Given value type: <class 'jsonargparse._util.NestedArg'>
  Given value: NestedArg(key='steps', val='3')"""
    options = "values, at_steps, at_epochs, at_fractions"
    assert readable(nested) == f"trainer.callbacks: Staged has no option 'steps', only {options}"


def test_an_option_of_a_class_that_can_not_be_found():
    nested = """Parser key "data":
  Errors:
    - Problem with given class_path 'nowhere.Data':
        Option 'steps' is not accepted"""
    assert readable(nested) == "data: Option 'steps' is not accepted"
