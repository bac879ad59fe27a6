"""Tools to test branch kinds and passes: random BatchNorms, asserts in float64, and Hypothesis strategies.

Imports `algebra` and the wings above it (order: docs/architecture.md).
Begin with `asserts`; `strategies` alone needs Hypothesis.
"""

from repfx.testing.asserts import TOLERANCE as TOLERANCE
from repfx.testing.asserts import assert_equivalent as assert_equivalent
from repfx.testing.asserts import assert_same_map as assert_same_map
from repfx.testing.asserts import randomize_batch_norm as randomize_batch_norm
from repfx.testing.asserts import relative_error as relative_error
