"""Chapter 1: fast architectures, built from scratch."""

from karui.index import room, techniques

_PLAIN = ("cifar_resnet", "resnet8", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110")

__getattr__, __dir__ = room(__name__)


def factories() -> dict[str, str]:
    """Import path of the factory of each architecture that can be built by name, without importing any.

    A technique that builds offers its untrained network as `build_<slug>`; the others are networks to work on, and
    are no technique of the survey.

    Example:
        >>> factories()["resnet20"]
        'karui.architectures.cifar_resnet:resnet20'
    """
    builders = [entry for entry in techniques() if entry.room == "architectures" and entry.card["kind"] == "build"]
    plain = {name: f"karui.architectures.cifar_resnet:{name}" for name in _PLAIN}
    return {**plain, **{entry.slug: f"{entry.module}:build_{entry.slug}" for entry in builders}}
