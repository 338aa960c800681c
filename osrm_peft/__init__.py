"""Train LoRA adapters so that they can be merged (OSRM), and merge them (LoRE-Merging and the baselines).

The public names are listed in `__init__.pyi` and imported when they are first used: `import osrm_peft` and
`osrm-peft --help` need not wait for torch.
"""

from importlib.metadata import version

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = version("osrm_peft")
