"""What runs on the device. Knows neither HTTP nor pydantic."""

import os

# Read by the libraries when they are first imported; the operator's own values win.
# Hints for notebooks do not belong in a server's log.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
# Idle OpenMP threads that spin take the cores from HTTP and image encoding, and from any other
# process: on two busy cores a picture then takes twenty times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Segments of fixed sizes leave gaps between weights, pictures and graphs: 1.6 GB beside SDXL's 13.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name of the same
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
