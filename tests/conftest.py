import os
import socket
from collections import defaultdict
from importlib.util import find_spec

import pytest
import torch

# Lightning 2.6 calls names of jsonargparse that are being given up; our users can't fix that.
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"

# What is saved must load without its code being trusted. (Lightning's own `weights_only=` begins with 2.6.)
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"

# Processes find each other over the loopback. Gloo would look up the host's name, which waits without a network.
os.environ.setdefault("GLOO_SOCKET_IFNAME", next(name for _, name in socket.if_nameindex() if name.startswith("lo")))

# The models of the tests are small: threads cost them more than they give.
torch.set_num_threads(1)

# How many examples hypothesis tries, the same ones each time: `--hypothesis-profile=thorough` for 1,300. It is not
# there where the callbacks are tested on what they alone need.
if find_spec("hypothesis"):
    from hypothesis import HealthCheck, settings

    always = {"deadline": None, "database": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
    settings.register_profile("ordinary", max_examples=30, **always)
    settings.register_profile("thorough", max_examples=1300, **always)
    settings.load_profile("ordinary")


@pytest.hookimpl(tryfirst=True)  # before pytest selects by `-m`
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the cases that `sampled(n)` leaves out of the default run as exhaustive."""
    functions = defaultdict(list)
    for item in items:
        if mark := item.get_closest_marker("sampled"):
            functions[item.nodeid.partition("[")[0], *mark.args].append(item)
    for (_, n), cases in functions.items():
        kept = {len(cases) * number // n for number in range(n)}
        for number, case in enumerate(cases):
            if number not in kept:
                case.add_marker("exhaustive")
