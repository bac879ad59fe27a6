"""repfx inside Lightning 2: a callback for the Trainer, and functions that load its checkpoints without a Trainer.

Imports change, search and below, and Lightning itself. Begin with `callback`.
"""

from repfx.integrations.lightning.callback import RepFXCallback as RepFXCallback
from repfx.integrations.lightning.checkpoint import load_weights as load_weights
from repfx.integrations.lightning.checkpoint import rebuild as rebuild
