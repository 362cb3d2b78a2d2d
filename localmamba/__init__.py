__version__ = "0.1.0"

from localmamba.models import localvim, localvmamba  # registers the models with timm
