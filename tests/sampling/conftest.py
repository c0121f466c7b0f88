"""Settings for arithmetic on small tensors."""

from __future__ import annotations

import torch

# Threads would only wait for each other.
torch.set_num_threads(1)
