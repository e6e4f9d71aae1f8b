"""Settings of all tests."""

import torch

# The models of the tests are tiny: a second thread gains nothing, and on a busy machine waiting for it costs seconds.
torch.set_num_threads(1)
