"""One of several processes that share a batch; started by test_parallel.py."""

# ruff: noqa: E402

import sys

import jax

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
number, count, port = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(f"127.0.0.1:{port}", count, number)

import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxrnn
from tests.reference import relative_errors
from tests.test_parallel import AGREEMENT, unequal_case

case = unequal_case()
mesh = jax.sharding.Mesh(jax.devices(), ("batch",))


def split(leaf, spec):
    whole, sharding = np.asarray(leaf), NamedSharding(mesh, spec)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: whole[index])


batch = jax.tree.map(lambda leaf: split(leaf, P(None, "batch")), case.batch)
params = jax.tree.map(lambda leaf: split(leaf, P()), case.params)
h_0 = split(case.h_0, P("batch"))
gradient_fn = jax.jit(jaxrnn.data_parallel(jaxrnn.bptt, mesh))
(value, h_T), grads = gradient_fn(params, batch, h_0)

(expected, expected_h_T), expected_grads = jax.jit(jaxrnn.bptt)(*case.arguments)
assert max(relative_errors((value, grads), (expected, expected_grads))) <= AGREEMENT
for shard in h_T.addressable_shards:
    np.testing.assert_allclose(shard.data, np.asarray(expected_h_T)[shard.index], atol=1e-14)
print(f"process {number} of {count}: {len(jax.devices())} devices agree")
jax.distributed.shutdown()
