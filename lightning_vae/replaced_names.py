"""Removed public names of earlier versions, and their replacements."""

from __future__ import annotations

_REPLACEMENTS = {
    "Attribute": "AttributePath",
    "BestCheckpoint": "Lightning's ModelCheckpoint with `monitor: val/loss` and `filename: best`",
    "Diagnosis": "CollapseState",
    "FlushedCurves": "FlushLoggers",
    "MutualInformation": "ObservationSubset of `lightning_vae.estimators`, and mutual_information of its rows",
    "NullProfiler": "the Trainer's own default, by leaving `profiler` out",
    "PosteriorReader": "DistributionReader",
    "QuickTensorBoardLogger": "Lightning's TensorBoardLogger",
    "ScheduledKnob": "AttributeScheduler",
    "diagnose": "collapse_state",
}


def advice(path: str) -> str | None:
    """Return advice on what replaces a removed name.

    Args:
        path: The name, or the dotted path of an import that ends in it.

    Returns:
        A sentence, or ``None`` for any other name.

    Example::

        >>> advice("lightning_vae.FlushedCurves")
        '`FlushedCurves` is gone: use FlushLoggers.'
    """
    name = path.rpartition(".")[2]
    return f"`{name}` is gone: use {_REPLACEMENTS[name]}." if name in _REPLACEMENTS else None
