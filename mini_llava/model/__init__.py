import torch

from .. import deepspeed_accelerator  # noqa: F401  before all else

# From 2.11 on, torch takes cuDNN's attention first on Hopper and Blackwell. It makes a plan for every new shape, which
# each number of images and each token of an answer is, and with a mask its gradients may be NaN (pytorch issue 196678).
torch.backends.cuda.enable_cudnn_sdp(False)
