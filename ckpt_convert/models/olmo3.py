"""OLMo 3: OLMo 2's layout, key for key; which layers use a sliding window is in the config only.

hf: what transformers 5.23 saves.
"""

from __future__ import annotations

from ckpt_convert.models.olmo2 import OLMO2

OLMO3 = OLMO2.replace(name="olmo3", title="OLMo 3", model_types=("olmo3",))
