"""The examples' workers, but their results are tensors as they were drawn, untouched by 8-bit pixels.

`raw_examples.py:FluxUlysses` is the worker of `examples/flux_ulysses/app.py`, and so on.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(example: str) -> Any:
    """Import an example's `app.py` under a name of its own: they are all called `app`."""
    name = f"drumline_example_{example}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / example / "app.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


class Raw:
    picture = staticmethod(lambda images: images)


class FluxUlysses(Raw, load("flux_ulysses").FluxUlysses):
    pass


class SdxlCfg(Raw, load("sdxl_cfg").SdxlCfg):
    pass
