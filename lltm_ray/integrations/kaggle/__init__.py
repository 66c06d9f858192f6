"""Kaggle, Colab and other machines that are lent for some hours: what there is, and the fleet that suits it.

```python
from lltm_ray.integrations import kaggle

machine = kaggle.detect()
print(machine)
config = kaggle.build_fleet("auto", model="qwen3-8b-q4_k_m", machine=machine)
print(kaggle.time_left_s())
```

Flow: `machine` measures -> `presets` (with `presets.toml`) chooses -> a `FleetConfig`. `secrets` hands out tokens, one
at a time; `deadline` knows when the machine is taken back. Nothing here starts anything: `sdk.quick` does.
"""

from lltm_ray.integrations.kaggle.deadline import Deadline, read_deadline, time_left_s
from lltm_ray.integrations.kaggle.machine import Machine, Service, detect
from lltm_ray.integrations.kaggle.presets import Preset, build_fleet, load_presets, tensor_split

__all__ = [
    "Deadline",
    "Machine",
    "Preset",
    "Service",
    "build_fleet",
    "detect",
    "load_presets",
    "read_deadline",
    "tensor_split",
    "time_left_s",
]
