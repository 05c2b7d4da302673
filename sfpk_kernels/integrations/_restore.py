"""Which masks a callback goes on with: those it was given, those of a checkpoint, or a refusal."""

from __future__ import annotations

from ..masks.maskset import MaskSet


def check_masks(masks: MaskSet | None) -> None:
    """``masks`` is a MaskSet or None."""
    if masks is not None and not isinstance(masks, MaskSet):
        raise TypeError(f"masks: wanted a MaskSet or None, got {type(masks).__name__}")


def restored(given: MaskSet | None, found: MaskSet, where: str) -> MaskSet:
    """The masks of a checkpoint, which must be those given, if any were.

    Raises:
        ValueError: two different ones.
    """
    if given is not None and given != found:
        raise ValueError(
            f"masks: wanted those of {where}, {found!r}, got others, {given!r}: "
            "a new callback with masks=None goes on with those of the checkpoint"
        )
    return found if given is None else given
