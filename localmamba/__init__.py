__version__ = "0.1.0"

import os
import sys
import warnings

# Threads that wait for one another sleep, or a second process on the same cores takes many times as long. OpenMP reads
# this when torch is imported; whoever has set it, or imported torch before, decides.
if 'torch' not in sys.modules: os.environ.setdefault('OMP_WAIT_POLICY', 'passive')

# fastai decorates with torch.jit.script; each time torch says that this is deprecated.
warnings.filterwarnings('ignore', message='.*torch.jit.script.*', category=FutureWarning)

from localmamba.models import localvim, localvmamba  # registers the models with timm
