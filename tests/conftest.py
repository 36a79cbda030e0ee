"""One thread, so that neither timings nor the last bits depend on the machine's load."""

import torch

torch.set_num_threads(1)
