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
