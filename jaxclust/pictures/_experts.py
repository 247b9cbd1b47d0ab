"""What a mixture's experts are given of images, for pictures of it."""

from collections.abc import Callable
from typing import Any

import jax

from jaxclust.errors import DataError
from jaxclust.pictures import Seen

Experts = Callable[[Any, Any, jax.Array], dict[str, jax.Array]]


def of_method(seen: Seen) -> Experts:
    """`Method.experts`; DataError where the method has none."""
    if seen.stage.method.experts is None:
        raise DataError(
            f"method {seen.stage.config.method!r} of stage {seen.stage.name!r} has no experts that a gate chooses "
            "from; another stage may: config.report.stage"
        )
    return seen.stage.method.experts


def layers(seen: Seen) -> list[str]:
    """ "input", what they are given, and the names of their convolutions in order."""
    stage = seen.stage
    image = jax.ShapeDtypeStruct(
        (1, *stage.info.image_shape), "uint8" if len(stage.info.image_shape) == 3 else "float32"
    )
    found = jax.eval_shape(of_method(seen), stage.shapes.params, stage.shapes.extra, image)
    return sorted(found.keys() - {"choice"}, key=lambda name: (name != "input", len(name), name))
