"""Every test runs with full float32 products (TPUs round them otherwise) and without implicit promotion.

The CPU counts as eight devices, for the tests of meshes; all others run on the first.
"""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def eight_devices():
    if jax.device_count() != 8:
        pytest.skip(f"takes eight devices, as a CPU counts here; there are {jax.device_count()}")


@pytest.fixture(autouse=True)
def strict_jax(request):
    with jax.default_matmul_precision("highest"):
        if request.node.get_closest_marker("promotes") is not None:  # runs library code that promotes
            yield
        else:
            with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
                yield
