"""One of several processes that share a batch; started by test_parallel.py."""

import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxrnn
from tests.reference import relative_errors
from tests.test_parallel import AGREEMENT, unequal_case


def train(params, batch, gradient_fn, folder: Path, **keywords):
    """Trains for three epochs, of which the last is after a resume."""
    optimizer = optax.adam(1e-2)
    fit = partial(
        jaxrnn.fit, jax.random.key(0), params, batch, batch, optimizer=optimizer,
        gradient_fn=gradient_fn, batch_size=4, callback=partial(jaxrnn.save_fit, folder),
    )  # fmt: skip
    fit(max_epochs=2)
    multihost_utils.sync_global_devices("saved")
    found = jaxrnn.load_fit(folder, params, optimizer)
    return fit(max_epochs=3, resume=found)


def main(number: int, count: int, port: str, folder: str) -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", count, number)
    mesh, case = Mesh(jax.devices(), ("batch",)), unequal_case()

    def split(leaf, spec):
        whole, sharding = np.asarray(leaf), NamedSharding(mesh, spec)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: whole[index])

    batch = jax.tree.map(lambda leaf: split(leaf, P(None, "batch")), case.batch)
    params = jax.tree.map(lambda leaf: split(leaf, P()), case.params)
    gradient_fn = jax.jit(jaxrnn.data_parallel(jaxrnn.bptt, mesh))
    (value, h_T), grads = gradient_fn(params, batch, split(case.h_0, P("batch")))

    (expected, expected_h_T), expected_grads = jax.jit(jaxrnn.bptt)(*case.arguments)
    assert max(relative_errors((value, grads), (expected, expected_grads))) <= AGREEMENT
    for shard in h_T.addressable_shards:
        np.testing.assert_allclose(shard.data, np.asarray(expected_h_T)[shard.index], atol=1e-14)

    alone = train(case.params, case.batch, jaxrnn.bptt, Path(folder) / f"alone-{number}")
    shared = train(params, batch, gradient_fn, Path(folder) / "shared")
    np.testing.assert_allclose(shared.history, alone.history, rtol=1e-10)
    wrong = batch._replace(targets=split(np.full_like(case.batch.targets, 99), P(None, "batch")))
    with pytest.raises(ValueError, match=r"^targets: expected integers in \[0, 4\) .*, got 99"):
        jaxrnn.check_values(params, wrong)
    print(f"process {number} of {count}: {len(jax.devices())} devices agree")
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
