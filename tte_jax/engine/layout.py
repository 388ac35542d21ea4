"""Where the arguments of compiled programs lie: on one device, or over a mesh.

    weights           `tte_jax.sharding.Rules`
    rows of a batch   split over data and fsdp where these divide them
    feature tables    whole: a row of the batch may read any of them
    KV caches         key/value heads over tp where it divides them; all slots everywhere, because
                      sequences enter and leave single slots

Host arrays are put there before a program runs; what programs return lies where the next ones
take it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tte_jax.errors import UnsupportedError
from tte_jax.models.config import TextConfig
from tte_jax.sharding import Rules, batch_spec, placement


@dataclass(frozen=True)
class Layout:
    """One device (`mesh` None) or a mesh whose devices all belong to this process.

    Raises:
      UnsupportedError: a mesh with devices of other processes: every one of them would have to
        run the same programs in the same order, and requests reach one of them only.
    """

    mesh: Mesh | None = None
    rules: Rules = field(default_factory=Rules)

    def __post_init__(self) -> None:
        if self.mesh is not None and any(
            d.process_index != jax.process_index() for d in self.mesh.devices.flat
        ):
            raise UnsupportedError(
                "A model is served on the devices of one process, but the mesh has devices of "
                "others. Make it of jax.local_devices(), or call the model with "
                "tte_jax.load_model(path, mesh=mesh) in all processes.",
                reason="MESH_UNSUPPORTED",
            )

    @property
    def devices(self) -> tuple[Any, ...]:
        """On which programs run."""
        return (jax.devices()[0],) if self.mesh is None else tuple(self.mesh.devices.flat)

    @property
    def text(self) -> str:
        """All that is to be said of it: equal for equal layouts of any process."""
        if self.mesh is None:
            return "one device"
        devices = [(d.id, d.process_index) for d in self.devices]
        return f"{self.mesh.shape} {self.mesh.axis_types} {devices} {self.rules}"

    def rows(self, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        """An argument whose leading dimension is the batch."""
        if self.mesh is None:
            return jax.ShapeDtypeStruct(shape, dtype)
        return self._placed(dtype, shape, batch_spec(shape[0], self.mesh, self.rules))

    def whole(self, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        """An argument that every device holds."""
        return self._placed(dtype, shape, PartitionSpec())

    def cache(self, config: TextConfig, dtype: Any, rows: int, places: int) -> jax.ShapeDtypeStruct:
        """Keys, or values, of all layers [L B S K H]: heads lie as those of the projection do."""
        c = config
        shape = (c.layers, rows, places, c.kv_heads, c.head_dim)
        if self.mesh is None:
            return jax.ShapeDtypeStruct(shape, dtype)
        weight = (c.layers, c.hidden_size, c.kv_heads, c.head_dim)
        heads = placement("text.layers.k_dkh", weight, self.mesh, self.rules).spec[2]
        return self._placed(dtype, shape, PartitionSpec(None, None, None, heads, None))

    def put(self, argument: Any, like: Any) -> Any:
        """Host arrays of a pytree on the mesh, as `like` says; arrays of devices as they are."""
        if self.mesh is None:
            return argument
        return jax.tree.map(
            lambda x, to: x if isinstance(x, jax.Array) else jax.device_put(x, to.sharding),
            argument,
            like,
        )

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """The context in which programs are traced: the mesh is part of their types."""
        if self.mesh is None:
            yield
        else:
            with jax.set_mesh(self.mesh):
                yield

    def _placed(
        self, dtype: Any, shape: tuple[int, ...], spec: PartitionSpec
    ) -> jax.ShapeDtypeStruct:
        sharding = None if self.mesh is None else NamedSharding(self.mesh, spec)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


ONE_DEVICE = Layout()
