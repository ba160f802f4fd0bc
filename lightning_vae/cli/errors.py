"""Report any mistake in the input as one readable message with an exit code."""

from __future__ import annotations

import difflib
import errno
import inspect
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pkgutil import resolve_name
from typing import NoReturn

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer

from .. import __all__ as public
from .. import callbacks, datamodules, likelihoods, networks
from ..checkpoints.checkpoint_io import SaveError
from ..replaced_names import advice

# Errors whose message needs no location in the code.
_INPUT_ERRORS = (ValueError, OSError, MisconfigurationException)

# Errors of a disk or a quota.
_NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)

# Lines that report the parser's attempts and not the mistake.
_NOISE = re.compile(
    r"Does not validate against|Subtypes: |Errors:$|Given value type: |Expected a <class 'NoneType'>"
    r"|Expected a path but|Not a valid subclass|Subclass types expect|a class path \(str\)|a dict with"
    r"|Problem with given class_path"
)
_UNKNOWN = re.compile(r"Problem with given class_path '([\w.]+)':\s+Option '([^'\n]+)' is not accepted")
_STRUCTURE = re.compile(r"\.? Got value: (Namespace|NestedArg)\(.*")
# A class name that was not found, or a path into this package, in a message.
_NAME = re.compile(r"import path string: (\w+)\s*$|(?<![\w./-])(lightning_vae(?:\.\w+)+)", re.MULTILINE)
_LONGEST = 800


def exit_with(error: object, hint: str = "", code: int = 2) -> NoReturn:
    """End the process with one message on standard error.

    Args:
        error: The error or its message, which may be a parser's. The message of a DataError is printed whole.
        hint: Text to append unchanged.
        code: The exit code.
    """
    text = str(error) if isinstance(error, datamodules.DataError) else readable(str(error))
    print(f"error: {text}{hint}", file=sys.stderr)
    raise SystemExit(code)


@contextmanager
def readable_errors() -> Iterator[None]:
    """End the process with one message on any error before a run begins."""
    try:
        yield
    except Exception as error:
        exit_with(_describe(error))


def exit_if_expected(error: Exception, trainer: Trainer, steps: int) -> None:
    """End the process with one message if the input, the disk or the numbers caused a run's failure.

    Up to the end of the first step, the input is taken to be the cause. Later the traceback of an unknown error is
    worth showing.

    Args:
        error: The error that ended the run.
        trainer: The run's Trainer.
        steps: Number of steps that this run has made.

    Returns:
        Only if the caller should raise the error.
    """
    said = _describe(error)
    known = isinstance(error, MisconfigurationException | SaveError | FloatingPointError | datamodules.DataError)
    if isinstance(error, OSError) and error.errno in _NO_PLACE:
        known = True
        place = error.filename or getattr(trainer.logger, "log_dir", None) or os.getcwd()
        said = f"{error.strerror}: {place}."
    monitors_nothing = "which is not available" in said  # EarlyStopping reports it after the first epoch
    if steps > 1 and not known and not monitors_nothing:
        return
    message = error if isinstance(error, datamodules.DataError) else said
    print(file=sys.stderr)  # ends the progress bar's line
    if isinstance(error, FloatingPointError):
        exit_with(said, code=1)
    if known and steps > 0:
        remedy = " The same command with `--ckpt_path last --same_run true` continues from the last save."
        exit_with(message, remedy, code=1)
    exit_with(_misfit(said) if "Error(s) in loading state_dict" in said else message)


def readable(message: str) -> str:
    r"""Reduce a nested parser error to the option and the mistake.

    Any other message is returned as it is.

    Args:
        message: The parser's message: one line per attempt to make sense of the value, nested by indentation.

    Example::

        >>> print(readable('Parser key "trainer.max_epochs":\n  Errors:\n    - Expected a <class \'int\'>'))
        trainer.max_epochs: Expected a <class 'int'>
    """
    keys, faults, given = [], [], ""
    message = re.sub(r"Call to compute_fn of link .*? failed: ", "", message, flags=re.DOTALL)
    message = _UNKNOWN.sub(_name_options, message)
    for line in message.splitlines():
        text = line.strip().removeprefix("- ")
        if key := re.search(r'Parser key "([^"]+)":?\s*(.*)', text):
            keys.append(key[1])
            text = key[2]
        if value := re.match(r"Given value: (?!Namespace|NestedArg|\[|\{)(.*)", text):
            given = f", got {value[1]}"
        elif text and not _NOISE.match(text) and not text.startswith("Given value: "):
            faults.append(_STRUCTURE.sub("", text))
    if any(" has no option " in each for each in faults):  # the other attempts say less
        faults = [each for each in faults if " is not accepted" not in each]
    option = ".".join(dict.fromkeys(keys))
    prefix = f"{option}: " if option else ""
    missing = (name or path for name, path in _NAME.findall(message) if name or not _is_there(path))
    if replaced := next(filter(None, map(_successor, missing)), None):
        return prefix + replaced
    if keys and not faults and (kind := re.search(r"Not a valid subclass of (\w+)", message)):
        faults = [f"Expected a {kind[1]}: its class path, or a mapping of `class_path` and `init_args`"]
    if not faults:
        return _shortened(message)
    fault = "; ".join(dict.fromkeys(faults)) + (given if len(faults) == 1 and given[6:] not in faults[0] else "")
    return _shortened(prefix + fault) + _suggestion(fault)


