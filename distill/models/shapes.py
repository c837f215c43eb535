"""Models without weights, for a forecast: checkpoints are configurations, and loading makes shapes.

Plug-ins that load through `distill.models` need not know. One that makes its model in a way of its own declares what a
forecast makes instead:

    @declare(without_weights=shape_of_my_student)
    def my_student(teacher: str, layers: int, device: str = "cpu") -> LanguageModel: ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from distill.models.checkpoints import Checkpoint

Find = Callable[[str, str | None, bool], "Checkpoint"]
"""Hub name, revision, trust in its code -> a checkpoint of which the configuration alone is read."""
Factory = TypeVar("Factory", bound=Callable[..., Any])

_find: ContextVar[Find | None] = ContextVar("find", default=None)


@contextmanager
def shapes_alone(find: Find) -> Iterator[None]:
    """Make models of their configurations inside; `find` takes the place of the download."""
    token = _find.set(find)
    try:
        yield
    finally:
        _find.reset(token)


def finder() -> Find | None:
    """Return what `shapes_alone` was given; None outside of it, where weights are loaded."""
    return _find.get()


def declare(
    *,
    without_weights: Callable[..., Any] | None = None,
    layer_by_layer: str | None = None,
    pretrained: str | None = None,
    candidates: Callable[..., list[dict[str, Any]]] | None = None,
    sizes: tuple[str, ...] = (),
) -> Callable[[Factory], Factory]:
    """Declare the facts about a plug-in that a forecast needs; a class may have these as attributes of its own.

    without_weights: makes a model of the same shapes from a checkpoint's configuration, called with those of the
    plug-in's arguments that it has.
    layer_by_layer: of a teacher, the class path of one that gives the same answers with a layer at a time on the
    device, and takes `micro_batch`.
    pretrained: of a student, the name of the option that names a checkpoint whose tokens it knows.
    candidates: of a student, a function of `parameters` and `count`, and of those of the plug-in's arguments that it
    names, that returns so many sets of options, each of a student of at most so many parameters, the largest to train
    first. A search tries them.
    sizes: the options that candidates set.
    """

    def mark(factory: Factory) -> Factory:
        factory.without_weights = without_weights  # type: ignore[attr-defined]
        factory.layer_by_layer = layer_by_layer  # type: ignore[attr-defined]
        factory.pretrained = pretrained  # type: ignore[attr-defined]
        factory.candidates = candidates  # type: ignore[attr-defined]
        factory.sizes = sizes  # type: ignore[attr-defined]
        return factory

    return mark
