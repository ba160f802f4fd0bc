import os

import torch
from hypothesis import HealthCheck, settings

# Lightning 2.6 calls names of jsonargparse that are being given up; it is not for our users to mend.
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"

# What is saved must load without its code being trusted. (Lightning's own `weights_only=` begins with 2.6.)
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"

# The models of the tests are small: threads cost them more than they give.
torch.set_num_threads(1)

# How many examples hypothesis tries, the same ones each time: `--hypothesis-profile=thorough` for 1,300.
_ALWAYS = {"deadline": None, "database": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
settings.register_profile("ordinary", max_examples=30, **_ALWAYS)
settings.register_profile("thorough", max_examples=1300, **_ALWAYS)
settings.load_profile("ordinary")