def _name_options(fault: re.Match[str]) -> str:
    """Name the class that does not have an option, and the options that it has."""
    path, option = fault.groups()
    try:
        parameters = inspect.signature(resolve_name(path)).parameters.values()
    except (ImportError, AttributeError, TypeError, ValueError):
        return fault[0]
    names = [each.name for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
    if not names:  # such as a base class, which the parser has tried too
        return fault[0]
    return f"{path.rpartition('.')[2]} has no option '{option}', only {', '.join(names)}"


def _successor(path: str) -> str | None:
    """Say what replaces a class of earlier versions, or where it is now."""
    homes = {callbacks.__name__: callbacks.__all__, datamodules.__name__: datamodules.__all__, "lightning_vae": public}
    name = path.rpartition(".")[2]
    now = [home for home, names in homes.items() if "." in path and name in names]
    now.sort(key=lambda home: not path.startswith(home))  # a name of several stays in its own package
    return advice(path) or (f"`{path}` has moved: use {now[0]}.{name}." if now else None)


def _is_there(path: str) -> bool:
    try:
        resolve_name(path)
    except (ImportError, AttributeError):
        return False
    return True


def _shortened(text: str) -> str:
    """Leave out the noise: a file that is not a config, a value of a thousand letters, a list of all options."""
    text = re.sub(r"(Unexpected config)\b.*", r"\1: it must be a mapping of options to values", text, flags=re.DOTALL)
    text = re.sub(r"(\S{80})\S{120,}", r"\1...", text)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


def _suggestion(fault: str) -> str:
    """Return a hint at the classes with names similar to an unknown one."""
    unknown = re.search(r"import path string: ([\w.]+)", fault)
    known = [
        name
        for module in (callbacks, datamodules, likelihoods, networks)
        for name, value in vars(module).items()
        if isinstance(value, type)
    ]
    near = difflib.get_close_matches(unknown[1].rpartition(".")[2], known, n=3) if unknown else []
    return f". Did you mean {' or '.join(near)}?" if near else ""


def _describe(error: Exception) -> str:
    """Describe an error in one line, with its location in the code unless it names an option."""
    if isinstance(error, UnicodeDecodeError):
        return f"`--config`: a file is not UTF-8 text ({error})."
    if twin := re.search(r"more than one stateful callback of type (`\w+`)", str(error)):
        return (
            f"`trainer.callbacks`: two {twin[1]} would save their states under one key. Remove one, which another "
            "config may have brought, or distinguish them by their options, such as `attribute` and `name`."
        )
    text = str(error).partition("\nException raised from")[0]  # torch adds a page on its own functions
    if isinstance(error, _INPUT_ERRORS) or "`" in text:
        return text
    frames = traceback.extract_tb(error.__traceback__)
    if any(frame.filename.endswith("checkpoint_connector.py") for frame in frames):
        return f"`--ckpt_path`: the content of the checkpoint does not fit: {type(error).__name__}: {text}"
    place = ([frame for frame in frames if "site-packages" not in frame.filename] or frames)[-1]
    return f"{type(error).__name__}: {text} (in {place.filename}, line {place.lineno})"


def _misfit(error: str) -> str:
    """Return the message for a checkpoint of another model, with the first of torch's complaints."""
    first = next(line.strip() for line in error.splitlines()[1:])
    return (
        "`--ckpt_path`: the checkpoint does not fit the model that the config's networks and data make. Give the "
        f"config that it was trained with, the config.yaml in its run's folder. The first mismatch: {first}"
    )
