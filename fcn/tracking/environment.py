"""Where a run happens: versions, machine, processes."""

from __future__ import annotations

import platform
import socket
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fcn.distributed import DistributedContext


def versions() -> dict[str, str]:
    """Of Python, of the packages that a run's numbers come from, and of the system. Imports none of them."""
    packages = ("torch", "torchvision", "numpy", "pillow", "matplotlib")
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
        "system": f"{platform.system()} {platform.machine()}",
    }


def environment_of(context: DistributedContext) -> dict[str, Any]:
    """Versions, machine and processes of one start of a run."""
    import torch  # here, so that `versions` alone does not wait for it

    cuda = context.device.type == "cuda"
    return {
        **versions(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name(context.device) if cuda else "CPU",
        "launcher": context.launcher,
        "processes": context.size,
        **({"slurm_job": context.job} if context.job else {}),
    }
