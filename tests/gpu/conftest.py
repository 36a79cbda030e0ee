"""What only a GPU can tell; these files are not collected without one."""

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
